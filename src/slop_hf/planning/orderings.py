"""The best orders of growth if each dimension grows once: every order to every target, scored with numpy.

Every structure on the way is a corner of the box between the initial structure and a target: some operators have
grown, the others have not. A corner is numbered by the bit mask of the grown operators. All n! orders share
the 2^n corners, so a million targets take a few seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, pairwise, permutations

import numpy as np

from ..dims import IntArray, ModelDims
from .best_paths import StageCost, round_for_ties
from .constraints import PathConstraints
from .structures import CostInputs, DimsArray, DimsTable, FloatArray

#: Targets scored at once, to bound the memory.
_CHUNK_TARGETS = 2**16


def find_best_orders(
    initial: ModelDims,
    targets: DimsArray,
    stage_fields: Mapping[str, Sequence[str]],
    inputs: CostInputs,
    constraints: PathConstraints,
    cost: StageCost,
    top_k: int,
) -> list[tuple[ModelDims, ...]]:
    """Return the best paths from a structure to any of many targets, best first.

    Paths of equal cost are ordered by the FLOPs of stages of one token each, then by target, then by order.

    Args:
        initial, targets: structures that paths begin and end with; targets of shape [targets].
        stage_fields: fields of `ModelDims` that grow in the stage of each operator.
        inputs: see `CostInputs`.
        constraints, cost: structures and growths that a path may use, and the cost of a growth in a stage.
        top_k: largest number of paths.
    """
    grown_fields = [stage_fields[name] for name in sorted(stage_fields)]
    bits = [1 << bit for bit in range(len(grown_fields))]
    paths = np.array([list(accumulate(order, initial=0)) for order in permutations(bits)])  # [orders, stages + 1]
    best = np.empty((4, 0))  # rows: cost, FLOPs, target, order; one column per path
    for first in range(0, len(targets), _CHUNK_TARGETS):
        corners = _build_corners(initial, targets[first : first + _CHUNK_TARGETS], grown_fields)
        costs = score_orders(DimsTable(corners, inputs), paths, constraints, cost)
        bound = np.partition(costs, top_k - 1, axis=None)[top_k - 1] if costs.size > top_k else np.inf
        order, target = np.nonzero(np.isfinite(costs) & (costs <= bound + abs(bound) * 1e-9))
        flops = DimsTable(corners[paths[order].T, target], inputs).flops_per_token.sum(axis=0)
        rows = np.stack([round_for_ties(costs[order, target]), flops, first + target, order])
        best = np.concatenate([best, rows], axis=1)
        best = best[:, np.lexsort(best[::-1])[:top_k]]
    target, order = best[2:].astype(np.int64)
    corners = _build_corners(initial, targets[target], grown_fields)
    return [tuple(corners.at((corner, number)) for corner in paths[index]) for number, index in enumerate(order)]


def score_orders(corners: DimsTable, paths: IntArray, constraints: PathConstraints, cost: StageCost) -> FloatArray:
    """Return the cost of every order to every target, shape [orders, targets]; infinite if it is forbidden.

    Args:
        corners: structures by bit mask of the grown operators, shape [2^operators, targets].
        paths: corners along each order, shape [orders, operators + 1].
        constraints, cost: as in `find_best_orders`.
    """
    allowed = constraints.space.allows(corners.dims)
    edges = {edge: number for path in paths.tolist() for number, edge in enumerate(pairwise(path), start=1)}
    costs = {}
    for edge, number in edges.items():
        before, after = (corners.select(corner) for corner in edge)
        is_allowed = allowed[edge[1]] & constraints.allow_growths(before, after)
        costs[edge] = np.where(is_allowed, cost(number, before, after), np.inf)
    return np.stack([np.sum([costs[edge] for edge in pairwise(path)], axis=0) for path in paths.tolist()])


def _build_corners(initial: ModelDims, targets: DimsArray, grown_fields: Sequence[Sequence[str]]) -> DimsArray:
    """Return the structures by bit mask of the grown operators, shape [2^operators, targets]."""
    masks = np.arange(2 ** len(grown_fields))
    columns = {}
    for item in fields(DimsArray):
        grows = sum(1 << bit for bit, names in enumerate(grown_fields) if item.name in names)
        column = np.full((len(masks), len(targets)), getattr(initial, item.name), dtype=np.int64)
        column[masks & grows > 0] = getattr(targets, item.name)
        columns[item.name] = column
    return DimsArray(**columns)
