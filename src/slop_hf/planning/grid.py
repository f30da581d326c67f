"""`GrowthGrid`: all structures between a start and some goals.

Each operator with stages of its own is an axis; the other dimensions follow `hidden`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

import numpy as np

from ..dims import IntArray, ModelDims
from ..errors import PlanError
from ..operators import OPERATORS
from .space import ConfigSpace
from .structures import BoolArray, DimsArray

_HEAD_DIM_MULTIPLE = 16

#: More values would have more growths between them than a search can hold.
MAX_AXIS_VALUES = 10_000

#: The field of each operator's own dimension.
OWN_FIELD = {name: operator.fields[0] for name, operator in OPERATORS.items()}


@dataclass(frozen=True)
class GrowthGrid:
    """A grid of structures, including some that no model can have; those have 0 heads.

    Args:
        shape: number of values along each operator.
        structures: structure at every vertex, shape [vertices].
        start: vertex of the initial structure.
        goals: vertices of the goals, in their order.
    """

    shape: tuple[int, ...]
    structures: DimsArray
    start: int
    goals: tuple[int, ...]


def get_grid_key(goal: ModelDims, operators: Sequence[str]) -> tuple[str, ...]:
    """Return a key shared by goals that can share a grid: their other dimensions follow `hidden` alike."""
    follows_heads = Fraction(goal.num_attention_heads, goal.hidden_size) if "mha" not in operators else None
    follows_ffn = (goal.hidden_size, goal.intermediate_size) if "ffn" not in operators else None
    group = goal.num_attention_heads // goal.num_key_value_heads
    head_dim = goal.head_dim if "head_dim" not in operators else None
    return tuple(map(str, (follows_heads, follows_ffn, group, head_dim)))


def list_axis_values(operator: str, initial: ModelDims, goals: Sequence[ModelDims], space: ConfigSpace) -> IntArray:
    """Return the values of an operator's own dimension: the initial one, the goals', and the multiples between."""
    field = OWN_FIELD[operator]
    multiple = {
        "hidden": space.hidden_multiple,
        "ffn": space.ffn_multiple,
        "layer": 1,
        "mha": initial.num_attention_heads // initial.num_key_value_heads,
        "head_dim": _HEAD_DIM_MULTIPLE,
    }[operator]
    first, ends = getattr(initial, field), {getattr(goal, field) for goal in goals}
    between = range(math.ceil(first / multiple) * multiple, max(ends), multiple)
    if len(between) + len(ends) > MAX_AXIS_VALUES:
        raise PlanError(
            f"{len(between):,} values of {field} from {first} to {max(ends)} are too many to search (at most "
            f"{MAX_AXIS_VALUES:,}); take coarser multiples or a nearer target, or mode 'once'"
        )
    return np.array(sorted({first, *ends, *between}), dtype=np.int64)


def compute_grid_shape(
    initial: ModelDims, goals: Sequence[ModelDims], values: Mapping[str, IntArray]
) -> tuple[int, ...]:
    """Return the shape of the grid that `build_grid` would build."""
    return tuple(len(axis) for axis in _build_axes(initial, goals, values).values())


def build_grid(
    initial: ModelDims, goals: Sequence[ModelDims], values: Mapping[str, IntArray], ffn_multiple: int
) -> GrowthGrid:
    """Build the grid from a structure to goals with one `get_grid_key`.

    If heads follow `hidden`, they keep their size or their number, as the goals do. If ffn follows `hidden`, it keeps
    the goal's ratio, rounded up to `ffn_multiple`. Between the ends, each key/value head serves as many query heads as
    in the initial structure, or more if there would be more key/value heads than in any goal. `values` ascend; those
    above all goals are left out.
    """
    axes = _build_axes(initial, goals, values)
    shape = tuple(len(axis) for axis in axes.values())
    positions = np.indices(shape).reshape(len(shape), -1)
    mesh = {
        field: axis[position, column]
        for (name, axis), position in zip(axes.items(), positions, strict=True)
        for column, field in enumerate(_list_axis_fields(name))
    }

    def find_vertex(dims: ModelDims) -> int:
        sizes = {name: [getattr(dims, field) for field in _list_axis_fields(name)] for name in axes}
        position = [int(np.flatnonzero((axis == sizes[name]).all(axis=1))[0]) for name, axis in axes.items()]
        return int(np.ravel_multi_index(position, shape))

    structures = _Completion(mesh, initial, goals).structures(ffn_multiple)
    return GrowthGrid(shape, structures, find_vertex(initial), tuple(map(find_vertex, goals)))


def find_growing_edges(grid: GrowthGrid, origins: IntArray, targets: IntArray) -> BoolArray:
    """Return whether each edge shrinks no dimension; those that follow another one can shrink while it grows."""
    grows = np.ones(len(targets), dtype=bool)
    for item in fields(grid.structures):
        sizes = getattr(grid.structures, item.name)
        cube = sizes.reshape(grid.shape)
        if any((np.diff(cube, axis=axis) < 0).any() for axis in range(cube.ndim)):
            grows &= sizes[targets] >= sizes[origins]
    return grows


def _list_axis_fields(operator: str) -> tuple[str, ...]:
    return OPERATORS[operator].fields


def _build_axes(initial: ModelDims, goals: Sequence[ModelDims], values: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Return the sizes along each axis, shape [values, fields of the operator], without values above all goals."""
    axes = {}
    for name, sizes in values.items():
        sizes = sizes[sizes <= max(getattr(goal, OWN_FIELD[name]) for goal in goals)]
        axes[name] = _pair_heads(sizes, initial, goals) if name == "mha" else sizes[:, np.newaxis]
    return axes


def _pair_heads(sizes: IntArray, initial: ModelDims, goals: Sequence[ModelDims]) -> IntArray:
    """Return the query heads and key/value heads along the axis of `mha`, shape [values, 2]."""
    choose = _make_rule_of_kv_heads(initial, goals)
    at_ends: dict[int, set[int]] = {}
    for dims in (initial, *goals):
        at_ends.setdefault(dims.num_attention_heads, set()).add(dims.num_key_value_heads)
    pairs = [(heads, kv) for heads in sizes.tolist() for kv in sorted(at_ends.get(heads, {choose(heads)}))]
    return np.array(pairs, dtype=np.int64)


def _make_rule_of_kv_heads(initial: ModelDims, goals: Sequence[ModelDims]) -> Callable[[int], int]:
    """Return a function from a number of query heads to the key/value heads between the ends; 0 if none fit."""
    groups = {dims.num_attention_heads: _get_group(dims) for dims in (initial, *goals)}
    default = _get_group(initial)
    fewest, most = initial.num_key_value_heads, max(goal.num_key_value_heads for goal in goals)

    def choose(heads: int) -> int:
        kv_heads, remainder = divmod(heads, groups.get(heads, default))
        if remainder:
            return 0
        if kv_heads <= most:
            return kv_heads
        # a growth never shrinks key/value heads: with more than every goal has, this would be a dead end
        return max((number for number in range(fewest, most + 1) if heads % number == 0), default=0)

    return choose


def _get_group(dims: ModelDims) -> int:
    return dims.num_attention_heads // dims.num_key_value_heads


class _Completion:
    """Derives all sizes of a grid's structures from `mesh`: the fields of each axis at every vertex."""

    def __init__(self, mesh: Mapping[str, IntArray], initial: ModelDims, goals: Sequence[ModelDims]) -> None:
        self._mesh, self._initial, self._goals = mesh, initial, goals
        self._corners = (initial, *goals)
        self._count = len(next(iter(mesh.values())))
        self._hidden = self._get_axis("hidden_size")

    def structures(self, ffn_multiple: int) -> DimsArray:
        """The structure at every vertex, with 0 heads if the hidden size allows no whole number of them."""
        first, goal = self._initial, self._goals[0]
        ratio = Fraction(goal.intermediate_size, goal.hidden_size)
        ffn = self._follow_hidden(
            "intermediate_size", lambda hidden: math.ceil(ratio * hidden / ffn_multiple) * ffn_multiple
        )
        share = Fraction(first.num_attention_heads, first.hidden_size)
        heads = self._follow_hidden("num_attention_heads", lambda hidden: math.floor(share * hidden))
        # heads that keep their number grow in size
        size = first.hidden_size // first.num_attention_heads
        head_dim = self._follow_hidden(
            "head_dim", lambda hidden: hidden // first.num_attention_heads * first.head_dim // size
        )
        kv_heads = self._get_kv_heads(heads)
        is_whole = self._heads_fill_hidden(share) & (kv_heads > 0)
        return DimsArray(
            hidden_size=self._hidden,
            intermediate_size=ffn,
            num_hidden_layers=self._get_axis("num_hidden_layers"),
            num_attention_heads=np.where(is_whole, heads, 0),
            num_key_value_heads=np.where(is_whole, kv_heads, 0),
            head_dim=head_dim,
        )

    def _get_axis(self, field: str) -> IntArray:
        """Return a dimension at every vertex; the initial one if it is not on an axis."""
        return self._mesh.get(field, np.full(self._count, getattr(self._initial, field), dtype=np.int64))

    def _follow_hidden(self, field: str, rule: Callable[[int], int]) -> IntArray:
        """Return `_get_axis`, or for a dimension that follows `hidden`: its value at the corners, a rule between."""
        if field in self._mesh or "hidden_size" not in self._mesh:
            return self._get_axis(field)
        at_corners = {dims.hidden_size: getattr(dims, field) for dims in self._corners}
        lowest, highest = min(at_corners.values()), max(at_corners.values())
        sizes, inverse = np.unique(self._hidden, return_inverse=True)
        values = [at_corners.get(size, min(max(rule(size), lowest), highest)) for size in sizes.tolist()]
        return np.array(values, dtype=np.int64)[inverse]

    def _get_kv_heads(self, heads: IntArray) -> IntArray:
        """Return the key/value heads at every vertex, 0 if none fit `heads`."""
        if "num_key_value_heads" in self._mesh or "hidden_size" not in self._mesh:
            return self._get_axis("num_key_value_heads")
        choose = _make_rule_of_kv_heads(self._initial, self._goals)
        numbers, inverse = np.unique(heads, return_inverse=True)
        kv_heads = np.array([choose(number) for number in numbers.tolist()], dtype=np.int64)[inverse]
        for dims in self._corners:
            kv_heads[self._hidden == dims.hidden_size] = dims.num_key_value_heads
        return kv_heads

    def _heads_fill_hidden(self, share: Fraction) -> BoolArray:
        """Return whether heads that keep their size fill the hidden size; True if they do not keep it."""
        keep_number = all(dims.num_attention_heads == self._initial.num_attention_heads for dims in self._goals)
        if "num_attention_heads" in self._mesh or "hidden_size" not in self._mesh or keep_number:
            return np.ones(self._count, dtype=bool)
        fills = (self._hidden * share.numerator) % share.denominator == 0
        return fills | np.isin(self._hidden, [dims.hidden_size for dims in self._corners])
