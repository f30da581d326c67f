"""The checkpoints of the stage in training: verify, remove and read them.

A checkpoint holds the files of a finished stage (a stock model, AdamW's state, the trainer's state), and
`resume.json`: what else the run needs to continue as if it had never stopped.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypedDict, cast

from transformers.utils import logging

from ..errors import RunError
from ..io.serialization import Json, read_json
from ..runs.directory import RunDirectory, list_checkpoints
from .checksums import CHECKSUM_FILE, find_corruption
from .ranks import Ranks

logger = logging.get_logger(__name__)

RESUME_FILE = "resume.json"


class LossSums(TypedDict):
    """Sums of the losses of a stage, from which `Trainer` computes the means that it logs.

    Keys:
        total: sum over the steps up to the last log.
        logged: global step of the last log.
        pending: sum over the steps since then, of each rank.
    """

    total: float
    logged: int
    pending: list[float]


class GrowthFacts(TypedDict):
    """The growth at the beginning of a stage, as it happened.

    Keys:
        init: init of each operator.
        seed: seed of the entries drawn at random.
        noise: noise on copies, as a fraction of `initializer_range`.
    """

    init: dict[str, str]
    seed: int
    noise: float


class Resumption(TypedDict, total=False):
    """Content of `resume.json`.

    Keys:
        growth: the growth that the stage began with; None without one.
        seconds: seconds that the stage has trained for.
        scheduler: state of the learning-rate scheduler.
        scaler: state of the loss scaler; None without one.
        losses: sums of the losses of the stage.
        random: state of the random number generators of each rank.
    """

    growth: GrowthFacts | None
    seconds: float
    scheduler: dict[str, Json]
    scaler: dict[str, Json] | None
    losses: LossSums
    random: list[dict[str, Json]]


def find_last_good_checkpoint(run: RunDirectory, stage: int, ranks: Ranks) -> Path | None:
    """Return the newest checkpoint of a stage whose files are intact, or None; log and rename corrupt ones."""
    for path in ranks.from_first(list_checkpoints(run, stage)):
        fault = find_corruption(path, ranks)
        if fault is None:
            return path
        logger.warning(f"{path} is corrupt: {fault}; going back to the checkpoint before")
        with ranks.raise_on_all():
            if ranks.is_first:  # so that it is neither counted nor in the way of the next one with its name
                corrupt = path.with_name(f"corrupt-{path.name}")
                shutil.rmtree(corrupt, ignore_errors=True)
                path.rename(corrupt)
    return None


def check_stage(run: RunDirectory, stage: int, ranks: Ranks) -> None:
    """Refuse to continue from a finished stage whose files have changed."""
    directory = run.stage_dir(stage)
    if not (directory / CHECKSUM_FILE).exists():  # written by a release without checksums
        return
    if fault := find_corruption(directory, ranks, is_stage=True):
        remedy = f"`slop rollback {run.path} --to-stage {stage - 1}`" if stage else "begin another run"
        raise RunError(f"{directory} is corrupt: {fault}; restore it from a copy, or {remedy}")


def remove_old_checkpoints(run: RunDirectory, stage: int, keep: int | None) -> None:
    """Remove all but the newest `keep` checkpoints of a stage; None or 0 keeps all."""
    for path in list_checkpoints(run, stage)[keep:] if keep else ():
        remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; it is renamed first, because half of one must not look like a whole one."""
    removing = path.with_name(f".{path.name}.removing")
    path.rename(removing)
    shutil.rmtree(removing, ignore_errors=True)


def read_resumption(checkpoint: Path) -> Resumption:
    """Read the `resume.json` of a checkpoint."""
    content = read_json(checkpoint / RESUME_FILE, if_missing="resume from another checkpoint", error=RunError)
    return cast(Resumption, content)
