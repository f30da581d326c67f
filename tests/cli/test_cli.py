"""The commands as a user would type them."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import slop_hf
from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory

PLAN = ["plan", "--initial", "768,2048,6,6", "--target-params", "1e9"]


def test_errors_reach_the_shell():
    """One run in a process of its own: a line on stderr, exit code 2, nothing on stdout."""
    command = [sys.executable, "-m", "slop_hf", *PLAN, "--operators", "depth"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown operator 'depth' (known: layer, mha, ffn, hidden, head_dim)\n"


@pytest.mark.parametrize("command", ["plan", "grow", "upscale", "train", "rollback", "report", "reproduce"])
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
    assert "has its own sizes" in error_of(*arguments, "--hidden-size", 64)
    GrowthSchedule(initial).to_yaml(path)
    assert "has no stages" in error_of(*arguments)
    GrowthSchedule(deep, (stages[1],)).to_yaml(path)
    assert "begins with (32, 48, 3, 4), but the model has (32, 48, 2, 4)" in error_of(*arguments)


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
    assert "marginal utility" in done and str(tmp_path / "report" / "report.html") in done
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md",
        "report.html",
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
        ("model.model_type=nonsense", "model.model_type 'nonsense' cannot be grown (known: llama, "),
        ("model.vocab_size=many", "model.vocab_size must be a whole number of at least 1, got 'many'"),
        ("data.vocabulary=1", "unknown key 'data.vocabulary'"),
        ("dta.vocab_size=1", "unknown key 'dta'"),
        ("data.source=/no/such/folder", "/no/such/folder"),
        ("data.block_size=64", "above the model's max_position_embeddings 32"),
        ("schedule=null", "the run has no schedule"),
        ("schedule.stages=[]", None),
        ("training={optim: adafactor, carry_optimizer_state: true}", "keeps a state that cannot be grown"),
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


def test_ctrl_c_says_how_to_resume(config, tmp_path, slop, output_of, monkeypatch, caplog):
    from slop_hf.training.preemption import StopOnSignal

    count = StopOnSignal.on_step_end

    def press(stop, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        count(stop, args, state, control, **kwargs)

    run, before = tmp_path / "a run", signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patched:
        patched.setattr(StopOnSignal, "on_step_end", press)
        code, out, err = slop("train", config, "-o", run)
    signal.signal(signal.SIGINT, before)
    assert code == 130 and "Traceback" not in err
    assert f"{run}: no stage has finished yet\nto continue: slop train {config} -o '{run}' --resume\n" in out
    assert "3 stages" in output_of("train", config, "-o", run, "--resume")
    assert "to continue" not in output_of("train", config, "-o", run, "--resume")
    assert f"{run} is finished" in caplog.text


def test_grow_verifies(model_dir, tmp_path, output_of):
    text = output_of(
        "grow", model_dir, "-o", tmp_path / "x", "--num-hidden-layers", 4, "--init", "preserving", "--verify"
    )
    assert "largest change of a logit" in text


def test_dry_run_of_batches_by_stage(config, output_of, tmp_path):
    """One number for all stages, one for each, and the last one's for the target alone."""
    for value, scratch in ((2, []), ([4, 2, 1], []), ([4, 2, 1], ["--from-scratch"])):
        changes = ["--set", f"training.stage_batch_sizes={value}", "--set", "training.batch_tokens=128"]
        rows = json.loads(
            output_of("train", config, "-o", tmp_path / "out", "--dry-run", "--json", *changes, *scratch)
        )
        assert len(rows) == (1 if scratch else 3) and all(row["tokens"] % 128 == 0 for row in rows)


def test_dry_run_knows_the_state_of_muon(config, output_of, tmp_path):
    """One moment for the matrices of the layers: less memory, and its iteration's FLOPs."""
    command = ["train", config, "-o", tmp_path / "out", "--dry-run", "--json"]
    adamw, muon = (
        json.loads(output_of(*command, "--set", f"training.optim={optim}")) for optim in ("adamw_torch", "muon")
    )
    for one, other in zip(adamw, muon, strict=True):
        assert one["memory_bytes"]["parameters"] == other["memory_bytes"]["parameters"]
        assert (
            one["memory_bytes"]["optimizer"] / 2
            < other["memory_bytes"]["optimizer"]
            < one["memory_bytes"]["optimizer"]
        )
        assert other["flops"] > one["flops"]


def test_version(output_of):
    assert output_of("--version") == f"slop-hf {slop_hf.__version__}\n"


@pytest.mark.parametrize(("option", "level"), [("-q", logging.ERROR), ("-v", logging.INFO)])
def test_verbosity_is_that_of_all_libraries(option, level, output_of, monkeypatch):
    libraries = [logging.getLogger(name) for name in ("slop_hf", "transformers", "huggingface_hub")]
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "warning")
    before = [library.level for library in libraries]
    try:
        assert "10 of 10 agree" in output_of(option, "reproduce", "table1")
        assert [library.level for library in libraries] == [level] * 3
        assert os.environ["TRANSFORMERS_VERBOSITY"] == logging.getLevelName(level).lower()
    finally:
        for library, old in zip(libraries, before, strict=True):
            library.setLevel(old)


def test_verbose_errors_say_where_they_were_raised(slop, monkeypatch):
    monkeypatch.setattr(logging.getLogger("slop_hf"), "level", logging.WARNING)
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "warning")
    code, _, err = slop("-v", "reproduce", "table9")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("error: unknown part 'table9'")
    for name in ("slop_hf", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)


MISSING = """
    train none.yaml -o out
    train none.yaml -o out --dry-run
    data inspect none.yaml
    data tokenize none.yaml
    data train-tokenizer none.yaml -o out
    plan --initial 16,32,2,2 --target 32,64,4,4 --cost-model none.yaml
    plan --from ./none --target 32,64,4,4
    calibrate --from ./none --target 32,64,4,4
    grow ./none -o out --schedule none.yaml
    rollback none --to-stage 1
"""


def test_a_missing_file_is_reported_before_torch_is_loaded(tmp_path):
    """All in one process, so that its start is paid for once."""
    code = """
import shlex, sys
from slop_hf.cli import main
for line in sys.argv[1].strip().splitlines():
    sys.argv = ["slop", *shlex.split(line)]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 2, line
    assert "torch" not in sys.modules, line
"""
    done = subprocess.run([sys.executable, "-c", code, MISSING], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(MISSING.strip().splitlines()) and all("none" in line for line in lines), lines
