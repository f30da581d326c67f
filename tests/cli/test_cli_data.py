"""`slop data` as a user would type it."""

import json
import sys

import pytest
import yaml

from slop_hf import DataConfig, prepare_data
from slop_hf.data import load_tokenizer


@pytest.fixture
def mixture(tmp_path):
    """A file of two sources, 30 and 10 texts."""
    sources = {}
    for name, count, weight in (("notes", 30, 60), ("words", 10, 40)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:02}.txt").write_text(
                f"{name} [{number}] " + " ".join(str(number * k) for k in range(80))
            )
        sources[name] = {"source": str(folder), "weight": weight}
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": sources}))
    return path


@pytest.fixture
def small(tmp_path):
    values = {"vocab_size": 300, "block_size": 16, "held_out": 0.2, "cache_dir": tmp_path / "cache"}
    return [text for key, value in values.items() for text in ("--set", f"data.{key}={value}")]


def rows(summary):
    return {row["name"]: row for row in summary["sources"]}


class TestInspect:
    def test_shows_sources_reach_and_samples(self, output_of, mixture, small, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        out = output_of("data", "inspect", mixture, *small, "--samples", 2)
        assert "60.00%" in out and "40.00%" in out and "~30" in out and "~10" in out
        assert "training tokens before a source repeats: words is the first" in out
        assert "a bpe of 300 tokens trained on the sample" in out and "not all tokens are in the cache" in out
        assert "notes, document 1" in out and "words [1] 0 1 2" in out and "notes, document 3" not in out
        assert sorted(tmp_path.rglob("*")) == before

    def test_json(self, output_of, mixture, small):
        summary = json.loads(output_of("data", "inspect", mixture, *small, "--json", "--samples", 0))
        assert (
            not summary["cached"]
            and summary["complete"]
            and summary["scarcest"] == "words"
            and summary["samples"] == {}
        )
        assert summary["total"]["documents"] == 40
        words = rows(summary)["words"]
        assert words["weight"] == 0.4 and words["tokens"] > 0 and words["disk_bytes"] == 2 * words["tokens"]
        assert summary["tokens_before_repeat"] == pytest.approx(words["tokens"] * 0.8 / 0.4, rel=0.01)

    def test_counts_are_exact_once_cached(self, output_of, mixture, small):
        counts = json.loads(output_of("data", "tokenize", mixture, *small, "--json"))
        summary = json.loads(output_of("data", "inspect", mixture, *small, "--json"))
        assert summary["cached"] and summary["samples"]["notes"][0].startswith("notes [0]")
        for name, row in rows(counts).items():
            assert rows(summary)[name]["tokens"] == row["training_tokens"] + row["held_out_tokens"]
        out = output_of("data", "inspect", mixture, *small, "--samples", 0)
        assert "all tokens are in the cache" in out and "~" not in out
        assert f"{rows(summary)['words']['tokens']:,}" in out

    def test_a_runs_file_will_do(self, output_of, config):
        summary = json.loads(output_of("data", "inspect", config, "--json", "--set", "data.max_documents=7"))
        assert [row["documents"] for row in summary["sources"]] == [7]
        assert summary["samples"]["corpus"][0].startswith("file 0:")

    def test_changes_of_a_mixture(self, output_of, mixture, small):
        change = "--set", "sources.notes.max_documents=5"
        summary = json.loads(output_of("data", "inspect", mixture, *small, *change, "--json"))
        assert rows(summary)["notes"]["documents"] == 5


class TestTokenize:
    def test_shows_the_cost_and_writes_the_cache(self, output_of, mixture, small, tmp_path):
        out = output_of("data", "tokenize", mixture, *small)
        assert "~" in out and "training tokens before a source repeats" in out
        corpus = prepare_data(
            DataConfig(
                mixture=str(mixture), vocab_size=300, block_size=16, held_out=0.2, cache_dir=str(tmp_path / "cache")
            )
        )
        for name, source in corpus.sources.items():
            folder = source.train.path.parent
            assert f"{name}: {source.train.tokens:,} training tokens" in out and f"in {folder}" in out

    def test_a_dry_run_writes_nothing(self, output_of, mixture, small, tmp_path):
        out = output_of("data", "tokenize", mixture, *small, "--dry-run")
        assert "notes" in out and not (tmp_path / "cache").exists()
        summary = json.loads(output_of("data", "tokenize", mixture, *small, "--dry-run", "--json"))
        assert rows(summary).keys() == {"notes", "words"}

    def test_another_tokenizer(self, output_of, mixture, small, tmp_path):
        output_of("data", "train-tokenizer", mixture, "-o", tmp_path / "tokens", "--vocab-size", 280, *small)
        tokenizer = "--tokenizer", tmp_path / "tokens"
        counts = json.loads(output_of("data", "tokenize", mixture, *small, *tokenizer, "--json"))
        assert counts["vocab_size"] == 280
        assert "in the cache" in output_of("data", "tokenize", mixture, *small, *tokenizer, "--dry-run")


class TestTrainTokenizer:
    @pytest.mark.parametrize(("kind", "eos"), [("bpe", "<|endoftext|>"), ("sentencepiece", "</s>")])
    def test_writes_one_that_loads(self, output_of, mixture, tmp_path, kind, eos):
        pytest.importorskip(kind if kind == "sentencepiece" else "tokenizers")
        folder = tmp_path / "tokenizers" / kind
        out = output_of("data", "train-tokenizer", mixture, "-o", folder, "--kind", kind, "--vocab-size", 290)
        assert f"{kind} tokenizer of 290 tokens written to {folder}" in out
        tokenizer = load_tokenizer(folder)
        assert tokenizer.eos_token == eos and len(tokenizer) == 290

    def test_json(self, output_of, mixture, tmp_path):
        out = output_of("data", "train-tokenizer", mixture, "-o", tmp_path / "made", "--vocab-size", 270, "--json")
        assert json.loads(out) == {"tokenizer": str(tmp_path / "made"), "kind": "bpe", "vocab_size": 270}


@pytest.mark.parametrize("command", [(), ("inspect",), ("tokenize",), ("train-tokenizer",)])
def test_help_loads_no_heavy_library(command):
    import subprocess

    code = f"""
import sys
from slop_hf.cli import main
sys.argv = ["slop", "data", *{command!r}, "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code
print("loaded", *{{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_machines_tokenize_parts(mixture, small, tmp_path, output_of):
    """Each says what is missing, and the last one reports the whole."""
    first = json.loads(output_of("data", "tokenize", mixture, *small, "--part", "2/2", "--json"))
    assert first == {"part": 2, "parts": 2, "missing": {"notes": [1], "words": [1]}}
    assert "notes: part 2 of 2 is in the cache; missing: 1" in output_of(
        "data", "tokenize", mixture, *small, "--part", "2/2"
    )
    parts = json.loads(output_of("data", "tokenize", mixture, *small, "--part", "1/2", "--json"))
    other = [word.replace(str(tmp_path / "cache"), str(tmp_path / "other")) for word in small]
    whole = json.loads(output_of("data", "tokenize", mixture, *other, "--json"))
    assert parts["fingerprint"] == whole["fingerprint"]
