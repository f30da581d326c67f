"""One directory, one writer: every command that writes into a run is refused while another process does."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import environment, start, weights
from training_runs import BATCH, trainer

from slop_hf import RunDirectory
from slop_hf.errors import RunError


def run_slop(*words: object) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", "from slop_hf.cli import main; main()", *map(str, words)]
    return subprocess.Popen(command, env=environment(), text=True, **pipes)


@pytest.fixture
def run(config, tmp_path, output_of) -> Path:
    """A finished run."""
    output_of("train", config, "-o", tmp_path / "run")
    return tmp_path / "run"


def test_commands_that_write_into_a_run_are_refused(config, run, another_writer, error_of, tmp_path) -> None:
    commands = [
        ("train", config, "-o", run, "--resume"),
        ("train", config, "-o", run),
        ("rollback", run, "--to-stage", 1),
        ("publish", run, "--to", "user/name"),
    ]
    with another_writer(run):
        for command in commands:
            assert "is in use (training since" in error_of(*command), command
    assert RunDirectory(run).is_finished


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 0.3, 1, 2])
def test_of_two_trainings_of_one_directory_one_is_refused(config, run, seconds, tmp_path) -> None:
    shared = tmp_path / "shared"
    first = run_slop("train", config, "-o", shared)
    time.sleep(seconds)
    second = run_slop("train", config, "-o", shared)
    ended = [(process.communicate()[1], process.returncode) for process in (first, second)]
    (text,) = [text for text, code in ended if code]
    assert sorted(code for _, code in ended) == [0, 2]
    assert [line for line in text.splitlines() if line.startswith("error: ")] == [text.strip().splitlines()[-1]]
    assert "is in use" in text or "holds another run" in text
    for name in RunDirectory(run).schedule.stage_names:
        alone, beside = weights(run, name), weights(shared, name)
        assert all((alone[key] == beside[key]).all() for key in alone) and alone.keys() == beside.keys()


def test_a_rank_whose_launcher_was_killed_keeps_the_directory(tmp_path) -> None:
    """It trains on; a resumption is refused until it has ended."""
    output = tmp_path / "run"
    launcher = start("ddp", 1, output=output, batch=BATCH, at={"1": "hang"})
    while not (output / "hanging-0").exists():
        time.sleep(0.05)
        assert launcher.poll() is None
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.kill()
    launcher.wait()
    try:
        with pytest.raises(RunError, match=rf"is in use \(training since .*: process {rank.pid} on "):
            trainer(output).train(resume_from_checkpoint=True)
    finally:
        rank.kill()
