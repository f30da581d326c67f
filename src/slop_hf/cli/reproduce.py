"""`slop reproduce`, and the page `docs/reproduction.md` that it writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..errors import PlanError
from ..io.files import write_text
from ..io.serialization import to_plain
from ..paper import reproduction
from ..paper.page import HOURS_COLUMNS, PRODUCT_COLUMNS, reproduction_page, row_cells
from ..paper.reproduction import Hours, Product

_PARTS: dict[str, Callable[[], Sequence[Product] | Sequence[Hours]]] = {
    "table1": reproduction.table_1,
    "table3": reproduction.table_3,
    "table4": reproduction.table_4,
    "hours": reproduction.hours,
}


def reproduce(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(_PARTS)}, all.")] = "all",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a page of Markdown about all of it here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Compute the paper's printed figures again: products of parameter increments, and GPU hours.

    Example: `slop reproduce table1`
    """
    if part != "all" and part not in _PARTS:
        raise PlanError(f"unknown part {part!r}; known: {', '.join(_PARTS)}, all")
    names = list(_PARTS) if part == "all" else [part]
    if output is not None:
        write_text(output, reproduction_page())
    if as_json:
        rows = [to_plain(row) | {"agrees": row.agrees} for name in names for row in _PARTS[name]()]
        print(json.dumps(rows, indent=2))
        return
    for name in names:
        Console().print(_table(name))
    if output is not None:
        print(f"page written to {output}")


def _table(name: str) -> Table:
    rows = _PARTS[name]()
    columns = HOURS_COLUMNS if name == "hours" else PRODUCT_COLUMNS
    agreeing = sum(row.agrees for row in rows)
    title = "GPU hours" if name == "hours" else f"Table {name[-1]}: Π Δparams"
    table = Table(box=SIMPLE, collapse_padding=True, title=f"{title}, {agreeing} of {len(rows)} agree")
    for column in columns:
        right = column in ("printed", "computed", "off")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "note")
    for row in rows:
        table.add_row(*row_cells(row))
    return table
