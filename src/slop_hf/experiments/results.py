"""Losses at equal budgets, FLOPs to an equal loss, spreads over seeds and rank correlations."""

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
    """One quantity, measured with several seeds, in their order.

    >>> spread = Spread((1.0, 2.0, 6.0))
    >>> spread.mean, spread.low, spread.high, round(spread.deviation, 3)
    (3.0, 1.0, 6.0, 2.646)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None for a single seed, or if a value is not finite."""
        is_defined = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return statistics.stdev(self.values) if is_defined else None

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @classmethod
    def collect(cls, values: Sequence[float | None]) -> Spread | None:
        """Return the spread of some values; None if there are no values or one of them is None."""
        numbers = [value for value in values if value is not None]
        return cls(tuple(numbers)) if numbers and len(numbers) == len(values) else None


@dataclass(frozen=True)
class ArmResult:
    """One arm at one of its budgets.

    Args:
        budget: multiple of the comparison's budget.
        seeds: seeds of its finished runs.
        sequence: order of growth; empty without growth.
        loss: held-out loss at the end, in nats per token.
        tokens, flops: training of one run.
        marginal_utility: Eq. 2 of the paper; None without growth.
        flops_saved: saving from `compute_flops_saved`; it is the arm's, over all its budgets, and so the same at each
            of them. None if the arm misses the reference's loss with some seed.
        against_reference: loss minus the reference's loss at the same budget, by seed; None if the reference has no
            run there.
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
        """Perplexity of each seed, `exp(loss)`."""
        return Spread(tuple(map(compute_perplexity, self.loss.values)))


def compute_arm_results(comparison: Comparison) -> list[ArmResult]:
    """Return one result per arm and budget, in the order of the arms, smallest budget first."""
    results = []
    for arm in comparison.arms:
        saved = compute_flops_saved(comparison, arm)
        for budget in comparison.budgets(arm):
            runs = comparison.runs_of(arm, budget)
            results.append(
                ArmResult(
                    arm=arm,
                    budget=budget,
                    seeds=tuple(run.seed for run in runs),
                    sequence=runs[0].schedule.sequence,
                    loss=Spread(tuple(run.eval_loss for run in runs)),
                    tokens=runs[0].tokens,
                    flops=runs[0].flops,
                    seconds=Spread(tuple(run.seconds for run in runs)),
                    marginal_utility=Spread.collect([run.marginal_utility for run in runs]),
                    flops_saved=saved,
                    against_reference=_subtract_reference(comparison, runs),
                )
            )
    return results


def find_baseline(comparison: Comparison) -> str | None:
    """Return the arm that the others are compared with: the reference, or the first arm with finished runs."""
    finished = [arm for arm in comparison.arms if comparison.budgets(arm)]
    return comparison.reference if comparison.reference in finished else next(iter(finished), None)


def find_main_budget(comparison: Comparison, arm: str) -> float:
    """Return the budget that represents an arm: 1, or the largest one with finished runs."""
    budgets = comparison.budgets(arm)
    return 1.0 if 1.0 in budgets or not budgets else budgets[-1]


def select_main_runs(comparison: Comparison, arm: str) -> list[RunResult]:
    """Return the finished runs of an arm at its main budget, in the order of their seeds."""
    return comparison.runs_of(arm, find_main_budget(comparison, arm))


def compute_flops_saved(comparison: Comparison, arm: str) -> Spread | None:
    """Return the share of the reference's FLOPs that an arm saves on the way to the reference's final loss, by seed.

    The saving is `1 - FLOPs of the arm / FLOPs of the reference`. The loss is the one at the end of the reference's
    run at budget 1 with the same seed; `compute_cost_to_loss` defines when an arm reaches it.

    None without a reference, or if the arm misses the loss with some seed.

    >>> compute_flops_saved(Comparison("x", "nano", "", "flops", 1.0, {"slop": ""}), "slop") is None
    True
    """
    flops = {run.seed: run.flops for run in comparison.runs_of(comparison.reference or "")}
    costs = compute_costs_to_goal(comparison, arm)
    return Spread.collect([1 - cost / flops[seed] if cost < math.inf else None for seed, cost in costs.items()])


def compute_costs_to_goal(
    comparison: Comparison, arm: str, unit: Literal["flops", "seconds"] = "flops"
) -> dict[int, float]:
    """Return the least cost at which an arm reaches the reference's final loss at budget 1, by seed that both have."""
    goals = {run.seed: run.eval_loss for run in comparison.runs_of(comparison.reference or "")}
    by_seed = {seed: [run for run in comparison.runs if (run.arm, run.seed) == (arm, seed)] for seed in goals}
    return {seed: compute_cost_to_loss(runs, goals[seed], unit) for seed, runs in by_seed.items() if runs}


def compute_cost_to_loss(runs: Sequence[RunResult], loss: float, unit: Literal["flops", "seconds"] = "flops") -> float:
    """Return the least cost at which an arm reaches a loss with one seed; infinity if no run reaches it.

    A run reaches the loss at the first evaluation of its target at or below it. Losses of smaller models on the way
    do not count, and nothing is interpolated between evaluations. The learning rate is mostly still high at that
    point, which counts against the arm. If the arm has runs at several budgets, each with a complete learning-rate
    schedule, then a run at a budget between two of them counts as well: its final loss is taken to lie on the straight
    line between theirs, over the logarithm of the cost. Nothing is extrapolated.

    Args:
        runs: runs of one arm with one seed, at different budgets.
        loss: held-out loss to reach, in nats per token.
        unit: unit of the cost.
    """
    costs = []
    for run in runs:
        points = zip(run.curve.stages, run.curve.losses, getattr(run.curve, unit), strict=True)
        costs += [cost for stage, value, cost in points if stage == len(run.stages) - 1 and value <= loss][:1]
    for less, more in pairwise(sorted(runs, key=lambda run: run.budget)):
        if less.eval_loss > loss >= more.eval_loss:
            share = (less.eval_loss - loss) / (less.eval_loss - more.eval_loss)
            first, last = getattr(less, unit), getattr(more, unit)
            costs.append(first * (last / first) ** share)
    return min(costs, default=math.inf)


def is_below(arm: Spread, other: Spread) -> bool:
    """Whether one arm's losses are below another's beyond the spread of seeds: each of them below each of the others.

    >>> is_below(Spread((1.0, 1.2)), Spread((1.3, 1.5))), is_below(Spread((1.0, 1.4)), Spread((1.3, 1.5)))
    (True, False)
    """
    return arm.high < other.low


def compute_rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation: Pearson's correlation of ranks, equal values sharing their mean rank.

    It is NaN if one of the sequences is constant.

    >>> compute_rank_correlation([1, 2, 3, 4], [10, 30, 20, 40])
    0.8
    """
    if len(first) != len(second) or len(first) < 2:
        raise RunError(f"cannot correlate {len(first)} values with {len(second)}: give two or more pairs")
    ranks = _compute_ranks(first), _compute_ranks(second)
    if any(len(set(values)) == 1 for values in ranks):
        return math.nan
    return round(statistics.correlation(*ranks), 12)


def _compute_ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, counted from 1; equal values share their mean rank."""
    ranks: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(values), 1):
        ranks.setdefault(value, []).append(rank)
    return [statistics.fmean(ranks[value]) for value in values]


def _subtract_reference(comparison: Comparison, runs: Sequence[RunResult]) -> Spread | None:
    if comparison.reference is None:
        return None
    losses = {run.seed: run.eval_loss for run in comparison.runs_of(comparison.reference, runs[0].budget)}
    return Spread.collect([run.eval_loss - losses[run.seed] if run.seed in losses else None for run in runs])
