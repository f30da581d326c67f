"""Tables: runs side by side as in the paper's Table 1, and the stages of one run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from ..runs.records import StageRecord
from .summary import RunSummary

#: What a cell holds where there is nothing to tell.
NOTHING = "–"

#: Heading and whether the column is right-aligned; the first six and `sum (s)` are those of Table 1.
COMPARISON_COLUMNS = (
    ("run", False),
    ("target structure", False),
    ("sequence", False),
    ("Π Δparams", True),
    ("ppl", True),
    ("seconds a stage", False),
    ("sum (s)", True),
    ("tokens", True),
    ("FLOPs", True),
    ("marginal utility", True),
)

STAGE_COLUMNS = (
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


@dataclass(frozen=True)
class Cells:
    """A table as text, for Markdown, HTML and the terminal alike.

    Args:
        columns: heading of each, and whether it is right-aligned.
        rows: as many cells each.

    >>> print(Cells((("task", False), ("acc", True)), (("a|b", "0.5"),)).markdown(), end="")
    | task | acc |
    | --- | ---: |
    | a\\|b | 0.5 |
    """

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """The table in Markdown, a line a row."""
        headings = [heading for heading, _ in self.columns]
        rule = ["---:" if right else "---" for _, right in self.columns]
        lines: list[Sequence[str]] = [headings, rule, *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def comparison_cells(summaries: Iterable[RunSummary]) -> Cells:
    """Runs side by side, one row a run; for training from scratch, dashes stand for the schedule."""
    rows = (
        (
            row_name(run),
            str(run.target),
            run.sequence or NOTHING,
            power(run.delta_params),
            decimals(run.perplexity, 2),
            " + ".join(seconds(stage) for stage in run.stage_seconds),
            seconds(run.seconds),
            count(run.tokens),
            power(run.flops),
            significant(run.marginal_utility),
        )
        for run in summaries
    )
    return Cells(COMPARISON_COLUMNS, tuple(rows))


def row_name(run: RunSummary) -> str:
    """What a run's row is headed by: its name, and how far it has come where it is unfinished."""
    return run.name if run.finished else f"{run.name} ({run.stages} of {run.planned_stages} stages)"


def comparison_markdown(summaries: Iterable[RunSummary]) -> str:
    """Runs side by side as a Markdown table (the columns of the paper's Table 1, tokens, FLOPs and Eq. 2)."""
    return comparison_cells(summaries).markdown()


def comparison_table(summaries: Iterable[RunSummary]) -> Table:
    """The same for the terminal, a column a run: `rich.print(comparison_table(summaries))`."""
    rows = comparison_cells(summaries).rows
    table = Table()
    table.add_column(COMPARISON_COLUMNS[0][0])
    for row in rows:
        # Text takes a name such as `run[1]` as it is, where a string would be read as markup.
        table.add_column(Text(row[0]), justify="right", overflow="fold")
    for number, (heading, _) in enumerate(COMPARISON_COLUMNS[1:], start=1):
        table.add_row(heading, *(Text(row[number]) for row in rows))
    return table


def stage_cells(records: Iterable[StageRecord]) -> Cells:
    """The stages of one run, each grown from the one above it."""
    rows = (
        (
            str(record.stage),
            ", ".join(_grown(record)) or NOTHING,
            str(record.dims),
            count(record.parameters),
            count(record.tokens),
            f"{record.steps:,}",
            power(record.flops),
            seconds(record.seconds),
            decimals(record.eval_loss_after_growth, 4),
            decimals(record.eval_loss, 4),
            decimals(record.perplexity, 2),
        )
        for record in records
    )
    return Cells(STAGE_COLUMNS, tuple(rows))


def stage_markdown(records: Iterable[StageRecord]) -> str:
    """The stages of one run as a Markdown table."""
    return stage_cells(records).markdown()


def _grown(record: StageRecord) -> list[str]:
    """What grew, each operator with its init where that is known."""
    return [f"{name} ({record.init[name]})" if name in record.init else name for name in record.operators]


def count(value: float | None) -> str:
    """A count with three significant digits and k, M, B or T.

    >>> count(65_000_000_000), count(1_234_567), count(999_999), count(512)
    ('65B', '1.23M', '1M', '512')
    """
    if value is None:
        return NOTHING
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            # %g would write 1000 as 1e+03.
            scaled = value / size
            return (f"{scaled:,.0f}" if scaled >= 999.5 else f"{scaled:.3g}") + unit
    return f"{value:,.0f}"


def power(value: float | None) -> str:
    """A large number with its power of ten, as in Table 1.

    >>> power(1.6901e24), power(None), power(0)
    ('1.69e+24', '–', '0')
    """
    return NOTHING if value is None else f"{value:.2e}" if value else "0"


def decimals(value: float | None, places: int) -> str:
    """A number with so many decimal places."""
    return NOTHING if value is None else f"{value:,.{places}f}"


def seconds(value: float) -> str:
    """Seconds, with a decimal while it matters.

    >>> seconds(8.649), seconds(12345.6)
    ('8.6', '12,346')
    """
    return decimals(value, 1 if value < 1000 else 0)


def significant(value: float | None) -> str:
    """A number of any size and sign with three significant digits.

    >>> significant(-0.012345), significant(123456.0), significant(None)
    ('-0.0123', '123,000', '–')
    """
    if value is None:
        return NOTHING
    if not value:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"
