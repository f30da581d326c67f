"""One writer per directory: a lock that every process of a run holds for as long as it lives.

    DIRECTORY/.lock/rank-0, rank-1 ...   files that the operating system locks, one per process
    DIRECTORY/.lock/processes.json       the processes, for messages
    DIRECTORY/.lock/progress.json        progress of their training (`runs.status`)

The operating system releases a lock when its process ends, however it ends: a lock is never stale. If the launcher of
a run is killed, ranks that live on keep theirs. The files stay, and mean nothing without the locks.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from ..errors import RunError, SlopError
from ..io.record import Record

LOCK_DIRECTORY = ".lock"
PROCESSES_FILE = "processes.json"
#: Seconds to wait for ranks of a run that has just ended, which exit one after another.
PATIENCE = 5.0

logger = logging.getLogger(__name__)
_held: set[Path] = set()  # directories that this process has locked


@dataclass(frozen=True)
class Process:
    """A process that writes into a directory.

    Args:
        host: name of its machine.
        pid: its number there.
        started: when it began, in seconds since 1970: numbers are used again.
    """

    host: str
    pid: int
    started: float

    @classmethod
    def current(cls) -> Process:
        """Return this process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def may_live(self) -> bool:
        """Whether the process lives, as far as this machine can tell."""
        if self.host != socket.gethostname():
            return True
        with suppress(psutil.Error):
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1
        return False


@dataclass(frozen=True)
class Writers(Record, error=RunError):
    """The processes that write into a directory, as `processes.json` names them.

    Args:
        action: what they do, such as "training".
        since: local time at which they began.
        processes: the processes, by rank.
    """

    action: str
    since: str
    processes: tuple[Process, ...]

    def __str__(self) -> str:
        by_host: dict[str, list[str]] = {}
        for process in self.processes:
            if process.may_live():
                by_host.setdefault(process.host, []).append(str(process.pid))
        parts = [
            f"process{'es' * (len(pids) > 1)} {', '.join(pids)} on {host}" for host, pids in sorted(by_host.items())
        ]
        return f"{self.action} since {self.since}: {'; '.join(parts) or 'a process'}"


class DirectoryLock:
    """The part of a directory's lock that one process holds.

    Args:
        directory: directory to lock; it is made if it does not exist.
        rank: rank of this process in its run.
    """

    def __init__(self, directory: str | Path, rank: int = 0) -> None:
        self.directory, self.rank = Path(directory), rank
        self._path = self.directory / LOCK_DIRECTORY
        self._locks = ExitStack()

    def acquire(self) -> None:
        """Lock the directory, as the first rank of a run.

        Raises:
            RunError: if another process writes into the directory; the message names it.
        """
        if not self._acquire(self.rank, 0):
            raise self._describe_writers()
        deadline = time.monotonic() + PATIENCE
        for path in self._path.glob("rank-*"):  # of earlier runs, some of whose ranks may live on
            rank = int(path.name.removeprefix("rank-"))
            with ExitStack() as probe:
                if rank != self.rank and not self._acquire(rank, max(deadline - time.monotonic(), 0), probe):
                    self.release()
                    raise self._describe_writers()

    def join(self) -> None:
        """Hold the lock together with the first rank, which has acquired it."""
        if not self._acquire(self.rank, PATIENCE):
            raise self._describe_writers()

    def name_writers(self, action: str, processes: Sequence[Process]) -> None:
        """Write down who holds the lock, for the messages to others."""
        writers = Writers(action, time.strftime("%Y-%m-%d %H:%M:%S"), tuple(processes))
        writers.to_json(self._path / PROCESSES_FILE)

    def release(self) -> None:
        """Release what this process holds."""
        self._locks.close()

    def _acquire(self, rank: int, patience: float, locks: ExitStack | None = None) -> bool:
        """Lock the file of a rank; whether it was free, or became free in time."""
        self._path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._path / f"rank-{rank}", thread_local=False)
        try:
            lock.acquire(timeout=patience)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as caught:  # older releases of filelock raise the latter for ENOSYS
            if isinstance(caught, OSError) and caught.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            logger.warning(f"this file system cannot lock {self._path}: see to it that nobody else writes there")
            return True
        (locks or self._locks).callback(lock.release)
        return True

    def _describe_writers(self) -> RunError:
        try:
            writers = str(Writers.from_json(self._path / PROCESSES_FILE))
        except SlopError:  # they are about to write it
            writers = "another process"
        return RunError(
            f"{self.directory} is in use ({writers}); wait for it or stop it, or choose another output directory"
        )


def find_writers(directory: str | Path) -> Writers | None:
    """Return the processes that write into a directory; None if there are none.

    They have to live, as far as this machine can tell, and to hold the lock, which is tried only then: a run that
    begins in the same moment would find it taken. If it cannot be tried, as in a directory of another user, it counts
    as held.

    Raises:
        RunError: if the file that names them is not valid.
    """
    path = Path(directory) / LOCK_DIRECTORY
    if not (path / PROCESSES_FILE).is_file():
        return None
    writers = Writers.from_json(path / PROCESSES_FILE)
    may_write = any(process.may_live() for process in writers.processes)
    return writers if may_write and any(map(_is_locked, path.glob("rank-*"))) else None


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, thread_local=False).acquire(timeout=0):
            return False
    except (Timeout, OSError, NotImplementedError):
        return True


@contextmanager
def lock_directory(directory: str | Path, action: str) -> Iterator[None]:
    """Keep other processes from writing into a directory during the block; `training.run_lock` is the same for ranks.

    A block inside another one for the same directory changes nothing.

    Args:
        directory: directory of a run or of runs.
        action: what the block does, such as "publishing", for the messages to others.

    Raises:
        RunError: if another process writes there; the message names it.
    """
    with hold_once(directory) as is_outer:
        if not is_outer:
            yield
            return
        lock = DirectoryLock(directory)
        try:
            lock.acquire()
            lock.name_writers(action, [Process.current()])
            yield
        finally:
            lock.release()


def require_unlocked(directory: str | Path) -> None:
    """Refuse a directory that another process writes into, before slow preparations; `lock_directory` decides.

    Raises:
        RunError: if another process writes there; the message names it.
    """
    path = Path(directory)
    if path.resolve() in _held or not (path / LOCK_DIRECTORY).is_dir():
        return
    lock = DirectoryLock(path)
    lock.acquire()
    lock.release()


@contextmanager
def hold_once(directory: str | Path) -> Iterator[bool]:
    """Yield whether this process does not hold the directory's lock yet; inside the block it counts as held."""
    path = Path(directory).resolve()
    if path in _held:
        yield False
        return
    _held.add(path)
    try:
        yield True
    finally:
        _held.discard(path)
