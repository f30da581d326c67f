"""Directories that ranks write together: complete or absent, with checksums; and which of them to resume from.

A checkpoint inside a stage holds the same files as a finished stage (a stock model, AdamW's state, the trainer's
state), and `resume.json`: what else the run needs to go on as if it had never stopped.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from transformers.utils import logging

from ..errors import RunError
from ..records import OPTIMIZER_STEM, RunDirectory
from ..serialization import write_text
from .ranks import Ranks

logger = logging.get_logger(__name__)

CHECKSUM_FILE = "checksums.json"
RESUME_FILE = "resume.json"
CHECKPOINT = "checkpoint-"
CORRUPT = "corrupt-"
_PIECE_BYTES = 2**20


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


def _flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(directory: Path, mine: Iterable[str], ranks: Ranks) -> None:
    """Write the checksums of a directory's files.

    Args:
        directory: all ranks see the same.
        mine: files that this rank has written; the first rank sees to all that no rank names.
        ranks: of the run.
    """
    mine = set(mine)
    named: set[str] = set().union(*ranks.all_gather(sorted(mine)))
    sums: dict[str, dict[str, Any]] = {}
    with ranks.together():
        if ranks.is_first:
            rest = {path.name for path in directory.iterdir() if path.is_file()} - named
            for name in rest:
                _flush(directory / name)
            mine |= rest
        sums = {name: _checksum(directory / name) for name in mine}
    files = {name: one for part in ranks.all_gather(sums) for name, one in part.items()}
    with ranks.together():
        if ranks.is_first:
            content = {"algorithm": "xxh3_128", "files": dict(sorted(files.items()))}
            write_text(directory / CHECKSUM_FILE, json.dumps(content, indent=2) + "\n")


def _checksum(path: Path) -> dict[str, Any]:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return {"bytes": path.stat().st_size, "hash": digest.hexdigest()}


def fault_of(directory: Path, ranks: Ranks, *, is_stage: bool = False) -> str | None:
    """What is wrong with a directory's files by its checksums, on all ranks; None if nothing is.

    Args:
        directory: of a checkpoint, or of a finished stage.
        ranks: each looks at its share of the files.
        is_stage: the optimizer's state may be gone, which a finished stage does without.
    """
    fault: str | None = None
    try:
        files: dict[str, dict[str, Any]] = json.loads((directory / CHECKSUM_FILE).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {CHECKSUM_FILE}"
    except (ValueError, KeyError, TypeError, OSError) as caught:
        return f"{CHECKSUM_FILE} cannot be read ({type(caught).__name__})"
    for name in ranks.mine(sorted(files)):
        path = directory / name
        if not path.is_file():
            fault = None if is_stage and name.startswith(OPTIMIZER_STEM) else f"{name} is missing"
        elif path.stat().st_size != files[name]["bytes"]:
            fault = f"{name} has {path.stat().st_size} bytes instead of {files[name]['bytes']}"
        elif _checksum(path) != files[name]:
            fault = f"{name} does not hold what was written"
        if fault is not None:
            break
    return next((one for one in ranks.all_gather(fault) if one is not None), None)


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


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as JSON."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put every generator into the state that `random_state` took."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


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
