"""`train_run`: one call trains, scores and publishes; `tests/hub` shows it through `slop train` and a Hub."""

import pytest
from transformers import TrainerCallback

from slop_hf import GrowthSchedule, PublishCallback, RunConfig, train_run
from slop_hf.errors import EvaluationError, HubError, RunError
from slop_hf.runs.launches import RunLaunches

SCORED = {"evaluation": {"tasks": ["perplexity"]}}


class Counter(TrainerCallback):
    """Counts the optimizer steps of a run."""

    steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_a_run_is_trained_scored_and_resumed(config, tmp_path):
    counter = Counter()
    run = train_run(RunConfig.from_yaml(config, SCORED), tmp_path / "run", resume=True, callbacks=[counter])
    records = run.records()
    assert run.is_finished and counter.steps == records[-1].global_step
    assert [[score.task for score in run.evaluations(stage)] for stage in range(3)] == [["perplexity"]] * 3
    with pytest.raises(RunError, match="holds another run"):
        train_run(RunConfig.from_yaml(config), run.path)
    assert train_run(RunConfig.from_yaml(config), run.path, resume=True).records() == records
    launches = RunLaunches.load(run).launches
    assert launches[0].data == (str(config.parent / "texts"),) and len(launches) <= 2


def test_another_schedule_and_the_target_alone(config, tmp_path):
    run_config = RunConfig.from_yaml(config)
    schedule = run_config.read_schedule()
    shorter = GrowthSchedule(schedule.initial, schedule.stages[:1], schedule.initial_tokens)
    run = train_run(run_config, tmp_path / "run", schedule=shorter, scratch=True)
    (record,) = run.records()
    assert record.dims == shorter.target


def test_what_cannot_run_is_refused_first(config, tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setattr("slop_hf.evaluation.lm_eval._list_stock_tasks", dict)  # it reads thousands of files
    with pytest.raises(EvaluationError, match="nonsense"):
        train_run(RunConfig.from_yaml(config, {"evaluation": {"tasks": ["nonsense"]}}), output)
    with pytest.raises(HubError, match="is not an address"):
        train_run(RunConfig.from_yaml(config), output, from_stage="no address")
    with pytest.raises(HubError, match="hub_strategy 'checkpoint'"):
        train_run(
            RunConfig.from_yaml(config, {"training": {"push_to_hub": True, "hub_strategy": "checkpoint"}}), output
        )
    assert not output.exists()


def test_publishing_is_attached_once(config, tmp_path, monkeypatch):
    """The Hub is offline: nothing is published, training ends all the same, and the summary says so."""
    lines = []
    run_config = RunConfig.from_yaml(config, {"training.push_to_hub": True, "training.hub_model_id": "user/run"})
    monkeypatch.setattr(PublishCallback, "finish", lambda publishing: f"{publishing.repo_id} was asked")
    train_run(run_config, tmp_path / "run", report=lines.append)
    assert lines == ["user/run was asked"]
    train_run(run_config, tmp_path / "run", resume=True, callbacks=[PublishCallback("user/mine")], report=lines.append)
    assert len(lines) == 1
