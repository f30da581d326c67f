"""Every recipe can be planned, and is what it says."""

import importlib.util
from pathlib import Path

import pytest

from slop_hf import RunConfig, preview_run
from slop_hf.cost import count_parameters

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_can_run(path, tmp_path):
    spans = preview_run(RunConfig.from_yaml(path), tmp_path / "out")
    assert all(span.steps for span in spans)


def test_the_tiny_recipes_schedule_is_the_planners():
    spec = importlib.util.spec_from_file_location("demo", RECIPES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    config = RunConfig.from_yaml(demo.RECIPE)
    schedule = config.read_schedule()
    assert schedule == demo.plan(config, demo.TOKENS)
    assert {operator for stage in schedule for operator in stage.operators} == {"layer", "ffn", "hidden", "mha"}
    model = {"model_type": "llama", "vocab_size": config.data.vocab_size, "tie_word_embeddings": True}
    sizes = [count_parameters(dims, model) for dims in (schedule.initial, schedule.target)]
    assert sizes == [237_888, 1_541_760]
