"""Files and directories are complete or absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from slop_hf.errors import RunError
from slop_hf.io.files import (
    check_output,
    make_temporary_path,
    remove_abandoned,
    write_directory,
    write_file,
    write_text,
)


def test_a_file_is_replaced_when_it_is_complete(tmp_path: Path) -> None:
    target = write_text(tmp_path / "new" / "file.txt", "old")
    with write_file(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = write_text(tmp_path / "file.txt", "old")
    with pytest.raises(RuntimeError), write_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_directory_appears_when_it_is_complete(tmp_path: Path) -> None:
    with write_directory(tmp_path / "stage") as temporary:
        (temporary / "a").write_text("1")
        assert not (tmp_path / "stage").exists()
    assert [path.name for path in (tmp_path / "stage").iterdir()] == ["a"]


def test_a_failed_directory_is_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_directory(tmp_path / "stage"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "is_directory", "message"),
    [
        ("folder", False, "-o .*folder is a directory"),
        ("file", True, "-o .*file is a file: give a directory"),
        ("file/below", False, "below cannot be written: .*file is not a directory"),
        ("file/further/below", True, "below cannot be written: .*file is not a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, path, is_directory, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=message):
        check_output(tmp_path / path, "-o", RunError, is_directory=is_directory)


def test_an_output_that_can_be_written_is_accepted_and_not_created(tmp_path):
    (tmp_path / "file").touch()
    for path, is_directory in (("file", False), ("new/file", False), (".", True), ("new/folder", True)):
        check_output(tmp_path / path, is_directory=is_directory)
    check_output(None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


WRITER = "import sys; from slop_hf.io.files import make_temporary_path; print(make_temporary_path(sys.argv[1]))"


def find_dead_writers_path(target: Path) -> Path:
    """Return a temporary path of a process that has ended."""
    return Path(subprocess.run([sys.executable, "-c", WRITER, target], capture_output=True, text=True).stdout.strip())


def test_no_two_writers_share_a_path(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    with write_file(target) as first, write_file(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert first != second and target.read_text() == "first"


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    victim = write_text(tmp_path / "victim", "precious")
    target = tmp_path / "report.md"
    for link in (tmp_path / ".report.md.writing", target):
        link.unlink(missing_ok=True)
        link.symlink_to(victim)
        write_text(target, "text")
        assert victim.read_text() == "precious" and target.read_text() == "text" and not target.is_symlink()


@pytest.mark.parametrize("is_directory", [False, True])
def test_writing_again_removes_what_a_killed_process_left(is_directory: bool, tmp_path: Path) -> None:
    target = tmp_path / "stage"
    leftovers = [find_dead_writers_path(target), tmp_path / ".stage.writing"]  # the latter of an earlier release
    others = [
        make_temporary_path(target),
        tmp_path / ".stage.elsewhere-1-0123abcd.writing",
        tmp_path / ".stages.writing",
    ]
    for path in (*leftovers, *others):
        path.mkdir()
        (path / "old").touch()
    if is_directory:
        with write_directory(target):
            pass
    else:
        write_text(target, "")
    assert sorted(tmp_path.iterdir()) == sorted([target, *others])


def test_a_directory_is_cleaned_of_what_killed_processes_left(tmp_path: Path) -> None:
    below = tmp_path / "stage" / "part"
    below.mkdir(parents=True)
    alive = make_temporary_path(below / "weights")
    for path in (find_dead_writers_path(below / "weights"), find_dead_writers_path(tmp_path / "stage"), alive):
        path.mkdir()
        (path / ".file.writing").touch()
    remove_abandoned(tmp_path)
    assert list(below.iterdir()) == [alive] and list(tmp_path.iterdir()) == [tmp_path / "stage"]
