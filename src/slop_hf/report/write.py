"""`write_report`: runs as Markdown, HTML, figures and JSON in one directory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RunError
from ..io.files import write_text
from ..io.serialization import to_json, to_plain
from ..io.units import format_count, format_decimals, format_significant
from ..runs.directory import RunDirectory
from ..runs.records import EvalRecord, StageRecord
from .comparisons import draw_heads, draw_radar, draw_time_correlation
from .figures import draw_run_losses, draw_run_paths
from .render import DrawnFigure, render
from .results import tabulate_data, tabulate_held_out_losses, tabulate_stage_scores
from .scores import tabulate_final_scores
from .summary import RunSummary, name_runs, summarise
from .tables import tabulate_runs, tabulate_stages

REPORT_DIR = "report"
MARKDOWN_FILE, HTML_FILE, JSON_FILE = "report.md", "report.html", "report.json"


@dataclass(frozen=True)
class _RunParts:
    """A run as its part of the report needs it."""

    run: RunDirectory
    summary: RunSummary
    stages: list[StageRecord]
    evaluations: list[list[EvalRecord]]  # of each stage


def write_report(
    runs: Sequence[RunDirectory | str | Path] | RunDirectory | str | Path, output_dir: str | Path | None = None
) -> Path:
    """Report on one run, or compare several.

    Writes `report.md` (tables, figures, how to load each stage), `report.html` (the same in one file that opens
    offline), `report.json` (summaries, stage records, evaluations) and the figures: `loss.png` and `path.png`, and
    where the runs carry what they show, `radar.png` (downstream scores), `correlation.png` (training times) and
    `heads.png` (numbers of attention heads). Of several runs that were evaluated there is a table of runs × tasks too.
    All runs are read before anything is written, and each file is written aside and renamed. Runs of the same name are
    told apart by their parent directories; unfinished ones are reported with the stages they have, and marked.

    Args:
        runs: run directories.
        output_dir: where to write; default, `report/` in the first run.

    Returns:
        the directory of the report.

    Raises:
        RunError: for no runs, one given twice, a directory that is no run, a run without a finished stage, or one
            whose evaluations cannot be read.

    >>> write_report([])
    Traceback (most recent call last):
    slop_hf.errors.RunError: no runs to report on; give the output directory of `slop train`, or several
    """
    given = [runs] if isinstance(runs, (RunDirectory, str, Path)) else runs
    found = [run if isinstance(run, RunDirectory) else RunDirectory(run) for run in given]
    if not found:
        raise RunError("no runs to report on; give the output directory of `slop train`, or several")
    parts = [_read(run, name) for run, name in zip(found, name_runs(found), strict=True)]
    target = Path(output_dir) if output_dir is not None else found[0].path / REPORT_DIR
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file; give a directory to write the report into")

    target.mkdir(parents=True, exist_ok=True)
    content = {
        "title": parts[0].summary.name if len(parts) == 1 else f"Comparison of {len(parts)} runs",
        "runs": [_section(part, target) for part in parts],
        "comparison": tabulate_runs(part.summary for part in parts),
        "scores": tabulate_final_scores([part.summary for part in parts], [part.evaluations[-1] for part in parts]),
        "figures": _draw(found, target),
    }
    values = [{"summary": one.summary, "stages": one.stages, **_evaluated(one)} for one in parts]
    write_text(target / JSON_FILE, to_json(_strict(to_plain({"runs": values}))))
    write_text(target / MARKDOWN_FILE, render(f"{MARKDOWN_FILE}.j2", content))
    write_text(target / HTML_FILE, render(f"{HTML_FILE}.j2", content))
    return target


def _read(run: RunDirectory, name: str) -> _RunParts:
    summary, stages = summarise(run, name=name), run.records()
    return _RunParts(run, summary, stages, [run.evaluations(stage.stage) for stage in stages])


def _section(part: _RunParts, target: Path) -> dict[str, Any]:
    """What the templates tell of a run."""
    return {
        "summary": part.summary,
        "sentence": _sentence(part.summary),
        "versions": part.stages[-1].versions,
        "table": tabulate_stages(part.stages),
        "results": tabulate_stage_scores(part.stages, part.evaluations),
        "held_out": tabulate_held_out_losses(part.stages),
        "data": tabulate_data(part.stages),
        # Relative paths, so that run and report can move together and name no machine's directories.
        "last": Path(os.path.relpath(part.run.path / part.stages[-1].name, target)).as_posix(),
    }


def _sentence(run: RunSummary) -> str:
    """A run in a sentence: what it did, what it took and where it came to."""
    if run.sequence:
        what = f"Grown from {run.initial} to {run.target} by the sequence {run.sequence}"
    else:
        what = f"Structure {run.target}, trained without growth"
    size = f" ({format_count(run.parameters)} parameters)" if run.parameters else ""
    cost = f"{format_count(run.tokens)} tokens in {format_significant(run.device_hours)} device hours"
    loss = "" if run.eval_loss is None else f", held-out loss {format_decimals(run.eval_loss, 4)} nats a token"
    return f"{what}{size}: {cost}{loss}."


def _draw(runs: Sequence[RunDirectory], target: Path) -> list[DrawnFigure]:
    """Draw every figure that the runs have something for, and remove an earlier report's that they have not."""
    draw: dict[str, Callable[[Sequence[RunDirectory], Path], Path | None]] = {
        "loss": draw_run_losses,
        "path": draw_run_paths,
        "radar": draw_radar,
        "correlation": draw_time_correlation,
        "heads": draw_heads,
    }
    drawn = []
    for name, function in draw.items():
        path = target / f"{name}.png"
        if function(runs, path) is None:
            path.unlink(missing_ok=True)
        else:
            drawn.append(DrawnFigure(name, path))
    return drawn


def _evaluated(part: _RunParts) -> dict[str, Any]:
    """The evaluations by stage directory, those of stages that have some."""
    pairs = zip(part.stages, part.evaluations, strict=True)
    by_stage = {stage.name: scored for stage, scored in pairs if scored}
    return {"evaluations": by_stage} if by_stage else {}


def _strict(value: Any) -> Any:
    """Plain data in which a diverged run's infinities are None, since JSON has no word for them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
