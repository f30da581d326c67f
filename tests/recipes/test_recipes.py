"""Every recipe can be planned, and is what it says; every launch configuration can be read."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig

from slop_hf import ConfigSpace, ModelDims, RunConfig, SlopPlanner, preview_run
from slop_hf.cost import count_parameters
from slop_hf.growth import plan_growth
from slop_hf.paper import TABLE_1, TABLE_11
from slop_hf.training.config import known_vocab_size

RECIPES = Path(__file__).parents[2] / "recipes"
RUNS = sorted(RECIPES.glob("*.yaml"))
LAUNCHES = sorted(RECIPES.glob("accelerate/*.yaml"))


def recipe(name):
    return RunConfig.from_yaml(RECIPES / f"{name}.yaml")


def model_of(config):
    return config.model_config(config.read_schedule().initial, known_vocab_size(config))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_recipe_can_run(path, tmp_path):
    """Offline: neither the corpus nor a tokenizer is fetched, and no device that knows bf16 is needed."""
    config = RunConfig.from_yaml(path)
    spans = preview_run(config, tmp_path / "out")
    assert [bool(span.steps) for span in spans] == [bool(tokens) for tokens in config.read_schedule().tokens]
    inits = config.training.get("growth_init")
    for before, span in pairwise(spans):
        plan_growth(before.dims.to_config(model_of(config)), span.growth, init=inits)
