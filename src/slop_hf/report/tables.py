"""Tables as text: runs side by side as in the paper's Table 1, and the stages of one run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.table import Table
from rich.text import Text

from ..io.units import NOTHING, format_count, format_decimals, format_power, format_seconds, format_significant
from ..runs.records import StageRecord
from .summary import RunSummary

_Row = TypeVar("_Row")
# An underscore inside a word is no markup, as in `acc_norm`.
_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&#]|(?<!\w)_|_(?!\w)")


def escape_markdown(text: str) -> str:
    r"""Return Markdown that shows a text of one line as it is.

    >>> print(escape_markdown("a|b [x](y) <i> acc_norm _c_"))
    a\|b \[x\](y) \<i\> acc_norm \_c\_
    """
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(text.split()))


@dataclass(frozen=True)
class TextTable:
    """A table of formatted values, which Markdown, HTML and the terminal share.

    Args:
        columns: the heading of each column, and whether it is right-aligned.
        rows: one cell per column in each.

    >>> print(TextTable((("task", False), ("acc", True)), (("a|b", "0.5"),)).markdown(), end="")
    | task | acc |
    | --- | ---: |
    | a\\|b | 0.5 |
    """

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        headings = [heading for heading, _ in self.columns]
        rule = ["---:" if right else "---" for _, right in self.columns]
        lines: list[Sequence[str]] = [headings, rule, *self.rows]
        return "".join("| " + " | ".join(map(escape_markdown, line)) + " |\n" for line in lines)


def tabulate_runs(summaries: Iterable[RunSummary]) -> TextTable:
    """Tabulate runs, one per row: the columns of the paper's Table 1, tokens, FLOPs and marginal utility (Eq. 2).

    Runs trained from scratch have dashes in the columns that describe a growth schedule.
    """
    columns: list[tuple[str, bool, Callable[[RunSummary], str]]] = [
        ("run", False, format_run_name),
        ("target structure", False, lambda run: str(run.target)),
        ("sequence", False, lambda run: run.sequence or NOTHING),
        ("Π Δparams", True, lambda run: format_power(run.delta_params)),
        ("ppl", True, lambda run: format_decimals(run.perplexity, 2)),
        ("seconds per stage", False, lambda run: " + ".join(map(format_seconds, run.stage_seconds))),
        ("sum (s)", True, lambda run: format_seconds(run.seconds)),
        ("tokens", True, lambda run: format_count(run.tokens)),
        ("FLOPs", True, lambda run: format_power(run.flops)),
        ("marginal utility", True, lambda run: format_significant(run.marginal_utility)),
    ]
    return _tabulate(columns, summaries)


def format_run_name(run: RunSummary) -> str:
    """Return a run's name, followed by its progress if it is unfinished."""
    return run.name if run.finished else f"{run.name} ({run.stages} of {run.planned_stages} stages)"


def build_comparison_table(summaries: Iterable[RunSummary]) -> Table:
    """Build the table of `tabulate_runs` for the terminal, one run per column.

    Print it with `rich.print(build_comparison_table(summaries))`.
    """
    runs = tabulate_runs(summaries)
    table = Table()
    table.add_column(runs.columns[0][0])
    for row in runs.rows:
        # A plain string would be read as markup; Text takes a name such as `run[1]` literally.
        table.add_column(Text(row[0]), justify="right", overflow="fold")
    for number, (heading, _) in enumerate(runs.columns[1:], start=1):
        table.add_row(heading, *(Text(row[number]) for row in runs.rows))
    return table


def tabulate_stages(records: Iterable[StageRecord]) -> TextTable:
    """Tabulate the stages of one run; each is grown from the one in the row above it."""
    columns: list[tuple[str, bool, Callable[[StageRecord], str]]] = [
        ("stage", True, lambda record: str(record.stage)),
        ("grew", False, _format_growth),
        ("structure", False, lambda record: str(record.dims)),
        ("parameters", True, lambda record: format_count(record.parameters)),
        ("tokens", True, lambda record: format_count(record.tokens)),
        ("steps", True, lambda record: f"{record.steps:,}"),
        ("FLOPs", True, lambda record: format_power(record.flops)),
        ("seconds", True, lambda record: format_seconds(record.seconds)),
        ("loss after growth", True, lambda record: format_decimals(record.eval_loss_after_growth, 4)),
        ("held-out loss", True, lambda record: format_decimals(record.eval_loss, 4)),
        ("ppl", True, lambda record: format_decimals(record.perplexity, 2)),
    ]
    return _tabulate(columns, records)


def _format_growth(record: StageRecord) -> str:
    grown = [f"{name} ({record.init[name]})" if name in record.init else name for name in record.operators]
    return ", ".join(grown) or NOTHING


def _tabulate(columns: Sequence[tuple[str, bool, Callable[[_Row], str]]], rows: Iterable[_Row]) -> TextTable:
    """Return a table from the heading of each column, whether it is right-aligned, and how to format its cells."""
    headings = tuple((heading, is_right) for heading, is_right, _ in columns)
    return TextTable(headings, tuple(tuple(format_cell(row) for _, _, format_cell in columns) for row in rows))
