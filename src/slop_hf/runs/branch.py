"""Starting a run from the finished stages of another one."""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from ..io.files import write_directory
from ..schedule import GrowthSchedule
from .directory import RUNNING, SCHEDULE_FILE, RunDirectory, RunFacts
from .settings import RunSettings


def inherit(
    source: RunDirectory,
    run: RunDirectory,
    schedule: GrowthSchedule,
    *,
    name: str,
    checkpoint: Path | None = None,
    stages: int | None = None,
) -> None:
    """Begin a run with finished stages of another run; files are hard-linked if the disk supports it.

    Its seeds, its optimizer and the arguments of its growths are those that it is then trained with.

    Args:
        schedule: schedule of the new run; its stages that `source` has finished are taken over.
        name: prefix of the new run's id.
        checkpoint: checkpoint of the source's stage in training that the run continues from; None to continue after
            the finished stages.
        stages: number of finished stages to take over; by default all.
    """
    facts = RunFacts.load(source)
    finished = source.schedule.stage_names[: source.finished_stages if stages is None else stages]
    with write_directory(run.path) as temporary:
        for _, stage in zip(schedule.stage_names, finished, strict=False):
            shutil.copytree(source.path / stage, temporary / stage, copy_function=_link)
        if checkpoint is not None:
            running = temporary / f"{schedule.stage_name(len(finished))}{RUNNING}"
            shutil.copytree(checkpoint, running / checkpoint.name, copy_function=_link)
        if facts is not None:
            facts = replace(facts, run_id=f"{name}-{secrets.token_hex(3)}").forget_choices()
            facts.save(RunDirectory(temporary))
        if (settings := RunSettings.load(source)) is not None:
            settings.save(RunDirectory(temporary))
        schedule.to_yaml(temporary / SCHEDULE_FILE)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
