"""An interrupted run ends with the weights of an uninterrupted one, bit for bit."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import STEPS, Interrupt, losses, same_weights, trainer

from slop_hf import RunDirectory


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out"
    trainer(path).train()
    return path


def test_interrupted_at_steps_of_every_kind(whole, tmp_path):
    """Before the first checkpoint, in mid-stage, at a stage's last step, and after one."""
    path = tmp_path / "out"
    for step in (2, 5, STEPS, STEPS + 1, 2 * STEPS + 4, 4 * STEPS):
        with pytest.raises(KeyboardInterrupt):
            trainer(path, callbacks=[Interrupt(step)]).train(resume_from_checkpoint=RunDirectory(path).exists)
    trainer(path).train(resume_from_checkpoint=True)
    assert same_weights(whole, path)
    assert losses(path) == losses(whole)


@pytest.mark.parametrize("where", ["save_stage", "load_states", "evaluate", "_change_model", "_drop_optimizer_state"])
def test_interrupted_at_a_boundary(whole, tmp_path, monkeypatch, where):
    from slop_hf.training import trainer as module

    path = tmp_path / "out"
    owner = module.SlopTrainer if hasattr(module.SlopTrainer, where) else module
    real = getattr(owner, where)
    calls = []

    def fail_late(*args, **kwargs):
        calls.append(where)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, where, fail_late)
    with pytest.raises(KeyboardInterrupt):
        trainer(path).train()
    monkeypatch.undo()
    trainer(path).train(resume_from_checkpoint=True)
    assert same_weights(whole, path)


@pytest.mark.parametrize("where", ["write_checksums", "get_random_state", "save_states"])
def test_a_checkpoint_cut_short_is_not_resumed_from(whole, tmp_path, monkeypatch, where):
    from slop_hf.training import saving

    def interrupt(*args):
        raise KeyboardInterrupt

    path = tmp_path / "out"
    monkeypatch.setattr(saving, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer(path).train()
    monkeypatch.undo()
    assert not list(RunDirectory(path).running_dir(0).iterdir())
    trainer(path).train(resume_from_checkpoint=True)
    assert same_weights(whole, path)


def test_checkpoints_are_rotated(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer(path, callbacks=[Interrupt(STEPS)], save_steps=2, save_total_limit=2).train()
    names = sorted(item.name for item in RunDirectory(path).running_dir(0).iterdir())
    assert names == ["checkpoint-4", "checkpoint-6"]


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from training_runs import trainer
from slop_hf import RunDirectory
path = Path(sys.argv[1])
trainer(path, save_steps=2).train(resume_from_checkpoint=RunDirectory(path).exists)
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """SIGKILL twice at random moments, in a separate process; three such runs."""
    command = [sys.executable, "-c", SCRIPT]
    here = str(Path(__file__).parent)

    def start(path):
        return subprocess.Popen([*command, str(path), here], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def wait_for_run(path, process):
        while not (path / "schedule.yaml").exists() and process.poll() is None:
            time.sleep(0.05)

    whole = tmp_path / "whole"
    process = start(whole)
    wait_for_run(whole, process)
    began = time.perf_counter()
    assert process.wait() == 0
    training_seconds = time.perf_counter() - began

    dice = random.Random(0)
    kills = 0
    for attempt in range(3):
        path = tmp_path / f"killed-{attempt}"
        for _ in range(2):
            process = start(path)
            wait_for_run(path, process)
            time.sleep(dice.uniform(0.05, 0.9) * training_seconds)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait()
        process = start(path)
        assert process.wait() == 0
        assert same_weights(whole, path)
        assert losses(path) == losses(whole)
    assert kills >= 3
