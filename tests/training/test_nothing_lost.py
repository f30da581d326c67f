"""Whatever happens to a run, its saved files stay, and its user gets a clear message."""

import errno
import os
import shutil
import signal
from itertools import pairwise

import pytest
from training_runs import SCHEDULE, STEPS, Interrupt, losses, same_weights, small_model, trainer
from transformers import TrainerCallback

from slop_hf import GrowthSchedule, GrowthStage, RunDirectory
from slop_hf.errors import DivergedError, GrowthError, RunError
from slop_hf.growth import safetensors_io


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out"
    trainer(path).train()
    return path


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that stopped in its second stage, with two checkpoints there."""
    path = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer(path, callbacks=[Interrupt(STEPS + 5)]).train()
    return path


@pytest.fixture
def run(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out")
    return RunDirectory(tmp_path / "out")


class Beginnings(TrainerCallback):
    """The global steps that stages begin at."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


class Send(TrainerCallback):
    """Sends this process a signal after a step."""

    def __init__(self, step, number=signal.SIGTERM):
        self.step, self.number = step, number

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def flip(path):
    """Change a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


DAMAGES = [
    (flip, "model.safetensors", "does not hold what was written"),
    (cut, "optimizer.safetensors", "bytes instead of"),
    (os.remove, "optimizer.safetensors", "is missing"),
    (flip, "resume.json", "does not hold what was written"),
    (os.remove, "checksums.json", "it has no checksums.json"),
    (cut, "checksums.json", "cannot be read"),
]


@pytest.mark.parametrize(("damage", "name", "fault"), DAMAGES, ids=[f"{one[0].__name__} {one[1]}" for one in DAMAGES])
def test_a_corrupt_checkpoint_is_skipped(whole, run, damage, name, fault, caplog):
    """The run goes back to the checkpoint before, and says so."""
    damage(run.running_dir(1) / f"checkpoint-{STEPS + 4}" / name)
    begins = Beginnings()
    trainer(run.path, callbacks=[begins]).train(resume_from_checkpoint=True)
    assert begins.steps[0] == STEPS + 1
    assert f"checkpoint-{STEPS + 4} is corrupt" in caplog.text and fault in caplog.text
    assert same_weights(whole, run.path) and losses(run.path) == losses(whole)


def test_without_a_good_checkpoint_the_stage_begins_again(run, caplog):
    """AdamW starts afresh too: its state at the end of the stage before has been removed."""
    for checkpoint in run.running_dir(1).iterdir():
        flip(checkpoint / "model.safetensors")
    begins = Beginnings()
    trainer(run.path, callbacks=[begins]).train(resume_from_checkpoint=True)
    assert begins.steps[0] == STEPS and run.is_finished
    assert "no longer has an optimizer state: it starts afresh in stage-1-layer" in caplog.text


def test_a_lone_checkpoint_is_not_all_that_a_stage_has(whole, tmp_path):
    """The optimizer state of the stage before stays until there are two checkpoints."""
    run = RunDirectory(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        trainer(run.path, callbacks=[Interrupt(STEPS + 2)]).train()
    (checkpoint,) = run.running_dir(1).iterdir()
    flip(checkpoint / "model.safetensors")
    trainer(run.path).train(resume_from_checkpoint=True)
    assert same_weights(whole, run.path)


def test_a_corrupt_checkpoint_given_by_path_is_refused(run):
    checkpoint = run.running_dir(1) / f"checkpoint-{STEPS + 4}"
    flip(checkpoint / "model.safetensors")
    with pytest.raises(RunError, match=r"checkpoint-12 is corrupt: .*resume with True"):
        trainer(run.path).train(resume_from_checkpoint=str(checkpoint))


def test_a_corrupt_stage_is_refused_with_the_way_back(run):
    """Only the stage before is left to return to, and that is the user's decision."""
    shutil.rmtree(run.running_dir(1))
    flip(run.stage_dir(0) / "model.safetensors")
    with pytest.raises(RunError, match=r"stage-0-initial is corrupt: model.safetensors .*begin another run"):
        trainer(run.path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("when", ["checkpoint", "stage"])
def test_a_full_disk(whole, run, monkeypatch, when):
    """Training stops, saved files stay complete, and the run continues when there is space."""
    real = safetensors_io.allocate_space

    def full(descriptor, length):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if ("checkpoint" in name) == (when == "checkpoint"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, length)

    monkeypatch.setattr(safetensors_io, "allocate_space", full)
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("stage-*/**/*") if path.is_file()}
    with pytest.raises(GrowthError, match=r"No space left on device; free some space"):
        trainer(run.path).train(resume_from_checkpoint=True)
    monkeypatch.undo()
    remaining = [path for path in before if path.exists()]
    assert all(path.stat().st_mtime_ns == before[path] for path in remaining)
    assert {path.parent.name for path in remaining} >= {"stage-0-initial", f"checkpoint-{STEPS + 4}"}
    assert not list(run.path.rglob("*.writing*"))
    trainer(run.path).train(resume_from_checkpoint=True)
    assert same_weights(whole, run.path)


@pytest.mark.parametrize("what", ["the loss", "the gradient norm"])
def test_numbers_that_are_not_finite_stop_the_run(run, what):
    """Before they are logged or saved; the message names the last good state, from which the run can resume."""
    poisoned = trainer(run.path)
    step, clip = poisoned.training_step, poisoned._clip_grad_norm

    def poison(model):
        if poisoned.state.global_step == STEPS + 6:
            model.model.norm.weight.data[0] = float("nan")

    def training_step(model, *args, **kwargs):
        if what == "the loss":
            poison(model)
        return step(model, *args, **kwargs)

    def clip_grad_norm(model):
        if poisoned.state.global_step == STEPS + 6 and what != "the loss":
            model.model.norm.weight.grad[0] = float("inf")
        return clip(model)

    poisoned.training_step, poisoned._clip_grad_norm = training_step, clip_grad_norm
    last = f"checkpoint-{STEPS + 4}"
    with pytest.raises(RunError, match=rf"{what} is no longer finite; .* the last good state is .*{last}"):
        poisoned.train(resume_from_checkpoint=True)
    trainer(run.path).train(resume_from_checkpoint=True)
    assert run.is_finished and all(record.eval_loss < 10 for record in run.records())


@pytest.mark.parametrize("step", [STEPS + 7, 2 * STEPS, 4 * STEPS])
def test_sigterm_saves_and_stops(whole, run, step):
    """In mid-stage, at its last step, and at the run's last."""
    before = signal.getsignal(signal.SIGTERM)
    output = trainer(run.path, callbacks=[Send(step)], save_steps=100).train(resume_from_checkpoint=True)
    assert output.global_step == step and signal.getsignal(signal.SIGTERM) is before
    if step == STEPS + 7:
        assert (run.running_dir(1) / f"checkpoint-{step}").is_dir()
    else:
        assert run.finished_stages == step // STEPS
    trainer(run.path, save_steps=100).train(resume_from_checkpoint=True)
    assert same_weights(whole, run.path)


def test_a_last_step_that_breaks_the_weights_is_seen(run):
    """No training loss follows, but the held-out loss shows it before the stage is written."""
    broken = trainer(run.path)
    evaluate = broken.evaluate

    def evaluate_broken(*args, **kwargs):
        if broken.state.global_step == 2 * STEPS:
            broken.model.model.norm.weight.data[0] = float("nan")
        return evaluate(*args, **kwargs)

    broken.evaluate = evaluate_broken
    with pytest.raises(DivergedError, match="the loss is no longer finite"):
        broken.train(resume_from_checkpoint=True)
    assert run.finished_stages == 1


def test_another_schedule_is_refused(run):
    first, *others = SCHEDULE.stages
    longer = GrowthStage(first.operators, first.dims, 2 * first.tokens)
    other = GrowthSchedule(SCHEDULE.initial, (longer, *others), SCHEDULE.initial_tokens)
    with pytest.raises(RunError, match=r"another schedule \(stage 1 differs\)"):
        trainer(run.path, schedule=other).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("change", "named"), [({"data_seed": 5}, "data_seed 42, not 5"), ({"data": "fewer"}, "blocks 136, not 135")]
)
def test_other_data_are_refused(run, change, named):
    from training_runs import BATCH, blocks

    if "data" in change:
        change = {"data": blocks(4 * BATCH * STEPS + 7)}
    with pytest.raises(RunError, match=f"was begun with {named}"):
        trainer(run.path, **change).train(resume_from_checkpoint=True)


def test_carried_state_keeps_the_loss(tmp_path):
    """Preserving growth keeps the loss, which then develops as without growth."""
    tokens = SCHEDULE.initial_tokens
    steps = 3 * STEPS
    stages = (
        GrowthStage(("layer",), SCHEDULE.structures[1], 3 * tokens, init="preserving"),
        GrowthStage(
            ("hidden", "mha"),
            SCHEDULE.structures[1].replace(hidden_size=32, num_attention_heads=4, num_key_value_heads=4),
            3 * tokens,
            init="preserving",
        ),
    )
    grown = GrowthSchedule(SCHEDULE.initial, stages, 3 * tokens)
    plain = GrowthSchedule(SCHEDULE.initial, (), 9 * tokens)
    history = {}
    for name, schedule in (("grown", grown), ("plain", plain)):
        settings = {"model": small_model(dropout=0.0), "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}
        run = trainer(tmp_path / name, schedule=schedule, warmup_steps=0, learning_rate=1e-3, **settings)
        run.train()
        history[name] = RunDirectory(tmp_path / name).history()
    records = RunDirectory(tmp_path / "grown").records()
    for before, after in pairwise(records):
        assert after.eval_loss_after_growth == pytest.approx(before.eval_loss, abs=1e-5)
    curve = {name: {entry["step"]: entry["loss"] for entry in log if "loss" in entry} for name, log in history.items()}
    for boundary in (steps, 2 * steps):
        first = boundary + 1
        jumps = {
            name: max(losses[step] - losses[first] for step in range(first, first + 20))
            for name, losses in curve.items()
        }
        assert jumps["grown"] <= jumps["plain"] + 1e-2, jumps
