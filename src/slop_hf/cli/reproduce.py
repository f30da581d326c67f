"""`slop reproduce`: the command and its tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import PlanError
from ..io.files import check_output, write_text
from ..io.serialization import describe_alternatives, to_plain
from ..paper import reproduction
from ..paper import tables as paper
from ..paper.page import HOURS_COLUMNS, PRODUCT_COLUMNS, format_reproduction_page, format_row
from ..paper.reproduction import Hours, Product
from .options import AsJson
from .shared import print_json, print_table

_PARTS: dict[str, Callable[[], Sequence[Product] | Sequence[Hours]]] = {
    **{f"table{table.number}": partial(reproduction.reproduce_products, table) for table in paper.GROWTH_TABLES},
    "hours": reproduction.reproduce_hours,
}


def reproduce_command(
    part: Annotated[str, typer.Argument(help=f"One of {', '.join(_PARTS)}, all.")] = "all",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write a Markdown page about all parts to this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute the paper's printed numbers: products of parameter increments, and GPU hours.

    Example: `slop reproduce table1`
    """
    if part != "all" and part not in _PARTS:
        raise PlanError(f"unknown part {part!r}{describe_alternatives(part, [*_PARTS, 'all'])}")
    check_output(output, "--output", PlanError)
    names = list(_PARTS) if part == "all" else [part]
    if output is not None:
        write_text(output, format_reproduction_page())
    if as_json:
        print_json([to_plain(row) | {"agrees": row.agrees} for name in names for row in _PARTS[name]()])
        return
    for name in names:
        _show(name)
    if output is not None:
        print(f"page written to {output}")


def _show(name: str) -> None:
    rows = _PARTS[name]()
    columns = HOURS_COLUMNS if name == "hours" else PRODUCT_COLUMNS
    title = "GPU hours" if name == "hours" else f"Table {name[-1]}: Π Δparams"
    print_table(
        f"{title}, {sum(row.agrees for row in rows)} of {len(rows)} agree",
        [f">{column}" if column in ("printed", "computed", "off") else column for column in columns],
        [format_row(row) for row in rows],
        wraps=("trained", "note"),
        optional=("note",) if name == "hours" else (),
    )
