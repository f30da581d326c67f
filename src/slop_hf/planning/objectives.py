"""Objectives: what a planner ranks growth schedules by.

An objective is a pure function of a `Step`, one stage of many schedules at once, and a rule that joins the stages:
their product or their sum, of which the smallest or the largest is best. To add one, write the function and register
it in `OBJECTIVES`. `FINAL_LOSS` is the one that no sum over stages gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .budget import Budget
from .structures import DimsTable, FloatArray


@dataclass(frozen=True)
class Step:
    """One stage of many schedules at once.

    Args:
        initial: structure that the schedules begin with.
        before, after: structures before and after the growth of this stage; arrays of one shape.
        tokens: training tokens of this stage.
        seen: training tokens before this stage.
    """

    initial: DimsTable
    before: DimsTable
    after: DimsTable
    tokens: float = 0.0
    seen: float = 0.0


@dataclass(frozen=True)
class Objective:
    """How a planner ranks schedules.

    Args:
        term: function that returns the term of one stage, one number per schedule.
        join: "product" or "sum" of the terms of all stages.
        best: whether the smallest or the largest value is best.
        title: heading of a column.
        needs_tokens, needs_cost_model: inputs the objective requires.
        needs_start: whether it is undefined if the initial model, or some stage, has trained on no tokens.
        compares_stages: whether it adds up all training, the initial model's too, and so can compare schedules with
            different numbers of stages.
    """

    term: Callable[[Step], FloatArray]
    join: Literal["product", "sum"]
    best: Literal["smallest", "largest"]
    title: str
    needs_tokens: bool = False
    needs_cost_model: bool = False
    needs_start: bool = False
    compares_stages: bool = False

    def stage_cost(
        self, budget: Budget, initial: DimsTable, number: int, before: DimsTable, after: DimsTable
    ) -> FloatArray:
        """Contribution of a stage to the total that a search minimises; stage 0 trains the initial model."""
        if number == 0 and not self.compares_stages:
            return np.zeros(after.dims.hidden_size.shape)
        term = self.term(Step(initial, before, after, budget.tokens[number], budget.seen_before(number)))
        if self.join == "product":
            term = np.log(term)
        return term if self.best == "smallest" else -term

    def value(self, cost: npt.ArrayLike) -> FloatArray:
        """The value of the objective that belongs to a sum of `stage_cost`s."""
        total = np.asarray(cost, dtype=np.float64)
        signed = total if self.best == "smallest" else -total
        return np.asarray(np.exp(signed)) if self.join == "product" else signed


def delta_params(step: Step) -> FloatArray:
    """Return the parameters added **since the initial model**; the product is Eq. 11 as used in Tables 1 and 3.

    `prod_k max(1, params(M_{k+1}) - params(M_1))`, with `count_paper_params`. Eq. 3 of the paper defines the
    increment of a stage instead (`delta_params_eq3`), but only this one reproduces Table 1.
    """
    return np.maximum(step.after.paper_params - step.initial.paper_params, 1.0)


def delta_params_eq3(step: Step) -> FloatArray:
    """Return the parameters added **by the stage**; the product is Eq. 3 and 11 and reproduces Table 4.

    `prod_k max(1, params(M_{k+1}) - params(M_k))`, with `count_paper_params`.
    """
    return np.maximum(step.after.paper_params - step.before.paper_params, 1.0)


def flops(step: Step) -> FloatArray:
    """Return the training FLOPs; the sum is over all stages, including the initial model's."""
    return step.after.flops_per_token * step.tokens


def hours(step: Step) -> FloatArray:
    """Return the device hours by the cost model; the sum is over all stages, including the initial model's."""
    return step.after.hours_per_token * step.tokens


def loss_per_hour(step: Step) -> FloatArray:
    """Return the marginal utility of a stage: loss reduction per hour; the sum is Eq. 2 of the paper.

    The loss replaces the perplexity, and the scaling law predicts it at both ends from the parameters and all tokens
    seen so far. The paper argues in the same way when it leaves perplexities out of its objective: size and data
    decide them, and shape hardly matters. What a smaller model has learnt then counts in full.
    `ScalingLaw.staged_losses` counts more carefully, but its loss of a stage depends on all stages before it.
    """
    law = step.after.inputs.law
    by_size = step.before.loss_floor - step.after.loss_floor
    gain = by_size + law.above_floor(step.seen) - law.above_floor(step.seen + step.tokens)
    return gain / (step.after.hours_per_token * step.tokens)


OBJECTIVES: dict[str, Objective] = {
    "delta_params": Objective(delta_params, "product", "smallest", "Π Δparams"),
    "delta_params_eq3": Objective(delta_params_eq3, "product", "smallest", "by Eq. 3"),
    "flops": Objective(flops, "sum", "smallest", "FLOPs", needs_tokens=True, compares_stages=True),
    "hours": Objective(
        hours, "sum", "smallest", "hours", needs_tokens=True, needs_cost_model=True, compares_stages=True
    ),
    "loss_per_hour": Objective(
        loss_per_hour, "sum", "largest", "loss / hour", needs_tokens=True, needs_cost_model=True, needs_start=True
    ),
}


#: Objective of whole runs, by the loss that a growth law predicts for their end; see `planning.final_loss`.
FINAL_LOSS = "final_loss"
OBJECTIVE_NAMES = (*OBJECTIVES, FINAL_LOSS)


def get_title(name: str) -> str:
    """Return the heading of an objective's column.

    >>> get_title("flops"), get_title("final_loss")
    ('FLOPs', 'final loss')
    """
    return "final loss" if name == FINAL_LOSS else OBJECTIVES[name].title


def evaluate_objective(objective: Objective, structures: DimsTable, budget: Budget) -> FloatArray:
    """Return the value of an objective for whole schedules, shape [schedules].

    Args:
        structures: shape [schedules, stages + 1], the initial structure first.
    """
    stages = [structures.select((slice(None), number)) for number in range(budget.stages + 1)]
    pairs = enumerate(zip([stages[0], *stages], stages, strict=False))
    return objective.value(sum(objective.stage_cost(budget, stages[0], number, *pair) for number, pair in pairs))
