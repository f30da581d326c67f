"""What the planner predicted of the schedules of a comparison, beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..cost.flops import count_flops_per_token
from ..cost.hours import CostModel
from ..errors import RunError
from ..io.serialization import parse
from ..planning.budget import Budget
from ..planning.objectives import OBJECTIVES, score
from ..planning.structures import DimsArray, CostInputs, DimsTable
from ..report.tables import TextTable
from ..io.units import format_significant
from ..io.units import format_power
from ..training import RunConfig
from .arms import get_model_fields
from .final_losses import draw_scatter
from .comparison import Comparison, RunResult
from .results import Spread, compute_rank_correlation
from .tables import format_spread

#: Utilities are told in nats for so many FLOPs; ranks do not depend on it.
UTILITY_FLOPS = 1e12
#: Through two points there is always a line.
MIN_CORRELATED = 3
_PER_FLOP = CostModel(hours_per_flop=1.0 / UTILITY_FLOPS)


@dataclass(frozen=True)
class Prediction:
    """A schedule, as the planner sees it and as it was.

    Args:
        arm: its name.
        products: Π Δparams as Eq. 11 takes it, what the paper ranks by; small is good.
        flops: training FLOPs by the planner's count, in whole tokens.
        measured_flops: those of the run, in whole optimizer steps.
        utility: Σ Δloss / ΔFLOPs over its growth stages by the scaling law, in nats for 1e12 FLOPs.
        measured_utility: the same of the losses measured, over seeds.
        loss: held-out, at the end, over seeds.
    """

    arm: str
    products: float
    flops: float
    measured_flops: float
    utility: float
    compute_measured_utility: Spread
    loss: Spread


@dataclass(frozen=True)
class PlannerAccuracy:
    """Spearman's correlations over the schedules of a comparison; 1 is perfect agreement.

    Args:
        schedules: how many.
        flops: predicted and measured FLOPs of every stage of every schedule.
        utility: predicted and measured marginal utility.
        products: small Π Δparams and large measured utility.
        products_and_loss: small Π Δparams and low loss at the end.
        utility_and_loss: large measured utility and low loss at the end.
    """

    schedules: int
    flops: float
    utility: float
    products: float
    products_and_loss: float
    utility_and_loss: float


def compute_predictions(comparison: Comparison) -> list[Prediction]:
    """One for each arm that grows a model and trains every stage of it, at the whole budget, in the order of arms.

    Over the seeds that all of these arms have; over an arm's own where there is none.

    Eq. 2 of the paper, with losses in place of perplexities and FLOPs in place of hours, which go with them
    (`docs/reproduction.md`) and which other work on the machine does not touch.

    Raises:
        RunError: for a record that does not hold the run's settings.
    """
    run = _run_of(comparison)
    prices = CostInputs(get_model_fields(run), run.data.block_size, _PER_FLOP)
    grown = {arm: [run for run in comparison.of(arm) if _grows(run)] for arm in comparison.arms}
    seeds = [{run.seed for run in runs} for runs in grown.values() if runs]
    shared = set.intersection(*seeds) if seeds else set()
    found = []
    for arm, all_runs in grown.items():
        # Seeds move losses more than orders do: schedules are compared on those that all of them have.
        runs = [run for run in all_runs if run.seed in shared] or all_runs
        if not runs:
            continue
        schedule = runs[0].schedule
        structures = DimsTable(DimsArray.of(schedule.structures)[np.newaxis], prices)
        budget = Budget(schedule.tokens)
        found.append(
            Prediction(
                arm=arm,
                products=float(score(OBJECTIVES["delta_params"], structures, budget)[0]),
                flops=schedule.flops(prices.config, prices.sequence_length),
                measured_flops=runs[0].flops,
                utility=float(score(OBJECTIVES["loss_per_hour"], structures, budget)[0]),
                measured_utility=Spread(tuple(map(compute_measured_utility, runs))),
                loss=Spread(tuple(run.eval_loss for run in runs)),
            )
        )
    return found


def _grows(run: RunResult) -> bool:
    """Whether it grows a model, and trains every stage."""
    return bool(run.schedule.stages) and all(run.schedule.tokens[1:])


def compute_measured_utility(run: RunResult) -> float:
    """Σ Δloss / ΔFLOPs over the growth stages of a run, in nats for 1e12 FLOPs."""
    steps = pairwise(run.stages)
    return sum((before.eval_loss - after.eval_loss) / (after.flops / UTILITY_FLOPS) for before, after in steps)


def compute_planner_accuracy(comparison: Comparison) -> PlannerAccuracy | None:
    """How well the planner's ranks agree with what was measured; None for fewer than three schedules.

    Raises:
        RunError: as `compute_predictions`.
    """
    found = compute_predictions(comparison)
    if len(found) < MIN_CORRELATED:
        return None
    measured = [one.measured_utility.mean for one in found]
    small, low = [-one.products for one in found], [-one.loss.mean for one in found]
    return PlannerAccuracy(
        schedules=len(found),
        flops=compute_rank_correlation(*_stage_flops(comparison, [one.arm for one in found])),
        utility=compute_rank_correlation([one.utility for one in found], measured),
        products=compute_rank_correlation(small, measured),
        products_and_loss=compute_rank_correlation(small, low),
        utility_and_loss=compute_rank_correlation(measured, low),
    )


def describe_planner_accuracy(comparison: Comparison) -> str:
    """The agreement in words; empty where there is no ranking to compare."""
    agreed = compute_planner_accuracy(comparison)
    if agreed is None or not math.isfinite(agreed.utility):
        return ""
    return (
        f"Over {agreed.schedules} schedules, Spearman's correlation of predicted and measured marginal utility is "
        f"{agreed.utility:.2f}; that of small Π Δparams with large measured utility is {agreed.products:.2f}, with "
        f"low loss at the end {agreed.products_and_loss:.2f}. Of predicted and run FLOPs, stage by stage, it is "
        f"{agreed.flops:.4f}. Large measured utility and low loss at the end go together by "
        f"{agreed.utility_and_loss:.2f}."
    )


def build_prediction_cells(comparison: Comparison) -> TextTable:
    """Predictions beside measurements, a row a schedule, best predicted utility first."""
    columns = (
        ("arm", False),
        ("Π Δparams", True),
        ("FLOPs predicted", True),
        ("FLOPs run", True),
        ("utility predicted", True),
        ("utility measured", True),
        ("held-out loss", True),
    )
    rows = (
        (
            one.arm,
            format_power(one.products),
            f"{one.flops:.4g}",
            f"{one.measured_flops:.4g}",
            format_significant(one.utility),
            format_spread(one.measured_utility, 3),
            format_spread(one.loss, 4),
        )
        for one in sorted(compute_predictions(comparison), key=lambda one: -one.utility)
    )
    return TextTable(columns, tuple(rows))


def draw_utility(comparison: Comparison, path: str | Path) -> Path | None:
    """Draw measured against predicted marginal utility; None where there is no ranking to compare.

    Args:
        comparison: with three or more schedules that the planner tells apart.
        path: the PNG file to write, aside and renamed.
    """
    agreed = compute_planner_accuracy(comparison)
    if agreed is None or not math.isfinite(agreed.utility):
        return None
    found = compute_predictions(comparison)
    return draw_scatter(
        [one.arm for one in found],
        [one.utility for one in found],
        [one.measured_utility.mean for one in found],
        path,
        title="Marginal utility of schedules",
        labels=("predicted by the scaling law (nats for 1e12 FLOPs)", "measured, mean over seeds"),
        source=comparison.fingerprint,
    )


def _stage_flops(comparison: Comparison, arms: Sequence[str]) -> tuple[list[float], list[float]]:
    """Predicted and measured FLOPs of all stages."""
    run = _run_of(comparison)
    fields, length = get_model_fields(run), run.data.block_size
    predicted, measured = [], []
    for arm in arms:
        one = comparison.of(arm)[0]
        for dims, tokens, stage in zip(one.schedule.structures, one.schedule.tokens, one.stages, strict=True):
            predicted.append(float(count_flops_per_token(dims, fields, length)) * tokens)
            measured.append(stage.flops)
    return predicted, measured


def _run_of(comparison: Comparison) -> RunConfig:
    """The run that its arms have in common.

    Raises:
        RunError: for a record that does not tell.
    """
    if "run" not in comparison.settings:
        raise RunError(
            f"the record of {comparison.name} does not hold the run's settings; make it with `slop compare`"
        )
    return parse(RunConfig, comparison.settings["run"], where=f"the record of {comparison.name}", error=RunError)
