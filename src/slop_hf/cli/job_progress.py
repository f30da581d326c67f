"""Progress of several runs: a bar on a terminal, one line per ended run elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..io.units import format_decimals, format_duration, format_power
from ..runs.directory import RunDirectory
from .shared import is_quiet

if TYPE_CHECKING:
    from ..experiments.jobs import Job
    from ..experiments.running import JobEndCallback


@contextmanager
def show_job_progress(
    name: str, jobs: Sequence[Job], root: Path, flops: Mapping[Path, float], ended: set[Path]
) -> Iterator[JobEndCallback]:
    """Show the progress of runs on stderr, unless `slop --quiet`; yield the function to call when a run has ended.

    Args:
        name: name of the whole, for the bar.
        jobs: all runs and their shared prefixes; none if nothing is to be trained.
        root: directory that holds their directories.
        flops: FLOPs to train per directory, without the stages that a run takes over from a shared prefix.
        ended: directories of the runs that have ended before.
    """
    console = Console(stderr=True)
    if not jobs or is_quiet():
        yield lambda job, done, count: None
    elif console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(name, total=len(jobs), completed=len(ended))
            yield lambda job, done, count: progress.update(task, completed=done, description=f"{job.name} has ended")
    else:
        waiting = {job.directory: flops[job.directory] for job in jobs if job.directory not in ended}
        if waiting:
            total = format_power(sum(waiting.values()))
            _print(f"{name}: {len(waiting)} of {len(jobs)} runs to train, {total} FLOPs; their logs are in {root}")
        yield _JobLines(root, waiting).print_end


class _JobLines:
    """Prints a line per ended run: its loss, its FLOPs, and the time left at the speed so far."""

    def __init__(self, root: Path, waiting: dict[Path, float]) -> None:
        self._root, self._waiting = root, waiting
        self._begin, self._done = time.monotonic(), 0.0

    def print_end(self, job: Job, done: int, count: int) -> None:
        flops = self._waiting.pop(job.directory, 0.0)
        self._done += flops
        run = RunDirectory(self._root / job.directory)
        if job.end_step is not None and job.is_finished(self._root):
            outcome = "ready to branch off from"
        elif run.exists and run.is_finished:
            outcome = f"held-out loss {format_decimals(run.records()[-1].eval_loss, 4)}"
        else:
            outcome = "diverged"
        left, seconds = sum(self._waiting.values()), time.monotonic() - self._begin
        rest = f", about {format_duration(seconds / self._done * left)} left" if left and self._done else ""
        _print(f"{done} of {count}: {job.name}, {outcome}, {format_power(flops)} FLOPs{rest}")


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
