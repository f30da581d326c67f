"""What a killed process left in a run's directory, and its removal when the run is resumed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..io.files import remove_abandoned
from ..runs.directory import RunDirectory
from .ranks import Ranks


def remove_leftovers(
    run: RunDirectory, ranks: Ranks, *, keep_optimizer_states: bool, keep_checkpoints: bool = False
) -> None:
    """Remove the files and directories that a killed process of a run was about to complete or to remove.

    Call it only when no other process trains the run.
    """
    with ranks.raise_on_all():
        if ranks.is_first:
            for path in _list_leftovers(run, keep_optimizer_states, keep_checkpoints):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
            remove_abandoned(run.path)


def _list_leftovers(run: RunDirectory, keep_optimizer_states: bool, keep_checkpoints: bool) -> Iterator[Path]:
    finished, names = run.finished_stages, run.schedule.stage_names
    for number, name in enumerate(names):
        yield from run.path.glob(f".{name}.*writing")  # a stage cut short
        if number < finished:
            if not keep_checkpoints and (running := run.running_dir(number)).exists():
                yield running  # the stage was complete, its checkpoints were not removed yet
        else:
            yield from run.running_dir(number).glob(".*.writing")
            yield from run.running_dir(number).glob(".*.removing")
    if finished > 1 and not keep_optimizer_states:
        yield from run.optimizer_files(finished - 2)  # the stage after it has finished too
