"""`GrowthGraph`: the K best paths from a start to any of several goals.

Algorithm 1 of the paper in its general form: vertices are structures, and an edge is the growth of one stage, by any
amount. The cost of a stage may depend on its number, so an exact dynamic programme runs over (structure, stage):
backwards for the least remaining cost, then forwards, best first, which yields the K best paths one after the other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..dims import IntArray
from ..errors import PlanError
from .structures import BoolArray, DimsTable, FloatArray

#: More edges would take several GB.
MAX_EDGES = 50_000_000

#: Cost of growing each structure into another (arrays of one shape) in the stage of a number.
StageCost: TypeAlias = Callable[[int, DimsTable, DimsTable], FloatArray]


@dataclass(frozen=True)
class Edges:
    """Edges of a graph, sorted by the vertex that they leave.

    Args:
        sources: vertices with an edge, ascending.
        starts: position of each source's first edge.
        targets: vertex that each edge leads to.
    """

    sources: IntArray
    starts: IntArray
    targets: IntArray

    def __len__(self) -> int:
        return len(self.targets)

    @classmethod
    def sort(cls, sources: IntArray, targets: IntArray) -> Edges:
        """Build from edges in any order; the edges of one vertex keep theirs."""
        order = np.argsort(sources, kind="stable")
        ordered = sources[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        return cls(ordered[starts], starts, targets[order])

    @property
    def origins(self) -> IntArray:
        """The vertex that each edge leaves."""
        return np.repeat(self.sources, np.diff(self.starts, append=len(self.targets)))

    def find_leaving(self, vertex: int) -> slice:
        """Return the positions of the edges that leave a vertex."""
        position = int(np.searchsorted(self.sources, vertex))
        if position == len(self.sources) or self.sources[position] != vertex:
            return slice(0, 0)
        end = self.starts[position + 1] if position + 1 < len(self.starts) else len(self.targets)
        return slice(int(self.starts[position]), int(end))


def count_edges(shape: Sequence[int], joint: bool) -> int:
    """Return the number of edges that `build_grid_edges` would build."""
    vertices = math.prod(shape)
    if joint:
        return math.prod(size * (size + 1) // 2 for size in shape) - vertices
    return vertices * sum(size - 1 for size in shape) // 2


def check_size(shape: Sequence[int], joint: bool) -> None:
    """Refuse a grid whose edges would not fit into memory.

    Raises:
        PlanError: with the remedy.
    """
    vertices, count = math.prod(shape), count_edges(shape, joint)
    if count > MAX_EDGES:
        raise PlanError(
            f"{vertices:,} structures with {count:,} growths between them are too many to search (at most "
            f"{MAX_EDGES:,}); take coarser multiples, narrower bounds"
            + (", or mode 'repeated', which grows one dimension per stage" if joint else ", or fewer operators")
        )


def build_grid_edges(shape: Sequence[int], joint: bool) -> Edges:
    """Build the edges of a grid: from each vertex to all with one larger coordinate, or if `joint` with one or more.

    Raises:
        PlanError: if they would not fit into memory.

    >>> build_grid_edges((2, 2), joint=False).targets
    array([2, 1, 3, 3])
    >>> build_grid_edges((2, 2), joint=True).targets
    array([1, 2, 3, 3, 3])
    """
    check_size(shape, joint)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if joint:
        pairs = [(stride * np.stack(np.triu_indices(size))) for stride, size in zip(strides, shape, strict=True)]
        sources, targets = reduce(_add_all_pairs, pairs, np.zeros((2, 1), dtype=np.int64))
        is_growth = sources != targets
        return Edges.sort(sources[is_growth], targets[is_growth])
    ids = np.arange(math.prod(shape)).reshape(shape)
    per_axis = []
    for axis, size in enumerate(shape):
        before, after = np.triu_indices(size, 1)
        rows = np.moveaxis(ids, axis, -1)
        per_axis.append(np.stack([rows[..., before].ravel(), rows[..., after].ravel()]))
    sources, targets = np.concatenate(per_axis, axis=1)
    return Edges.sort(sources, targets)


def _add_all_pairs(left: IntArray, right: IntArray) -> IntArray:
    return (left[:, :, None] + right[:, None, :]).reshape(2, -1)


class GrowthGraph:
    """Structures, and the growths that lead from one to another.

    Args:
        structures: vertices, shape [vertices].
        edges: edges between them.
        allowed: whether a path may use each edge, shape [edges].
    """

    def __init__(self, structures: DimsTable, edges: Edges, allowed: BoolArray) -> None:
        self.structures = structures
        self.edges = edges
        self._forbidden = ~allowed
        self._before = structures.select(edges.origins)
        self._after = structures.select(edges.targets)

    def find_best_paths(
        self, start: int, goals: Sequence[int], stages: int, cost: StageCost, *, fixed_cost: bool, top_k: int
    ) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Yield the best paths from `start` to any of `goals` as (cost, vertices), best first.

        Paths of equal cost come in the order of their vertices.

        Args:
            start, goals: vertices.
            stages: number of edges per path.
            cost: cost of an edge in a stage; finite.
            fixed_cost: whether an edge costs the same in every stage.
            top_k: largest number of paths.
        """
        remaining = self._compute_remaining(goals, stages, cost, fixed_cost)
        if not np.isfinite(remaining[0][start]):
            return
        # The key of a partial path is the cost of its best completion, so the first complete path to leave the heap is
        # the next best one.
        heap: list[tuple[float, tuple[int, ...], float]]
        heap = [(float(round_for_ties(remaining[0][start])), (start,), 0.0)]
        count = 0
        while heap and count < top_k:
            _, path, spent = heapq.heappop(heap)
            number = len(path)
            if number == stages + 1:
                yield spent, path
                count += 1
                continue
            for after, total, bound in self._continue(path[-1], spent, cost, number, remaining[number]):
                heapq.heappush(heap, (bound, (*path, after), total))

    def find_alternatives(
        self, path: Sequence[int], goals: Sequence[int], cost: StageCost, *, fixed_cost: bool
    ) -> list[list[tuple[int, float]]]:
        """Return the alternatives at each step of a path, best first.

        Each is a possible next vertex with the cost of the best path of as many stages through it.
        """
        remaining = self._compute_remaining(goals, len(path) - 1, cost, fixed_cost)
        alternatives, spent = [], 0.0
        for number, (vertex, following) in enumerate(pairwise(path), start=1):
            steps = list(self._continue(vertex, spent, cost, number, remaining[number]))
            ranked = sorted((bound, after) for after, _, bound in steps)
            alternatives.append([(after, bound) for bound, after in ranked])
            spent = next(total for after, total, _ in steps if after == following)
        return alternatives

    def _continue(
        self, vertex: int, spent: float, cost: StageCost, number: int, remaining: FloatArray
    ) -> Iterator[tuple[int, float, float]]:
        """Yield each next vertex, the cost up to it, and the cost of the best completion."""
        leaving = self.edges.find_leaving(vertex)
        targets = self.edges.targets[leaving]
        targets = targets[np.isfinite(remaining[targets]) & ~self._forbidden[leaving]]
        if not len(targets):
            return
        before = self.structures.select(np.full(len(targets), vertex))
        totals = spent + cost(number, before, self.structures.select(targets))
        bounds = round_for_ties(totals + remaining[targets])
        yield from zip(targets.tolist(), totals.tolist(), bounds.tolist(), strict=True)

    def _compute_remaining(
        self, goals: Sequence[int], stages: int, cost: StageCost, fixed_cost: bool
    ) -> list[FloatArray]:
        """Return the least cost from every vertex to a goal after each number of stages; infinite without a path."""
        least = np.full(len(self.structures.dims), np.inf)
        least[list(goals)] = 0.0
        remaining = [least]
        edge_cost = None
        for number in range(stages, 0, -1):
            if edge_cost is None or not fixed_cost:
                edge_cost = cost(number, self._before, self._after)
                edge_cost[self._forbidden] = np.inf
            least = np.full_like(least, np.inf)
            if len(self.edges):
                totals = edge_cost + remaining[-1][self.edges.targets]
                least[self.edges.sources] = np.minimum.reduceat(totals, self.edges.starts)
            remaining.append(least)
        return remaining[::-1]


def round_for_ties(values: npt.ArrayLike) -> FloatArray:
    """Round to about eleven significant digits, so that sums of the same costs in another order are equal.

    >>> float(round_for_ties(0.1 + 0.2)) == float(round_for_ties(0.3))
    True
    """
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(mantissa, 11), exponent))
