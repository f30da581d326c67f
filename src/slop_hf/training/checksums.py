"""Checksums of the files of a stage or a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import xxhash

from ..io.files import flush_to_disk, write_text
from ..io.serialization import to_json
from ..runs.directory import OPTIMIZER_STEM
from .ranks import Ranks

CHECKSUM_FILE = "checksums.json"
_PIECE_BYTES = 2**20


class Checksum(TypedDict):
    """Size and hash of a file."""

    bytes: int
    hash: str


class RunningChecksum:
    """Checksum of a file whose bytes pass by in order, as they are written or read."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self._bytes = 0

    def update(self, piece: bytes | memoryview) -> None:
        self._digest.update(piece)
        self._bytes += len(piece)

    def finish(self) -> Checksum:
        """Return the checksum of the bytes so far."""
        return {"bytes": self._bytes, "hash": self._digest.hexdigest()}


def write_checksums(directory: Path, written: Mapping[str, Checksum], ranks: Ranks) -> None:
    """Write the checksums of a directory's files.

    Args:
        written: checksums of the files that this rank has written; the first rank reads files that no rank names.
    """
    files = {name: checksum for part in ranks.gather_all(dict(written)) for name, checksum in part.items()}
    with ranks.raise_on_all():
        if ranks.is_first:
            for path in directory.iterdir():
                if path.is_file() and path.name not in files:
                    flush_to_disk(path)
                    files[path.name] = _compute_checksum(path)
            content = {"algorithm": "xxh3_128", "files": dict(sorted(files.items()))}
            write_text(directory / CHECKSUM_FILE, to_json(content))


def _compute_checksum(path: Path) -> Checksum:
    checksum, buffer = RunningChecksum(), memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum.update(buffer[:count])
    return checksum.finish()


def find_corruption(directory: Path, ranks: Ranks, *, is_stage: bool = False) -> str | None:
    """Compare a directory's files with their checksums; return the first difference, the same on all ranks, or None.

    Each rank reads its share of the files.

    Args:
        is_stage: whether the optimizer state may be missing, as in a finished stage.
    """
    fault, files = ranks.from_first(_read_checksums(directory) if ranks.is_first else (None, {}))
    if fault is not None:
        return fault
    with ranks.raise_on_all():
        for name in ranks.select_share(sorted(files)):
            path = directory / name
            if not path.is_file():
                fault = None if is_stage and name.startswith(OPTIMIZER_STEM) else f"{name} is missing"
            elif path.stat().st_size != files[name]["bytes"]:
                fault = f"{name} has {path.stat().st_size} bytes instead of {files[name]['bytes']}"
            elif _compute_checksum(path) != files[name]:
                fault = f"{name} does not hold what was written"
            if fault is not None:
                break
    return next(filter(None, ranks.gather_all(fault)), None)


def _read_checksums(directory: Path) -> tuple[str | None, dict[str, Checksum]]:
    """Return why the checksums cannot be read, or None, and the checksums by file."""
    try:
        return None, json.loads((directory / CHECKSUM_FILE).read_text())["files"]
    except FileNotFoundError:
        return f"it has no {CHECKSUM_FILE}", {}
    except (ValueError, KeyError, TypeError, OSError) as caught:
        return f"{CHECKSUM_FILE} cannot be read ({type(caught).__name__})", {}
