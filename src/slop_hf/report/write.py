"""`write_report`: a report on runs as Markdown, HTML, figures and JSON in one directory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError
from ..io.files import check_output, write_text
from ..io.serialization import Json, to_json, to_plain
from ..io.units import format_count, format_decimals, format_duration
from ..runs.directory import RunDirectory
from ..runs.records import EvalRecord, StageRecord
from .comparisons import draw_heads, draw_radar, draw_time_correlation
from .figures import draw_run_losses, draw_run_paths
from .render import render_report, select_glossary
from .results import tabulate_data, tabulate_held_out_losses, tabulate_stage_scores
from .run_settings import list_settings
from .scores import tabulate_final_scores
from .summary import RunSummary, describe_outcomes, name_runs, summarise
from .tables import TextTable, tabulate_runs, tabulate_stages


@dataclass(frozen=True)
class ReportFigure:
    """A figure of a report."""

    draw: Callable[[Sequence[RunDirectory], Path], Path | None]  # writes the PNG file; None if the runs lack the data
    title: str
    caption: str
    is_wide: bool = False  # about twice as wide as high; a page shows it larger than the others


#: Figures of a report, by the names of their PNG files.
REPORT_FIGURES = {
    "loss": ReportFigure(
        draw_run_losses,
        "Loss against training FLOPs",
        "Lines are training loss, marks held-out loss; a filled triangle is the held-out loss just before a growth, "
        "a hollow one just after it, before the grown model was trained. Bands are the stages of a single run. The "
        "steep descent of a new model may leave through the top.",
        is_wide=True,
    ),
    "path": ReportFigure(
        draw_run_paths,
        "The path of structures",
        "(a) Parameters in training. (b) Dimensions at each stage as multiples of their initial sizes; lines that "
        "would coincide are drawn slightly apart.",
        is_wide=True,
    ),
    "radar": ReportFigure(
        draw_radar,
        "Downstream tasks",
        "Scores of the last stages of finished runs on the tasks that all evaluated runs share, with equal few-shot "
        "examples and limits. Each axis runs from 0 at the centre to the best score of these runs at the rim, printed "
        "next to the task. Compare along an axis, not areas. After Fig. 4 of the SLOP paper, which does not say how "
        "its axes are scaled.",
    ),
    "correlation": ReportFigure(
        draw_time_correlation,
        "Correlation of training times",
        "Pearson's correlation between the device hours per stage, the initial stage first, of every pair of finished "
        "schedules with the same number of stages; sorted by Π Δparams if all schedules have it. After Fig. 3 of the "
        "SLOP paper, which names neither the coefficient nor the times. With few stages, a high correlation says "
        "little.",
    ),
    "heads": ReportFigure(
        draw_heads,
        "Number of attention heads",
        "Final perplexity of targets that differ only in their heads and were grown from one structure in one order, "
        "and their scores on shared tasks if they were evaluated. After Table 9 and Fig. 6 of the SLOP paper.",
        is_wide=True,
    ),
}


@dataclass(frozen=True)
class _ReportedRun:
    """The data of a run that a report shows."""

    run: RunDirectory
    summary: RunSummary
    stages: list[StageRecord]
    evaluations: list[list[EvalRecord]]  # per stage

    @property
    def tables(self) -> dict[str, TextTable]:
        """The tables that the run has data for, by their headings."""
        tables = {
            "Lineage": tabulate_stages(self.stages),
            "Results per stage": tabulate_stage_scores(self.stages, self.evaluations),
            "Held-out loss by source": tabulate_held_out_losses(self.stages),
            "Tokens by source": tabulate_data(self.stages),
        }
        return {heading: table for heading, table in tables.items() if table is not None}

    @property
    def values(self) -> dict[str, object]:
        """The values for `report.json`: evaluations by stage directory, without unevaluated stages."""
        pairs = zip(self.stages, self.evaluations, strict=True)
        by_stage = {stage.name: evaluations for stage, evaluations in pairs if evaluations}
        values = {"summary": self.summary, "stages": self.stages, "evaluations": by_stage}
        return {key: value for key, value in values.items() if value}


def write_report(
    runs: Sequence[RunDirectory | str | Path] | RunDirectory | str | Path,
    output_dir: str | Path | None = None,
    *,
    samples: Sequence[tuple[str, str]] = (),
) -> Path:
    """Report on one run, or compare several.

    Writes `report.md` (tables, figures, how to load the models), `report.html` (the same in one file that opens
    offline), `report.json` (summaries, stage records, evaluations) and the figures `loss.png` and `path.png`. If the
    runs have the data, there are also `radar.png` (downstream scores), `correlation.png` (training times) and
    `heads.png` (numbers of attention heads), and for several evaluated runs a table of runs × tasks.

    All runs are read before anything is written, and each file is written atomically. Runs with the same name are
    distinguished by their parent directories. An unfinished run is reported with its finished stages, and marked.

    Args:
        runs: one run directory, or several.
        output_dir: directory to write to; default: `report/` in the first run.
        samples: a prompt and its continuation by each run's last stage (`generate_text`), in the order of the runs;
            empty for a report without samples.

    Returns:
        the directory of the report.

    Raises:
        RunError: if no run is given, a directory occurs twice or is not a run, a run has no finished stage, lacks an
            earlier one or has malformed evaluations, or the report cannot be written.

    >>> write_report([])
    Traceback (most recent call last):
    slop_hf.errors.RunError: no runs to report on; give one or more output directories of `slop train`
    """
    paths = [runs] if isinstance(runs, (RunDirectory, str, Path)) else runs
    if wrong := [path for path in paths if not isinstance(path, (RunDirectory, str, Path))]:
        raise RunError(f"runs must be run directories, got {wrong[0]!r}")
    directories = [path if isinstance(path, RunDirectory) else RunDirectory(path) for path in paths]
    if not directories:
        raise RunError("no runs to report on; give one or more output directories of `slop train`")
    if samples and len(samples) != len(directories):
        raise RunError(f"{len(samples)} samples for {len(directories)} runs: give one per run, or none")
    reported = [_read_run(run, name) for run, name in zip(directories, name_runs(directories), strict=True)]
    target = Path(output_dir) if output_dir is not None else directories[0].path / "report"
    check_output(target, error=RunError, is_directory=True)

    target.mkdir(parents=True, exist_ok=True)
    summaries = [run.summary for run in reported]
    comparison = tabulate_runs(summaries)
    tables = {run.summary.name: run.tables for run in reported}
    content = {
        "title": summaries[0].name if len(reported) == 1 else f"Comparison of {len(reported)} runs",
        "comparison": comparison,
        "scores": tabulate_final_scores(summaries, [run.evaluations[-1] for run in reported]),
        "figures": _draw_figures(directories, target),
        "runs": summaries,
        "verdicts": describe_outcomes(summaries),
        "settings": {run.summary.name: list_settings(run.run, run.stages) for run in reported},
        "samples": dict(zip([run.name for run in summaries], samples, strict=False)),
        "sentences": {run.name: _describe_run(run) for run in summaries},
        "tables": tables,
        "versions": {run.summary.name: run.stages[-1].versions for run in reported},
        "last_stages": {run.summary.name: _quote_last_stage(run, target) for run in reported},
        "glossary": select_glossary([comparison, *(table for run in tables.values() for table in run.values())]),
    }
    values = to_plain({"runs": [run.values for run in reported]})
    write_text(target / "report.json", to_json(_replace_non_finite(values)))
    for name in ("report.md", "report.html"):
        write_text(target / name, render_report(f"{name}.j2", content))
    return target


def _read_run(run: RunDirectory, name: str) -> _ReportedRun:
    summary, stages = summarise(run, name=name), run.records()
    run.history()  # refuses a damaged log, which the figures show
    return _ReportedRun(run, summary, stages, [run.evaluations(stage.stage) for stage in stages])


def _quote_last_stage(run: _ReportedRun, target: Path) -> str:
    """Return the path of a run's last stage as a Python literal.

    It is relative: runs and report can be moved together, and no directory of this machine is named.
    """
    path = Path(os.path.relpath(run.run.path / run.stages[-1].name, target)).as_posix()
    return json.dumps(path, ensure_ascii=False)


def _describe_run(run: RunSummary) -> str:
    """Describe a run in a sentence: its growth, its costs and its final loss."""
    size = f" ({format_count(run.parameters)} parameters)" if run.parameters else ""
    if run.sequence:
        growth = f"Grown from {run.initial} to {run.target}{size} in the order {run.sequence}"
    else:
        growth = f"Trained without growth, structure {run.target}{size}"
    cost = f"{format_count(run.tokens)} tokens in {format_duration(3600 * run.device_hours)} of device time"
    loss = "" if run.eval_loss is None else f", held-out loss {format_decimals(run.eval_loss, 4)} nats per token"
    return f"{growth}: {cost}{loss}."


def _draw_figures(runs: Sequence[RunDirectory], target: Path) -> dict[Path, ReportFigure]:
    """Draw the figures that the runs have data for, and remove the other figures of an earlier report."""
    figures = {}
    for name, figure in REPORT_FIGURES.items():
        path = target / f"{name}.png"
        if figure.draw(runs, path) is None:
            path.unlink(missing_ok=True)
        else:
            figures[path] = figure
    return figures


def _replace_non_finite(value: Json) -> Json:
    """Replace a diverged run's infinities and NaNs by None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
