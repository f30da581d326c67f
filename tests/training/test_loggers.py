"""TensorBoard shows one curve per run, also after interruptions."""

import pytest
from training_runs import STEPS, trainer
from transformers import TrainerCallback

from slop_hf import RunDirectory

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """The working directory, into which a writer without a directory would write; and sortable file names.

    The names end in a counter of the process, which decides within a second: 10 sorts before 9.
    """
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    yield
    assert list(here.iterdir()) == [], "written outside of the run"


class Interrupt(TrainerCallback):
    """Interrupts training at an event and a step."""

    def __init__(self, event, step):
        setattr(self, f"on_{event}", self._interrupt)
        self.step = step

    def _interrupt(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def curve(directory, tag):
    """(step, value) of a tag as TensorBoard has them."""
    shown = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    shown.Reload()
    return [(event.step, event.value) for event in shown.Scalars(tag)]


def check_curves(path):
    """The curves are the run's log, in one directory."""
    assert {file.parent for file in path.rglob("events.out.*")} == {path / "tensorboard"}
    history = [entry for entry in RunDirectory(path).history() if "loss" in entry]
    assert [entry["step"] for entry in history] == list(range(1, 4 * STEPS + 1))
    for tag, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate")):
        logged = [(entry["step"], pytest.approx(entry[key])) for entry in history]
        assert curve(path / "tensorboard", tag) == logged, tag


def test_one_curve_over_all_stages(tmp_path):
    path = tmp_path / "out"
    trainer(path, report_to=["tensorboard"]).train()
    check_curves(path)
    held_out = [step for step, _ in curve(path / "tensorboard", "eval/loss")]
    assert held_out == [STEPS, STEPS, 2 * STEPS, 2 * STEPS, 3 * STEPS, 3 * STEPS, 4 * STEPS], "around each growth"


@pytest.mark.parametrize(
    "interruption",
    [
        pytest.param(("step_begin", 2), id="before the first checkpoint"),
        pytest.param(("step_begin", STEPS + 6), id="two steps after a checkpoint"),
        pytest.param(("train_begin", 2 * STEPS), id="between two stages"),
        pytest.param(("evaluate", 3 * STEPS), id="before a stage was written"),
    ],
)
def test_one_curve_after_an_interruption(tmp_path, interruption):
    path = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer(path, report_to=["tensorboard"], callbacks=[Interrupt(*interruption)]).train()
    trainer(path, report_to=["tensorboard"]).train(resume_from_checkpoint=True)
    check_curves(path)


def test_a_directory_that_was_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "curves"))
    path = tmp_path / "out"
    for stop in (STEPS + 6, None):
        run = trainer(path, report_to=["tensorboard"], callbacks=[Interrupt("step_begin", stop)])
        if stop is None:
            run.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(KeyboardInterrupt):
                run.train()
    assert [step for step, _ in curve(tmp_path / "curves", "train/loss")] == list(range(1, 4 * STEPS + 1))
    assert not list(path.rglob("events.out.*"))
