"""`slop probe --mixing`: how much small tokens count in a grown model, and how long it takes to catch up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..errors import RunError
from .job_progress import show_job_progress
from .options import split_list
from .shared import print_json

if TYPE_CHECKING:
    from ..probing.probe import PlannedTrial
    from ..schedule import GrowthSchedule
    from ..training.config import RunConfig


def probe_mixing(
    run: RunConfig,
    output: Path,
    show_trials: Callable[[Sequence[PlannedTrial], str], None],
    *,
    schedule: GrowthSchedule,
    dimensions: str | None,
    factors: str | None,
    inits: str | None,
    at: tuple[int, ...],
    lag: int | None,
    share: float | None,
    largest_kappa: float | None,
    tolerance: float | None,
    seeds: tuple[int, ...],
    devices: tuple[str, ...],
    workers: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure κ and mixing times, and print them; arguments are the values of the command's options.

    Args:
        show_trials: function that prints what would be trained, below a title.
    """
    from ..experiments.running import find_ended  # with torch, which `slop --help` does without
    from ..probing.catch_up import MIXING_TOLERANCE
    from ..probing.mixing import LARGEST_KAPPA, MixingProbe, build_mixing_growths
    from ..probing.mixing_report import build_mixing_table, describe_mixing, draw_mixing

    growths = build_mixing_growths(
        schedule, split_list(dimensions or ""), _read_factors(factors), split_list(inits or "")
    )
    probe = MixingProbe(
        run.with_schedule(schedule),
        output,
        at=at,
        lag=lag,
        share=share,
        largest_kappa=LARGEST_KAPPA if largest_kappa is None else largest_kappa,
        tolerance=MIXING_TOLERANCE if tolerance is None else tolerance,
        seeds=seeds,
        devices=devices,
        workers=workers,
    )
    trials = probe.preview(growths)  # refuses what cannot be measured before the bar appears
    if dry_run:
        show_trials(trials, f"Mixing probe of {len(growths)} growths")
        return
    jobs = probe.build_jobs(growths)
    flops = {job.directory: planned.flops for job, planned in zip(jobs, trials, strict=True)}
    with show_job_progress(output.name, jobs, output, flops, find_ended(jobs, output)) as on_end:
        report = dataclasses.replace(probe, on_job_end=on_end).run(growths)
    figure = draw_mixing(report, output / "mixing.png")
    if as_json:
        print_json(report)
        return
    console = Console()
    console.print(build_mixing_table(report))
    for sentence in describe_mixing(report):
        console.print(sentence, highlight=False)
    print(f"measurements written to {output / 'mixing.json'}, figure to {figure}")


def _read_factors(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in split_list(text or ""))
    except ValueError:
        raise RunError(f"--factors must be numbers above 1, such as 2,4, got {text!r}") from None
