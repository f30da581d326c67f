"""Rollback of a run to the end of a stage: what moves, what stays, and that training then continues as before."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from slop_hf.dims import ModelDims
from slop_hf.errors import RunError
from slop_hf.runs.directory import RunDirectory, RunFacts
from slop_hf.runs.lock import LOCK_DIRECTORY
from slop_hf.runs.rollback import plan_rollback
from slop_hf.schedule import GrowthSchedule, GrowthStage

TOKENS = 64
SMALL, DEEP = ModelDims(16, 32, 2, 2), ModelDims(16, 32, 3, 2)
WIDE, LARGE = ModelDims(16, 48, 3, 2), ModelDims(32, 48, 3, 4)
LAYER, FFN = GrowthStage(("layer",), DEEP, TOKENS), GrowthStage(("ffn",), WIDE, TOKENS)
HIDDEN = GrowthStage(("hidden", "mha"), LARGE, TOKENS)
SCHEDULE = GrowthSchedule(SMALL, (LAYER, FFN, HIDDEN), TOKENS)
#: The same up to stage 1, and then other stages: fewer, more.
SHORTER = replace(SCHEDULE, stages=(LAYER,))
OTHER = replace(SCHEDULE, stages=(LAYER, replace(FFN, tokens=2 * TOKENS, init="copy")))
LONGER = replace(SCHEDULE, stages=(LAYER, FFN, HIDDEN, GrowthStage(("layer",), LARGE.replace(num_hidden_layers=4))))


def write_run(path, *, finished=4, running=None, facts=(4, 4, 2, 2)):
    """Write a run directory whose stages hold only a file with their name."""
    path.mkdir()
    SCHEDULE.to_yaml(path / "schedule.yaml")
    run = RunDirectory(path)
    if facts is not None:
        RunFacts(16, 100, facts, data_seed=7, run_id="run-1").save(run)
    for name in SCHEDULE.stage_names[:finished]:
        (path / name).mkdir()
        (path / name / "stage.json").write_text(name)
    if running is not None:
        (run.running_dir(running) / "checkpoint-3").mkdir(parents=True)
    return run


def content(path):
    """Return the text of every file below a directory, without rolled-back ones and the lock."""
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {
        f"{file.relative_to(path)}": file.read_text()
        for file in files
        if file.relative_to(path).parts[0] not in ("rolled-back", LOCK_DIRECTORY)
    }


def names(path):
    return sorted(item.name for item in path.iterdir() if item.name != LOCK_DIRECTORY)


# ---- What moves ------------------------------------------------------------------------------------------------


def test_later_stages_move_aside_and_the_rest_stays(tmp_path):
    run = write_run(tmp_path / "run", finished=3, running=3)
    before = content(run.path)
    plan = plan_rollback(run, 1)
    assert [path.name for path in plan.moved] == ["stage-3-hidden.running", "stage-2-ffn"]
    assert (plan.run, plan.stage, plan.aside) == (run.path, 1, run.path / "rolled-back" / "1")
    assert content(run.path) == before and not (run.path / "rolled-back").exists()  # planned, not done
    plan.apply()
    assert names(run.path) == ["rolled-back", "run.json", "schedule.yaml", "stage-0-initial", "stage-1-layer"]
    assert RunDirectory(run.path).finished_stages == 2
    assert names(plan.aside) == ["stage-2-ffn", "stage-3-hidden.running"]
    assert (plan.aside / "stage-2-ffn" / "stage.json").read_text() == "stage-2-ffn"
    assert content(run.path).items() <= before.items()


def test_a_stage_in_training_moves_alone(tmp_path):
    run = write_run(tmp_path / "run", finished=2, running=2)
    plan_rollback(run, 1).apply()
    assert names(run.path / "rolled-back" / "1") == ["stage-2-ffn.running"]
    assert names(run.path) == ["rolled-back", "run.json", "schedule.yaml", "stage-0-initial", "stage-1-layer"]


def test_what_was_rolled_back_before_stays_where_it_is(tmp_path):
    run = write_run(tmp_path / "run")
    plan_rollback(run, 2).apply()
    plan_rollback(RunDirectory(run.path), 0).apply()
    assert names(run.path / "rolled-back") == ["1", "2"]
    assert names(run.path / "rolled-back" / "1") == ["stage-3-hidden"]
    assert names(run.path / "rolled-back" / "2") == ["stage-1-layer", "stage-2-ffn"]


@pytest.mark.parametrize("files", [[], ["optimizer.safetensors"], ["optimizer-00001-of-00002.safetensors"]])
def test_whether_the_optimizers_state_is_still_there(tmp_path, files):
    run = write_run(tmp_path / "run")
    for name in files:
        (run.stage_dir(1) / name).touch()
    (run.stage_dir(2) / "optimizer.safetensors").touch()
    assert plan_rollback(run, 1).keeps_optimizer == bool(files)


# ---- Another schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "blocks"),
    [(SHORTER, (4, 3)), (OTHER, (4, 3, 2)), (SCHEDULE, (4, 3, 2, 1)), (LONGER, (4, 3, 2, 1, 1))],
)
def test_another_schedule_after_the_stage(tmp_path, schedule, blocks):
    """New stages take the batch size of the run's last one; the old schedule is kept with the moved stages."""
    run = write_run(tmp_path / "run", facts=(4, 3, 2, 1))
    plan = plan_rollback(run, 1, schedule)
    assert plan.schedule == schedule
    plan.apply()
    now = RunDirectory(run.path)
    assert now.schedule == schedule and now.finished_stages == 2
    assert GrowthSchedule.from_yaml(plan.aside / "schedule.yaml") == SCHEDULE
    assert RunFacts.load(now).batches(len(schedule.structures)) == blocks


def test_a_finished_run_can_be_extended(tmp_path):
    run = write_run(tmp_path / "run")
    plan = plan_rollback(run, 3, LONGER)
    assert plan.moved == ()
    plan.apply()
    now = RunDirectory(run.path)
    assert (now.schedule, now.finished_stages, now.is_finished) == (LONGER, 4, False)


def test_a_run_of_a_release_without_facts_takes_another_schedule(tmp_path):
    run = write_run(tmp_path / "run", facts=None)
    plan_rollback(run, 1, OTHER).apply()
    assert RunDirectory(run.path).schedule == OTHER and not (run.path / "run.json").exists()


# ---- Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("finished", "stage", "schedule", "message"),
    [
        (2, 2, None, "no finished stage 2: choose one from 0 to 1"),
        (4, 4, None, "no finished stage 4: choose one from 0 to 3"),
        (4, -1, None, "no finished stage -1: choose one from 0 to 3"),
        (0, 0, None, "has no finished stage yet: let `slop train` finish its first one"),
        (4, 3, None, "ends with stage-3-hidden; there is nothing after it"),
        (2, 1, None, "ends with stage-1-layer; there is nothing after it"),
        (4, 2, OTHER, r"differs from the run's in stage 2, which must stay the same: .*'ffn'"),
        (4, 2, SHORTER, "differs from the run's in stage 2, which must stay the same: None"),
        (4, 1, replace(SCHEDULE, initial_tokens=1), "differs from the run's in stage 0"),
        (4, 1, GrowthSchedule(DEEP, (FFN,), TOKENS), "differs from the run's in stage 0"),
        (4, 1, replace(SCHEDULE, stages=(replace(LAYER, init="preserving"),)), "differs from the run's in stage 1"),
    ],
)
def test_what_cannot_be_rolled_back_is_refused_and_left_alone(tmp_path, finished, stage, schedule, message):
    run = write_run(tmp_path / "run", finished=finished)
    before = content(run.path)
    with pytest.raises(RunError, match=message):
        plan_rollback(run, stage, schedule)
    assert content(run.path) == before and not (run.path / "rolled-back").exists()


def test_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"is not a run: it has no schedule\.yaml"):
        plan_rollback(RunDirectory(tmp_path), 0)


# ---- Killed meanwhile ------------------------------------------------------------------------------------------


def killed_at_rename(monkeypatch, plan, number):
    """Apply a plan in a process killed before one of its moves."""
    real, calls = Path.rename, []

    def rename(self, target):
        calls.append(self)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            plan.apply()


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("schedule", [None, OTHER])
def test_a_rollback_killed_between_moves_can_be_repeated(tmp_path, monkeypatch, schedule, number):
    """The finished stages never have a gap, and nothing is lost."""
    run = write_run(tmp_path / "run", finished=3, running=3)
    (run.path / "stage-2-ffn.running").mkdir()  # left by a process that died while the stage was written
    killed_at_rename(monkeypatch, plan_rollback(run, 1, schedule), number)
    left = RunDirectory(run.path)
    assert left.schedule == SCHEDULE and left.finished_stages == 3  # stage 2 moves last, and whole
    plan_rollback(left, 1, schedule).apply()
    now = RunDirectory(run.path)
    assert now.schedule == (schedule or SCHEDULE) and now.finished_stages == 2
    moved = {path.name for number in "12" for path in (run.path / "rolled-back" / number).iterdir()}
    assert moved - {"schedule.yaml"} == {"stage-3-hidden.running", "stage-2-ffn.running", "stage-2-ffn"}


# ---- A real run ------------------------------------------------------------------------------------------------


def train(path, schedule=SCHEDULE, **settings):
    """Train or resume a run of two steps per stage, and return its final weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from slop_hf import SlopTrainer, SlopTrainingArguments

    set_seed(0)
    config = LlamaConfig(vocab_size=40, max_position_embeddings=16, tie_word_embeddings=True, attention_dropout=0.1)
    rows = torch.randint(0, 40, (40, 16), generator=torch.Generator().manual_seed(0))
    args = SlopTrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        carry_optimizer_state=True,
        **settings,
    )
    trainer = SlopTrainer(
        LlamaForCausalLM(schedule.initial.to_config(config)),
        args,
        schedule=schedule,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )
    trainer.train(resume_from_checkpoint=RunDirectory(path).exists)
    return trainer.model.state_dict()


def same(weights, expected):
    return weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in weights)


def losses(path):
    return [(entry["step"], entry["loss"]) for entry in RunDirectory(path).history() if "loss" in entry]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A finished run that keeps its optimizer states, and its weights."""
    path = tmp_path_factory.mktemp("first") / "run"
    return path, train(path, keep_optimizer_states=True)


@pytest.fixture
def copied(first, tmp_path):
    return shutil.copytree(first[0], tmp_path / "run")


def test_a_run_continues_from_where_it_was_rolled_back_to(first, copied):
    """Rolled back twice, to earlier and earlier stages; with AdamW's state it always ends with the same bits."""
    path, weights = first
    for number, stage in enumerate((1, 0), start=1):
        plan = plan_rollback(RunDirectory(copied), stage)
        assert plan.keeps_optimizer
        plan.apply()
        assert same(train(copied, keep_optimizer_states=True), weights)
        assert losses(copied) == losses(path)
        assert names(copied / "rolled-back" / f"{number}") == [*SCHEDULE.stage_names[stage + 1 :]]


def test_without_the_optimizers_state_a_new_one_begins(first, copied):
    for file in RunDirectory(copied).optimizer_files(1):
        file.unlink()
    plan = plan_rollback(RunDirectory(copied), 1)
    assert not plan.keeps_optimizer
    plan.apply()
    weights = train(copied)
    assert not same(weights, first[1]) and all(value.isfinite().all() for value in weights.values())


def test_a_run_continues_with_another_schedule(first, copied):
    plan_rollback(RunDirectory(copied), 1, OTHER).apply()
    with pytest.raises(RunError, match="holds a run of another schedule"):
        train(copied)
    train(copied, OTHER)
    run, old = RunDirectory(copied), RunDirectory(first[0]).records()
    records = run.records()
    assert records[:2] == old[:2] and len(records) == 3
    assert (records[2].dims, records[2].tokens, records[2].init) == (WIDE, 2 * TOKENS, {"ffn": "copy"})
    assert losses(copied)[:4] == losses(first[0])[:4] and [step for step, _ in losses(copied)] == list(range(1, 9))


def test_another_schedule_may_leave_inits_to_growth_init(tmp_path):
    """A schedule may leave inits open, as the first one may: the argument then decides."""
    path = tmp_path / "run"
    train(path, growth_init="preserving")
    other = replace(SCHEDULE, stages=(LAYER, replace(FFN, tokens=2 * TOKENS)))
    plan_rollback(RunDirectory(path), 1, other).apply()
    train(path, other, growth_init="preserving")
    assert [record.init for record in RunDirectory(path).records()] == [
        {},
        {"layer": "preserving"},
        {"ffn": "preserving"},
    ]


def test_a_finished_run_is_trained_further(first, copied):
    longer = replace(LONGER, stages=(*LONGER.stages[:3], replace(LONGER.stages[3], tokens=TOKENS)))
    plan_rollback(RunDirectory(copied), 3, longer).apply()
    train(copied, longer)
    records = RunDirectory(copied).records()
    assert records[:4] == RunDirectory(first[0]).records() and records[4].global_step == 10


def test_killed_between_moves_the_run_can_be_resumed(first, copied, monkeypatch):
    killed_at_rename(monkeypatch, plan_rollback(RunDirectory(copied), 1), 2)
    assert RunDirectory(copied).finished_stages == 3
    assert same(train(copied, keep_optimizer_states=True), first[1])
