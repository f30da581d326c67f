"""Runs of a committed record as a growth law sees them."""

import dataclasses
from pathlib import Path

import pytest

from slop_hf import Comparison, GrowthLaw, GrowthSchedule, GrowthStage, ModelDims, RunConfig
from slop_hf.errors import RunError
from slop_hf.experiments.earlier_records import add_missing_facts
from slop_hf.experiments.staged_runs import draw_residuals, list_staged_runs, plan_staged_run

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results"


def load(name, arm):
    comparison = Comparison.load(RECORDS / f"{name}.json")
    run = next(run for run in comparison.runs if run.arm == arm)
    return add_missing_facts(dataclasses.replace(comparison, runs=(run,)))


def test_stages_growths_rates_and_losses_are_those_of_the_record():
    comparison = load("study_growth_nano", "hidden copy")
    (run,) = list_staged_runs(comparison)
    (result,) = comparison.runs
    assert [stage.factors for stage in run.stages] == [{}, {"depth": 4 / 3}, {"inner": 3.75}, {"hidden": 88 / 24}]
    assert [stage.is_copied for stage in run.stages] == [False, False, False, True]
    assert [stage.is_carried for stage in run.stages] == [False, True, True, True]
    assert [stage.losses[-1] for stage in run.stages] == [(1.0, stage.eval_loss) for stage in result.stages]
    assert all(stage.losses == tuple(sorted(stage.losses)) for stage in run.stages)
    # A cosine in each stage, up to a peak of 3e-3 and down to a tenth of it; rates are means of parts of a stage.
    assert all(max(stage.rates) == pytest.approx(3e-3, rel=0.01) for stage in run.stages)
    assert all(stage.rates[-1] == pytest.approx(3e-4, rel=0.05) for stage in run.stages)
    assert (run.end_loss, run.experiment) == (result.eval_loss, "growth")
    assert run.text == "python-stdlib, bpe of 1024, blocks of 128"


def test_the_rates_are_those_of_the_arm():
    (run,) = list_staged_runs(load("study_course_nano", "rate halved"))
    assert [round(max(stage.rates), 4) for stage in run.stages] == [0.003, 0.0015, 0.0015, 0.0015]


def test_a_record_without_its_config_is_refused():
    comparison = dataclasses.replace(load("study_learning_rate_nano", "3e-3"), settings={})
    with pytest.raises(RunError, match="the record of learning_rate lacks the config of its runs"):
        list_staged_runs(comparison)


@pytest.mark.parametrize(
    "name, arm", [("study_growth_nano", "hidden copy"), ("study_course_nano", "WSD over run"), ("best_nano", "slop")]
)
def test_a_run_before_it_is_trained_is_the_run_without_losses(name, arm):
    comparison = load(name, arm)
    (run,) = list_staged_runs(comparison)
    settings, (result,) = comparison.settings, comparison.runs
    training = {**settings["run"]["training"], **settings["arms"].get(arm, {})}
    config = RunConfig.from_plain({**settings["run"], "training": training}, "record")
    planned = plan_staged_run(dataclasses.replace(config, schedule=result.schedule), experiment=comparison.name)
    stages = tuple(dataclasses.replace(stage, losses=()) for stage in run.stages)
    assert planned == dataclasses.replace(run, stages=stages)


@pytest.mark.parametrize("state, is_carried", [("new", False), ("carried", True), ("kept", True)])
def test_the_optimizer_state_at_growth_is_read_by_either_name(state, is_carried):
    config = RunConfig(
        schedule=GrowthSchedule(
            ModelDims(16, 32, 1, 2), (GrowthStage(("layer",), ModelDims(16, 32, 2, 2), 4096),), 4096
        ),
        training={"optimizer_state_at_growth": state},
    )
    assert plan_staged_run(config).stages[1].is_carried == is_carried


def test_errors_are_drawn(tmp_path):
    (run,) = list_staged_runs(load("study_learning_rate_nano", "3e-3"))
    law = GrowthLaw()
    path = draw_residuals(law, [run], tmp_path / "errors.png")
    assert path.stat().st_size > 5_000
    with pytest.raises(RunError, match="none of 1 runs has a loss at the end"):
        draw_residuals(law, [dataclasses.replace(run, is_finished=False)], tmp_path / "none.png")
