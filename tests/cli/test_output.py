"""What commands print and write: characters that a terminal lacks, and paths that no file can be written to."""

import io
import json
import sys
from pathlib import Path

import pytest

from slop_hf.cli import app, main
from slop_hf.cli.shared import print_json

PLAN = ["plan", "--initial", "768,2048,6,6", "--target", "2816,7680,8,22"]
COMMANDS = [[], *([command.name] for command in app.registered_commands), ["data"]]


@pytest.fixture
def slop_in(monkeypatch):
    """Run `slop` with stdout and stderr of an encoding: (exit code, stdout, stderr)."""

    def run(encoding, *arguments):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        monkeypatch.setattr(sys, "argv", ["slop", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        for stream in streams:
            stream.flush()
        return ended.value.code or 0, *(stream.buffer.getvalue().decode(encoding) for stream in streams)

    return run


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_can_be_printed(slop_in, command):
    code, out, _ = slop_in("ascii", *command, "--help")
    assert code == 0 and "Usage" in out


def test_tables_in_ascii(slop_in):
    code, out, err = slop_in("ascii", *PLAN, "--tokens", "65e9", "--explain")
    assert code == 0, err
    assert "Prod dparams" in out and "->" in out and "\\" not in out
    code, out, _ = slop_in("ascii", "reproduce", "table1")
    assert code == 0 and "Prod dparams, 10 of 10 agree" in out


def test_errors_in_ascii(slop_in):
    code, _, err = slop_in("ascii", *PLAN, "--objective", "Glück")
    assert code == 2 and r"unknown objective 'Gl\xfcck'" in err


def test_json_in_ascii_holds_the_same_values(slop_in):
    value = {"name": "Π → é ☕ \U0001f600"}
    answers = []
    for encoding in ("ascii", "cp1252", "utf-8"):
        slop_in(encoding, "reproduce", "table4", "--json")  # leaves sys.stdout as the command had it
        print_json(value)
        sys.stdout.flush()
        answers.append(sys.stdout.buffer.getvalue().decode(encoding).rpartition("]\n")[2])
    assert [json.loads(answer) for answer in answers] == [value] * 3


UNWRITABLE = {
    "a directory": (".", "is a directory: give the path of a file in it"),
    "below a file": ("file/plan.yaml", "file is not a directory"),
    "below a device": ("/dev/null/plan.yaml", "/dev/null is not a directory"),
}
WRITERS = {
    "plan -o": [*PLAN, "-o"],
    "plan --plot": [*PLAN, "--plot"],
    "reproduce": ["reproduce", "table4", "-o"],
    "calibrate": ["calibrate", "-o"],
}


@pytest.mark.parametrize("command", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize(("path", "message"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_unwritable_output_is_refused_first(error_of, tmp_path, monkeypatch, command, path, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    error = error_of(*command, path)
    assert message in error and command[-1].replace("-o", "--output") in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_without_permission(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert "no permission to write in" in error_of(*PLAN, "-o", tmp_path / "plan.yaml")


def test_a_figure_of_another_format_is_refused_first(error_of, tmp_path):
    assert "plan.bmp" in error_of(*PLAN, "-o", tmp_path / "plan.yaml", "--plot", tmp_path / "plan.bmp")
    assert list(tmp_path.iterdir()) == []
