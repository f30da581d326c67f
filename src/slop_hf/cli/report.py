"""`slop report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import slop_hf

from ..report.summary import describe_outcomes
from ..runs.directory import RunDirectory
from .options import AsJson
from .shared import print_json_text


def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, compared in one report.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Report directory. Default: `report` in the first run.")
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(help="Text that the last stage of each run continues, in the report; loads the models."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write tables and figures of one or more runs.

    The report is `report.html` (one file that opens offline), `report.md`, `report.json`, and figures of loss against
    FLOPs and of the structures on the way. If the runs hold them, it includes benchmark scores, training times and
    attention heads.

    Examples:

    `slop report runs/slop runs/scratch`

    `slop report runs/slop --sample "def __init__(self"`
    """
    samples = [] if sample is None else [(sample, _continue_text(RunDirectory(run), sample)) for run in runs]
    directory = slop_hf.write_report(runs, output, samples=samples)
    if as_json:
        print_json_text((directory / "report.json").read_text(encoding="utf-8"))
        return
    summaries = [slop_hf.summarise(RunDirectory(run)) for run in runs]
    Console().print(slop_hf.build_comparison_table(summaries))
    for sentence in describe_outcomes(summaries):
        print(sentence)
    others = sorted(path.name for path in directory.iterdir() if path.suffix in {".md", ".json", ".png"})
    print(f"written: {directory / 'report.html'}; next to it {', '.join(others)}")


def _continue_text(run: RunDirectory, prompt: str) -> str:
    """Return what the last finished stage of a run writes after a prompt."""
    stage = run.select_stages()[-1]
    from ..evaluation.sampling import generate_text  # with torch, which a report does without

    return generate_text(run.stage_dir(stage), prompt).text
