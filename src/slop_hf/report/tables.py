"""Tables as text: runs side by side as in the paper's Table 1, and the stages of one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ..io.units import (
    NOTHING,
    format_count,
    format_decimals,
    format_power,
    format_seconds,
    format_significant,
)
from ..runs.records import StageRecord
from .summary import RunSummary


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
        return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def tabulate_runs(summaries: Iterable[RunSummary]) -> TextTable:
    """Tabulate runs, one per row: the columns of the paper's Table 1, tokens, FLOPs and marginal utility (Eq. 2).

    Runs trained from scratch have dashes in the columns that describe a growth schedule.
    """
    columns = (
        ("run", False),
        ("target structure", False),
        ("sequence", False),
        ("Π Δparams", True),
        ("ppl", True),
        ("seconds per stage", False),
        ("sum (s)", True),
        ("tokens", True),
        ("FLOPs", True),
        ("marginal utility", True),
    )
    rows = (
        (
            format_run_name(run),
            str(run.target),
            run.sequence or NOTHING,
            format_power(run.delta_params),
            format_decimals(run.perplexity, 2),
            " + ".join(format_seconds(seconds) for seconds in run.stage_seconds),
            format_seconds(run.seconds),
            format_count(run.tokens),
            format_power(run.flops),
            format_significant(run.marginal_utility),
        )
        for run in summaries
    )
    return TextTable(columns, tuple(rows))


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
    columns = (
        ("stage", True),
        ("grew", False),
        ("structure", False),
        ("parameters", True),
        ("tokens", True),
        ("steps", True),
        ("FLOPs", True),
        ("seconds", True),
        ("loss after growth", True),
        ("held-out loss", True),
        ("ppl", True),
    )
    rows = (
        (
            str(record.stage),
            ", ".join(f"{name} ({record.init[name]})" if name in record.init else name for name in record.operators)
            or NOTHING,
            str(record.dims),
            format_count(record.parameters),
            format_count(record.tokens),
            f"{record.steps:,}",
            format_power(record.flops),
            format_seconds(record.seconds),
            format_decimals(record.eval_loss_after_growth, 4),
            format_decimals(record.eval_loss, 4),
            format_decimals(record.perplexity, 2),
        )
        for record in records
    )
    return TextTable(columns, tuple(rows))
