"""`slop upscale` as a user would type it."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import slop_hf
from slop_hf import ModelDims, grow_model
from slop_hf.data import load_tokenizer
from slop_hf.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small model with a tokenizer and a folder of texts next to it."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    for number in range(40):
        (home / "texts" / f"{number}.txt").write_text(" ".join(str(number * k) for k in range(60)))
    tokenizer = train_tokenizer((path.read_text() for path in sorted((home / "texts").iterdir())), 300)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64)
    LlamaForCausalLM(ModelDims(32, 48, 4, 4).to_config(config)).save_pretrained(home / "small")
    tokenizer.save_pretrained(home / "small")
    return home / "small"


@pytest.fixture
def upscale(checkpoint, output_of, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return lambda output, *options: output_of(
        *("upscale", checkpoint, "-o", output, "--already-seen", "1e8", "--sequence-length", 32, *options)
    )


def test_a_checkpoint_grows_and_its_run_is_accepted(checkpoint, upscale, output_of, tmp_path):
    grown, texts = tmp_path / "grown", checkpoint.parent / "texts"
    text = upscale(grown, "--tokens", 4096, "--data", texts, "--seed", 3)
    assert "4→6" in text and "grown.yaml" in text and "missing" not in text
    expected = grow_model(AutoModelForCausalLM.from_pretrained(checkpoint), "layer", 6, init="interleave", seed=3)
    weights = dict(AutoModelForCausalLM.from_pretrained(grown).named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in expected.named_parameters())
    assert len(load_tokenizer(grown)) == expected.config.vocab_size
    (stage,) = json.loads(output_of("train", tmp_path / "grown.yaml", "-o", tmp_path / "out", "--dry-run", "--json"))
    assert stage["structure"] == str(ModelDims(32, 48, 6, 4)) and stage["tokens"] == pytest.approx(4096, rel=0.1)
    assert stage["parameters"] == expected.num_parameters()


def test_the_run_trains(checkpoint, upscale, output_of, tmp_path):
    """From another directory than the one in which it was written, and with the training text filled in."""
    upscale(
        tmp_path / "grown",
        "--tokens",
        256,
        "--init",
        "preserving",
        "--precision",
        "fp32",
        "--run",
        tmp_path / "r.yaml",
    )
    change = [f"data.source={checkpoint.parent / 'texts'}", f"data.cache_dir={tmp_path / 'cache'}"]
    change += ["data.held_out=0.2", "training.use_cpu=true", "training.disable_tqdm=true"]
    options = [word for setting in change for word in ("--set", setting)]
    (record,) = json.loads(output_of("train", tmp_path / "r.yaml", "-o", tmp_path / "out", "--json", *options))
    assert record["total_tokens"] == 256


def test_nothing_is_written_by_a_dry_run(checkpoint, upscale, tmp_path):
    text = upscale(tmp_path / "grown", "--dry-run", "--by", 1.5)
    assert not list(tmp_path.iterdir())
    assert max(map(len, text.partition("would write")[0].splitlines())) <= 80 and "…" not in text
    words = " ".join(text.split())
    assert all(word in words for word in ("× 1.5", "memory per device", "Ways to spend", "disk space", "interleave"))
    content = yaml.safe_load(text.partition("yaml:\n")[2])
    assert content["schedule"]["initial"]["num_hidden_layers"] == 6 and content["data"]["tokenizer"] == "grown"
    answer = json.loads(upscale(tmp_path / "grown", "--dry-run", "--by", 1.5, "--json"))
    assert not list(tmp_path.iterdir()) and answer["run"] == content
    assert answer["would_write"] == [str(tmp_path / "grown"), str(tmp_path / "grown.yaml")]
    stored = load_file(checkpoint / "model.safetensors")
    assert answer["before"]["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert answer["after"]["parameters"] == answer["checkpoint"]["parameters"]
    assert answer["after"]["memory_bytes"]["total"] > answer["before"]["memory_bytes"]["total"]
    assert {option["kind"] for option in answer["advice"]["options"]} > {"growth", "unchanged"}


def test_a_run_file_behind_a_link_names_the_checkpoint_from_where_the_link_leads(upscale, tmp_path):
    (tmp_path / "deep" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "runs")
    answer = json.loads(upscale(tmp_path / "grown", "--run", tmp_path / "link" / "r.yaml", "--dry-run", "--json"))
    assert (tmp_path / "link" / answer["run"]["model"]["pretrained"]).parent.samefile(tmp_path)


def test_json_holds_what_was_written(upscale, tmp_path):
    answer = json.loads(upscale(tmp_path / "grown", "--layers", 5, "--json"))
    assert answer["receipt"]["parameters"] == answer["after"]["parameters"]
    assert answer["run"] == yaml.safe_load((tmp_path / "grown.yaml").read_text())
    assert "data.source" in (tmp_path / "grown.yaml").read_text()


def test_a_dry_run_of_a_hub_id_reads_its_config_only(checkpoint, output_of, tmp_path, monkeypatch):
    fetched = []

    def fetch(address, name):
        fetched.append(f"{address}/{name}")
        return checkpoint / name

    monkeypatch.setattr("slop_hf.hub.access.fetch_file", fetch)
    monkeypatch.setattr(slop_hf, "plan_checkpoint_growth", None)
    text = output_of(
        *(
            "upscale",
            "user/small",
            "-o",
            tmp_path / "grown",
            "--already-seen",
            "1e8",
            "--sequence-length",
            32,
            "--dry-run",
        )
    )
    assert fetched == ["user/small@main/config.json"] and "user/small grown in depth" in text
