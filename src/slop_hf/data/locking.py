"""Locks in the cache: one process at a time makes a folder or appends to a download."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ..errors import DataError


@contextmanager
def lock_cache(path: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block; its folder is created.

    Raises:
        DataError: if the cache cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as caught:
        raise DataError(
            f"the cache {path.parent} cannot be written ({caught.strerror or caught}): choose another cache_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
