"""The best orders in which each dimension grows once: all of them, for any number of targets at once.

With each dimension grown once, a path's structures are corners of the box between initial and target: some operators
have grown, the others have not. The corners of n operators are 2^n, so that the n! orders share their figures: that is
why a million targets take a second or two. Cost: targets x (2^n figures + n! x n additions), in chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import combinations, pairwise, permutations

import numpy as np

from ..dims import ModelDims
from ..operators import OPERATORS
from .best_paths import significant
from .budget import Budget
from .constraints import PathRules
from .objectives import Objective, step_of
from .structures import DimsArray, Prices, Structures

CHUNK = 2**16


@dataclass(frozen=True)
class Corners:
    """The box between an initial structure and each of many targets.

    Args:
        initial: where all paths begin.
        targets: where they end, shape [targets].
        grows: for each operator that has a stage, the operators that grow in it.
        prices: see there.
        rules: what a path may use.
    """

    initial: ModelDims
    targets: DimsArray
    grows: Mapping[str, Sequence[str]]
    prices: Prices
    rules: PathRules

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """All orders of the stages."""
        return list(permutations(sorted(self.grows)))

    def at(self, grown: frozenset[str]) -> DimsArray:
        """The structures where some operators have grown, shape [targets]."""
        moved = {name for operator in grown for own in self.grows[operator] for name in OPERATORS[own].fields}
        columns = {}
        for item in fields(DimsArray):
            goal = getattr(self.targets, item.name)
            columns[item.name] = goal if item.name in moved else np.full_like(goal, getattr(self.initial, item.name))
        return DimsArray(**columns)

    @cached_property
    def structures(self) -> dict[frozenset[str], Structures]:
        """Every corner, and what it costs."""
        names = sorted(self.grows)
        subsets = (frozenset(some) for count in range(len(names) + 1) for some in combinations(names, count))
        return {subset: Structures(self.at(subset), self.prices) for subset in subsets}

    def path(self, order: Sequence[str]) -> list[frozenset[str]]:
        """The corners along an order, the initial one first."""
        return [frozenset(order[:count]) for count in range(len(order) + 1)]

    def costs(self, objective: Objective, budget: Budget) -> np.ndarray:
        """The cost of every order of every target, shape [orders, targets]; infinite where it may not be taken."""
        initial = self.structures[frozenset()]
        barred = self._barred()
        edges: dict[tuple[frozenset[str], frozenset[str]], np.ndarray] = {}
        rows = []
        for order in self.orders:
            path = self.path(order)
            total = np.zeros(len(self.targets))
            for number, edge in enumerate(pairwise(path), start=1):
                if edge not in edges:
                    before, after = (self.structures[corner] for corner in edge)
                    cost = objective.cost(step_of(budget, number, initial, before, after))
                    cost[barred[edge[1]] | ~self.rules.edges(before, after)] = np.inf
                    edges[edge] = cost
                total += edges[edge]
            rows.append(total)
        return np.stack(rows)

    def _barred(self) -> dict[frozenset[str], np.ndarray]:
        """Where a path may not use a corner."""
        # Whether a structure loads depends on few of its sizes, so that corners share the answer: division is slow.
        shaping = {name for name, own in self.grows.items() if not {"layer", "ffn"}.issuperset(own)}
        loadable: dict[frozenset[str], np.ndarray] = {}
        barred = {}
        for corner, structures in self.structures.items():
            shape = corner & shaping
            if shape not in loadable:
                loadable[shape] = structures.dims.loadable
            barred[corner] = ~(loadable[shape] & self.rules.space.within_limits(structures.dims))
        return barred

    def even_flops(self, orders: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """FLOPs of stages of one token each, of pairs of an order and a target."""
        total = np.zeros(len(orders))
        for index, order in enumerate(self.orders):
            chosen = orders == index
            if chosen.any():
                own = replace(self, targets=self.targets[targets[chosen]])
                total[chosen] = sum(own.structures[corner].flops_per_token for corner in own.path(order))
        return total


def best_orders(
    corners: Corners, objective: Objective, budget: Budget, top_k: int
) -> list[tuple[int, tuple[str, ...]]]:
    """The best pairs of a target's index and an order, best first.

    Equal ones are ordered by the FLOPs of stages of equal length, then by target, then by order.
    """
    kept = [np.empty((4, 0))]
    for first, part in _chunks(corners):
        costs = part.costs(objective, budget)
        bound = np.partition(costs, top_k - 1, axis=None)[top_k - 1] if costs.size > top_k else np.inf
        orders, targets = np.nonzero(np.isfinite(costs) & (costs <= bound + abs(bound) * 1e-9))
        rows = [significant(costs[orders, targets]), part.even_flops(orders, targets), first + targets, orders]
        kept = [_first(np.concatenate([*kept, np.stack(rows)], axis=1), top_k)]
    names = corners.orders
    return [(int(target), names[int(order)]) for target, order in kept[0][2:].T]


def _chunks(corners: Corners) -> Iterator[tuple[int, Corners]]:
    for first in range(0, len(corners.targets), CHUNK):
        part = corners.targets[first : first + CHUNK]
        yield first, replace(corners, targets=part)


def _first(rows: np.ndarray, count: int) -> np.ndarray:
    """The columns that come first when sorted by the first row, then by the second, and so on."""
    return rows[:, np.lexsort(rows[::-1])[:count]]
