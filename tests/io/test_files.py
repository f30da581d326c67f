"""Files and directories are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from slop_hf.errors import RunError
from slop_hf.io.files import check_output, make_temporary_path, write_directory, write_file, write_text


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
    leftover = make_temporary_path(tmp_path / "stage")
    leftover.mkdir()
    (leftover / "old").touch()
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
