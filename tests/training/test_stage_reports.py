"""What a run that was killed after a stage finds when it is resumed: unreported stages, and files left behind."""

import json

import pytest
from training_runs import BATCH, SCHEDULE, TOKENS, blocks, trainer

from slop_hf import GrowthSchedule, RunDirectory
from slop_hf.training.callbacks import StageCallback
from slop_hf.training.ranks import Ranks
from slop_hf.training.stage_reports import NOTES_FILE, report_stages

SHORT = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:2]).with_shares([TOKENS // 8] * 3)


class Listener(StageCallback):
    """Records its calls as (stage, is_repeated); dies in the call for a stage."""

    def __init__(self, dies_at=None, calls=None):
        self.calls, self.dies_at = [] if calls is None else calls, dies_at

    def on_stage_written(self, run, stage, ranks):
        self.calls.append((stage, self.is_repeated))
        if stage == self.dies_at:
            raise KeyboardInterrupt


class Uploader(Listener):
    publishes = True


def train(path, *callbacks, resume=False, **settings):
    data = blocks(3 * BATCH)
    run = trainer(path, schedule=SHORT, data=data, callbacks=list(callbacks), eval_dataset=None, **settings)
    run.train(resume_from_checkpoint=resume)
    return RunDirectory(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    listener = Listener()
    return train(tmp_path_factory.mktemp("finished") / "out", listener), listener


def test_each_stage_is_reported_once(finished):
    run, listener = finished
    assert listener.calls == [(0, False), (1, False), (2, False)]
    again = Listener()
    report_stages(run, [again], Ranks())
    assert again.calls == []


def test_a_killed_call_is_repeated_and_says_so(tmp_path):
    run, dying, others = RunDirectory(tmp_path / "out"), Listener(dies_at=1), []
    with pytest.raises(KeyboardInterrupt):
        train(run.path, Uploader(calls=others), dying)
    assert dying.calls == [(0, False), (1, False)] and others == [(0, False)], "uploads come last"
    resumed = Listener()
    train(run.path, Uploader(calls=others), resumed, resume=True)
    assert resumed.calls == [(1, True), (2, False)]
    assert others == [(0, False), (1, False), (2, False)]


@pytest.mark.parametrize("where", ["report_stages", "_drop_optimizer_state"])
def test_a_run_killed_before_the_report_makes_it_when_it_is_resumed(tmp_path, monkeypatch, where):
    """Right after the second stage has been written; the whole run ends with nothing left over."""
    from slop_hf.training import trainer as module

    run, listener = RunDirectory(tmp_path / "out"), Listener()
    owner = module.SlopTrainer if hasattr(module.SlopTrainer, where) else module
    real = getattr(owner, where)

    def die(*args, **kwargs):
        if run.finished_stages == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, where, die)
    with pytest.raises(KeyboardInterrupt):
        train(run.path, listener)
    assert listener.calls == [(0, False)]
    monkeypatch.undo()
    train(run.path, listener, resume=True)
    assert listener.calls == [(0, False), (1, False), (2, False)]
    assert [bool(run.optimizer_files(stage)) for stage in range(3)] == [False, False, True]


def test_a_new_callback_gets_the_stages_that_it_missed(finished):
    run, _ = finished

    class Newcomer(Listener):
        pass

    newcomers = Newcomer(), Newcomer()
    train(run.path, *newcomers, resume=True)
    assert [newcomer.calls for newcomer in newcomers] == [[(0, False), (1, False), (2, False)]] * 2
    assert json.loads((run.stage_dir(2) / NOTES_FILE).read_text()).keys() == {
        "Listener",
        *(f"{Newcomer.__qualname__}{number}" for number in ("", " 2")),
    }


def test_stages_without_notes_count_as_reported(tmp_path):
    """Releases before these notes wrote none."""
    run = train(tmp_path / "out")
    for stage in range(3):
        (run.stage_dir(stage) / NOTES_FILE).unlink()
    listener = Listener()
    report_stages(run, [listener], Ranks())
    assert listener.calls == []


def test_what_a_kill_left_behind_is_removed(tmp_path):
    run = RunDirectory(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        train(run.path, Listener(dies_at=1))
    kept = {path for path in run.path.rglob("*") if not path.name.startswith((".", NOTES_FILE))}
    notes = run.path / "notes.running"  # somebody else's
    left = [
        run.running_dir(1) / "checkpoint-2",
        run.path / ".stage-2-ffn.node-1-4711-9f86d081.writing",
        run.path / ".stage-2-ffn.writing",
        run.running_dir(2) / ".checkpoint-3.node-1-4711-9f86d081.writing",
        run.running_dir(2) / ".checkpoint-2.removing",
        notes,
    ]
    for directory in left:
        directory.mkdir(parents=True)
        (directory / "model.safetensors").touch()
    (run.stage_dir(0) / "optimizer.safetensors").touch()
    train(run.path, resume=True)
    assert not any(path.exists() for path in left[:-1]) and notes.exists()
    assert not run.optimizer_files(0)
    assert all(path.exists() for path in kept if not path.name.startswith("optimizer"))
    assert not [path for path in run.path.rglob(".*ing") if path.is_dir()] + list(run.path.glob("stage-*.running"))
