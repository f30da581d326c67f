"""`lock_on_all_ranks`: a run directory that belongs to the processes of one launch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..runs.lock import DirectoryLock, Process, hold_once
from .ranks import Ranks


@contextmanager
def lock_on_all_ranks(directory: Path, action: str, ranks: Ranks) -> Iterator[None]:
    """Keep processes of other launches from writing into a directory during the block.

    Each rank holds a lock of its own, so that the directory is in use while one of them lives.
    `runs.lock.lock_directory` is the same for one process.

    Raises:
        RunError: on all ranks, if another process writes there; the message names it.
    """
    with hold_once(directory) as is_outer:
        if not is_outer:
            yield
            return
        lock = DirectoryLock(directory, ranks.rank)
        try:
            with ranks.raise_on_all():
                if ranks.is_first:
                    lock.acquire()
            with ranks.raise_on_all():
                if not ranks.is_first:
                    lock.join()
            processes = ranks.gather_all(Process.current())
            with ranks.raise_on_all():
                if ranks.is_first:
                    lock.name_writers(action, processes)
            yield
        finally:
            lock.release()
