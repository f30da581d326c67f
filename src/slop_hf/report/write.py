"""`write_report`: runs as Markdown, figures and JSON in one directory."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import RunError
from ..records import RunDirectory
from ..serialization import plain, to_json, write_text
from .figures import loss_figure, path_figure
from .summary import run_names, summarise
from .tables import comparison_markdown, count, decimals, significant, stage_markdown

REPORT_DIR = "report"


def write_report(
    runs: Sequence[RunDirectory | str | Path] | RunDirectory | str | Path, output_dir: str | Path | None = None
) -> Path:
    """Report on one run, or compare several.

    Writes `report.md` (tables, figures, how to load each stage), `loss.png`, `path.png` and `report.json` (the
    summaries and stage records). All runs are read before anything is written, and each file is written aside and
    renamed. Runs of the same name are told apart by their parent directories; unfinished ones are reported with the
    stages they have, and marked.

    Args:
        runs: run directories.
        output_dir: where to write; default, `report/` in the first run.

    Returns:
        the directory of the report.

    Raises:
        RunError: for no runs, one given twice, a directory that is no run, or a run without a finished stage.

    >>> write_report([])
    Traceback (most recent call last):
    slop_hf.errors.RunError: no runs to report on; give the output directory of `slop train`, or several
    """
    given = [runs] if isinstance(runs, (RunDirectory, str, Path)) else runs
    found = [run if isinstance(run, RunDirectory) else RunDirectory(run) for run in given]
    if not found:
        raise RunError("no runs to report on; give the output directory of `slop train`, or several")
    names = run_names(found)
    summaries = [summarise(run, name=name) for run, name in zip(found, names, strict=True)]
    records = [run.records() for run in found]
    target = Path(output_dir) if output_dir is not None else found[0].path / REPORT_DIR
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file; give a directory to write the report into")

    sections = [
        {
            "summary": summary,
            "stages": stages,
            "table": stage_markdown(stages),
            # Relative paths, so that run and report can move together and name no machine's directories.
            "last": Path(os.path.relpath(run.path / stages[-1].name, target)).as_posix(),
        }
        for run, summary, stages in zip(found, summaries, records, strict=True)
    ]
    text = _template().render(runs=sections, comparison=comparison_markdown(summaries))
    values = [{"summary": one, "stages": stages} for one, stages in zip(summaries, records, strict=True)]
    target.mkdir(parents=True, exist_ok=True)
    loss_figure(found, target / "loss.png")
    path_figure(found, target / "path.png")
    write_text(target / "report.json", to_json(_strict(plain({"runs": values}))))
    write_text(target / "report.md", text)
    return target


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=count, decimals=decimals, significant=significant)
    return environment.get_template("report.md.j2")


def _strict(value: Any) -> Any:
    """Plain data in which a diverged run's infinities are None, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
