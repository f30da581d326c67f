"""`Progress`: what a run has cost up to a step, so that steps taken over from a trunk are counted once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError
from ..io.record import Record
from ..runs.directory import RunDirectory, list_checkpoints, parse_step
from ..training.checkpoints import read_resumption
from .jobs import BRANCH_FILE, Job


@dataclass(frozen=True)
class Progress(Record, error=RunError):
    """The training of a run up to a step.

    Args:
        trunk: name of the directory that holds the state of that step.
        step: steps done.
        tokens, flops, seconds: training up to there; seconds are summed over devices.
    """

    trunk: str
    step: int
    tokens: int
    flops: float
    seconds: float


def measure_progress(job: Job, run: RunDirectory, step: int) -> Progress:
    """Return what the first steps of a job have cost in a run that has its state after them.

    Args:
        run: run of the trunk, or of the job itself, whose finished stages and checkpoints do not go beyond the step.
    """
    seconds = sum(record.seconds * record.devices for record in run.records())
    stage = run.finished_stages
    for checkpoint in list_checkpoints(run, stage) if stage < len(run.schedule.structures) else ():
        if parse_step(checkpoint) == step:
            resumption = read_resumption(checkpoint)
            seconds += resumption["seconds"] * len(resumption["random"])  # one random state per device
    tokens, flops = job.count_until(step)
    return Progress(run.path.name, step, tokens, flops, round(seconds, 1))


def read_progress_at_branch(job: Job, root: Path) -> Progress | None:
    """Return what had been paid when a run branched off from its trunk; None if it began otherwise."""
    path = job.sibling_file(root, BRANCH_FILE)
    return Progress.from_json(path) if path.exists() else None
