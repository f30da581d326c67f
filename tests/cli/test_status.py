"""`slop status` and `slop sample`: a run that was interrupted, trains, or has finished."""

import json
import shutil
import time

import pytest
from run_files import write_run_file
from transformers import TrainerCallback

from slop_hf import ModelDims, RunConfig, RunDirectory, train_run
from slop_hf.cli import status as status_module
from slop_hf.errors import RunError
from slop_hf.runs import status as status_of_runs
from slop_hf.runs.directory import find_newest_model
from slop_hf.runs.lock import DirectoryLock, Process, find_writers
from slop_hf.runs.status import LiveProgress, read_status

DIMS = ModelDims(16, 32, 2, 2)
STEPS, TOKENS = 15, 15 * 4 * 32


class Interrupt(TrainerCallback):
    """Ends a run as a kill would, in the middle of its second stage."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            raise RuntimeError("killed")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run of three stages of five steps that was killed after its eighth step, with a checkpoint of the seventh."""
    home = tmp_path_factory.mktemp("home")
    stage = {"operators": ["layer"], "dims": DIMS.replace(num_hidden_layers=3).as_dict(), "tokens": TOKENS // 3}
    wide = DIMS.replace(num_hidden_layers=3, intermediate_size=48).as_dict()
    stages = [stage, {"operators": ["ffn"], "dims": wide, "tokens": TOKENS // 3}]
    schedule = {"initial": DIMS.as_dict(), "initial_tokens": TOKENS // 3, "stages": stages}
    training = {"batch_tokens": [128], "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 7}
    config = write_run_file(home, schedule, training)
    with pytest.raises(RuntimeError, match="killed"):
        train_run(RunConfig.from_yaml(config), home / "run", callbacks=[Interrupt()])
    return home


@pytest.fixture
def run(interrupted, tmp_path):
    """A copy of it to change."""
    shutil.copytree(interrupted / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def alive(run):
    """Let this process be the one that trains the run."""
    lock = DirectoryLock(run)
    lock.acquire()
    lock.name_writers("training", [Process.current()])
    yield run
    lock.release()


def test_a_stopped_run(run, output_of):
    """Its process is gone, so it stands at its checkpoint, not where the process got to."""
    text = output_of("status", run)
    for part in (" stopped", "2 of 3 (stage-1-layer)", f"step {7}", "training loss", f"-o {run} --resume"):
        assert part in text, text
    assert "process" not in text and "time left" not in text
    status = json.loads(output_of("status", run, "--json"))
    assert (status["state"], status["stage"], status["step"], status["tokens"]) == ("stopped", 1, 7, 7 * 128)
    assert status["share"] == pytest.approx(7 / 15, abs=1e-3) and status["loss"] > 0 and status["eval_loss"] > 0


def test_a_run_in_training(alive, output_of):
    now = LiveProgress(time.time(), 1, 8, STEPS, 8 * 128, TOKENS, loss=4.25, tokens_per_second=1234.5, seconds_left=61)
    now.save(alive)
    text = output_of("status", alive)
    for part in (
        " running",
        "53%",
        "step 8 of 15",
        "1,234 tokens per second",
        "0:01:01",
        "4.25",
        "training since",
    ):
        assert part in text, text
    assert "--resume" not in text
    LiveProgress(0.0, 0, 3, STEPS, 3 * 128, TOKENS).save(alive)
    assert read_status(RunDirectory(alive)).step == 7, "an earlier process wrote that; the new one has resumed"


def test_a_trainer_writes_its_progress(interrupted):
    """The first log at least; later ones only after two seconds, as each waits for the disk."""
    live = LiveProgress.load(interrupted / "run")
    assert (live.steps, live.total_tokens) == (STEPS, TOKENS) and 1 <= live.step <= 8 and live.loss > 0
    assert find_writers(interrupted / "run") is None, "this process lives, but has let go of the lock"


def test_a_checkpoint_may_be_replaced_while_it_is_read(run, monkeypatch):
    newest = find_newest_model(RunDirectory(run))
    gone = iter([newest.with_name("checkpoint-6")])
    monkeypatch.setattr(status_of_runs, "find_newest_model", lambda run: next(gone, newest))
    assert read_status(RunDirectory(run)).step == 7
    newest.joinpath(status_of_runs.STATE_FILE).unlink()
    with pytest.raises(RunError, match="trainer_state"):
        read_status(RunDirectory(run))


def test_processes_that_have_ended_write_nothing(run):
    lock = DirectoryLock(run)
    lock.acquire()
    lock.name_writers("training", [Process(Process.current().host, Process.current().pid, 0.0)])
    assert find_writers(run) is None and read_status(RunDirectory(run)).state == "stopped"
    lock.release()
    lock.name_writers("training", [Process("elsewhere", 1, 0.0)])
    assert find_writers(run) is None, "nobody holds the lock"
    lock.acquire()
    assert find_writers(run) is not None
    lock.release()


def test_watching_ends_with_the_training(alive, output_of, monkeypatch):
    states = iter(["running", "running", "finished"])
    read = status_module.read_status

    def read_next(directory):
        status = read(directory)
        object.__setattr__(status, "state", next(states))
        return status

    monkeypatch.setattr(status_module, "read_status", read_next)
    text = output_of("status", alive, "--watch", "--interval", 0.1)
    assert text.count(" running") == 2 and text.count(" finished") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [(["missing"], "is not a run"), (["missing", "--json"], "is not a run"), (["run", "--interval", 0], "--interval")],
)
def test_wrong_statuses_are_refused(error_of, words, message):
    assert message in error_of("status", *words)


def test_a_sample_comes_from_the_newest_model(run, slop, output_of):
    code, text, err = slop("sample", run, "1 2 3", "--max-new-tokens", 5)
    assert code == 0, err
    assert text.startswith("1 2 3") and "stage-1-layer.running/checkpoint-7" in err
    assert output_of("sample", run, "1 2 3", "--max-new-tokens", 5) == text, "the same seed"
    first = json.loads(output_of("sample", run, "1 2 3", "--stage", 0, "--temperature", 0, "--json"))
    assert first["model"].endswith("stage-0-initial") and 0 < first["tokens"] <= 32
    assert find_newest_model(RunDirectory(run)).name == "checkpoint-7"
    shutil.rmtree(run / "stage-1-layer.running")
    assert find_newest_model(RunDirectory(run)).name == "stage-0-initial"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", 2], "no finished stage 2"),
        (["--temperature", "nan"], "--temperature"),
        (["--max-new-tokens", 0], "--max-new-tokens"),
    ],
)
def test_wrong_samples_are_refused(run, error_of, words, message):
    assert message in error_of("sample", run, "1 2 3", *words)


def test_a_prompt_must_fit(run, error_of):
    assert "the prompt has 0 tokens" in error_of("sample", run, "")
    assert "context of the model 32" in error_of("sample", run, "1 2 3 " * 30)
    assert "--stage is for a run" in error_of("sample", run / "stage-0-initial", "1", "--stage", 0)
    (run / "schedule.yaml").unlink()
    assert "error" in error_of("sample", run, "1")
