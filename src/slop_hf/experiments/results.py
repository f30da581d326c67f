"""Losses at equal budgets, FLOPs to an equal loss, spreads over seeds and rank correlations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..dims import ModelDims
from ..errors import RunError
from ..runs.records import compute_perplexity
from .comparison import Comparison, RunResult

#: Measure of a run's training.
Unit = Literal["flops", "seconds", "tokens"]
#: Largest relative difference of costs that count as equal: runs have whole steps.
_EQUAL = 0.01


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
            of them. None if the arm misses the reference's loss with some seed, or with unfinished schedules.
        is_bound: whether the saving is a lower bound (`is_saving_bound`).
        is_finished: whether the learning-rate schedules of its runs have ended; None if some record does not say.
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
    is_bound: bool = False
    is_finished: bool | None = None

    @property
    def perplexity(self) -> Spread:
        """Perplexity of each seed, `exp(loss)`."""
        return Spread(tuple(map(compute_perplexity, self.loss.values)))


def compute_arm_results(comparison: Comparison) -> list[ArmResult]:
    """Return one result per arm and budget, in the order of the arms, smallest budget first."""
    results = []
    for arm in comparison.arms:
        saved, is_bound = compute_flops_saved(comparison, arm), is_saving_bound(comparison, arm)
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
                    is_bound=is_bound,
                    is_finished=_find_whether_finished(runs),
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

    The saving is `1 - FLOPs of the arm / FLOPs of the reference`, including the optimizer's. The loss is the one at
    the end of the reference's run at budget 1 with the same seed; `compute_cost_to_loss` defines when an arm reaches
    it.
    None without a reference, if the arm misses the loss with some seed, and for schedules that are not finished.

    >>> compute_flops_saved(Comparison("x", "nano", "", "flops", 1.0, {"slop": ""}), "slop") is None
    True
    """
    flops = {run.seed: run.total_flops for run in _select_finished(comparison.runs_of(comparison.reference or ""))}
    costs = compute_costs_to_goal(comparison, arm)
    return Spread.collect([1 - cost / flops[seed] if cost < math.inf else None for seed, cost in costs.items()])


def is_saving_bound(comparison: Comparison, arm: str) -> bool:
    """Whether a saving is only a lower bound, because an arm's shortest run is below the loss with some seed."""
    goals = {run.seed: run.eval_loss for run in comparison.runs_of(comparison.reference or "")}
    shortest = {
        seed: min(runs, key=lambda run: run.total_flops)
        for seed in goals
        if (runs := _select_finished([run for run in comparison.runs if (run.arm, run.seed) == (arm, seed)]))
    }
    return any(run.eval_loss < goals[seed] for seed, run in shortest.items())


def compute_costs_to_goal(
    comparison: Comparison, arm: str, unit: Literal["flops", "seconds"] = "flops"
) -> dict[int, float]:
    """Return the least cost at which an arm reaches the reference's final loss at budget 1, by seed that both have."""
    goals = {run.seed: run.eval_loss for run in _select_finished(comparison.runs_of(comparison.reference or ""))}
    by_seed = {seed: [run for run in comparison.runs if (run.arm, run.seed) == (arm, seed)] for seed in goals}
    return {seed: compute_cost_to_loss(runs, goals[seed], unit) for seed, runs in by_seed.items() if runs}


def compute_cost_to_loss(runs: Sequence[RunResult], loss: float, unit: Literal["flops", "seconds"] = "flops") -> float:
    """Return the least cost at which an arm reaches a loss with one seed; infinity if no run reaches it.

    Only the end of a finished learning-rate schedule can reach a loss. An evaluation within a run does not count: the
    rate is still high there, and a shorter run with its own schedule would end elsewhere. If the arm has runs at
    several budgets, a run between two of them counts as well: its final loss is taken to lie on the straight line
    between theirs, over the logarithm of the cost. Nothing is extrapolated, so the cost is an upper bound if the
    shortest run ends below the loss.

    Args:
        runs: runs of one arm with one seed, at different budgets.
        loss: held-out loss to reach, in nats per token.
        unit: unit of the cost; FLOPs include the optimizer's.
    """
    finished = sorted(_select_finished(runs), key=lambda run: run.budget)
    costs = [_get_cost(run, unit) for run in finished if run.eval_loss <= loss]
    for less, more in pairwise(finished):
        if less.eval_loss > loss >= more.eval_loss:
            share = (less.eval_loss - loss) / (less.eval_loss - more.eval_loss)
            first, last = _get_cost(less, unit), _get_cost(more, unit)
            costs.append(first * (last / first) ** share)
    return min(costs, default=math.inf)


@dataclass(frozen=True)
class Saving:
    """The FLOPs that an arm saves at one of its budgets.

    Args:
        shares: 1 − the arm's FLOPs / those with which the reference would end at the same loss, by seed.
        is_bound: whether the saving is only a lower bound, because with some seed the reference's longest run ends
            above that loss.
    """

    shares: Spread
    is_bound: bool


def compute_saving(comparison: Comparison, arm: str, budget: float) -> Saving | None:
    """Return what an arm saves at its own final loss at a budget, compared with the reference's ladder of budgets.

    The reference's FLOPs lie on the straight line between the ends of two of its runs, over their logarithm
    (`compute_cost_to_loss`). Losses fall less and less, so this line lies above them, and a saving is overstated by a
    little: the closer the reference's budgets, the less.

    None for the reference itself, if the two share no seed, and if with some seed the loss is above that of the
    reference's shortest run, whose FLOPs say nothing then.

    Args:
        comparison: record with runs of the reference at several budgets.
        arm: name of the arm.
        budget: budget of the arm's runs, as a multiple of the comparison's.
    """
    shares, is_bound = [], False
    if arm == comparison.reference:
        return None
    for run in _select_finished(comparison.runs_of(arm, budget)):
        key = comparison.reference, run.seed
        references = [other for other in comparison.runs if (other.arm, other.seed) == key]
        ladder = sorted(_select_finished(references), key=lambda other: other.total_flops)
        if not ladder:
            continue
        if run.eval_loss > ladder[0].eval_loss:
            return None
        flops = compute_cost_to_loss(ladder, run.eval_loss)
        is_bound |= flops == math.inf
        shares.append(1 - run.total_flops / min(flops, ladder[-1].total_flops))
    return Saving(Spread(tuple(shares)), is_bound) if shares else None


def compute_loss_at(runs: Sequence[RunResult], cost: float, unit: Unit) -> float | None:
    """Return the loss with which a run of a certain cost would end, from an arm's runs with one seed.

    It is the final loss of a run whose cost differs by at most 1%, since runs have whole steps; else it lies on the
    straight line between the ends of two runs, over the logarithm of the cost. None beyond the budgets that were run.
    Only finished learning-rate schedules count.
    """
    finished = sorted(_select_finished(runs), key=lambda run: _get_cost(run, unit))
    near = [run for run in finished if abs(_get_cost(run, unit) / cost - 1) <= _EQUAL]
    if near:
        return min(near, key=lambda run: abs(_get_cost(run, unit) / cost - 1)).eval_loss
    for less, more in pairwise(finished):
        first, last = _get_cost(less, unit), _get_cost(more, unit)
        if first < cost < last:
            share = math.log(cost / first) / math.log(last / first)
            return less.eval_loss + share * (more.eval_loss - less.eval_loss)
    return None


@dataclass(frozen=True)
class Counting:
    """An arm at one budget, compared in every way of counting; differences of held-out losses, by seed.

    Args:
        is_finished: whether the arm's learning-rate schedules end; None if some record does not say.
        tokens_per_parameter: tokens of all stages per parameter of the final model.
        relative_flops: FLOPs over those of the reference's run at budget 1, including the optimizer's.
        optimizer_share: share of the optimizer in the FLOPs; None if unknown.
        passes: passes over the training data; None if unknown.
        equal_flops: loss minus the reference's at the same FLOPs.
        equal_tokens: loss minus the reference's at the same tokens.
        saving: FLOPs that the arm saves at its own loss.
        gap_closed: share of the distance between the initial structure without growth and the reference that the arm
            has covered, all on the same tokens: 1 is as good as the reference, 0 no better than without growth.
        best_size: the arm without growth with the lowest loss at the same FLOPs, of all sizes.
        against_best_size: loss minus that arm's.
    """

    arm: str
    budget: float
    seeds: tuple[int, ...]
    sequence: str
    is_finished: bool | None
    tokens_per_parameter: float
    relative_flops: float | None
    optimizer_share: float | None
    passes: float | None
    equal_flops: Spread | None
    equal_tokens: Spread | None
    saving: Saving | None
    gap_closed: Spread | None
    best_size: str | None
    against_best_size: Spread | None


def compute_countings(comparison: Comparison) -> list[Counting]:
    """Return every arm and budget in every way of counting, in the order of the arms, smallest budget first.

    Losses at equal FLOPs or tokens come from finished learning-rate schedules of the same seeds (`compute_loss_at`). A
    value is None if the runs that it needs are missing with some seed.
    """
    return [_count(comparison, arm, budget) for arm in comparison.arms for budget in comparison.budgets(arm)]


def _count(comparison: Comparison, arm: str, budget: float) -> Counting:
    runs, reference = comparison.runs_of(arm, budget), find_baseline(comparison)
    first, whole = runs[0], comparison.runs_of(reference or "")
    at_flops, at_tokens = (_compute_losses_at(comparison, reference, runs, unit) for unit in ("flops", "tokens"))
    ungrown = _list_ungrown(comparison)
    small = next((name for name in ungrown if _get_target(comparison, name) == first.schedule.initial), None)
    small_losses = _compute_losses_at(comparison, small, runs, "tokens") if first.schedule.stages else None
    sizes = {
        name: (statistics.fmean(losses), _subtract(runs, losses))
        for name in ungrown
        if name != arm and (losses := _compute_losses_at(comparison, name, runs, "flops")) is not None
    }
    best_size = min(sizes, key=lambda name: sizes[name][0], default=None)
    is_reference = arm == reference
    return Counting(
        arm=arm,
        budget=budget,
        seeds=tuple(run.seed for run in runs),
        sequence=first.schedule.sequence,
        is_finished=_find_whether_finished(runs),
        tokens_per_parameter=first.tokens_per_parameter,
        relative_flops=first.total_flops / whole[0].total_flops if whole else None,
        optimizer_share=None if first.optimizer_flops is None else first.optimizer_flops / first.total_flops,
        passes=first.passes,
        equal_flops=None if is_reference else _subtract(runs, at_flops),
        equal_tokens=None if is_reference else _subtract(runs, at_tokens),
        saving=compute_saving(comparison, arm, budget),
        gap_closed=_compute_gap_closed(runs, small_losses, at_tokens),
        best_size=best_size,
        against_best_size=None if best_size is None else sizes[best_size][1],
    )


def _compute_losses_at(
    comparison: Comparison, arm: str | None, runs: Sequence[RunResult], unit: Unit
) -> list[float] | None:
    """Return the losses of an arm at the costs of some runs, seed by seed; None if it has none for some seed."""
    losses = []
    for run in runs:
        own = [other for other in comparison.runs if (other.arm, other.seed) == (arm, run.seed)]
        loss = compute_loss_at(own, _get_cost(run, unit), unit)
        if loss is None:
            return None
        losses.append(loss)
    return losses


def _subtract(runs: Sequence[RunResult], losses: Sequence[float] | None) -> Spread | None:
    """Return the final losses of some runs minus other losses, seed by seed."""
    if losses is None:
        return None
    return Spread(tuple(run.eval_loss - loss for run, loss in zip(runs, losses, strict=True)))


def _compute_gap_closed(
    runs: Sequence[RunResult], small: Sequence[float] | None, large: Sequence[float] | None
) -> Spread | None:
    if small is None or large is None or not all(one > other for one, other in zip(small, large, strict=True)):
        return None  # the smaller model is no worse on these tokens, and there is no gap
    return Spread(
        tuple((one - run.eval_loss) / (one - other) for run, one, other in zip(runs, small, large, strict=True))
    )


def _list_ungrown(comparison: Comparison) -> list[str]:
    """Return the arms that do not grow and have finished runs."""
    arms = {run.arm for run in comparison.runs if not run.schedule.stages}
    return [arm for arm in comparison.arms if arm in arms]


def _get_target(comparison: Comparison, arm: str) -> ModelDims:
    return next(run.schedule.structures[-1] for run in comparison.runs if run.arm == arm)


def _find_whether_finished(runs: Sequence[RunResult]) -> bool | None:
    return None if any(run.end_rate is None for run in runs) else all(run.is_finished for run in runs)


def _select_finished(runs: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs whose learning-rate schedule is known to have ended; none that has diverged."""
    return [run for run in runs if run.is_finished and math.isfinite(run.eval_loss)]


def _get_cost(run: RunResult, unit: Unit) -> float:
    return {"flops": run.total_flops, "seconds": run.seconds, "tokens": float(run.tokens)}[unit]


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
