"""Directories that ranks write together: complete or absent, with checksums; and which of them to resume from.

A checkpoint inside a stage holds the same files as a finished stage (a stock model, AdamW's state, the trainer's
state), and `resume.json`: what else the run needs to go on as if it had never stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import RunError
from ..runs.directory import RunDirectory
from .checksums import CHECKSUM_FILE, _flush, fault_of
from .ranks import Ranks

logger = logging.get_logger(__name__)

RESUME_FILE = "resume.json"
CHECKPOINT = "checkpoint-"
CORRUPT = "corrupt-"


@contextmanager
def written_together(target: Path, ranks: Ranks) -> Iterator[Path]:
    """A fresh directory for all ranks to write into, which becomes `target` in one rename when the block ends well.

    Where it fails, on one rank or all, what was written is removed.

    Raises:
        RunError: where not all ranks see the same directory.
    """
    aside = target.with_name(f".{target.name}.writing")
    with ranks.together():
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    try:
        with ranks.together():
            if not aside.is_dir():
                raise RunError(
                    f"{aside} is not there on rank {ranks.rank}; all nodes need output_dir on a shared disk"
                )
        yield aside
        with ranks.together():
            if ranks.is_first:
                aside.rename(target)
                _flush(target.parent)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def checkpoints(run: RunDirectory, stage: int) -> list[Path]:
    """A running stage's checkpoints, the newest first."""
    found = [path for path in run.running_dir(stage).glob(f"{CHECKPOINT}*") if path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The global step of a checkpoint."""
    return int(path.name.removeprefix(CHECKPOINT))


def last_good_checkpoint(run: RunDirectory, stage: int, ranks: Ranks) -> Path | None:
    """The newest of a stage's checkpoints whose files are what was written; others are told of and renamed."""
    for path in ranks.from_first(checkpoints(run, stage)):
        fault = fault_of(path, ranks)
        if fault is None:
            return path
        logger.warning(f"{path} is corrupt: {fault}; going back to the one before")
        with ranks.together():
            if ranks.is_first:  # out of the way of the next of its name, and of those that are counted
                aside = path.with_name(f"{CORRUPT}{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
    return None


def check_stage(run: RunDirectory, stage: int, ranks: Ranks) -> None:
    """Refuse to go on from a finished stage whose files are not what was written.

    Raises:
        RunError: on all ranks.
    """
    directory = run.stage_dir(stage)
    if not (directory / CHECKSUM_FILE).exists():  # of a release before there were any
        return
    if fault := fault_of(directory, ranks, is_stage=True):
        remedy = f"`slop rollback {run.path} --to-stage {stage - 1}`" if stage else "begin another run"
        raise RunError(f"{directory} is corrupt: {fault}; fetch a copy of it, or {remedy}")


def rotate(run: RunDirectory, stage: int, keep: int | None) -> None:
    """Remove all but the newest `keep` of a stage's checkpoints; None or 0 keeps all."""
    for path in checkpoints(run, stage)[keep:] if keep else ():
        # Renamed first: half a checkpoint must not look like one.
        gone = path.with_name(f".{path.name}.removing")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def read_resume(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint keeps beside states.

    Raises:
        RunError: where it cannot be read.
    """
    path = checkpoint / RESUME_FILE
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError) as caught:
        raise RunError(f"{path} cannot be read ({caught}); resume from another checkpoint") from None
