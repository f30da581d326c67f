"""Tables of a comparison: its arms, the stages of each arm, and the compute ledger."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..io.units import NOTHING, format_count, format_decimals, format_power, format_seconds, format_significant
from ..report.tables import TextTable
from .comparison import Comparison, Cost
from .results import (
    ArmResult,
    Counting,
    Saving,
    Spread,
    compute_arm_results,
    compute_countings,
    find_baseline,
    find_main_budget,
    select_main_runs,
)

Row = TypeVar("Row")

LEDGER_COLUMNS = (("what", False), ("count", True), ("tokens", True), ("FLOPs", True), ("device seconds", True))
#: A further column of the ledger, if the record counts the optimizers' FLOPs.
OPTIMIZER_COLUMN = ("optimizer FLOPs", True)
ARM_STAGE_COLUMNS = (
    *(("arm", False), ("stage", False), ("structure", False), ("parameters", True), ("tokens", True)),
    *(("loss after growth", True), ("held-out loss", True)),
)
#: What the ledger's kinds of entries are called in tables.
_LEDGER_NAMES = {"trunks": "shared prefixes (first steps that several runs have in common)"}
_NOT_REACHED = "not reached"
_SCHEDULE_ENDS = {True: "finished", False: "unfinished", None: NOTHING}
_MEANINGLESS = 1e9  # a perplexity or utility from here on is a sign of divergence
_LEAST_TEXT = 14  # characters of a column of texts, before it wraps
_ABOUT = "what"
_SCHEDULE = "schedule"
_BEST_SIZE = "best size not grown"
_LEFT_ALIGNED = ("arm", _ABOUT, "grows", _SCHEDULE, _BEST_SIZE)


def tabulate_arms(comparison: Comparison) -> TextTable:
    """Return a table with one row per arm and budget, in the order of the experiment.

    Columns without content are left out. Numbers printed in the paper have columns of their own, and stand in the
    row of an arm's main budget.
    """
    baseline, reference = find_baseline(comparison), comparison.reference
    results = compute_arm_results(dataclasses.replace(comparison, reference=baseline))
    has_budgets = any(result.budget != 1 for result in results)
    cells: dict[str, Callable[[ArmResult], str]] = {
        "arm": lambda result: result.arm,
        _ABOUT: lambda result: comparison.arms[result.arm] or NOTHING,
        "grows": lambda result: result.sequence or NOTHING,
        "budget": lambda result: f"×{result.budget:g}" if has_budgets else NOTHING,
        "seeds": lambda result: str(len(result.seeds)),
        _SCHEDULE: lambda result: _SCHEDULE_ENDS[result.is_finished],
        "tokens": lambda result: format_count(result.tokens),
        "FLOPs": lambda result: format_power(result.flops),
        "seconds": lambda result: format_seconds(result.seconds.mean),
        "held-out loss": lambda result: format_spread(result.loss, 4),
        "ppl": lambda result: format_spread(result.perplexity, 2),
        f"loss vs {baseline}": lambda result: _format_difference(result, baseline),
        "FLOPs saved": lambda result: _format_saving(comparison, result) if reference is not None else NOTHING,
        "marginal utility": _format_utility,
    }
    for column in dict.fromkeys(name for printed in comparison.printed.values() for name in printed):
        cells[f"{column} (paper)"] = partial(_format_printed, comparison, column)
    return _build_table(results, cells)


def tabulate_countings(comparison: Comparison) -> TextTable:
    """Return a table of every arm and budget in every way of counting (`compute_countings`).

    Differences are means over seeds, with the lowest and the highest. Columns without content are left out.
    """
    baseline, countings = find_baseline(comparison), compute_countings(comparison)
    savings = {(result.arm, result.budget): result for result in compute_arm_results(comparison)}
    has_budgets = any(counting.budget != 1 for counting in countings)
    cells: dict[str, Callable[[Counting], str]] = {
        "arm": lambda counting: counting.arm,
        "grows": lambda counting: counting.sequence or NOTHING,
        "budget": lambda counting: f"×{counting.budget:g}" if has_budgets else NOTHING,
        "seeds": lambda counting: str(len(counting.seeds)),
        _SCHEDULE: lambda counting: _SCHEDULE_ENDS[counting.is_finished],
        "tokens per parameter": lambda counting: f"{counting.tokens_per_parameter:,.1f}",
        f"FLOPs of {baseline}": lambda counting: _format_ratio(counting.relative_flops),
        "equal FLOPs": lambda counting: format_differences(counting.equal_flops),
        "equal tokens": lambda counting: format_differences(counting.equal_tokens),
        "saved at its loss": lambda counting: _format_own_saving(counting.saving),
        "gap closed": lambda counting: _format_percent(counting.gap_closed) if counting.gap_closed else NOTHING,
        _BEST_SIZE: lambda counting: counting.best_size or NOTHING,
        "vs best size": lambda counting: format_differences(counting.against_best_size),
        "FLOPs saved": lambda counting: (
            NOTHING
            if comparison.reference is None
            else _format_saving(comparison, savings[counting.arm, counting.budget])
        ),
        "optimizer's share": lambda counting: _format_share(counting.optimizer_share),
        "passes over the data": lambda counting: format_decimals(counting.passes, 2),
    }
    return _build_table(countings, cells)


def _build_table(rows: Sequence[Row], cells: Mapping[str, Callable[[Row], str]]) -> TextTable:
    """Return a table with one row per value and one column per heading, without columns that hold nothing."""
    columns = {heading: [cell(row) for row in rows] for heading, cell in cells.items()}
    shown = {heading: column for heading, column in columns.items() if not column or {*column} != {NOTHING}}
    headings = tuple((heading, heading not in _LEFT_ALIGNED) for heading in shown)
    return TextTable(headings, tuple(zip(*shown.values(), strict=True)))


def tabulate_arm_stages(comparison: Comparison) -> TextTable:
    """Return a table with the stages of each arm at its main budget; losses are means over seeds."""
    rows = []
    for arm in comparison.arms:
        stages_of_runs = (run.stages for run in select_main_runs(comparison, arm))
        for number, stages in enumerate(zip(*stages_of_runs, strict=True)):
            first = stages[0]
            after_growth = Spread.collect([stage.eval_loss_after_growth for stage in stages])
            rows.append(
                (
                    "" if number else arm,
                    first.name.removeprefix("stage-").replace("-", " ", 1),
                    str(first.dims),
                    format_count(first.parameters),
                    format_count(first.tokens),
                    format_decimals(after_growth.mean if after_growth else None, 4),
                    format_decimals(Spread(tuple(stage.eval_loss for stage in stages)).mean, 4),
                )
            )
    return TextTable(ARM_STAGE_COLUMNS, tuple(rows))


def tabulate_ledger(comparison: Comparison) -> TextTable:
    """Return a table of the compute spent, everything counted once, with the sum in its last row."""
    costs = list(comparison.ledger)
    if len(costs) > 1:
        costs.append(Cost.sum("sum", costs))
    has_optimizer = any(cost.optimizer_flops for cost in costs)
    rows = (
        (
            _LEDGER_NAMES.get(cost.what, cost.what),
            f"{cost.count:,}",
            format_count(cost.tokens),
            format_power(cost.flops),
            format_seconds(cost.seconds),
            *([format_power(cost.optimizer_flops)] if has_optimizer else []),
        )
        for cost in costs
    )
    return TextTable((*LEDGER_COLUMNS, *([OPTIMIZER_COLUMN] if has_optimizer else [])), tuple(rows))


def build_arms_table(comparison: Comparison) -> Table:
    """Return the columns of `tabulate_arms` that fit into a terminal of 80 characters, for `rich.print`.

    The column of schedules is among them if one of them is unfinished.
    """
    table, unequal = tabulate_arms(comparison), {"flops": "tokens", "tokens": "FLOPs"}[comparison.equal]
    wanted = {"arm", "grows", "budget", unequal, "held-out loss", "FLOPs saved"}
    if any(_SCHEDULE_ENDS[False] in row for row in table.rows):
        wanted.add(_SCHEDULE)
    headings = [heading for heading, _ in table.columns]
    numbers = [n for n, heading in enumerate(headings) if heading in wanted or heading.startswith("loss vs ")]
    rows = tuple(tuple(row[number] for number in numbers) for row in table.rows)
    narrow = TextTable(tuple(table.columns[number] for number in numbers), rows)
    return build_terminal_table(narrow, f"{comparison.title} · {comparison.scale}")


def build_terminal_table(table: TextTable, title: str) -> Table:
    """Return a table for the terminal, with a title above it; headings and texts wrap, and numbers do not."""
    result = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    for number, (heading, right) in enumerate(table.columns):
        longest = max((len(row[number]) for row in table.rows), default=0)
        least = longest if right else min(longest, _LEAST_TEXT)
        result.add_column(heading, justify="right" if right else "left", min_width=least)
    for row in table.rows:
        result.add_row(*map(Text, row))  # a string such as `run[1]` would be read as markup
    return result


def format_spread(spread: Spread, places: int) -> str:
    """Return the mean ± the sample standard deviation over seeds, or only the mean for a single seed.

    >>> format_spread(Spread((3.0, 3.5)), 2), format_spread(Spread((3.0,)), 2)
    ('3.25 ± 0.35', '3.00')
    >>> format_spread(Spread((3.0, float("inf"))), 2)
    'diverged'
    """
    if not spread.mean < _MEANINGLESS:
        return "diverged"
    deviation = spread.deviation
    mean = format_decimals(spread.mean, places)
    return mean if deviation is None else f"{mean} ± {format_decimals(deviation, places)}"


def format_differences(spread: Spread | None) -> str:
    """Return differences of losses, the mean over seeds with its range.

    >>> format_differences(Spread((-0.25, 0.5))), format_differences(Spread((-0.25,)))
    ('+0.1250 (-0.2500 to +0.5000)', '-0.2500')
    """
    if spread is None or not math.isfinite(spread.mean):
        return NOTHING
    seeds = f" ({spread.low:+.4f} to {spread.high:+.4f})" if len(spread.values) > 1 else ""
    return f"{spread.mean:+.4f}{seeds}"


def _format_difference(result: ArmResult, baseline: str | None) -> str:
    spread = result.against_reference
    if result.arm == baseline or spread is None or not math.isfinite(spread.mean):
        return NOTHING
    return f"{spread.mean:+.4f}"


def _format_utility(result: ArmResult) -> str:
    spread = result.marginal_utility
    return format_significant(spread.mean) if spread is not None and abs(spread.mean) < _MEANINGLESS else NOTHING


def _format_saving(comparison: Comparison, result: ArmResult) -> str:
    """Return the saving in percent, the mean over seeds with its range; nothing for the reference itself."""
    saved, goals = result.flops_saved, {run.seed for run in comparison.runs_of(comparison.reference or "")}
    if result.arm == comparison.reference or not goals & {*result.seeds}:
        return NOTHING
    if saved is None:
        return _NOT_REACHED
    return f"{'≥ ' if result.is_bound else ''}{_format_percent(saved)}"


def _format_own_saving(saving: Saving | None) -> str:
    return NOTHING if saving is None else f"{'≥ ' if saving.is_bound else ''}{_format_percent(saving.shares)}"


def _format_percent(spread: Spread) -> str:
    """Return a share in percent, the mean over seeds with its range."""
    low, high = (f"{100 * value:.1f}".replace("-0.0", "0.0") for value in (spread.low, spread.high))
    mean = f"{100 * spread.mean:.1f}%".replace("-0.0%", "0.0%")
    return f"{mean} ({low} to {high})" if len(spread.values) > 1 else mean


def _format_ratio(value: float | None) -> str:
    return NOTHING if value is None else f"×{value:.2f}"


def _format_share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2%}"


def _format_printed(comparison: Comparison, column: str, result: ArmResult) -> str:
    value = comparison.printed.get(result.arm, {}).get(column)
    is_shown = value is not None and result.budget == find_main_budget(comparison, result.arm)
    return f"{value:,.10g}" if is_shown else NOTHING
