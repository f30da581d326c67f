"""`ProbeReport`: candidates in the order of what their trials came to, and what those cost, as one JSON file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.table import Table

from ..errors import RunError
from ..experiments.planner_accuracy import MIN_CORRELATED, compute_measured_utility
from ..experiments.comparison import Cost, RunResult
from ..experiments.results import Spread, compute_rank_correlation
from ..experiments.tables import for_terminal, format_spread
from ..io.files import write_text
from ..io.serialization import parse, read_json, to_json
from ..report.tables import TextTable
from ..io.units import NOTHING
from ..io.units import format_significant
from ..io.units import format_power
from ..io.units import format_count
from ..schedule import GrowthSchedule
from .candidates import Candidate

#: What candidates are put in order by.
RankBy = Literal["utility", "utility_per_hour", "loss"]


@dataclass(frozen=True)
class CandidateResult:
    """What the trials of a candidate came to; every number is of the stages after the start.

    Args:
        name: of the candidate.
        schedule: of a whole run, with what was measured among its scores.
        start_loss: held-out loss where candidates part, over seeds, as all below.
        loss: held-out, at the end of the trial.
        utility: marginal utility, Σ Δloss / ΔFLOPs over the stages, in nats for 1e12 FLOPs.
        tokens, flops: of a trial.
        seconds: of its training.
        loss_at_growth: right after the first growth, before any training.
        utility_per_hour: Eq. 2 of the paper, in perplexity a device hour; None where a stage took no time.
        rank: its place before it was tried, from 1; None where there was no order.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

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
    def of(cls, candidate: Candidate, trials: Sequence[RunResult]) -> CandidateResult:
        """Sum up the trials of a candidate.

        Args:
            candidate: that was tried.
            trials: one for each seed, their stages without those before the start, but for the last of them.
        """
        grown = [trial.stages[1:] for trial in trials]
        found = cls(
            name=candidate.name,
            schedule=candidate.schedule,
            start_loss=Spread(tuple(trial.stages[0].eval_loss for trial in trials)),
            loss=Spread(tuple(trial.eval_loss for trial in trials)),
            utility=Spread(tuple(map(compute_measured_utility, trials))),
            tokens=sum(stage.tokens for stage in grown[0]),
            flops=sum(stage.flops for stage in grown[0]),
            seconds=Spread(tuple(sum(stage.seconds for stage in stages) for stages in grown)),
            loss_at_growth=Spread(tuple(map(_loss_at_growth, trials))),
            utility_per_hour=Spread.of([trial.marginal_utility for trial in trials]),
            rank=candidate.rank,
        )
        return dataclasses.replace(found, schedule=found.scored(candidate.schedule))

    def scored(self, schedule: GrowthSchedule) -> GrowthSchedule:
        """A schedule with what was measured among its scores, by names that begin with `probe_`."""
        measured = {
            "probe_loss": self.loss.mean,
            "probe_loss_at_growth": self.loss_at_growth.mean,
            "probe_utility": self.utility.mean,
        }
        return dataclasses.replace(schedule, scores={**schedule.scores, **measured})

    def standing(self, by: RankBy) -> tuple[bool, float]:
        """What candidates are sorted by, the best one's being the smallest.

        A loss that is not below the start's yet is no utility, and divided by more FLOPs it would look the better for
        them: such candidates come last, by their loss.
        """
        if by == "loss":
            return False, self.loss.mean
        found = self.utility if by == "utility" else self.utility_per_hour
        return (False, -found.mean) if found is not None and found.mean > 0 else (True, self.loss.mean)


@dataclass(frozen=True)
class ProbeReport:
    """What came out of trial training.

    Args:
        results: of the candidates, best first.
        by: what they are put in order by, see `RankBy`.
        length: how long a trial is, in words.
        start: where candidates part, in words.
        cost: what was paid for, everything counted once; an entry for the ledger of a comparison.
        diverged: names of candidates without a result, as a trial of theirs came to a loss that is not finite.
        order_agreement: Spearman's correlation of the order that the candidates came in with the measured one; 1 is
            perfect agreement. None where they came in no order, are all alike, or are fewer than three.
        growth_agreement: the same of their losses right after growth.
        versions: of slop_hf, transformers and torch.
        device: what it ran on.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

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
    def of(cls, results: Sequence[CandidateResult], by: RankBy, **facts: Any) -> ProbeReport:
        """Put candidates in order; those that are alike keep the order that they came in.

        Args:
            results: of the candidates.
            by: see `RankBy`.
            facts: the other fields.
        """
        standings = [one.standing(by) for one in results]
        places = [sorted(standings).index(standing) for standing in standings]
        ranks = [one.rank for one in results]
        known = [float(rank) for rank in ranks if rank is not None]
        return cls(
            results=tuple(sorted(results, key=lambda one: one.standing(by))),
            by=by,
            order_agreement=_correlation(known, places) if len(known) == len(ranks) else None,
            growth_agreement=_correlation([one.loss_at_growth.mean for one in results], places),
            **facts,
        )

    @property
    def best(self) -> CandidateResult:
        """The first of the results."""
        return self.results[0]

    @property
    def lost(self) -> tuple[str, ...]:
        """The names of candidates whose loss is not below the start's yet: their trial was too short for a utility."""
        return tuple(one.name for one in self.results if one.loss.mean >= one.start_loss.mean)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, aside and renamed."""
        return write_text(path, to_json(self))

    @classmethod
    def load(cls, path: str | Path) -> ProbeReport:
        """Read one.

        Raises:
            RunError: where the file is none.
        """
        content = read_json(path, if_missing="`slop probe` writes one", error=RunError)
        return parse(cls, content, where=str(path), error=RunError)


def _loss_at_growth(trial: RunResult) -> float:
    loss = trial.stages[1].eval_loss_after_growth
    assert loss is not None  # a probe has its trials evaluated there
    return loss


def _correlation(values: Sequence[float], places: Sequence[float]) -> float | None:
    if len(values) < MIN_CORRELATED:
        return None
    found = compute_rank_correlation(values, places)
    return found if math.isfinite(found) else None


_UNITS = {"utility": "nats / 1e12 FLOPs", "utility_per_hour": "ppl / hour"}


def build_probe_cells(report: ProbeReport) -> TextTable:
    """A row a candidate, best first; utilities are those that they are ranked by, or of a FLOP."""
    kind = "utility_per_hour" if report.by == "utility_per_hour" else "utility"
    ranked = any(one.rank is not None for one in report.results)
    columns = ("", True), ("candidate", False), *((("planned as", True),) if ranked else ())
    measured = (("after growth", True), ("held-out loss", True), (_UNITS[kind], True), ("FLOPs", True))
    rows = []
    for place, one in enumerate(report.results, 1):
        planned = (NOTHING if one.rank is None else str(one.rank),) if ranked else ()
        losses = format_spread(one.loss_at_growth, 4), format_spread(one.loss, 4)
        rows.append((str(place), one.name, *planned, *losses, _utility(one, kind), format_power(one.flops)))
    return TextTable((*columns, *measured), tuple(rows))


def build_probe_table(report: ProbeReport) -> Table:
    """`build_probe_cells` for the terminal: `rich.print(probe_table(report))`."""
    loss = format_spread(report.best.start_loss, 4)
    title = f"Tried for {report.length}, from a loss of {loss}; ranked by {report.by}"
    return for_terminal(build_probe_cells(report), title)


def describe_probe(report: ProbeReport) -> list[str]:
    """What the numbers say, and what they cost."""
    known = {"the planner's order": report.order_agreement, "losses right after growth": report.growth_agreement}
    told = [f"{value:.2f} with {what}" for what, value in known.items() if value is not None]
    found = [f"Rank correlation of the measured order: {', '.join(told)}."] if told else []
    if report.diverged:
        found.append(f"Diverged, and without a place: {', '.join(report.diverged)}.")
    if report.lost:
        found.append(
            f"Too short to tell: the loss is not below the one that trials began with in {', '.join(report.lost)}."
        )
    cost = report.cost
    hours = format_significant(cost.seconds / 3600)
    found.append(f"It cost {format_count(cost.tokens)} tokens, {format_power(cost.flops)} FLOPs, {hours} device hours.")
    return found


def _utility(one: CandidateResult, kind: str) -> str:
    spread = one.utility_per_hour if kind == "utility_per_hour" else one.utility
    return NOTHING if spread is None else format_significant(spread.mean)
