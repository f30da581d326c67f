"""`explain`: why a schedule grows each dimension when it does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..dims import ModelDims
from ..errors import PlanError
from ..operators import find_operators
from ..schedule import GrowthSchedule, GrowthStage
from .budget import Budget
from .objectives import OBJECTIVES
from .planner import SlopPlanner


@dataclass(frozen=True)
class Alternative:
    """A possible growth, and the objective of the best schedule of as many stages that makes this growth next."""

    stage: GrowthStage
    value: float


@dataclass(frozen=True)
class Choice:
    """One growth of a schedule, and its alternatives.

    Args:
        before, taken: structure before the growth, and growth of the schedule.
        others: best growth of every other set of dimensions, best first; empty without alternatives.
    """

    before: ModelDims
    taken: Alternative
    others: tuple[Alternative, ...]


def explain(planner: SlopPlanner, schedule: GrowthSchedule, already_seen: float = 0.0) -> list[Choice]:
    """Compare each growth of a schedule with its alternatives.

    Args:
        planner, schedule: planner and one of its schedules; the planner's objective, mode and constraints apply.
        already_seen: tokens that the initial model was trained on before.

    Returns:
        One `Choice` per growth stage, in the order of the stages.

    Raises:
        PlanError: if the planner cannot make such a schedule.

    >>> from slop_hf import ConfigSpace
    >>> planner = SlopPlanner(ModelDims(768, 2048, 6, 6), ConfigSpace(targets=[ModelDims(2816, 7680, 8, 22)]))
    >>> first = explain(planner, planner.plan(1)[0])[0]
    >>> first.taken.stage.label, [(other.stage.label, f"{other.value:.3g}") for other in first.others]
    ('layer', [('ffn', '7.96e+24'), ('hidden', '1.36e+26')])
    """
    targets = [schedule.target] if planner.mode == "once" else planner.space.structures(planner.initial)
    grid, graph = planner.build_graph([schedule.target], planner.list_axes(targets))
    loadable = np.flatnonzero(grid.structures.loadable).tolist()
    vertices = {grid.structures.at(vertex): vertex for vertex in loadable}
    if unknown := [dims for dims in schedule.structures if dims not in vertices]:
        raise PlanError(
            f"{unknown[0]} is not among the structures of this planner; explain a schedule that the planner made"
        )
    budget = Budget(schedule.tokens, already_seen)
    cost, initial_cost = planner.stage_cost(budget)
    path = [vertices[dims] for dims in schedule.structures]
    steps = graph.find_alternatives(path, grid.goals, cost, fixed_cost=planner.has_fixed_costs(budget))
    choices = []
    for before, stage, options in zip(schedule.structures, schedule.stages, steps, strict=False):
        totals = {grid.structures.at(vertex): initial_cost + total for vertex, total in options}
        values = {dims: float(OBJECTIVES[planner.objective].value(total)) for dims, total in totals.items()}
        best: dict[tuple[str, ...], Alternative] = {}
        for dims, value in values.items():
            operators = find_operators(before, dims)
            best.setdefault(operators, Alternative(replace(stage, operators=operators, dims=dims), value))
        best.pop(find_operators(before, stage.dims))
        choices.append(Choice(before, Alternative(stage, values[stage.dims]), tuple(best.values())))
    return choices
