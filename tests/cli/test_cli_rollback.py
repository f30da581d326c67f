"""`slop rollback` as a user would type it."""

import json
from dataclasses import replace

import pytest

from slop_hf.dims import ModelDims
from slop_hf.runs.directory import RunDirectory
from slop_hf.schedule import GrowthSchedule, GrowthStage

DEEP = ModelDims(16, 32, 3, 2)
STAGES = GrowthStage(("layer",), DEEP, 100), GrowthStage(("ffn",), DEEP.replace(intermediate_size=48), 100)
SCHEDULE = GrowthSchedule(ModelDims(16, 32, 2, 2), STAGES, 100)


@pytest.fixture
def run(tmp_path):
    """The directory of a finished run, without the content of its stages."""
    path = tmp_path / "run"
    for name in SCHEDULE.stage_names:
        (path / name).mkdir(parents=True)
        (path / name / "stage.json").touch()
    SCHEDULE.to_yaml(path / "schedule.yaml")
    return path


def names(path):
    return sorted(item.name for item in path.iterdir())


def test_help_names_every_option(output_of):
    text = output_of("rollback", "--help")
    assert all(option in text for option in ("RUN", "--to-stage", "--schedule", "--dry-run", "--json"))
    assert "slop train --resume" in text and "rolled-back" in text


def test_later_stages_are_moved(run, output_of):
    text = output_of("rollback", run, "--to-stage", 0)
    aside = run / "rolled-back" / "1"
    assert names(aside) == ["stage-1-layer", "stage-2-ffn"] and RunDirectory(run).finished_stages == 1
    lines = text.splitlines()
    assert lines[0].startswith("stage-2-ffn → ") and lines[1].startswith("stage-1-layer → ")
    assert f"{run} ends with stage-0-initial; to continue: `slop train CONFIG -o {run} --resume`" in text
    assert "its AdamW state no longer exists" in text


def test_what_is_kept_needs_no_warning(run, output_of):
    (run / "stage-1-layer" / "optimizer.safetensors").touch()
    assert "AdamW" not in output_of("rollback", run, "--to-stage", 1)


def test_a_dry_run_moves_nothing(run, tmp_path, output_of):
    before = names(run)
    text = output_of("rollback", run, "--to-stage", 1, "--dry-run")
    assert f"stage-2-ffn would be moved to {run / 'rolled-back' / '1'}" in text
    assert f"{run} would end with stage-1-layer" in text
    other = tmp_path / "other.yaml"
    replace(SCHEDULE, stages=STAGES[:1]).to_yaml(other)
    output_of("rollback", run, "--to-stage", 1, "--schedule", other, "--dry-run", "--json")
    assert names(run) == before and RunDirectory(run).schedule == SCHEDULE


def test_json(run, output_of):
    expected = {
        "run": str(run),
        "stage": 0,
        "moved": ["stage-2-ffn", "stage-1-layer"],
        "aside": str(run / "rolled-back" / "1"),
        "keeps_optimizer": False,
    }
    arguments = ["rollback", run, "--to-stage", 0, "--json"]
    assert json.loads(output_of(*arguments, "--dry-run")) == expected
    assert json.loads(output_of(*arguments)) == expected
    assert RunDirectory(run).finished_stages == 1


def test_another_schedule(run, tmp_path, output_of):
    other = replace(SCHEDULE, stages=(STAGES[0], replace(STAGES[1], tokens=500)))
    other.to_yaml(tmp_path / "other.yaml")
    output_of("rollback", run, "--to-stage", 1, "-s", tmp_path / "other.yaml")
    assert RunDirectory(run).schedule == other


def test_with_another_schedule_the_run_goes_on_as_it_says(run, tmp_path, output_of):
    replace(SCHEDULE, stages=STAGES[:1], initial_tokens=100).to_yaml(tmp_path / "other.yaml")
    text = output_of("rollback", run, "--to-stage", 0, "-s", tmp_path / "other.yaml")
    assert f"--schedule {run / 'schedule.yaml'} --resume`" in text


def test_a_run_is_trained_put_back_and_trained_again(config, tmp_path, output_of):
    path, options = tmp_path / "run", ["--set", "training.keep_optimizer_states=true"]
    output_of("train", config, "-o", path, *options)
    weights = (path / "stage-2-ffn" / "model.safetensors").read_bytes()
    output_of("rollback", path, "--to-stage", 0)
    assert not (path / "stage-1-layer").exists()
    output_of("train", config, "-o", path, *options, "--resume")
    assert (path / "stage-2-ffn" / "model.safetensors").read_bytes() == weights
    assert (path / "rolled-back" / "1" / "stage-2-ffn" / "model.safetensors").read_bytes() == weights
