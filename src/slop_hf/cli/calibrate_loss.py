"""`slop calibrate --loss`: a growth law fitted to short runs of the structures and the data of a planned run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

import slop_hf

from ..cost.least_squares import Z80
from ..errors import PlanError, RunError
from ..io.files import check_output
from ..io.units import format_count, format_duration, format_power
from .job_progress import show_job_progress
from .model_config import read_law
from .options import read_changes
from .shared import print_json, print_table

if TYPE_CHECKING:
    from ..probing.loss_calibration import LossCalibration, LossCalibrationReport
    from ..probing.probe import PlannedTrial


def calibrate_loss(
    config: Path,
    output: Path,
    *,
    share: float | None,
    prior: Path | None,
    runs: Path | None,
    change: Sequence[str] | None,
    devices: tuple[str, ...],
    workers: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train short runs, fit a growth law to them, and print its errors; arguments are the values of the options."""
    root = runs or Path("runs", f"calibrate-{config.stem}")
    figure = output.with_suffix(".png")
    check_output(output, "--output", PlanError)
    check_output(figure, "the figure next to --output", PlanError)
    check_output(root, "--runs", RunError, is_directory=True)
    law = None if prior is None else read_law(prior, "--prior")
    run = slop_hf.RunConfig.from_yaml(config, overrides=read_changes(change))

    from ..experiments.running import find_ended  # with torch, which `slop --help` does without
    from ..experiments.staged_runs import draw_residuals
    from ..probing.loss_calibration import DEFAULT_LOSS_SHARE, LossCalibration

    calibration = LossCalibration(
        run,
        root,
        share=DEFAULT_LOSS_SHARE if share is None else share,
        prior=law,
        devices=devices,
        workers=workers,
    )
    trials = calibration.preview()  # refuses what cannot be measured before anything is trained
    if dry_run or not as_json:
        _show_plan(calibration, trials, as_json=as_json)
    if dry_run:
        return
    jobs = calibration.build_jobs()
    flops = {job.directory: planned.flops for job, planned in zip(jobs, trials, strict=True)}
    with show_job_progress(root.name, jobs, root, flops, find_ended(jobs, root)) as on_end:
        report = dataclasses.replace(calibration, on_job_end=on_end).run()
    report.law.to_yaml(output)
    draw_residuals(report.law, report.measured, figure)
    if as_json:
        print_json({**vars(report), "measured": len(report.measured), "expected_error": report.expected_error})
        return
    _show_result(report)
    print(f"law written to {output}, figure of its errors to {figure}, measurements to {root}")


def _show_plan(calibration: LossCalibration, trials: Sequence[PlannedTrial], *, as_json: bool) -> None:
    """Print the runs and what they cost."""
    tokens, flops = sum(trial.tokens for trial in trials), sum(trial.flops for trial in trials)
    planned = calibration.planned_flops
    if as_json:
        print_json({"runs": trials, "tokens": tokens, "flops": flops, "planned_flops": planned})
        return
    print_table(
        "Runs to fit a growth law to; steps that several share are trained once",
        ("run", ">tokens", ">FLOPs"),
        [(trial.name, format_count(trial.tokens), f"{trial.flops:.3g}") for trial in trials],
        total=("sum", format_count(tokens), f"{flops:.3g}"),
        wraps=("run",),
        caption=f"{flops / planned:.2%} of the run's {format_power(planned)} FLOPs",
    )


def _show_result(report: LossCalibrationReport) -> None:
    """Print measured losses, what was spent, and the error to be expected for the planned run."""
    from ..probing.mixing_report import build_mixing_table

    print_table(
        "Held-out losses in nats per token",
        ("run", ">tokens", ">FLOPs", ">measured", ">law", ">error"),
        [
            (
                run.name,
                format_count(run.tokens),
                f"{run.flops:.3g}",
                f"{run.loss:.3f}",
                f"{run.fitted:.3f}",
                f"{run.fitted - run.loss:+.3f}",
            )
            for run in report.runs
        ],
        wraps=("run",),
    )
    if report.mixing is not None:
        Console().print(build_mixing_table(report.mixing))
    for name in report.diverged:
        print(f"{name} diverged; the law does not know it")
    cost, (loss, low, high) = report.cost, report.forecast
    print(
        f"spent: {format_power(cost.flops)} FLOPs, {cost.flops / report.planned_flops:.1%} of the run's "
        f"{format_power(report.planned_flops)}, and {format_duration(cost.seconds)} of training"
    )
    print(
        f"error of the law within the measured scales: ±{Z80 * report.law.deviation:.3f} nats (80% of runs left out)"
    )
    print(
        f"forecast of the run: {loss:.3f} nats per token, 80% interval {low:.3f} to {high:.3f} "
        f"(±{report.expected_error:.3f})"
    )
    if report.distance:
        print(
            f"the run lies {report.distance:.1f} decades outside of what was measured, which widens the interval; a "
            "larger --share narrows it"
        )
