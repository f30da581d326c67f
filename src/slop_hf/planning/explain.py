"""`explain`: why a schedule grows what it grows when it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..dims import ModelDims
from ..errors import PlanError
from ..operators import operators_between
from ..schedule import GrowthSchedule, GrowthStage
from .budget import Budget
from .grid import build_grid
from .objectives import OBJECTIVES
from .planner import SlopPlanner


@dataclass(frozen=True)
class Alternative:
    """A growth that a schedule could make at some point.

    Args:
        stage: the growth.
        value: the objective of the best schedule that goes on this way, to the same target in as many stages.
    """

    stage: GrowthStage
    value: float


@dataclass(frozen=True)
class Choice:
    """One growth of a schedule beside those that it could have made instead.

    Args:
        before: the structure that is grown.
        taken: the growth that was made.
        others: the best growth of every other set of dimensions, best first; empty where there was no choice.
    """

    before: ModelDims
    taken: Alternative
    others: tuple[Alternative, ...]


def explain(planner: SlopPlanner, schedule: GrowthSchedule, already_seen: float = 0.0) -> list[Choice]:
    """What each growth of a schedule was chosen over.

    Args:
        planner: that made the schedule; its objective, mode and rules hold.
        schedule: one that it made.
        already_seen: tokens that the initial model was trained on before.

    Raises:
        PlanError: for a schedule that is not one of the planner's.

    >>> from slop_hf import ConfigSpace
    >>> planner = SlopPlanner(ModelDims(768, 2048, 6, 6), ConfigSpace(targets=[ModelDims(2816, 7680, 8, 22)]))
    >>> first = explain(planner, planner.plan(1)[0])[0]
    >>> first.taken.stage.label, [(other.stage.label, f"{other.value:.3g}") for other in first.others]
    ('layer', [('ffn', '7.96e+24'), ('hidden', '1.36e+26')])
    """
    grid = build_grid(
        planner.initial, [schedule.target], planner.axes(_targets(planner, schedule)), planner.space.ffn_multiple
    )
    graph = planner.graph(grid)
    places = {graph.structures.dims.at(vertex): vertex for vertex in range(len(graph.structures.dims))}
    if strays := [dims for dims in schedule.structures if dims not in places]:
        raise PlanError(f"{strays[0]} is not among the structures of this planner; explain a schedule that it made")
    objective = OBJECTIVES[planner.objective]
    budget = Budget(schedule.tokens, already_seen)
    cost, first = planner.stage_cost(budget)
    steps = graph.choices(
        [places[dims] for dims in schedule.structures], grid.goals, cost, fixed_cost=planner.has_fixed_costs(budget)
    )
    choices = []
    for before, stage, options in zip(schedule.structures, schedule.stages, steps, strict=False):
        best: dict[tuple[str, ...], Alternative] = {}
        taken = None
        for vertex, total in options:
            dims = graph.structures.dims.at(vertex)
            value = float(objective.value(np.float64(first + total)))
            if dims == stage.dims:
                taken = Alternative(stage, value)
            operators = operators_between(before, dims)
            best.setdefault(operators, Alternative(replace(stage, operators=operators, dims=dims), value))
        assert taken is not None
        best.pop(operators_between(before, stage.dims))
        choices.append(Choice(before, taken, tuple(best.values())))
    return choices


def _targets(planner: SlopPlanner, schedule: GrowthSchedule) -> Sequence[ModelDims]:
    return [schedule.target] if planner.mode == "once" else planner.space.structures(planner.initial)
