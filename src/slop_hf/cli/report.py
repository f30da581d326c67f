"""`slop report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import slop_hf

from ..runs.directory import RunDirectory


def report(
    runs: Annotated[list[Path], typer.Argument(help="Directories of runs, side by side in one report.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; default, `report` in the first run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summaries as JSON.")] = False,
) -> None:
    """Tables and figures of one or more runs.

    Writes `report.html`, one file that opens offline; `report.md`, `report.json`, and figures of loss against FLOPs
    and of the path of structures; of runs that carry it, also of downstream scores, training times and heads.

    Example: `slop report runs/slop runs/scratch`
    """
    directory = slop_hf.write_report(runs, output)
    if as_json:
        print((directory / "report.json").read_text(encoding="utf-8"), end="")
        return
    Console().print(slop_hf.comparison_table([slop_hf.summarise(RunDirectory(run)) for run in runs]))
    others = sorted(path.name for path in directory.iterdir() if path.suffix in {".md", ".json", ".png"})
    print(f"{directory / 'report.html'}, beside it {', '.join(others)}")
