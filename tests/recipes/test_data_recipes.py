"""The mixtures among the recipes can be read, and are what they say."""

import json
from pathlib import Path

import pytest
from mixture import WEIGHTS

from slop_hf.data import DataConfig, Mixture
from slop_hf.data.sources import count_local_bytes

ROOT = Path(__file__).parents[2]
MIXTURES = sorted(ROOT.glob("recipes/data/*.yaml"))


@pytest.mark.parametrize("path", MIXTURES, ids=lambda path: path.stem)
def test_every_mixture_can_be_read(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    mixture = Mixture.from_yaml(path)
    assert DataConfig(mixture=str(path)).weights == mixture.weights
    for source in mixture.sources.values():
        assert (count_local_bytes(source) is not None) == (path.stem in ("local", "machine")), (
            "a Hub id, or what every checkout has"
        )


def test_redpajamas_weights_are_the_papers():
    mixture = Mixture.from_yaml(ROOT / "recipes/data/redpajama.yaml")
    assert {name: source.weight for name, source in mixture.sources.items()} == WEIGHTS


def test_the_local_mixture_runs(output_of, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    small = "sources.code.max_documents=20", f"data.cache_dir={tmp_path}", "data.vocab_size=400", "data.held_out=0"
    options = [text for change in small for text in ("--set", change)]
    made = json.loads(output_of("data", "tokenize", "recipes/data/local.yaml", *options, "--json"))
    assert [(row["name"], row["weight"]) for row in made["sources"]] == [("code", 1.0)]
    assert all(row["training_tokens"] > 1000 for row in made["sources"])
