"""What a comparison says: losses at equal budgets, FLOPs to an equal loss, spreads over seeds, rank correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..errors import RunError
from ..runs.records import compute_perplexity
from .comparison import Comparison, RunResult


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds.

    Args:
        values: by seed, ascending seeds.

    >>> spread = Spread((1.0, 2.0, 6.0))
    >>> spread.mean, spread.low, spread.high, round(spread.deviation, 3)
    (3.0, 1.0, 6.0, 2.646)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation; None for a single seed, and where one is not finite."""
        known = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return statistics.stdev(self.values) if known else None

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        """The spread of values that all exist; None where one is missing, or there are none."""
        known = [value for value in values if value is not None]
        return cls(tuple(known)) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class ArmResult:
    """An arm at one of its budgets.

    Args:
        arm: its name.
        budget: multiple of the comparison's.
        seeds: of its finished runs.
        sequence: the order of growth; "" without growth.
        loss: held-out, at the end.
        tokens, flops: of a run.
        seconds: of training.
        marginal_utility: Eq. 2 of the paper; None without growth.
        flops_saved: 1 - (FLOPs to the reference's final loss) / (the reference's FLOPs), see `compute_flops_saved`; of all
            budgets of the arm, so that it is the same for each. None for an arm that does not get there with every
            seed.
        against_reference: loss minus that of the reference at the same budget, seed by seed; None where the reference
            was not run there.
    """

    arm: str
    budget: float
    seeds: tuple[int, ...]
    sequence: str
    loss: Spread
    tokens: int
    flops: float
    seconds: Spread
    marginal_utility: Spread | None
    flops_saved: Spread | None
    against_reference: Spread | None

    @property
    def perplexity(self) -> Spread:
        """`exp(loss)` of each seed."""
        return Spread(tuple(map(compute_perplexity, self.loss.values)))


def compute_arm_results(comparison: Comparison) -> list[ArmResult]:
    """One for each arm and budget, in the order of arms, budgets ascending."""
    found = []
    for arm in comparison.arms:
        saved = compute_flops_saved(comparison, arm)
        for budget in comparison.budgets(arm):
            runs = comparison.of(arm, budget)
            found.append(
                ArmResult(
                    arm=arm,
                    budget=budget,
                    seeds=tuple(run.seed for run in runs),
                    sequence=runs[0].schedule.sequence,
                    loss=Spread(tuple(run.eval_loss for run in runs)),
                    tokens=runs[0].tokens,
                    flops=runs[0].flops,
                    seconds=Spread(tuple(run.seconds for run in runs)),
                    marginal_utility=Spread.of([run.marginal_utility for run in runs]),
                    flops_saved=saved,
                    against_reference=_against_reference(comparison, runs),
                )
            )
    return found


def find_baseline(comparison: Comparison) -> str | None:
    """The arm that the others are set beside: the reference, or else the first; of those that have finished runs."""
    finished = [arm for arm in comparison.arms if comparison.budgets(arm)]
    return comparison.reference if comparison.reference in finished else next(iter(finished), None)


def find_full_budget(comparison: Comparison, arm: str) -> float:
    """The budget that stands for an arm: 1, or the largest that it has finished runs at."""
    budgets = comparison.budgets(arm)
    return 1.0 if 1.0 in budgets or not budgets else budgets[-1]


def compute_flops_saved(comparison: Comparison, arm: str) -> Spread | None:
    """How much less compute an arm takes to the reference's final loss: `1 - FLOPs / the reference's FLOPs`, by seed.

    The loss is the reference's at the end of its run at budget 1 with the same seed; `compute_cost_to_loss` says when an arm
    is there.

    Returns:
        None without a reference, or where some seed of the arm never gets there.

    >>> compute_flops_saved(Comparison("x", "nano", "", "flops", 1.0, {"slop": ""}), "slop") is None
    True
    """
    if comparison.reference is None:
        return None
    goals = {run.seed: run for run in comparison.of(comparison.reference)}
    seeds = sorted({run.seed for run in comparison.runs if run.arm == arm} & goals.keys())
    saved: list[float | None] = []
    for seed in seeds:
        runs = [run for run in comparison.runs if run.arm == arm and run.seed == seed]
        cost = compute_cost_to_loss(runs, goals[seed].eval_loss)
        saved.append(1 - cost / goals[seed].flops if cost < math.inf else None)
    return Spread.of(saved)


def compute_cost_to_loss(runs: Sequence[RunResult], loss: float, unit: Literal["flops", "seconds"] = "flops") -> float:
    """The least that an arm takes to a loss, of its runs with one seed; infinite where none gets there.

    A run gets there at its target's first evaluation at or below the loss: losses of smaller structures on the way do
    not count, and nothing is read between evaluations. Within a run the learning rate is mostly still high then, which
    counts against an arm. Where it has been run at several budgets, each with a whole learning-rate schedule, a run of
    a budget between two of them counts too, its end taken to lie on the straight line between theirs, over the
    logarithm of the cost. Nothing is read beyond the budgets that were run.

    Args:
        runs: of one arm and seed, at different budgets.
        loss: held-out, to be reached.
        unit: what is counted.
    """
    places = ((run, find_first_at_loss(run, loss)) for run in runs)
    costs = [getattr(run.curve, unit)[place] for run, place in places if place is not None]
    for less, more in pairwise(sorted(runs, key=lambda run: run.budget)):
        if less.eval_loss > loss >= more.eval_loss:
            share = (less.eval_loss - loss) / (less.eval_loss - more.eval_loss)
            first, last = getattr(less, unit), getattr(more, unit)
            costs.append(first * (last / first) ** share)
    return min(costs, default=math.inf)


def find_first_at_loss(run: RunResult, loss: float) -> int | None:
    """Which entry of a run's curve is the first of the target's at or below a loss; None where there is none."""
    points = enumerate(zip(run.curve.stages, run.curve.losses, strict=True))
    last = len(run.stages) - 1
    return next((place for place, (stage, value) in points if stage == last and value <= loss), None)


def is_below(arm: Spread, other: Spread) -> bool:
    """Whether one arm's losses are below another's beyond the spread of seeds: every one of them below every other.

    >>> is_below(Spread((1.0, 1.2)), Spread((1.3, 1.5))), is_below(Spread((1.0, 1.4)), Spread((1.3, 1.5)))
    (True, False)
    """
    return arm.high < other.low


def compute_rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's correlation: Pearson's of ranks, equal values sharing their mean rank; NaN where one is constant.

    Raises:
        RunError: for sequences of different lengths, or of fewer than two.

    >>> compute_rank_correlation([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    if len(one) != len(other) or len(one) < 2:
        raise RunError(f"cannot correlate {len(one)} values with {len(other)}: give two or more pairs")
    first, second = _ranks(one), _ranks(other)
    if len(set(first)) == 1 or len(set(second)) == 1:
        return math.nan
    return round(statistics.correlation(first, second), 12)


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value from 1, equal values sharing their mean rank."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    return [statistics.fmean(places[value]) for value in values]


def _against_reference(comparison: Comparison, runs: Sequence[RunResult]) -> Spread | None:
    if comparison.reference is None:
        return None
    budget = runs[0].budget
    others = {run.seed: run.eval_loss for run in comparison.of(comparison.reference, budget)}
    return Spread.of([run.eval_loss - others[run.seed] if run.seed in others else None for run in runs])
