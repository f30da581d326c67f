"""`GrowthGrid`: all structures that growth may pass on its way from a start to some goals.

Each operator with stages of its own is an axis; what has none follows `hidden`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..dims import ModelDims
from ..operators import OPERATORS
from .space import ConfigSpace
from .structures import DimsArray

_HEAD_DIM_MULTIPLE = 16

#: The field of each operator's own dimension.
OWN_FIELD = {name: operator.fields[0] for name, operator in OPERATORS.items()}


@dataclass(frozen=True)
class GrowthGrid:
    """A grid of structures; those that no model can have are in it too, with 0 heads.

    Args:
        shape: number of values along each operator.
        structures: of every vertex, shape [vertices].
        start: the vertex of the initial structure.
        goals: the vertices of the goals, in their order.
    """

    shape: tuple[int, ...]
    structures: DimsArray
    start: int
    goals: tuple[int, ...]


def grid_key(goal: ModelDims, operators: Sequence[str]) -> tuple[object, ...]:
    """Goals of one key share a grid: what follows `hidden` does so alike."""
    follows_heads = Fraction(goal.num_attention_heads, goal.hidden_size) if "mha" not in operators else None
    follows_ffn = (goal.hidden_size, goal.intermediate_size) if "ffn" not in operators else None
    group = goal.num_attention_heads // goal.num_key_value_heads
    return follows_heads, follows_ffn, group, goal.head_dim if "head_dim" not in operators else None


def axis_values(operator: str, initial: ModelDims, goals: Sequence[ModelDims], space: ConfigSpace) -> np.ndarray:
    """The values of an operator's own dimension on the way: the initial one, the goals', and the multiples between."""
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


def grid_shape(goals: Sequence[ModelDims], values: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The shape of `build_grid`'s grid."""
    return tuple(len(axis) for axis in _below(goals, values).values())


def _below(goals: Sequence[ModelDims], values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values that some goal has not passed."""
    highest = {name: max(getattr(goal, OWN_FIELD[name]) for goal in goals) for name in values}
    return {name: own[own <= highest[name]] for name, own in values.items()}


def build_grid(
    initial: ModelDims, goals: Sequence[ModelDims], values: Mapping[str, np.ndarray], ffn_multiple: int
) -> GrowthGrid:
    """The grid from a structure to goals of one `grid_key`.

    Heads that follow `hidden` keep their size or their number, as the goals do; ffn that follows keeps the goal's
    ratio, rounded up to `ffn_multiple`.

    Args:
        initial, goals: corners.
        values: of each operator's dimension, ascending; those above all goals are left out.
        ffn_multiple: see there.
    """
    axes = _below(goals, values)
    mesh = dict(zip(axes, (axis.ravel() for axis in np.meshgrid(*axes.values(), indexing="ij")), strict=True))
    shape = tuple(len(axis) for axis in axes.values())
    start, *ends = (
        int(
            np.ravel_multi_index(
                [int(np.searchsorted(axis, getattr(dims, OWN_FIELD[name]))) for name, axis in axes.items()], shape
            )
        )
        for dims in (initial, *goals)
    )
    structures = _Completion(mesh, initial, goals).structures(ffn_multiple)
    return GrowthGrid(shape, structures, start, tuple(ends))


class _Completion:
    """All sizes of the structures whose own dimensions are given.

    Args:
        mesh: of each operator that is an axis, its dimension at every vertex.
        initial, goals: corners of the grid.
    """

    def __init__(self, mesh: Mapping[str, np.ndarray], initial: ModelDims, goals: Sequence[ModelDims]) -> None:
        self._mesh, self._initial, self._goals = mesh, initial, goals
        self._ends = (initial, *goals)
        self._count = len(next(iter(mesh.values())))
        self._hidden = self._own("hidden")

    def structures(self, ffn_multiple: int) -> DimsArray:
        """Every vertex; 0 heads where its hidden size allows none."""
        goal = self._goals[0]
        ratio = Fraction(goal.intermediate_size, goal.hidden_size)
        ffn = self._following("ffn", lambda size: math.ceil(ratio * size / ffn_multiple) * ffn_multiple)
        share = Fraction(self._initial.num_attention_heads, self._initial.hidden_size)
        heads = self._following("mha", lambda size: math.floor(share * size))
        head_dim = self._following("head_dim", lambda size: self._head_dim(size))
        groups = {
            dims.num_attention_heads: dims.num_attention_heads // dims.num_key_value_heads for dims in self._ends
        }
        own = self._initial.num_attention_heads // self._initial.num_key_value_heads
        group = np.array([groups.get(number, own) for number in range(int(heads.max()) + 1)])[heads]
        whole = self._whole_heads(share) & (heads % group == 0)
        return DimsArray(
            hidden_size=self._hidden,
            intermediate_size=ffn,
            num_hidden_layers=self._own("layer"),
            num_attention_heads=np.where(whole, heads, 0),
            num_key_value_heads=np.where(whole, heads // group, 0),
            head_dim=head_dim,
        )

    def _own(self, name: str) -> np.ndarray:
        """An operator's dimension; the initial one where it is no axis."""
        alone = np.full(self._count, getattr(self._initial, OWN_FIELD[name]), dtype=np.int64)
        return self._mesh.get(name, alone)

    def _following(self, name: str, between: Callable[[int], int]) -> np.ndarray:
        """The same, but where hidden is an axis it goes along: as it is at the ends, and by a rule in between."""
        if name in self._mesh or "hidden" not in self._mesh:
            return self._own(name)
        field = OWN_FIELD[name]
        known = {dims.hidden_size: getattr(dims, field) for dims in self._ends}
        lowest, highest = min(known.values()), max(known.values())
        sizes, inverse = np.unique(self._hidden, return_inverse=True)
        found = [known.get(size, min(max(between(size), lowest), highest)) for size in sizes.tolist()]
        return np.array(found, dtype=np.int64)[inverse]

    def _head_dim(self, hidden: int) -> int:
        """Of heads that keep their number."""
        heads, first = self._initial.num_attention_heads, self._initial
        return hidden // heads * first.head_dim // (first.hidden_size // heads)

    def _whole_heads(self, share: Fraction) -> np.ndarray:
        """Where heads that keep their size fill the hidden size."""
        keep_number = all(dims.num_attention_heads == self._initial.num_attention_heads for dims in self._goals)
        if "mha" in self._mesh or "hidden" not in self._mesh or keep_number:
            return np.ones(self._count, dtype=bool)
        fills = (self._hidden * share.numerator) % share.denominator == 0
        return fills | np.isin(self._hidden, [dims.hidden_size for dims in self._ends])
