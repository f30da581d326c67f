"""`GrowthGrid`: all structures between a start and some goals.

Each operator with stages of its own is an axis; the other dimensions follow `hidden`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..dims import IntArray, ModelDims
from ..operators import OPERATORS
from .space import ConfigSpace
from .structures import BoolArray, DimsArray

_HEAD_DIM_MULTIPLE = 16

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
    return np.array(sorted({first, *ends, *between}), dtype=np.int64)


def compute_grid_shape(goals: Sequence[ModelDims], values: Mapping[str, IntArray]) -> tuple[int, ...]:
    """Return the shape of the grid that `build_grid` would build."""
    return tuple(len(axis) for axis in _cut_axes(goals, values).values())


def _cut_axes(goals: Sequence[ModelDims], values: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Leave out the values above all goals."""
    highest = {name: max(getattr(goal, OWN_FIELD[name]) for goal in goals) for name in values}
    return {name: axis[axis <= highest[name]] for name, axis in values.items()}


def build_grid(
    initial: ModelDims, goals: Sequence[ModelDims], values: Mapping[str, IntArray], ffn_multiple: int
) -> GrowthGrid:
    """Build the grid from a structure to goals with one `get_grid_key`.

    If heads follow `hidden`, they keep their size or their number, as the goals do. If ffn follows `hidden`, it keeps
    the goal's ratio, rounded up to `ffn_multiple`. `values` ascend; those above all goals are left out.
    """
    axes = _cut_axes(goals, values)
    mesh = dict(zip(axes, (axis.ravel() for axis in np.meshgrid(*axes.values(), indexing="ij")), strict=True))
    shape = tuple(len(axis) for axis in axes.values())

    def find_vertex(dims: ModelDims) -> int:
        position = [int(np.searchsorted(axis, getattr(dims, OWN_FIELD[name]))) for name, axis in axes.items()]
        return int(np.ravel_multi_index(position, shape))

    structures = _Completion(mesh, initial, goals).structures(ffn_multiple)
    return GrowthGrid(shape, structures, find_vertex(initial), tuple(map(find_vertex, goals)))


class _Completion:
    """Derives all sizes of a grid's structures from `mesh`: each axis's dimension at every vertex."""

    def __init__(self, mesh: Mapping[str, IntArray], initial: ModelDims, goals: Sequence[ModelDims]) -> None:
        self._mesh, self._initial, self._goals = mesh, initial, goals
        self._corners = (initial, *goals)
        self._count = len(next(iter(mesh.values())))
        self._hidden = self._get_axis("hidden")

    def structures(self, ffn_multiple: int) -> DimsArray:
        """The structure at every vertex, with 0 heads if the hidden size allows no whole number of them."""
        first, goal = self._initial, self._goals[0]
        ratio = Fraction(goal.intermediate_size, goal.hidden_size)
        ffn = self._follow_hidden("ffn", lambda hidden: math.ceil(ratio * hidden / ffn_multiple) * ffn_multiple)
        share = Fraction(first.num_attention_heads, first.hidden_size)
        heads = self._follow_hidden("mha", lambda hidden: math.floor(share * hidden))
        # heads that keep their number grow in size
        size = first.hidden_size // first.num_attention_heads
        head_dim = self._follow_hidden(
            "head_dim", lambda hidden: hidden // first.num_attention_heads * first.head_dim // size
        )
        groups = {
            dims.num_attention_heads: dims.num_attention_heads // dims.num_key_value_heads for dims in self._corners
        }
        default = first.num_attention_heads // first.num_key_value_heads
        group = np.array([groups.get(number, default) for number in range(int(heads.max()) + 1)])[heads]
        is_whole = self._heads_fill_hidden(share) & (heads % group == 0)
        return DimsArray(
            hidden_size=self._hidden,
            intermediate_size=ffn,
            num_hidden_layers=self._get_axis("layer"),
            num_attention_heads=np.where(is_whole, heads, 0),
            num_key_value_heads=np.where(is_whole, heads // group, 0),
            head_dim=head_dim,
        )

    def _get_axis(self, name: str) -> IntArray:
        """Return an operator's dimension at every vertex; the initial one if the operator is not an axis."""
        return self._mesh.get(name, np.full(self._count, getattr(self._initial, OWN_FIELD[name]), dtype=np.int64))

    def _follow_hidden(self, name: str, rule: Callable[[int], int]) -> IntArray:
        """Return `_get_axis`, or for a dimension that follows `hidden`: its value at the corners, a rule between."""
        if name in self._mesh or "hidden" not in self._mesh:
            return self._get_axis(name)
        at_corners = {dims.hidden_size: getattr(dims, OWN_FIELD[name]) for dims in self._corners}
        lowest, highest = min(at_corners.values()), max(at_corners.values())
        sizes, inverse = np.unique(self._hidden, return_inverse=True)
        values = [at_corners.get(size, min(max(rule(size), lowest), highest)) for size in sizes.tolist()]
        return np.array(values, dtype=np.int64)[inverse]

    def _heads_fill_hidden(self, share: Fraction) -> BoolArray:
        """Return whether heads that keep their size fill the hidden size; True if they do not keep it."""
        keep_number = all(dims.num_attention_heads == self._initial.num_attention_heads for dims in self._goals)
        if "mha" in self._mesh or "hidden" not in self._mesh or keep_number:
            return np.ones(self._count, dtype=bool)
        fills = (self._hidden * share.numerator) % share.denominator == 0
        return fills | np.isin(self._hidden, [dims.hidden_size for dims in self._corners])
