"""Checksums of the files of a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from ..io.files import write_text
from ..runs.directory import OPTIMIZER_STEM
from .ranks import Ranks

CHECKSUM_FILE = "checksums.json"
_PIECE_BYTES = 2**20


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
