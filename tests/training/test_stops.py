"""How a run ends early: signals, callbacks that ask for it, and what the resumed run finds."""

import os
import signal

import pytest
from training_runs import BATCH, SCHEDULE, TOKENS, blocks, small_model, trainer, weights_of_last_stage
from transformers import EarlyStoppingCallback, TrainerCallback

from slop_hf import GrowthSchedule, RunDirectory
from slop_hf.training.preemption import StopOnSignal
from slop_hf.training.ranks import Ranks

#: Two stages of three steps.
STEPS = 3
SHORT = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:1]).with_shares([3 * TOKENS // 8] * 2)


def train(path, *, resume=False, **settings):
    settings = {"schedule": SHORT, "data": blocks(2 * BATCH * STEPS), "save_steps": 100, **settings}
    run = trainer(path, **settings)
    run.train(resume_from_checkpoint=resume)
    return RunDirectory(path)


def describe(run):
    """Return the numbers of finished stages and of checkpoints in the stage after them."""
    finished = run.finished_stages
    running = run.running_dir(finished) if finished < 2 else None
    return finished, sorted(path.name for path in running.iterdir()) if running and running.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole") / "out")


class Send(TrainerCallback):
    """Sends this process a signal after a step, once or twice."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


class StopAt(TrainerCallback):
    """Asks to stop after a step, or at an evaluation there."""

    def __init__(self, step, event="on_step_end"):
        self.step = step
        setattr(self, event, self.stop)

    def stop(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.fixture
def interruptible():
    """Shells ignore SIGINT in background jobs, and so may the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler, "the trainer puts the handler back"


@pytest.mark.parametrize(
    ("step", "left"), [(2, (0, ["checkpoint-2"])), (3, (1, [])), (4, (1, ["checkpoint-4"])), (6, (2, []))]
)
def test_ctrl_c_saves_the_state_and_stops(whole, tmp_path, capfd, caplog, interruptible, step, left):
    """In mid-stage and at its last step; after the run's last step there is nothing left to resume."""
    with pytest.raises(KeyboardInterrupt, match=r"out was stopped; train\(resume_from_checkpoint=True\) continues it"):
        train(tmp_path / "out", callbacks=[Send(step)])
    run = RunDirectory(tmp_path / "out")
    assert describe(run) == left
    assert "press Ctrl-C again to stop at once" in capfd.readouterr().err
    assert (f"stopped at step {step} of 6" in caplog.text) is (step < 6)
    train(run.path, resume=True)
    assert weights_of_last_stage(run).equal(weights_of_last_stage(whole))


def test_a_second_ctrl_c_stops_at_once(tmp_path, interruptible):
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path / "out", callbacks=[Send(2, times=2)])
    assert not str(caught.value), "Python's own"
    assert describe(RunDirectory(tmp_path / "out")) == (0, [])


@pytest.mark.parametrize(("count", "second"), [(1, signal.default_int_handler), (2, signal.SIG_DFL)])
def test_handlers_of_ctrl_c(monkeypatch, interruptible, count, second):
    """A process of a launch may wait for the others, where Python's own handler is not called."""
    monkeypatch.setattr("torch.distributed.new_group", lambda **_: None)
    stop = StopOnSignal(Ranks(0, count))
    with stop.watch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_interrupted and signal.getsignal(signal.SIGINT) is second


def test_an_ignored_ctrl_c_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal(Ranks()).watch_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("step", "event", "left"),
    [
        (2, "on_step_end", (0, ["checkpoint-2"])),
        (3, "on_step_end", (1, [])),
        (3, "on_evaluate", (1, [])),  # the evaluation at the end of a stage
        (4, "on_step_end", (1, ["checkpoint-4"])),
        (6, "on_step_end", (2, [])),
    ],
)
def test_a_callback_stops_the_run_wherever_it_asks(whole, tmp_path, caplog, step, event, left):
    run = train(tmp_path / "out", callbacks=[StopAt(step, event)])
    assert describe(run) == left
    assert (f"stopped at step {step} of 6" in caplog.text) is (step < 6)
    train(run.path, resume=True)
    assert weights_of_last_stage(run).equal(weights_of_last_stage(whole))


def test_a_callback_stops_the_run_at_the_evaluation_after_a_growth(tmp_path, caplog):
    run = train(tmp_path / "out", callbacks=[StopAt(3, "on_evaluate")], eval_before_growth=False)
    assert describe(run) == (1, []) and "stopped at step 3 of 6, before stage-1-layer" in caplog.text


def test_early_stopping_counts_evaluations_at_the_ends_of_stages(tmp_path):
    """The rate is too high to learn anything, so that the second stage does not improve on the first."""
    settings = {"eval_strategy": "epoch", "eval_after_growth": False, "metric_for_best_model": "loss"}
    schedule = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:2]).with_shares([TOKENS // 8] * 3)
    stopping = EarlyStoppingCallback(early_stopping_patience=1, early_stopping_threshold=100.0)
    run = train(tmp_path / "out", schedule=schedule, callbacks=[stopping], **settings)
    assert run.finished_stages == 2


def test_the_end_of_a_stage_is_evaluated_once(tmp_path):
    run = train(tmp_path / "out", eval_strategy="steps", eval_steps=3, eval_after_growth=False)
    evaluations = [entry for entry in run.history() if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [3, 6]
    assert [record.eval_loss for record in run.records()] == [entry["eval_loss"] for entry in evaluations]


def test_a_stop_at_a_step_that_saves_writes_one_checkpoint(tmp_path):
    """An `epoch` ends with the stage or with the stop."""
    run = train(tmp_path / "out", callbacks=[StopAt(2)], save_strategy="epoch")
    assert describe(run) == (0, ["checkpoint-2"])


def test_a_checkpoint_replaces_one_of_the_same_step(whole, tmp_path):
    """Resumed from an earlier checkpoint, a run comes again to the step of a later one."""
    run = train(tmp_path / "out", callbacks=[StopAt(2)], save_steps=1)
    assert describe(run) == (0, ["checkpoint-1", "checkpoint-2"])
    train(run.path, resume=str(run.running_dir(0) / "checkpoint-1"), save_steps=1)
    assert weights_of_last_stage(run).equal(weights_of_last_stage(whole))


def test_a_finished_run_says_so_when_it_is_resumed(whole, caplog):
    train(whole.path, resume=True)
    assert f"{whole.path} is finished: its 2 stages had all been trained before" in caplog.text


def test_pages_are_not_pinned_on_cpus(tmp_path):
    """torch would warn in the middle of the progress bar."""
    run = trainer(tmp_path, schedule=SHORT, model=small_model(), use_cpu=False, dataloader_pin_memory=True)
    assert run.args.dataloader_pin_memory is (run.args.device.type != "cpu")
