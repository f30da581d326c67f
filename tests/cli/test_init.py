"""`slop init`: recipes copied anywhere, the questions in a terminal, and what travels in the wheel."""

import io
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from slop_hf import Experiment, RunConfig, preview_run
from slop_hf.cli import init, recipe_files
from slop_hf.cli.recipe_files import list_launch_configs, list_recipes
from slop_hf.data import Mixture

RECIPES = {recipe.name: recipe for recipe in list_recipes()}
RUNS = [name for name in RECIPES if "/" not in name]
MIXTURES = [name for name in RECIPES if name.startswith("data/")]
EXPERIMENTS = [name for name in RECIPES if name.startswith("experiments/")]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def answer(monkeypatch):
    """Answer the questions of `slop init` with these lines, as in a terminal."""

    def give(*lines):
        monkeypatch.setattr(init, "_is_terminal", lambda: True)
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))

    return give


def test_recipes_and_launch_configurations_are_listed_in_80_columns(output_of, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = output_of("init")
    assert max(map(len, text.splitlines())) <= 80, text
    for entry in (*RECIPES.values(), *list_launch_configs()):
        assert re.search(rf"^  {re.escape(entry.name)}  +\S", text, re.MULTILINE), entry.name
    assert [row["name"] for row in json.loads(output_of("init", "--json"))] == list(RECIPES)
    assert next(iter(RECIPES)) == "tiny" and {"1b", "7b-13b", "data/fineweb-edu", "experiments/table2"} <= set(RECIPES)


@pytest.mark.parametrize("name", RUNS)
def test_a_copied_run_can_run(output_of, work, name):
    """Away from the recipes: with the mixture that it names, and without a path of a checkout in its comments."""
    text = output_of("init", name, "-o", "new/run.yaml")
    assert "next: slop train new/run.yaml" in text
    copy = Path("new/run.yaml").read_text()
    assert copy.startswith("# ") and "recipes/" not in copy
    assert preview_run(RunConfig.from_yaml("new/run.yaml"), "out")[-1].steps
    original = yaml.safe_load(RECIPES[name].path.read_text())
    original["data"] = {**original["data"], **({"mixture": "redpajama.yaml"} if "mixture" in original["data"] else {})}
    assert yaml.safe_load(copy) == original


@pytest.mark.parametrize("name", MIXTURES)
def test_a_copied_mixture_is_the_same(output_of, work, name):
    output_of("init", name)
    path = work / f"{name.partition('/')[2]}.yaml"
    assert Mixture.from_yaml(path) == Mixture.from_yaml(RECIPES[name].path) and "recipes/" not in path.read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_copied_experiment_brings_its_scales(output_of, work, name):
    output_of("init", name, "-o", "compare.yaml")
    for scale in yaml.safe_load(RECIPES[name].path.read_text())["scales"]:
        copied = Experiment.from_yaml("compare.yaml", scale)
        original = Experiment.from_yaml(RECIPES[name].path, scale)
        assert (copied.arms, copied.run.model, copied.run.training) == (
            original.arms,
            original.run.model,
            original.run.training,
        )
    assert not any("recipes/" in path.read_text() for path in work.glob("*.yaml"))


def test_existing_files_stay_unless_forced(output_of, error_of, work):
    (work / "run.yaml").write_text("mine")
    assert "run.yaml exists" in error_of("init", "tiny", "-o", "run.yaml")
    assert (work / "run.yaml").read_text() == "mine"
    output_of("init", "tiny", "-o", "run.yaml", "--force")
    (work / "redpajama.yaml").write_text("mine")
    assert "redpajama.yaml exists" in error_of("init", "1b"), "what comes along does not overwrite either"
    assert not (work / "1b.yaml").exists() and (work / "redpajama.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tny"], "no recipe 'tny'; did you mean 'tiny'"),
        (["data"], "no recipe 'data'; did you mean 'data/"),
        (["-o", "run.yaml"], "needs the name of a recipe"),
    ],
)
def test_wrong_names_are_refused(error_of, work, words, message):
    assert message in error_of("init", *words)
    assert not list(work.iterdir())


def test_a_name_can_be_given_to_the_question(output_of, work, answer):
    answer("tiny")
    assert "written: tiny.yaml" in output_of("init")
    assert "slop train tiny.yaml" in (work / "tiny.yaml").read_text()


def test_an_own_run_from_answers(output_of, work, answer, tmp_path):
    """A wrong answer is asked again; the file can be trained, and says what it predicts."""
    answer("", "", "", "much", "1e17 flops")
    text = output_of("init", "-o", "own.yaml")
    assert "expected a number above 0 with its unit" in text and "slop advise --flops 1e+17" in text
    content = (work / "own.yaml").read_text()
    assert re.search(r"Predicted loss: \d", content)
    for section in ("schedule", "model", "data", "training"):
        assert re.search(rf"^# .+\n{section}:", content, re.MULTILINE)
    spans = preview_run(RunConfig.from_yaml("own.yaml"), "out")
    assert sum(span.flops for span in spans) == pytest.approx(1e17, rel=0.02)


def test_a_model_of_your_own(output_of, work, answer):
    config = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
              "num_attention_heads": 8, "vocab_size": 32000}  # fmt: skip
    (work / "model").mkdir()
    (work / "model" / "config.json").write_text(json.dumps(config))
    answer("", "missing/model", "model", "1e9", "texts", "1e9 tokens")
    text = output_of("init")
    assert "missing/model" in text and "--from model --already-seen 1e+09 --tokens 1e+09" in text
    run = yaml.safe_load((work / "run.yaml").read_text())
    assert run["data"]["source"] == "texts"
    assert run["schedule"]["initial_tokens"] is not None


def test_an_installed_package_has_recipes_of_its_own(monkeypatch, tmp_path):
    package = tmp_path / "site-packages" / "slop_hf"
    (package / "recipes").mkdir(parents=True)
    monkeypatch.setattr(recipe_files, "_PACKAGE", package)
    assert recipe_files.find_recipes() == package / "recipes"
