"""The commands as a user would type them."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory
from slop_hf.cli import main

PLAN = ["plan", "--initial", "768,2048,6,6", "--target-params", "1e9"]


@pytest.fixture
def slop(monkeypatch, capfd):
    """Run `slop` in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["slop", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture
def output_of(slop):
    def output(*arguments):
        code, out, err = slop(*arguments)
        assert code == 0, err
        return out

    return output


@pytest.fixture
def error_of(slop):
    def error(*arguments):
        code, _, err = slop(*arguments)
        assert code == 2, err
        assert err.startswith("error: ") and len(err.strip().splitlines()) <= 2, err
        return err

    return error


def test_errors_reach_the_shell():
    """One run in a process of its own: a line on stderr, exit code 2, nothing on stdout."""
    command = [sys.executable, "-m", "slop_hf", *PLAN, "--operators", "depth"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown operator 'depth'; known: layer, mha, ffn, hidden, head_dim\n"


def test_plan_prints_a_table(output_of):
    text = output_of(*PLAN, "--top-k", 3)
    assert "(2816, 7680, 8, 22)" in text and "1.69e+24" in text and "l-f-h" in text


def test_plan_writes_a_schedule_that_train_accepts(tmp_path, config, output_of):
    done = output_of("plan", "--initial", "16,32,2,2", "--target", "32,48,3,4", "--operators", "layer,ffn,hidden,mha",
                "--tokens", "4e3", "-o", tmp_path / "plan.yaml", "--json")  # fmt: skip
    found = json.loads(done)
    schedule = GrowthSchedule.from_yaml(tmp_path / "plan.yaml")
    assert len(found) == 5 and found[0]["initial"]["hidden_size"] == 16 and len(schedule.stages) == 4
    rows = json.loads(
        output_of("train", config, "-s", tmp_path / "plan.yaml", "-o", tmp_path / "out", "--dry-run", "--json")
    )
    assert [row["stage"] for row in rows] == list(schedule.stage_names)
    assert not (tmp_path / "out").exists()


def test_plan_from_a_model(tmp_path, output_of):
    LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                tie_word_embeddings=True).save_pretrained(tmp_path)  # fmt: skip
    done = output_of("plan", "--from", tmp_path, "--target", "128,256,4,8", "--json")
    assert json.loads(done)[0]["initial"] == ModelDims(64, 128, 2, 4).as_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--initial", "768,2048,6", "--target-params", "1e9"], "expected hidden,ffn,layers,heads"),
        (["--initial", "768,2048,6,6"], "either targets or target_params"),
        (["--target-params", "1e9"], "either with --initial or with --from"),
        (["--from", "nowhere", "--target-params", "1e9"], "no readable config.json"),
        ([*PLAN[1:], "--operators", "depth"], "unknown operator 'depth'"),
        ([*PLAN[1:], "--objective", "flops"], "needs a token budget"),
        ([*PLAN[1:], "--tokens", "-5"], "tokens must be positive"),
        ([*PLAN[1:], "--min-layers", "70"], "bounds contradict"),
    ],
)
def test_plan_refuses(arguments, message, error_of):
    assert message in error_of("plan", *arguments)


@pytest.mark.parametrize("command", ["plan", "grow", "train", "report", "reproduce"])
def test_help_teaches(command, output_of):
    text = output_of(command, "--help")
    assert f"slop {command}" in text and "Example" in text and "--json" in text


@pytest.fixture
def model_dir(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(ModelDims(32, 48, 2, 4).to_config(LlamaConfig(vocab_size=50))).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_grow(model_dir, tmp_path, output_of, error_of):
    target = tmp_path / "large"
    dry = output_of("grow", model_dir, "-o", target, "--num-hidden-layers", 4, "--intermediate-size", 64, "--dry-run")
    assert "would grow" in dry and not target.exists()
    receipt = json.loads(
        output_of("grow", model_dir, "-o", target, "--num-hidden-layers", 4, "--intermediate-size", 64, "--json")
    )
    model = AutoModelForCausalLM.from_pretrained(target)
    assert ModelDims.from_config(model.config) == ModelDims(32, 64, 4, 4)
    assert receipt["parameters"] == model.num_parameters()
    assert "exists already" in error_of("grow", model_dir, "-o", target, "--num-hidden-layers", 4)
    assert "nothing to grow" in error_of("grow", model_dir, "-o", tmp_path / "x")
    assert "would shrink" in error_of("grow", model_dir, "-o", tmp_path / "x", "--num-hidden-layers", 1)
    assert "unknown init" in error_of(
        "grow", model_dir, "-o", tmp_path / "x", "--num-hidden-layers", 4, "--init", "no"
    )
    assert "is not a model directory" in error_of("grow", tmp_path, "-o", tmp_path / "x", "--hidden-size", 64)
    assert "could be fetched from the Hub" in error_of("grow", "no/model", "-o", tmp_path / "x", "--hidden-size", 64)


def test_grow_options(model_dir, tmp_path, output_of, error_of):
    target = tmp_path / "large"
    sizes = ["--head-dim", 16, "--intermediate-size", 96, "--max-shard-size", "30KB"]
    others = ["--init", "ffn=copy, head_dim=spread", "--noise", 0, "--seed", 7, "--threads", 1]
    options = ["grow", model_dir, "-o", target, *sizes, *others]
    text = output_of(*options, "--dry-run")
    assert "ffn by copy, head_dim by spread" in text and "model-00001-of-0000" in text and "free" in text
    plan = json.loads(output_of(*options, "--dry-run", "--json"))
    assert plan["preserves"] and plan["needed_bytes"] > plan["weight_bytes"] == 4 * plan["parameters"]
    assert not target.exists()
    receipt = json.loads(output_of(*options, "--json"))
    assert receipt["inits"] == {"ffn": "copy", "head_dim": "spread"} and receipt["seed"] == 7
    small, large = (AutoModelForCausalLM.from_pretrained(path) for path in (model_dir, target))
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(small(tokens).logits, large(tokens).logits, rtol=1e-4, atol=1e-5)
    assert len(list(target.glob("model-*.safetensors"))) == len(plan["shards"])


def test_grow_through_a_schedule(model_dir, tmp_path, output_of, error_of):
    initial, deep, wide = ModelDims(32, 48, 2, 4), ModelDims(32, 48, 3, 4), ModelDims(32, 64, 3, 4)
    path = tmp_path / "plan.yaml"
    stages = GrowthStage(("layer",), deep, tokens=10), GrowthStage(("ffn",), wide, init="preserving")
    GrowthSchedule(initial, stages).to_yaml(path)
    arguments = ["grow", model_dir, "-o", tmp_path / "large", "--schedule", path]
    assert "growth 2: ffn by preserving" in output_of(*arguments, "--dry-run")
    assert json.loads(output_of(*arguments, "--json"))["inits"] == {"layer": "stack", "ffn": "preserving"}
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "large")
    assert ModelDims.from_config(grown.config) == wide
    assert "brings its own sizes" in error_of(*arguments, "--hidden-size", 64)
    GrowthSchedule(initial).to_yaml(path)
    assert "has no stages" in error_of(*arguments)
    GrowthSchedule(deep, (stages[1],)).to_yaml(path)
    assert "begins with (32, 48, 3, 4), but the model has (32, 48, 2, 4)" in error_of(*arguments)


@pytest.fixture
def config(tmp_path):
    """A run of three short stages over a few text files."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"file {number}: " + " ".join(str(number * k) for k in range(60)))
    dims = ModelDims(16, 32, 2, 2)
    deeper = dims.replace(num_hidden_layers=3)
    wider = deeper.replace(intermediate_size=48)
    stages = [
        {"operators": ["layer"], "dims": deeper.as_dict(), "tokens": 600},
        {"operators": ["ffn"], "dims": wider.as_dict(), "tokens": 600},
    ]
    data = {
        "source": str(texts),
        "vocab_size": 300,
        "block_size": 32,
        "held_out": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    run = {
        "schedule": {"initial": dims.as_dict(), "initial_tokens": 600, "stages": stages},
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": data,
        "training": {"per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 2, "disable_tqdm": True},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def test_train_resume_and_report(config, tmp_path, output_of, error_of):
    runs = tmp_path / "grown", tmp_path / "scratch"
    output_of("train", config, "-o", runs[0])
    records = json.loads(output_of("train", config, "-o", runs[1], "--from-scratch", "--json"))
    grown = RunDirectory(runs[0]).records()
    assert [record.name for record in grown] == ["stage-0-initial", "stage-1-layer", "stage-2-ffn"]
    assert len(records) == 1
    assert records[0]["total_flops"] == pytest.approx(grown[-1].total_flops, rel=0.1)
    assert (runs[0] / "stage-1-layer" / "tokenizer.json").is_file()
    assert "holds another run" in error_of("train", config, "-o", runs[0])
    assert "holds another run" in error_of("train", config, "-o", runs[0], "--dry-run")
    assert "3 stages" in output_of("train", config, "-o", runs[0], "--resume")
    done = output_of("report", *runs, "-o", tmp_path / "report")
    assert "marginal utility" in done
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md",
        "report.json",
        "loss.png",
        "path.png",
    }
    assert "is not a run" in error_of("report", tmp_path / "texts")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rte=1", "training: unknown key 'learning_rte'; did you mean 'learning_rate'?"),
        (
            "model.tie_word_embedings=true",
            "model: unknown key 'tie_word_embedings'; did you mean 'tie_word_embeddings'?",
        ),
        ("model.model_type=nonsense", "model: "),
        ("data.vocabulary=1", "unknown key 'data.vocabulary'"),
        ("dta.vocab_size=1", "unknown key 'dta'"),
        ("data.source=/no/such/folder", "/no/such/folder"),
        ("data.block_size=64", "above the model's max_position_embeddings 32"),
        ("schedule=null", "the run has no schedule"),
        ("schedule.stages=[]", None),
        ("training.optim=adafactor", "keeps a state that cannot be grown"),
        ("training.learning_rate=fast", "training.learning_rate: Input should be a valid number"),
        ("training", "expected key=value"),
    ],
)
def test_train_refuses_before_it_begins(config, tmp_path, change, message, output_of, error_of):
    arguments = ["train", config, "-o", tmp_path / "out", "--set", change, "--dry-run"]
    if message is None:
        output_of(*arguments)
    else:
        assert message in error_of(*arguments)
    assert not (tmp_path / "out").exists()


def test_train_config_that_is_not_there(tmp_path, error_of):
    assert "no such file" in error_of("train", tmp_path / "none.yaml", "-o", tmp_path / "out")


def test_grow_verifies(model_dir, tmp_path, output_of):
    text = output_of(
        "grow", model_dir, "-o", tmp_path / "x", "--num-hidden-layers", 4, "--init", "preserving", "--verify"
    )
    assert "logits change by" in text
