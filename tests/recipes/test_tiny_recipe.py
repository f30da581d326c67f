"""The tiny recipe for real: under DeepSpeed ZeRO-3 on two ranks, as its users launch it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from launching import ROOT, command, environment, largest_difference

from slop_hf import RunConfig, RunDirectory, build_trainer

SHARE = 40  # of the recipe's tokens is one in so many trained on here


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe with fewer tokens, and data of its own."""
    folder = tmp_path_factory.mktemp("recipe")
    content = yaml.safe_load((ROOT / "recipes" / "grow_tiny.yaml").read_text())
    content["data"] |= {"cache_dir": str(folder / "cache"), "max_documents": 300}
    schedule = content["schedule"]
    schedule["initial_tokens"] //= SHARE
    for stage in schedule["stages"]:
        stage["tokens"] //= SHARE
    content["training"]["save_steps"] = 3
    path = folder / "grow_tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.deepspeed
def test_two_ranks_end_where_one_process_does(recipe, tmp_path):
    pytest.importorskip("deepspeed")
    words = command("zero3", 2, ROOT / "recipes" / "grow_1b.py")
    words += ["--config", str(recipe), "--output-dir", str(tmp_path / "two")]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "5 stages" in done.stdout
    build_trainer(RunConfig.from_yaml(recipe), tmp_path / "one").train()
    one, two = (RunDirectory(tmp_path / name).records() for name in ("one", "two"))
    for alone, shared in zip(one, two, strict=True):
        assert (shared.devices, shared.global_step) == (2, alone.global_step)
        assert shared.eval_loss == pytest.approx(alone.eval_loss, abs=1e-5), "the same blocks count, once each"
        assert largest_difference(tmp_path / "one", tmp_path / "two", alone.name) < 1e-5, "Adam magnifies rounding"
