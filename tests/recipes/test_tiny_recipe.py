"""The tiny recipe on a mixture of seven sources, in one process and on two ranks."""

import sys
import time
from pathlib import Path

import pytest
import yaml
from mixture import WEIGHTS, seven_sources

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import launched_recipe
from launching import ROOT, ForkedLaunch, largest_difference

from slop_hf import RunConfig, RunDirectory, build_trainer

SHARE = 40  # divisor of the recipe's tokens


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with fewer tokens, and with the seven sources as data."""
    folder = tmp_path_factory.mktemp("recipe")
    content = yaml.safe_load((ROOT / "recipes" / "grow_tiny.yaml").read_text())
    del content["data"]["source"]
    (folder / "mixture.yaml").write_text(yaml.safe_dump(seven_sources(folder), sort_keys=False))
    content["data"] |= {"cache_dir": str(folder / "cache"), "mixture": "mixture.yaml", "held_out": 0.015}
    schedule = content["schedule"]
    schedule["initial_tokens"] //= SHARE
    for stage in schedule["stages"]:
        stage["tokens"] //= SHARE
    content["training"] |= {
        "save_steps": 4,
        "logging_steps": 4,
        "eval_after_growth": False,  # seven sources take a second
        "per_device_eval_batch_size": 8,
    }  # batches are filled up; ZeRO-3 takes a quarter second for each
    path = folder / "grow_tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start(kind, recipe, output, *more):
    words = ["--config", str(recipe), *more]
    return ForkedLaunch(kind, 2, main=launched_recipe.main, output=output, words=words)


def run(kind, recipe, output, *more):
    launch = start(kind, recipe, output, *more)
    assert launch.wait(300) == 0, launch.text
    assert "5 stages" in launch.text


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """The run in one process."""
    output = tmp_path_factory.mktemp("runs") / "alone"
    build_trainer(RunConfig.from_yaml(recipe), output).train()
    return output


@pytest.fixture(scope="module", params=["ddp", pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"])
def kind(request):
    if request.param == "zero3":
        pytest.importorskip("deepspeed")
    return request.param


@pytest.fixture(scope="module")
def two(kind, recipe, tmp_path_factory):
    """The run on two ranks."""
    output = tmp_path_factory.mktemp("runs") / "two"
    run(kind, recipe, output)
    return output


def log_of(output):
    """Return the logs of a run without times and speeds."""
    timed = ("second", "runtime", "mfu")
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in timed)}
        for entry in RunDirectory(output).history()
    ]


@pytest.mark.slow
def test_two_ranks_end_where_one_process_does(alone, two):
    for one, shared in zip(RunDirectory(alone).records(), RunDirectory(two).records(), strict=True):
        assert (shared.devices, shared.global_step) == (2, one.global_step)
        assert shared.eval_loss == pytest.approx(one.eval_loss, abs=1e-5), "the same blocks count, once each"
        assert shared.eval_losses == pytest.approx(one.eval_losses, abs=1e-5)
        assert shared.data == one.data and shared.data_fingerprint == one.data_fingerprint != ""
        assert largest_difference(alone, two, one.name) < 1e-5, "Adam magnifies rounding"


@pytest.mark.slow
def test_a_killed_and_resumed_run_logs_the_same(kind, recipe, two, tmp_path):
    """After SIGKILL to all ranks in the third stage, the resumed run logs the same losses, rates and tokens."""
    output = tmp_path / "killed"
    launch = start(kind, recipe, output, "--set", "training.save_steps=1")
    try:
        deadline = time.monotonic() + 240
        while not any((output / "stage-2-ffn.running").glob("checkpoint-*")):
            assert launch.is_alive and time.monotonic() < deadline, launch.text
            time.sleep(0.02)
    finally:
        launch.kill()
    assert RunDirectory(output).finished_stages == 2
    run(kind, recipe, output, "--resume")
    assert log_of(output) == log_of(two)
    assert largest_difference(output, two, "stage-4-layer") == 0.0


def test_the_consumed_tokens_of_a_mixture(alone):
    """Every stage records its tokens per source; shares follow the weights, and ranges are contiguous."""
    records = RunDirectory(alone).records()
    ends = dict.fromkeys(WEIGHTS, 0)
    for record in records:
        assert [source.source for source in record.data] == list(WEIGHTS)
        for source in record.data:
            assert (source.first_token, source.weight) == (
                ends[source.source],
                pytest.approx(WEIGHTS[source.source] / 100),
            )
            ends[source.source] = source.end_token
        assert sum(source.tokens for source in record.data) == record.tokens
        weighed = [(record.eval_losses[name], WEIGHTS[name]) for name in record.eval_losses]
        mean = sum(loss * weight for loss, weight in weighed) / sum(weight for _, weight in weighed)
        assert record.eval_loss == pytest.approx(mean, rel=1e-9) and len(weighed) >= 2
    total = records[-1].total_tokens
    assert sum(ends.values()) == total
    for name, weight in WEIGHTS.items():
        share = weight / 100
        blocks = total / 128
        assert abs(ends[name] / total - share) <= 3 * (share * (1 - share) / blocks) ** 0.5
