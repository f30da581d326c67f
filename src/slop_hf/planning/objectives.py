"""Objectives: what a planner ranks growth schedules by.

An objective is a pure function of a `Step`, one stage of many schedules side by side, and a rule that joins the
stages: their product or their sum, the smallest or the largest being best. To add one, write it and register it in
`OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .budget import Budget
from .structures import Structures


@dataclass(frozen=True)
class Step:
    """One stage of many schedules side by side.

    Args:
        initial: the structure that the schedules begin with.
        before, after: structures before and after the growth of this stage; arrays of one shape.
        tokens: trained on in this stage.
        seen: tokens trained on before it.
    """

    initial: Structures
    before: Structures
    after: Structures
    tokens: float = 0.0
    seen: float = 0.0


@dataclass(frozen=True)
class Objective:
    """What schedules are ranked by.

    Args:
        term: what one stage adds, a number for each schedule.
        join: "product" or "sum" of the terms of all stages.
        best: the smallest value, or the largest.
        title: a column's heading.
        counts_initial: whether training the initial model is a stage too.
        needs_tokens, needs_cost_model: what it cannot be told without.
        needs_start: whether it cannot be told of an initial model that has seen no tokens, or of a stage without any.
        compares_stages: whether schedules with different numbers of stages may be compared by it.
    """

    term: Callable[[Step], np.ndarray]
    join: Literal["product", "sum"]
    best: Literal["smallest", "largest"]
    title: str
    counts_initial: bool = False
    needs_tokens: bool = False
    needs_cost_model: bool = False
    needs_start: bool = False
    compares_stages: bool = False

    def cost(self, step: Step) -> np.ndarray:
        """What a stage adds to a total that is to be as small as possible."""
        term = self.term(step)
        if self.join == "product":
            term = np.log(term)
        return term if self.best == "smallest" else -term

    def value(self, cost: Any) -> Any:
        """The value that a total of `cost`s stands for."""
        signed = cost if self.best == "smallest" else -cost
        return np.exp(signed) if self.join == "product" else signed


def delta_params(step: Step) -> np.ndarray:
    """The parameters added **since the initial model**: the product is Eq. 11 as Tables 1 and 3 take it.

    `prod_k max(1, params(M_{k+1}) - params(M_1))`, with `cost.paper_params`. Eq. 3 of the paper defines the
    increment of a stage instead (`delta_params_eq3`); its Table 1 is reproduced by this one only.
    """
    return np.maximum(step.after.paper_params - step.initial.paper_params, 1.0)


def delta_params_eq3(step: Step) -> np.ndarray:
    """The parameters added **by the stage**: the product is Eq. 3 and 11; Table 4 is made by it.

    `prod_k max(1, params(M_{k+1}) - params(M_k))`, with `cost.paper_params`.
    """
    return np.maximum(step.after.paper_params - step.before.paper_params, 1.0)


def flops(step: Step) -> np.ndarray:
    """Training FLOPs; the sum is over all stages, the initial model's included."""
    return step.after.flops_per_token * step.tokens


def hours(step: Step) -> np.ndarray:
    """Device hours by the cost model; the sum is over all stages, the initial model's included."""
    return step.after.hours_per_token * step.tokens


def loss_per_hour(step: Step) -> np.ndarray:
    """The marginal utility of a stage: the loss that it takes away in each hour; the sum is Eq. 2 of the paper.

    With the loss in place of the perplexity, and both ends predicted by the scaling law from the parameters and all
    tokens seen so far: the paper's argument for leaving the perplexities out of its objective is that size and data
    decide them, and shape hardly does. What a smaller model has learnt then counts in full.
    `ScalingLaw.staged_losses` counts more carefully, but what it says of a stage depends on all before it.
    """
    law = step.after.prices.law
    by_size = step.before.loss_floor - step.after.loss_floor
    gain = by_size + law.above_floor(step.seen) - law.above_floor(step.seen + step.tokens)
    return gain / (step.after.hours_per_token * step.tokens)


OBJECTIVES: dict[str, Objective] = {
    "delta_params": Objective(delta_params, "product", "smallest", "Π Δparams"),
    "delta_params_eq3": Objective(delta_params_eq3, "product", "smallest", "by Eq. 3"),
    "flops": Objective(
        flops, "sum", "smallest", "FLOPs", counts_initial=True, needs_tokens=True, compares_stages=True
    ),
    "hours": Objective(
        hours,
        "sum",
        "smallest",
        "hours",
        counts_initial=True,
        needs_tokens=True,
        needs_cost_model=True,
        compares_stages=True,
    ),
    "loss_per_hour": Objective(
        loss_per_hour, "sum", "largest", "loss / hour", needs_tokens=True, needs_cost_model=True, needs_start=True
    ),
}


def step_of(budget: Budget, number: int, initial: Structures, before: Structures, after: Structures) -> Step:
    """The stage of that number; 0 is the initial model's training."""
    return Step(initial, before, after, budget.tokens[number], budget.seen_before(number))


def score(objective: Objective, structures: Structures, budget: Budget) -> np.ndarray:
    """The value of an objective for whole schedules.

    Args:
        objective: one of `OBJECTIVES`.
        structures: shape [schedules, stages + 1], the initial structure first.
        budget: tokens of the stages.

    Returns:
        Shape [schedules].
    """
    columns = [Structures(structures.dims[:, number], structures.prices) for number in range(budget.stages + 1)]
    total = np.zeros(len(columns[0].dims))
    if objective.counts_initial:
        total += objective.cost(step_of(budget, 0, columns[0], columns[0], columns[0]))
    for number in range(1, budget.stages + 1):
        total += objective.cost(step_of(budget, number, columns[0], columns[number - 1], columns[number]))
    return np.asarray(objective.value(total))
