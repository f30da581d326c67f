"""Atomic writes of files and directories: a reader finds the whole of one or nothing."""

from __future__ import annotations

import glob
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from ..errors import SlopError

WRITING = ".writing"
_WRITER = re.compile(rf"\..+-(\d+)-[0-9a-f]{{8}}{re.escape(WRITING)}")


def make_temporary_path(target: str | os.PathLike[str]) -> Path:
    """Return a path next to `target` to write it under until it is complete.

    The name says which process writes, and no other call returns it: processes that write the same target do not meet,
    and nobody can have put a link in its way.

    >>> make_temporary_path("runs/report.md").as_posix()  # doctest: +SKIP
    'runs/.report.md.node-1-4711-9f86d081.writing'
    """
    target = Path(target)
    return target.with_name(f".{target.name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}{WRITING}")


def list_abandoned(target: str | os.PathLike[str]) -> list[Path]:
    """Return the temporary paths of `target` whose writers on this host have ended, as after SIGKILL."""
    target = Path(target)
    earlier = f".{target.name}{WRITING}"  # the name that earlier releases gave
    paths = target.parent.glob(f".{glob.escape(target.name)}.*{WRITING[1:]}")
    return [path for path in paths if path.name == earlier or _is_abandoned(path)]


def remove_abandoned(directory: str | os.PathLike[str]) -> None:
    """Remove the temporary paths in a directory, and below it, whose writers on this host have ended."""
    for path in sorted(Path(directory).rglob(f".*{WRITING}")):  # parents before children
        if _is_abandoned(path):
            _remove(path)


def _is_abandoned(path: Path) -> bool:
    writer = _WRITER.fullmatch(path.name)
    if writer is None:
        return True  # of an earlier release
    return f".{socket.gethostname()}-{writer[1]}-" in path.name and not psutil.pid_exists(int(writer[1]))


def find_near(path: str, folder: str | os.PathLike[str], *, working_first: bool = False) -> str:
    """Return a path that a file in `folder` names: next to that file if it exists there, else as it is.

    As it is, a relative path belongs to the working directory. Names that are no paths, such as URLs and ids on the
    Hub, come back as they are.

    Args:
        working_first: whether the working directory comes first, as for what was typed on the command line.

    >>> find_near("owner/name", "runs")
    'owner/name'
    """
    near = Path(folder, path)
    if not path or near == Path(path) or (working_first and os.path.exists(path)) or not os.path.exists(near):
        return path
    return str(near)


@contextmanager
def write_file(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write a file under; rename it to `target` when the block ends without an error.

    Missing parent directories are made. If the block fails, the temporary file is removed.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in list_abandoned(target):
        _remove(leftover)
    temporary = make_temporary_path(target)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically, in UTF-8, and return its path."""
    with write_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@contextmanager
def write_directory(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory to write into; rename it to `target` when the block ends without an error.

    Every file is flushed to disk before the rename. If the block fails, the directory is removed.
    """
    target = Path(target)
    for leftover in list_abandoned(target):
        _remove(leftover)
    temporary = make_temporary_path(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                flush_to_disk(file)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove(leftover: Path) -> None:
    """Remove a file, a link or a directory; another process may do the same."""
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until the disk holds what was written to a file, or the entries of a directory."""
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes only writable files
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(
    path: str | os.PathLike[str] | None,
    name: str = "",
    error: type[SlopError] = SlopError,
    *,
    is_directory: bool = False,
) -> None:
    """Refuse a path that nothing can be written to, before the work that the output is for. Nothing is created.

    Args:
        path: file or directory to write later; None for no output.
        name: option or argument that names it, for the message.
        error: class of error to raise.
        is_directory: whether a directory will be written, which may exist.

    >>> check_output(".", "--output")
    Traceback (most recent call last):
    slop_hf.errors.SlopError: --output . is a directory: give the path of a file in it
    """
    if path is None:
        return
    path, label = Path(path), f"{name} {path}".strip()
    if path.is_dir() and not is_directory:
        raise error(f"{label} is a directory: give the path of a file in it")
    if path.exists() and is_directory and not path.is_dir():
        raise error(f"{label} is a file: give a directory")
    places = [path, *path.absolute().parents] if is_directory else path.absolute().parents
    nearest = next(place for place in places if place.exists() or place.is_symlink())
    if not nearest.is_dir():
        raise error(f"{label} cannot be written: {nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise error(f"{label} cannot be written: no permission to write in {nearest}")


def require_absent(path: str | os.PathLike[str], kind: str, *, error: type[SlopError] = SlopError) -> None:
    """Refuse an existing file, directory or link as the target of something new.

    Args:
        path: path to write later.
        kind: what to choose instead, for the message: "file" or "directory".
        error: class of error to raise.

    >>> require_absent(".", "directory")
    Traceback (most recent call last):
    slop_hf.errors.SlopError: . exists already; choose a new directory, nothing is overwritten
    """
    if os.path.lexists(path):
        raise error(f"{os.fspath(path)} exists already; choose a new {kind}, nothing is overwritten")


def require_path(value: object, name: str, *, error: type[SlopError] = SlopError) -> None:
    """Refuse anything but a path.

    Args:
        value: path to check.
        name: name of the argument, for the message.
        error: class of error to raise.

    >>> require_path(None, "target")
    Traceback (most recent call last):
    slop_hf.errors.SlopError: target must be a path, got NoneType
    """
    if not isinstance(value, str | os.PathLike):
        raise error(f"{name} must be a path, got {type(value).__name__}")
