"""`slop advise` as a user would type it."""

import json
import subprocess
import sys

import pytest
import yaml
from transformers import LlamaConfig

from slop_hf import GrowthSchedule, RunConfig

TINY = ["advise", "--flops", "1e14", "--vocab-size", 300, "--sequence-length", 64]
LLAMA = ["advise", "--initial", "2048,8192,16,32,8", "--vocab-size", 128256, "--tied", "--already-seen", "9e12"]


@pytest.fixture
def narrow(monkeypatch, output_of):
    """Run `slop` in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return output_of


PAGES = {
    "from scratch": ["advise", "--flops", "1e20"],
    "hours": [*LLAMA, "--hours", "100", "--device", "H100"],
    "tokens": [*LLAMA, "--tokens", "20e9"],
    "a target": ["advise", "--flops", "1e19", "--target", "1024,4096,24,16", "--cost-model", "paper"],
    "own head size": ["advise", "--initial", "1024,3072,28,16,8,128", "--already-seen", "36e12", "--tokens", "20e9"],
    "tiny": TINY,
}


@pytest.mark.parametrize("command", PAGES.values(), ids=PAGES)
def test_a_page_fits_into_80_columns(narrow, command):
    text = narrow(*command)
    assert "…" not in text and max(map(len, text.splitlines())) <= 80, text
    words = " ".join(text.split())
    assert all(word in words for word in ("Ways to spend", "from scratch,", "±", "vs row 1", "learning rate"))
    assert any(
        verdict in words
        for verdict in ("Too close to call", "Do not grow", "Grow: ", "Outside what this law", "No verdict")
    )


def test_json_holds_every_figure_of_the_page(output_of):
    answer = json.loads(output_of(*PAGES["hours"], "--json"))
    assert answer["unit"] == "hours" and answer["verdict"]["kind"] == "outside"
    kinds = [option["kind"] for option in answer["options"]]
    assert kinds.count("growth") == 3 and {"unchanged", "scratch_target", "scratch_best"} < set(kinds)
    for option in answer["options"]:
        figures = {"tokens", "flops", "hours", "memory", "learning_rate", "loss", "error", "chance"}
        assert figures <= option.keys()
        assert option["hours"] == pytest.approx(100)
        assert GrowthSchedule.from_plain(option["schedule"], "answer").tokens


@pytest.mark.parametrize("row", [1, 2, 3, 4])
def test_train_accepts_the_run_of_every_row(row, tmp_path, config, output_of):
    texts, run = tmp_path / "texts", tmp_path / "run.yaml"
    answer = json.loads(output_of(*TINY, "--data", texts, "-o", run, "--row", row, "--json"))
    rows = json.loads(output_of("train", run, "-o", tmp_path / "out", "--dry-run", "--json"))
    option = answer["options"][row - 1]
    assert [stage["tokens"] for stage in rows] == pytest.approx(
        [
            option["schedule"].get("initial_tokens", 0),
            *(stage["tokens"] for stage in option["schedule"].get("stages", [])),
        ],
        rel=0.1,
    )
    assert RunConfig.from_yaml(run).training["learning_rate"] == option["learning_rate"]


@pytest.mark.parametrize(("positions", "options"), [(64, ()), (4096, ("--sequence-length", 4096))])
def test_train_accepts_a_run_from_a_model(tmp_path, config, output_of, positions, options):
    """By default, sequences are as long as the model has positions for."""
    model, run = tmp_path / "model", tmp_path / "run.yaml"
    LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                max_position_embeddings=positions, tie_word_embeddings=True).save_pretrained(model)  # fmt: skip
    command = ["advise", "--from", model, "--already-seen", "1e8", "--tokens", "1e6", *options]
    answer = json.loads(output_of(*command, "--data", tmp_path / "texts", "-o", run, "--json"))
    content = yaml.safe_load(run.read_text())
    assert answer["options"][0]["kind"] in ("growth", "unchanged")
    assert content["model"] == {"pretrained": str(model)} and content["data"]["block_size"] == positions
    content["data"] |= {"tokenizer": None, "vocab_size": 300}  # the model has none of its own
    run.write_text(yaml.safe_dump(content))
    rows = json.loads(output_of("train", run, "-o", tmp_path / "out", "--dry-run", "--json"))
    assert sum(stage["tokens"] for stage in rows) == pytest.approx(answer["options"][0]["tokens"], rel=0.1)


def test_a_figure_marks_every_option(tmp_path, output_of):
    figure = tmp_path / "advice.svg"
    text = output_of(*TINY, "--plot", figure)
    assert f"figure written to {figure}" in text
    drawn = figure.read_text()
    rows = json.loads(output_of(*TINY, "--json"))["options"]
    assert all(f'id="option-{number}"' in drawn for number in range(1, len(rows) + 1))


def test_advice_needs_no_torch():
    script = (
        "import sys; from slop_hf.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", script, *map(str, PAGES["from scratch"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
