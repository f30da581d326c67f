"""The planner's predictions for the schedules of a comparison, and how well they agree with the measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..cost.flops import count_flops_per_token
from ..cost.hours import CostModel
from ..errors import RunError
from ..io.serialization import parse
from ..io.units import format_power, format_significant
from ..planning.budget import Budget
from ..planning.objectives import OBJECTIVES, evaluate_objective
from ..planning.structures import CostInputs, DimsArray, DimsTable
from ..report.tables import TextTable
from ..training.config import RunConfig
from .arms import get_model_fields
from .comparison import Comparison, RunResult
from .final_losses import draw_scatter
from .results import Spread, compute_rank_correlation
from .tables import format_spread

#: Utilities are in nats per this many FLOPs; ranks do not depend on it.
UTILITY_FLOPS = 1e12
#: Fewest points of a rank correlation: two points always lie on a line.
MIN_CORRELATED = 3
_PER_FLOP = CostModel(hours_per_flop=1.0 / UTILITY_FLOPS)
_NUMBERS = "Π Δparams", "FLOPs predicted", "FLOPs run", "utility predicted", "utility measured", "held-out loss"
_COLUMNS = (("arm", False), *((heading, True) for heading in _NUMBERS))


@dataclass(frozen=True)
class Prediction:
    """One schedule, as predicted by the planner and as measured.

    Args:
        products: Π Δparams as in Eq. 11, the paper's objective; small is good.
        flops: training FLOPs predicted, for whole tokens.
        measured_flops: training FLOPs of the run, for whole optimizer steps.
        stage_flops: predicted and measured FLOPs of each stage.
        utility: Σ Δloss / ΔFLOPs over the growth stages, predicted by the scaling law, in nats per 1e12 FLOPs.
        measured_utility: the same quantity measured, over seeds.
        loss: held-out loss at the end, over seeds.
    """

    arm: str
    products: float
    flops: float
    measured_flops: float
    stage_flops: tuple[tuple[float, float], ...]
    utility: float
    measured_utility: Spread
    loss: Spread


@dataclass(frozen=True)
class PlannerAccuracy:
    """Spearman's correlations over some number of schedules; 1 is perfect agreement.

    Args:
        flops: predicted and measured FLOPs of every stage of every schedule.
        utility: predicted and measured marginal utility.
        products: small Π Δparams and large measured utility.
        products_and_loss: small Π Δparams and low final loss.
        utility_and_loss: large measured utility and low final loss.
    """

    schedules: int
    flops: float
    utility: float
    products: float
    products_and_loss: float
    utility_and_loss: float


def compute_predictions(comparison: Comparison) -> list[Prediction]:
    """Return one prediction per arm that grows a model and trains each of its stages, in the order of the arms.

    Measurements are those at budget 1, over the seeds that all of these arms have in common; an arm without any of
    them is measured over its own seeds. Utility is Eq. 2 of the paper with losses in place of perplexities, and with
    FLOPs in place of hours: the two are proportional (`docs/reproduction.md`), and FLOPs do not depend on the load of
    the machine.
    """
    if "run" not in comparison.settings:
        raise RunError(f"the record of {comparison.name} lacks the config of its runs; make it with `slop compare`")
    where = f"the record of {comparison.name}"
    run = parse(RunConfig, comparison.settings["run"], where=where, error=RunError)
    inputs = CostInputs(get_model_fields(run), run.data.block_size, _PER_FLOP)
    by_arm: dict[str, list[RunResult]] = {}
    for arm in comparison.arms:
        if runs := [run for run in comparison.runs_of(arm) if run.schedule.stages and all(run.schedule.tokens[1:])]:
            by_arm[arm] = runs
    # Losses vary more between seeds than between orders: schedules are compared on the seeds that all of them have.
    shared = set.intersection(*({run.seed for run in runs} for runs in by_arm.values())) if by_arm else set()
    return [_predict(arm, [run for run in runs if run.seed in shared] or runs, inputs) for arm, runs in by_arm.items()]


def _predict(arm: str, runs: list[RunResult], inputs: CostInputs) -> Prediction:
    schedule, budget = runs[0].schedule, Budget(runs[0].schedule.tokens)
    structures = DimsTable(DimsArray.of(schedule.structures)[np.newaxis], inputs)
    predicted = [
        float(count_flops_per_token(dims, inputs.config, inputs.sequence_length)) * tokens
        for dims, tokens in zip(schedule.structures, schedule.tokens, strict=True)
    ]
    return Prediction(
        arm=arm,
        products=float(evaluate_objective(OBJECTIVES["delta_params"], structures, budget)[0]),
        flops=schedule.flops(inputs.config, inputs.sequence_length),
        measured_flops=runs[0].flops,
        stage_flops=tuple(zip(predicted, (stage.flops for stage in runs[0].stages), strict=True)),
        utility=float(evaluate_objective(OBJECTIVES["loss_per_hour"], structures, budget)[0]),
        measured_utility=Spread(tuple(map(compute_measured_utility, runs))),
        loss=Spread(tuple(run.eval_loss for run in runs)),
    )


def compute_measured_utility(run: RunResult) -> float:
    """Return Σ Δloss / ΔFLOPs over the growth stages of a run, in nats per 1e12 FLOPs."""
    return sum(
        (before.eval_loss - after.eval_loss) / (after.flops / UTILITY_FLOPS) for before, after in pairwise(run.stages)
    )


def compute_planner_accuracy(comparison: Comparison) -> PlannerAccuracy | None:
    """Return the correlations of predictions and measurements; None for fewer than three schedules."""
    predictions = compute_predictions(comparison)
    if len(predictions) < MIN_CORRELATED:
        return None
    measured = [prediction.measured_utility.mean for prediction in predictions]
    small = [-prediction.products for prediction in predictions]
    low = [-prediction.loss.mean for prediction in predictions]
    stage_flops = [pair for prediction in predictions for pair in prediction.stage_flops]
    return PlannerAccuracy(
        schedules=len(predictions),
        flops=compute_rank_correlation(*zip(*stage_flops, strict=True)),
        utility=compute_rank_correlation([prediction.utility for prediction in predictions], measured),
        products=compute_rank_correlation(small, measured),
        products_and_loss=compute_rank_correlation(small, low),
        utility_and_loss=compute_rank_correlation(measured, low),
    )


def describe_planner_accuracy(comparison: Comparison) -> str:
    """Return the correlations as sentences; empty if the schedules have no ranking."""
    accuracy = compute_planner_accuracy(comparison)
    if accuracy is None or not math.isfinite(accuracy.utility):
        return ""
    return (
        f"Over {accuracy.schedules} schedules, Spearman's correlation of predicted and measured marginal utility is "
        f"{accuracy.utility:.2f}. A small Π Δparams correlates with a large measured utility by "
        f"{accuracy.products:.2f} and with a low final loss by {accuracy.products_and_loss:.2f}; a large measured "
        f"utility correlates with a low final loss by {accuracy.utility_and_loss:.2f}. Predicted and measured FLOPs "
        f"of all stages correlate by {accuracy.flops:.4f}."
    )


def tabulate_predictions(comparison: Comparison) -> TextTable:
    """Return a table of predictions and measurements, one row per schedule, best predicted utility first."""
    rows = (
        (
            prediction.arm,
            format_power(prediction.products),
            f"{prediction.flops:.4g}",
            f"{prediction.measured_flops:.4g}",
            format_significant(prediction.utility),
            format_spread(prediction.measured_utility, 3),
            format_spread(prediction.loss, 4),
        )
        for prediction in sorted(compute_predictions(comparison), key=lambda prediction: -prediction.utility)
    )
    return TextTable(_COLUMNS, tuple(rows))


def draw_utility(comparison: Comparison, path: str | Path) -> Path | None:
    """Draw measured against predicted marginal utility; return None if the schedules have no ranking."""
    accuracy = compute_planner_accuracy(comparison)
    if accuracy is None or not math.isfinite(accuracy.utility):
        return None
    predictions = compute_predictions(comparison)
    return draw_scatter(
        [prediction.arm for prediction in predictions],
        [prediction.utility for prediction in predictions],
        [prediction.measured_utility.mean for prediction in predictions],
        path,
        title="Marginal utility of schedules",
        labels=("predicted by the scaling law (nats per 1e12 FLOPs)", "measured, mean over seeds"),
        source=comparison.fingerprint,
    )
