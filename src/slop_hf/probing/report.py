"""`ProbeReport`: the measurements of a probe, best candidate first, as a JSON file, a table and sentences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table

from ..errors import RunError
from ..experiments.comparison import Cost, RunResult
from ..experiments.planner_accuracy import MIN_CORRELATED, compute_measured_utility
from ..experiments.results import Spread, compute_rank_correlation
from ..experiments.tables import build_terminal_table, format_spread
from ..io.record import Record
from ..io.units import NOTHING, format_count, format_power, format_significant
from ..report.tables import TextTable
from ..schedule import GrowthSchedule
from .candidates import Candidate

#: Quantity that candidates are ranked by.
RankBy = Literal["utility", "utility_per_hour", "loss"]
_UNITS = {"utility": "nats / 1e12 FLOPs", "utility_per_hour": "ppl / hour"}


@dataclass(frozen=True)
class CandidateResult(Record, error=RunError):
    """The measurements of a candidate's trials, over seeds; every number covers the stages after the start.

    Args:
        schedule: schedule of a whole run, with the measurements among its scores.
        start_loss: held-out loss at the start, in nats per token.
        loss: held-out loss at the end of the trial.
        utility: marginal utility, Σ Δloss / ΔFLOPs over the stages, in nats per 1e12 FLOPs.
        tokens, flops, seconds: training of one trial.
        loss_at_growth: held-out loss right after the first growth, before any training.
        utility_per_hour: Eq. 2 of the paper, in perplexity per device hour; None if a stage took no time.
        rank: rank before the trial, from 1; None if the candidates had no order.
    """

    name: str
    schedule: GrowthSchedule
    start_loss: Spread
    loss: Spread
    utility: Spread
    tokens: int
    flops: float
    seconds: Spread
    loss_at_growth: Spread
    utility_per_hour: Spread | None = None
    rank: int | None = None

    @classmethod
    def from_trials(cls, candidate: Candidate, trials: Sequence[RunResult]) -> CandidateResult:
        """Summarize a candidate's trials, one per seed, with only the last one of the stages up to the start."""
        grown = [trial.stages[1:] for trial in trials]
        result = cls(
            name=candidate.name,
            schedule=candidate.schedule,
            start_loss=Spread(tuple(trial.stages[0].eval_loss for trial in trials)),
            loss=Spread(tuple(trial.eval_loss for trial in trials)),
            utility=Spread(tuple(map(compute_measured_utility, trials))),
            tokens=sum(stage.tokens for stage in grown[0]),
            flops=sum(stage.flops for stage in grown[0]),
            seconds=Spread(tuple(sum(stage.seconds for stage in stages) for stages in grown)),
            loss_at_growth=Spread(tuple(map(_get_loss_at_growth, trials))),
            utility_per_hour=Spread.collect([trial.marginal_utility for trial in trials]),
            rank=candidate.rank,
        )
        return dataclasses.replace(result, schedule=result.add_scores(candidate.schedule))

    def add_scores(self, schedule: GrowthSchedule) -> GrowthSchedule:
        """Return a schedule with the measurements among its scores, under names that begin with `probe_`."""
        measured = {"loss": self.loss, "loss_at_growth": self.loss_at_growth, "utility": self.utility}
        scores = {f"probe_{name}": spread.mean for name, spread in measured.items()}
        return dataclasses.replace(schedule, scores={**schedule.scores, **scores})

    def sort_key(self, by: RankBy) -> tuple[bool, float]:
        """Return the key that sorts candidates, best first.

        While a loss is not yet below the start's, its utility is negative, and more FLOPs would make it look better:
        such candidates come last, sorted by their loss.
        """
        if by == "loss":
            return False, self.loss.mean
        utility = self.utility if by == "utility" else self.utility_per_hour
        if utility is not None and utility.mean > 0:
            return False, -utility.mean
        return True, self.loss.mean


@dataclass(frozen=True)
class ProbeReport(Record, error=RunError, if_missing="`slop probe` writes one"):
    """The measurements of a probe.

    Args:
        results: results of the candidates, best first.
        by: quantity that ranks them, see `RankBy`.
        length: length of a trial, in words.
        start: start of the trials, in words.
        cost: cost of the probe, everything counted once; an entry for the ledger of a comparison.
        diverged: names of candidates without a result, because one of their trials diverged.
        order_agreement: Spearman's correlation of the candidates' ranks before and after the trials; 1 is perfect
            agreement. None without ranks before, for equal values, or for fewer than three candidates.
        growth_agreement: Spearman's correlation of the losses right after growth and the ranks after the trials.
        versions: versions of slop_hf, transformers and torch.
        device: hardware that the trials ran on.
    """

    results: tuple[CandidateResult, ...]
    by: RankBy
    length: str
    start: str
    cost: Cost
    diverged: tuple[str, ...] = ()
    order_agreement: float | None = None
    growth_agreement: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    @classmethod
    def rank(
        cls,
        results: Sequence[CandidateResult],
        by: RankBy,
        *,
        length: str,
        start: str,
        cost: Cost,
        diverged: tuple[str, ...] = (),
        versions: dict[str, str] | None = None,
        device: str = "",
    ) -> ProbeReport:
        """Rank candidates; equal ones keep their order. The other arguments are fields of the report."""
        keys = [result.sort_key(by) for result in results]
        positions = [sorted(keys).index(key) for key in keys]
        planned = [float(result.rank) for result in results if result.rank is not None]
        at_growth = [result.loss_at_growth.mean for result in results]
        return cls(
            results=tuple(sorted(results, key=lambda result: result.sort_key(by))),
            by=by,
            length=length,
            start=start,
            cost=cost,
            diverged=diverged,
            order_agreement=_correlate(planned, positions) if len(planned) == len(results) else None,
            growth_agreement=_correlate(at_growth, positions),
            versions=versions or {},
            device=device,
        )

    @property
    def best(self) -> CandidateResult:
        return self.results[0]

    @property
    def not_improved(self) -> tuple[str, ...]:
        """Names of candidates whose loss is not yet below the start's: their trials were too short for a utility."""
        return tuple(result.name for result in self.results if result.loss.mean >= result.start_loss.mean)


def _get_loss_at_growth(trial: RunResult) -> float:
    loss = trial.stages[1].eval_loss_after_growth
    assert loss is not None  # trials are evaluated right after growth
    return loss


def _correlate(values: Sequence[float], positions: Sequence[float]) -> float | None:
    if len(values) < MIN_CORRELATED:
        return None
    correlation = compute_rank_correlation(values, positions)
    return correlation if math.isfinite(correlation) else None


def tabulate_probe(report: ProbeReport) -> TextTable:
    """Return a table with one row per candidate, best first, with the utility that ranks them or the one per FLOP."""
    kind = "utility_per_hour" if report.by == "utility_per_hour" else "utility"
    has_ranks = any(result.rank is not None for result in report.results)
    columns = ("", True), ("candidate", False), *((("planned as", True),) if has_ranks else ())
    measured = (("after growth", True), ("held-out loss", True), (_UNITS[kind], True), ("FLOPs", True))
    rows = []
    for position, result in enumerate(report.results, 1):
        utility = result.utility_per_hour if kind == "utility_per_hour" else result.utility
        rows.append(
            (
                str(position),
                result.name,
                *((NOTHING if result.rank is None else str(result.rank),) if has_ranks else ()),
                format_spread(result.loss_at_growth, 4),
                format_spread(result.loss, 4),
                NOTHING if utility is None else format_significant(utility.mean),
                format_power(result.flops),
            )
        )
    return TextTable((*columns, *measured), tuple(rows))


def build_probe_table(report: ProbeReport) -> Table:
    """Return `tabulate_probe` for the terminal: `rich.print(build_probe_table(report))`."""
    loss = format_spread(report.best.start_loss, 4)
    title = f"Trials of {report.length}, from a loss of {loss}; ranked by {report.by}"
    return build_terminal_table(tabulate_probe(report), title)


def describe_probe(report: ProbeReport) -> list[str]:
    """Return sentences about the measured order and the cost."""
    agreements = {"the planner's order": report.order_agreement, "losses right after growth": report.growth_agreement}
    known = [f"{value:.2f} with {what}" for what, value in agreements.items() if value is not None]
    sentences = [f"Rank correlation of the measured order: {', '.join(known)}."] if known else []
    if report.diverged:
        sentences.append(f"Diverged, and therefore not ranked: {', '.join(report.diverged)}.")
    if report.not_improved:
        names = ", ".join(report.not_improved)
        sentences.append(f"Too short to rank by utility, as the loss is not yet below the start's: {names}.")
    cost, hours = report.cost, format_significant(report.cost.seconds / 3600)
    spent = f"{format_count(cost.tokens)} tokens, {format_power(cost.flops)} FLOPs and {hours} device hours"
    return [*sentences, f"The probe cost {spent}."]
