"""A comparison as tables: its arms, the stages of each arm, and the ledger of what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..report.tables import TextTable
from ..io.units import NOTHING
from ..io.units import format_significant
from ..io.units import format_seconds
from ..io.units import format_decimals
from ..io.units import format_power
from ..io.units import format_count
from .comparison import Comparison
from .results import ArmResult, Spread, compute_arm_results, find_baseline, find_full_budget

LEDGER_COLUMNS = (("what", False), ("count", True), ("tokens", True), ("FLOPs", True), ("device seconds", True))
ARM_STAGE_COLUMNS = (
    ("arm", False),
    ("stage", False),
    ("structure", False),
    ("parameters", True),
    ("tokens", True),
    ("loss after growth", True),
    ("held-out loss", True),
)
#: What the kinds of the ledger are.
PAID_FOR = {"trunks": "beginnings that several runs share"}
NOT_REACHED = "not reached"
_MOST = 1e9  # perplexity, or utility, that has a meaning
_ABOUT = "what"
_TEXT = ("arm", _ABOUT, "grows")


def build_arm_cells(comparison: Comparison) -> TextTable:
    """Arms side by side: a row an arm and budget, in the order of the experiment.

    A column in which no row has anything to tell is left out; what the paper prints of an arm stands in its row at
    budget 1, in columns of their own.
    """
    against, reference = find_baseline(comparison), comparison.reference
    results = compute_arm_results(dataclasses.replace(comparison, reference=against))
    several = any(result.budget != 1 for result in results)
    cells: dict[str, Callable[[ArmResult], str]] = {
        "arm": lambda one: one.arm,
        _ABOUT: lambda one: comparison.arms[one.arm] or NOTHING,
        "grows": lambda one: one.sequence or NOTHING,
        "budget": lambda one: f"×{one.budget:g}" if several else NOTHING,
        "seeds": lambda one: str(len(one.seeds)),
        "tokens": lambda one: format_count(one.tokens),
        "FLOPs": lambda one: format_power(one.flops),
        "seconds": lambda one: format_seconds(one.seconds.mean),
        "held-out loss": lambda one: format_spread(one.loss, 4),
        "ppl": lambda one: format_spread(one.perplexity, 2),
        f"loss − that of {against}": lambda one: _difference(one, against),
        "FLOPs saved": lambda one: _saved(comparison, one) if reference is not None else NOTHING,
        "marginal utility": _utility,
    }
    for column in dict.fromkeys(name for printed in comparison.printed.values() for name in printed):
        cells[f"{column} (paper)"] = partial(_printed, comparison, column)
    columns = {heading: [cell(result) for result in results] for heading, cell in cells.items()}
    told = {heading: column for heading, column in columns.items() if not column or {*column} != {NOTHING}}
    headings = tuple((heading, heading not in _TEXT) for heading in told)
    return TextTable(headings, tuple(zip(*told.values(), strict=True)))


def build_arm_stage_cells(comparison: Comparison) -> TextTable:
    """The stages of each arm at its full budget, with the mean of its seeds' losses."""
    rows = []
    for arm in comparison.arms:
        runs = comparison.of(arm, find_full_budget(comparison, arm))
        for number, stages in enumerate(zip(*(run.stages for run in runs), strict=True)):
            one = stages[0]
            after = Spread.of([stage.eval_loss_after_growth for stage in stages])
            rows.append(
                (
                    "" if number else arm,
                    one.name.removeprefix("stage-").replace("-", " ", 1),
                    str(one.dims),
                    format_count(one.parameters),
                    format_count(one.tokens),
                    format_decimals(after.mean if after else None, 4),
                    format_decimals(Spread(tuple(stage.eval_loss for stage in stages)).mean, 4),
                )
            )
    return TextTable(ARM_STAGE_COLUMNS, tuple(rows))


def build_ledger_cells(comparison: Comparison) -> TextTable:
    """What was paid, everything counted once, and the sum."""
    rows = [
        (
            f"{cost.what} ({PAID_FOR[cost.what]})" if cost.what in PAID_FOR else cost.what,
            f"{cost.count:,}",
            format_count(cost.tokens),
            format_power(cost.flops),
            format_seconds(cost.seconds),
        )
        for cost in comparison.ledger
    ]
    paid = comparison.ledger
    totals = [sum(getattr(cost, name) for cost in paid) for name in ("count", "tokens", "flops", "seconds")]
    if len(rows) > 1:
        rows.append(("sum", f"{totals[0]:,}", format_count(totals[1]), format_power(totals[2]), format_seconds(totals[3])))
    return TextTable(LEDGER_COLUMNS, tuple(rows))


def build_arms_table(comparison: Comparison) -> Table:
    """`build_arm_cells` for the terminal, as much as fits 80 columns: `rich.print(arms_table(comparison))`."""
    cells, unequal = build_arm_cells(comparison), {"flops": "tokens", "tokens": "FLOPs"}[comparison.equal]
    wanted = ("arm", "grows", "budget", unequal, "held-out loss", "FLOPs saved")
    kept = [number for number, (name, _) in enumerate(cells.columns) if name in wanted or name.startswith("loss −")]
    rows = tuple(tuple(row[number] for number in kept) for row in cells.rows)
    narrow = TextTable(tuple(cells.columns[number] for number in kept), rows)
    return for_terminal(narrow, f"{comparison.title} · {comparison.scale}")


def build_arm_stages_table(comparison: Comparison) -> Table:
    """`build_arm_stage_cells` for the terminal."""
    return for_terminal(build_arm_stage_cells(comparison), "Stages, means over seeds")


def build_ledger_table(comparison: Comparison) -> Table:
    """`build_ledger_cells` for the terminal."""
    return for_terminal(build_ledger_cells(comparison), "What it cost")


def for_terminal(cells: TextTable, title: str) -> Table:
    """Cells as a table for the terminal."""
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    for heading, right in cells.columns:
        table.add_column(heading, justify="right" if right else "left", no_wrap=not right)
    for row in cells.rows:
        table.add_row(*map(Text, row))  # Text takes a name such as `run[1]` as it is, a string would be markup
    return table


def format_spread(spread: Spread, places: int) -> str:
    """The mean ± the sample standard deviation over seeds, which a single seed has not.

    >>> format_spread(Spread((3.0, 3.5)), 2), plus_minus(Spread((3.0,)), 2), plus_minus(Spread((3.0, float("inf"))), 2)
    ('3.25 ± 0.35', '3.00', 'diverged')
    """
    if not spread.mean < _MOST:
        return "diverged"
    deviation = spread.deviation
    return format_decimals(spread.mean, places) + (f" ± {format_decimals(deviation, places)}" if deviation is not None else "")


def _difference(one: ArmResult, against: str | None) -> str:
    spread = one.against_reference
    return f"{spread.mean:+.4f}" if one.arm != against and spread and math.isfinite(spread.mean) else NOTHING


def _utility(one: ArmResult) -> str:
    spread = one.marginal_utility
    return format_significant(spread.mean) if spread is not None and abs(spread.mean) < _MOST else NOTHING


def _saved(comparison: Comparison, one: ArmResult) -> str:
    """In percent, the mean over seeds and the lowest to the highest; for the reference there is nothing to save."""
    saved, goals = one.flops_saved, {run.seed for run in comparison.of(comparison.reference or "")}
    if one.arm == comparison.reference or not goals & {*one.seeds}:
        return NOTHING
    if saved is None:
        return NOT_REACHED
    mean, low, high = (f"{100 * value:.1f}".replace("-0.0", "0.0") for value in (saved.mean, saved.low, saved.high))
    return f"{mean}% ({low} to {high})" if len(saved.values) > 1 else f"{mean}%"


def _printed(comparison: Comparison, column: str, one: ArmResult) -> str:
    value = comparison.printed.get(one.arm, {}).get(column)
    return NOTHING if value is None or one.budget != find_full_budget(comparison, one.arm) else f"{value:,.10g}"
