"""`GrowthGraph`: the K best paths through all structures between a start and a goal.

Algorithm 1 of the paper in its general form: vertices are structures, an edge is the growth of one stage, by any
amount. A stage's cost may depend on its number, so that a path is found by an exact dynamic programme over
(structure, stage): backwards for the best cost that is left, then forwards, best first, which names the K best paths
one after the other.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import PlanError
from .structures import Structures

#: More edges than this would take several GB.
MAX_EDGES = 50_000_000

#: The cost of growing from structures to others (arrays of one shape) in the stage of a number.
StageCost = Callable[[int, Structures, Structures], np.ndarray]


@dataclass(frozen=True)
class Edges:
    """Edges ordered by the vertex that they leave.

    Args:
        sources: vertices with an edge, ascending.
        starts: where each one's edges begin.
        targets: the vertices that the edges lead to.
    """

    sources: np.ndarray
    starts: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def from_each(self) -> np.ndarray:
        """The vertex that each edge leaves."""
        return np.repeat(self.sources, np.diff(self.starts, append=len(self.targets)))

    def leaving(self, vertex: int) -> np.ndarray:
        """The vertices that a vertex's edges lead to."""
        place = np.searchsorted(self.sources, vertex)
        if place == len(self.sources) or self.sources[place] != vertex:
            return self.targets[:0]
        end = self.starts[place + 1] if place + 1 < len(self.starts) else len(self.targets)
        return self.targets[self.starts[place] : end]

    @classmethod
    def sorted(cls, sources: np.ndarray, targets: np.ndarray) -> Edges:
        """Edges in any order; those of one vertex keep theirs."""
        order = np.argsort(sources, kind="stable")
        ordered = sources[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=-1))
        return cls(ordered[starts], starts, targets[order])


def count_edges(shape: Sequence[int], joint: bool) -> int:
    """The number of `grid_edges`."""
    vertices = math.prod(shape)
    if joint:
        return math.prod(size * (size + 1) // 2 for size in shape) - vertices
    return vertices * sum(size - 1 for size in shape) // 2


def check_size(shape: Sequence[int], joint: bool) -> None:
    """Refuse a grid whose edges would not fit into memory.

    Raises:
        PlanError: with what to do.
    """
    vertices, count = math.prod(shape), count_edges(shape, joint)
    if count > MAX_EDGES:
        raise PlanError(
            f"{vertices:,} structures with {count:,} growths between them are too many to search (at most "
            f"{MAX_EDGES:,}); take coarser multiples, narrower bounds"
            + (", or grow one dimension in a stage" if joint else ", or fewer operators")
        )


def grid_edges(shape: Sequence[int], joint: bool) -> Edges:
    """The edges of a grid: each vertex to all with one larger coordinate, or if `joint` with any number of them.

    Raises:
        PlanError: where they are too many for the memory.

    >>> grid_edges((2, 2), joint=False).targets
    array([2, 1, 3, 3])
    >>> grid_edges((2, 2), joint=True).targets
    array([1, 2, 3, 3, 3])
    """
    check_size(shape, joint)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if joint:
        pairs = [(stride * np.stack(np.triu_indices(size))) for stride, size in zip(strides, shape, strict=True)]
        sources, targets = reduce(_all_sums, pairs, np.zeros((2, 1), dtype=np.int64))
        moving = sources != targets
        return Edges.sorted(sources[moving], targets[moving])
    ids = np.arange(math.prod(shape)).reshape(shape)
    both = []
    for axis, size in enumerate(shape):
        before, after = np.triu_indices(size, 1)
        rows = np.moveaxis(ids, axis, -1)
        both.append(np.stack([rows[..., before].ravel(), rows[..., after].ravel()]))
    sources, targets = np.concatenate(both, axis=1)
    return Edges.sorted(sources, targets)


def _all_sums(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one[:, :, None] + other[:, None, :]).reshape(2, -1)


class GrowthGraph:
    """Structures, and the growths that lead from one to another.

    Args:
        structures: the vertices, shape [vertices].
        edges: between them.
        allowed: whether a path may use each edge, shape [edges].
    """

    def __init__(self, structures: Structures, edges: Edges, allowed: np.ndarray) -> None:
        self.structures = structures
        self.edges = edges
        self._forbidden = ~allowed
        self._before = structures.take(edges.from_each)
        self._after = structures.take(edges.targets)

    def best_paths(
        self, start: int, goals: Sequence[int], stages: int, cost: StageCost, *, fixed_cost: bool, top_k: int
    ) -> Iterator[tuple[float, tuple[int, ...]]]:
        """The best paths of so many edges from `start` to any of `goals`, as (cost, vertices), best first.

        Paths of equal cost come in the order of their vertices.

        Args:
            start, goals: vertices.
            stages: number of edges.
            cost: of an edge in a stage; finite.
            fixed_cost: whether it is the same in every stage.
            top_k: at most how many.
        """
        left = self._costs_left(goals, stages, cost, fixed_cost)
        if not np.isfinite(left[0][start]):
            return
        # A partial path is followed by all its continuations' best: what comes out of the heap complete is the next.
        heap: list[tuple[float, tuple[int, ...], float]] = [(float(significant(left[0][start])), (start,), 0.0)]
        found = 0
        while heap and found < top_k:
            _, path, spent = heapq.heappop(heap)
            number = len(path)
            if number == stages + 1:
                yield spent, path
                found += 1
                continue
            for after, total, bound in self._continuations(path[-1], spent, cost, number, left[number]):
                heapq.heappush(heap, (bound, (*path, after), total))

    def choices(
        self, path: Sequence[int], goals: Sequence[int], cost: StageCost, *, fixed_cost: bool
    ) -> list[list[tuple[int, float]]]:
        """What could have been done at each step of a path: the next vertex, and the least cost of a path that goes on
        from it to a goal in as many stages, best first."""
        left = self._costs_left(goals, len(path) - 1, cost, fixed_cost)
        found, spent = [], 0.0
        for number, (vertex, taken) in enumerate(pairwise(path), start=1):
            steps = list(self._continuations(vertex, spent, cost, number, left[number]))
            found.append(sorted([(after, bound) for after, _, bound in steps], key=lambda one: (one[1], one[0])))
            spent = next(total for after, total, _ in steps if after == taken)
        return found

    def _continuations(
        self, vertex: int, spent: float, cost: StageCost, number: int, left: np.ndarray
    ) -> Iterator[tuple[int, float, float]]:
        targets = self.edges.leaving(vertex)
        place = np.searchsorted(self.edges.sources, vertex)
        begin = self.edges.starts[place] if len(targets) else 0
        usable = np.isfinite(left[targets]) & ~self._forbidden[begin : begin + len(targets)]
        targets = targets[usable]
        if not len(targets):
            return
        here = self.structures.take(np.full(len(targets), vertex))
        totals = spent + cost(number, here, self.structures.take(targets))
        bounds = significant(totals + left[targets])
        yield from zip(targets.tolist(), totals.tolist(), bounds.tolist(), strict=True)

    def _costs_left(self, goals: Sequence[int], stages: int, cost: StageCost, fixed_cost: bool) -> list[np.ndarray]:
        """Of each number of stages done, the least cost from every vertex to a goal; infinite without a way."""
        left = np.full(len(self.structures.dims), np.inf)
        left[list(goals)] = 0.0
        found = [left]
        edge_cost = None
        for number in range(stages, 0, -1):
            if edge_cost is None or not fixed_cost:
                edge_cost = cost(number, self._before, self._after)
                edge_cost[self._forbidden] = np.inf
            left = np.full_like(left, np.inf)
            if len(self.edges):
                totals = edge_cost + found[-1][self.edges.targets]
                left[self.edges.sources] = np.minimum.reduceat(totals, self.edges.starts)
            found.append(left)
        return found[::-1]


def significant(values: Any) -> Any:
    """Values to about eleven digits: sums of the same costs in another order differ in the last ones.

    >>> float(significant(np.float64(0.1 + 0.2))) == float(significant(np.float64(0.3)))
    True
    """
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa, 11), exponent)
