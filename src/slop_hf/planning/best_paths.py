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
from functools import cached_property, reduce
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
        starts: position of each vertex's first edge, and their number, shape [vertices + 1].
        targets: vertex that each edge leads to, shape [edges].
    """

    starts: IntArray
    targets: IntArray

    @classmethod
    def sort(cls, vertices: int, sources: IntArray, targets: IntArray) -> Edges:
        """Build from edges in any order; the edges of one vertex keep theirs."""
        order = np.argsort(sources, kind="stable")
        return cls(np.searchsorted(sources[order], np.arange(vertices + 1)), targets[order])

    @property
    def origins(self) -> IntArray:
        """The vertex that each edge leaves, shape [edges]."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


def count_edges(shape: Sequence[int], joint: bool) -> int:
    """Return the number of edges that `build_grid_edges` would build."""
    vertices = math.prod(shape)
    if joint:
        return math.prod(size * (size + 1) // 2 for size in shape) - vertices
    return vertices * sum(size - 1 for size in shape) // 2


def check_size(shape: Sequence[int], joint: bool) -> None:
    """Raise a `PlanError` if the edges of a grid would not fit into memory."""
    vertices, count = math.prod(shape), count_edges(shape, joint)
    if count > MAX_EDGES:
        raise PlanError(
            f"{vertices:,} structures with {count:,} growths between them are too many to search (at most "
            f"{MAX_EDGES:,}); take coarser multiples, narrower bounds"
            + (", or mode 'repeated', which grows one dimension per stage" if joint else ", or fewer operators")
        )


def build_grid_edges(shape: Sequence[int], joint: bool) -> Edges:
    """Build the edges of a grid: from each vertex to all with one larger coordinate, or if `joint` with one or more.

    >>> build_grid_edges((2, 2), joint=False).targets
    array([2, 1, 3, 3])
    >>> build_grid_edges((2, 2), joint=True).targets
    array([1, 2, 3, 3, 3])
    """
    vertices = math.prod(shape)
    if joint:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        pairs = [stride * np.stack(np.triu_indices(size)) for stride, size in zip(strides, shape, strict=True)]
        sources, targets = reduce(_add_all_pairs, pairs, np.zeros((2, 1), dtype=np.int64))
        is_growth = sources != targets
        return Edges.sort(vertices, sources[is_growth], targets[is_growth])
    ids = np.arange(vertices).reshape(shape)
    per_axis = []
    for axis, size in enumerate(shape):
        before, after = np.triu_indices(size, 1)
        rows = np.moveaxis(ids, axis, -1)
        per_axis.append(np.stack([rows[..., before].ravel(), rows[..., after].ravel()]))
    sources, targets = np.concatenate(per_axis, axis=1)
    return Edges.sort(vertices, sources, targets)


def _add_all_pairs(left: IntArray, right: IntArray) -> IntArray:
    return (left[:, :, None] + right[:, None, :]).reshape(2, -1)


class GrowthGraph:
    """Structures, shape [vertices], and the growths between them; a path uses only `allowed` ones, shape [edges]."""

    def __init__(self, structures: DimsTable, edges: Edges, allowed: BoolArray) -> None:
        self.structures = structures
        self.edges = edges
        self._forbidden = ~allowed
        self._before = structures.select(edges.origins)
        self._after = structures.select(edges.targets)

    def find_best_paths(
        self, start: int, goals: Sequence[int], stages: int, cost: StageCost, *, fixed_cost: bool
    ) -> Iterator[tuple[float, tuple[int, ...]]]:
        """Yield the paths from `start` to any of `goals` as (cost, vertices), best first.

        Paths of equal cost come in the order of their vertices.

        Args:
            start, goals: vertices.
            stages: number of edges per path.
            cost: cost of an edge in a stage; finite.
            fixed_cost: whether an edge costs the same in every stage.
        """
        remaining = self._compute_remaining(goals, stages, cost, fixed_cost)
        # The key of a partial path is the cost of its best completion, so the first complete path to leave the heap is
        # the next best one.
        heap: list[tuple[float, tuple[int, ...], float]] = [(0.0, (start,), 0.0)]
        while heap:
            _, path, spent = heapq.heappop(heap)
            number = len(path)
            if number == stages + 1:
                yield spent, path
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
            ranked = sorted(steps, key=lambda step: (step[2], step[0]))
            alternatives.append([(after, bound) for after, _, bound in ranked])
            totals = {after: total for after, total, _ in steps}
            if following not in totals:
                before, after = (self.structures.dims.at(end) for end in (vertex, following))
                raise PlanError(
                    f"no schedule of this planner grows {before} to {after} in stage {number}; "
                    "explain a schedule that the planner made"
                )
            spent = totals[following]
        return alternatives

    def count_paths(self, start: int, goals: Sequence[int], stages: int) -> int:
        """Return the number of paths of a number of edges from a start to any of several goals, at most 2^53."""
        origins, targets = self._allowed_edges
        counts: FloatArray = np.zeros(len(self.structures.dims))
        counts[list(goals)] = 1
        for _ in range(stages):
            counts = np.bincount(origins, weights=counts[targets], minlength=len(counts)).astype(np.float64)
        return int(min(counts[start], 2.0**53))

    def list_between(self, before: int, after: int) -> list[int]:
        """Return the vertices that a path may visit between two others, with one edge to each."""
        origins, targets = self._allowed_edges
        leaving, arriving = targets[origins == before], origins[targets == after]
        return [int(vertex) for vertex in leaving[np.isin(leaving, arriving)]]

    def list_after(self, vertex: int) -> list[int]:
        """Return the vertices that an edge leads to."""
        origins, targets = self._allowed_edges
        return [int(target) for target in targets[origins == vertex]]

    @cached_property
    def _allowed_edges(self) -> tuple[IntArray, IntArray]:
        """The origins and targets of the edges that a path may use."""
        return self.edges.origins[~self._forbidden], self.edges.targets[~self._forbidden]

    def _continue(
        self, vertex: int, spent: float, cost: StageCost, number: int, remaining: FloatArray
    ) -> Iterator[tuple[int, float, float]]:
        """Yield each next vertex, the cost up to it, and the cost of the best completion."""
        leaving = slice(*self.edges.starts[vertex : vertex + 2])
        targets = self.edges.targets[leaving]
        targets = targets[np.isfinite(remaining[targets]) & ~self._forbidden[leaving]]
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
        sources = np.flatnonzero(np.diff(self.edges.starts))
        edge_cost = None
        for number in range(stages, 0, -1):
            if edge_cost is None or not fixed_cost:
                edge_cost = cost(number, self._before, self._after)
                edge_cost[self._forbidden] = np.inf
            least = np.full_like(least, np.inf)
            totals = edge_cost + remaining[-1][self.edges.targets]
            least[sources] = np.minimum.reduceat(totals, self.edges.starts[sources])
            remaining.append(least)
        return remaining[::-1]


def round_for_ties(values: npt.ArrayLike) -> FloatArray:
    """Round to about eleven significant digits, so that sums of the same costs in another order are equal.

    >>> float(round_for_ties(0.1 + 0.2)) == float(round_for_ties(0.3))
    True
    """
    mantissa, exponent = np.frexp(values)
    return np.asarray(np.ldexp(np.round(mantissa, 11), exponent))
