"""Option parsing and printing shared by the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Annotated, Any, TextIO

import typer
from rich.box import SIMPLE
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import RunError
from ..io.serialization import Json, parse_yaml, to_json

#: The option `--json`, which every command has.
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def make_option(panel: str, *names: str, **settings: Any) -> Any:
    """Return a typer option that `--help` lists in a panel of its command."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


def split_list(text: str) -> tuple[str, ...]:
    """Split the value of an option at its commas.

    >>> split_list("layer, ffn")
    ('layer', 'ffn')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_seeds(text: str) -> tuple[int, ...]:
    """Read the value of `--seeds`.

    Raises:
        RunError: if a part is not a whole number.

    >>> read_seeds("0,1")
    (0, 1)
    """
    try:
        return tuple(int(seed) for seed in split_list(text))
    except ValueError:
        raise RunError(f"--seeds must be whole numbers such as 0,1,2, got {text!r}") from None


def read_changes(changes: Sequence[str] | None) -> dict[str, Json]:
    """Read the values of `--set key=value` as overrides for `RunConfig.from_yaml`; values are YAML.

    Raises:
        RunError: if one has no value.

    >>> read_changes(["training.learning_rate=1e-3", "data.source=[a.txt, b.txt]"])
    {'training.learning_rate': 0.001, 'data.source': ['a.txt', 'b.txt']}
    """
    pairs = [change.partition("=") for change in changes or ()]
    for key, equals, _ in pairs:
        if not equals:
            raise RunError(f"--set {key}: expected key=value, such as training.learning_rate=1e-3")
    return {key: parse_yaml(value) for key, _, value in pairs}


def is_first_process() -> bool:
    """Whether this is the only process of a command, or the first one of a launch."""
    return os.environ.get("RANK", "0") == "0"


def redirect_prints(*, as_json: bool) -> AbstractContextManager[TextIO | None]:
    """Send what libraries print to stderr if stdout is to hold JSON only."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def print_json(value: object) -> None:
    """Print a value, dataclasses included, as indented JSON."""
    print(to_json(value), end="")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] = (),
    wraps: Sequence[str] = (),
    caption: str | None = None,
) -> None:
    """Print a table.

    Args:
        title: heading above the table.
        columns: names of the columns; those that begin with `>` are right-aligned.
        rows: cells, in rich's markup.
        total: cells of a last row, below a line.
        wraps: names of columns that are wrapped if the terminal is narrow; the others stay whole.
        caption: line below the table.
    """
    table = Table(box=SIMPLE, title=title, caption=caption, pad_edge=False, collapse_padding=True)
    for column in columns:
        justify: JustifyMethod = "right" if column.startswith(">") else "left"
        if column in wraps:
            table.add_column(column, justify=justify, overflow="fold")
        else:
            table.add_column(column.removeprefix(">"), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total)
    Console().print(table)


def make_progress_bar(*, quiet: bool) -> Progress:
    """Return a progress bar on stderr that counts runs; it stays invisible if `quiet`."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), disable=quiet)
