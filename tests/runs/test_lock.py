"""One writer per directory: who is refused, in which words, and when the lock is free again."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from slop_hf.errors import RunError
from slop_hf.runs import lock as locks
from slop_hf.runs.lock import DirectoryLock, Process, lock_directory

HOLDER = """
import sys, time
from slop_hf.runs.lock import DirectoryLock, Process
lock = DirectoryLock(sys.argv[1], rank=int(sys.argv[2]))
lock.acquire() if lock.rank == 0 else lock.join()
print(Process.current().pid, flush=True)
sys.stdin.read()
"""


@contextmanager
def hold_in_another_process(directory: Path, rank: int = 0) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, directory, str(rank)], text=True, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.1)


def test_a_second_process_is_refused_until_the_first_one_ends(tmp_path: Path) -> None:
    with hold_in_another_process(tmp_path) as process:
        with pytest.raises(RunError, match=r"in use \(another process\); wait for it or stop it"):
            DirectoryLock(tmp_path).acquire()
        process.kill()
        process.wait()
        with lock_directory(tmp_path, "training"):
            pass


def test_the_message_names_the_processes(another_writer, tmp_path: Path) -> None:
    with another_writer(tmp_path), pytest.raises(RunError, match=r"\(training since 2.*: process 1 on elsewhere\)"):
        DirectoryLock(tmp_path).acquire()


def test_a_rank_that_lives_on_keeps_the_directory(tmp_path: Path) -> None:
    """The first rank is gone: the message names only the other one."""
    with hold_in_another_process(tmp_path, rank=1) as orphan:
        host = Process.current().host
        living = Process(host, orphan.pid, psutil.Process(orphan.pid).create_time())
        DirectoryLock(tmp_path).name_writers("training", [Process(host, 2**22 + 1, 0.0), living])
        with pytest.raises(RunError, match=rf": process {orphan.pid} on {host}\)"):
            DirectoryLock(tmp_path).acquire()
        with pytest.raises(RunError):  # the failed attempt has released what it held
            DirectoryLock(tmp_path).acquire()
    with lock_directory(tmp_path, "training"):
        pass


def test_a_rank_about_to_exit_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 30)
    with hold_in_another_process(tmp_path, rank=1) as orphan:
        assert orphan.stdin is not None
        orphan.stdin.close()
        with lock_directory(tmp_path, "training"):
            pass


def test_the_number_of_a_process_may_be_used_again() -> None:
    now = Process.current()
    assert now.may_live() and not Process(now.host, now.pid, now.started - 3600).may_live()


def test_blocks_for_one_directory_nest(tmp_path: Path) -> None:
    with lock_directory(tmp_path, "comparing"):
        with lock_directory(tmp_path / ".", "training"):
            pass
        with pytest.raises(RunError, match="comparing since"):
            DirectoryLock(tmp_path).acquire()
    DirectoryLock(tmp_path).acquire()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("use SoftFileLock")]
)
def test_a_file_system_without_locks_is_warned_of(error: Exception, tmp_path: Path, monkeypatch, caplog) -> None:
    def refuse(self: FileLock, timeout: float) -> None:
        raise error

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with caplog.at_level(logging.WARNING), lock_directory(tmp_path, "training"):
        pass
    assert "this file system cannot lock" in caplog.text


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    (tmp_path / "run" / ".lock" / "rank-0").symlink_to(victim)
    with pytest.raises((RunError, OSError)), lock_directory(tmp_path / "run", "training"):
        pass
    assert victim.read_text() == "precious"
