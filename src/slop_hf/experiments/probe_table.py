"""A probe's report for the terminal: candidates in the measured order, and what is to be said of them."""

from __future__ import annotations

from rich.table import Table

from ..report.tables import NOTHING, Cells, count, power, significant
from .probe_report import CandidateResult, ProbeReport
from .tables import for_terminal, plus_minus

_UNITS = {"utility": "nats / 1e12 FLOPs", "utility_per_hour": "ppl / hour"}


def probe_cells(report: ProbeReport) -> Cells:
    """A row a candidate, best first; utilities are those that they are ranked by, or of a FLOP."""
    kind = "utility_per_hour" if report.by == "utility_per_hour" else "utility"
    ranked = any(one.rank is not None for one in report.results)
    columns = ("", True), ("candidate", False), *((("planned as", True),) if ranked else ())
    measured = (("after growth", True), ("held-out loss", True), (_UNITS[kind], True), ("FLOPs", True))
    rows = []
    for place, one in enumerate(report.results, 1):
        planned = (NOTHING if one.rank is None else str(one.rank),) if ranked else ()
        losses = plus_minus(one.loss_at_growth, 4), plus_minus(one.loss, 4)
        rows.append((str(place), one.name, *planned, *losses, _utility(one, kind), power(one.flops)))
    return Cells((*columns, *measured), tuple(rows))


def probe_table(report: ProbeReport) -> Table:
    """`probe_cells` for the terminal: `rich.print(probe_table(report))`."""
    loss = plus_minus(report.best.start_loss, 4)
    title = f"Tried for {report.length}, from a loss of {loss}; ranked by {report.by}"
    return for_terminal(probe_cells(report), title)


def probe_sentences(report: ProbeReport) -> list[str]:
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
    hours = significant(cost.seconds / 3600)
    found.append(f"It cost {count(cost.tokens)} tokens, {power(cost.flops)} FLOPs, {hours} device hours.")
    return found


def _utility(one: CandidateResult, kind: str) -> str:
    spread = one.utility_per_hour if kind == "utility_per_hour" else one.utility
    return NOTHING if spread is None else significant(spread.mean)
