"""Every recipe can run and matches its description; every launch configuration can be read."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from slop_hf import ConfigSpace, ModelDims, RunConfig, SlopPlanner, preview_run
from slop_hf.cost.flops import count_parameters
from slop_hf.io.units import format_bytes
from slop_hf.paper import tables as paper
from slop_hf.training.config import find_vocab_size

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
RUNS = sorted(RECIPES.glob("*.yaml"))
LAUNCHES = sorted(RECIPES.glob("accelerate/*.yaml"))
DEEPSPEED = sorted(RECIPES.glob("accelerate/*.json"))


def stem(path):
    return path.stem


def script(name):
    """Import a script of the recipes as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def launch(monkeypatch, capfd):
    """Run grow_1b.py in this process as a launcher does, and return its exit code, stdout and stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["grow_1b.py", *map(str, arguments)])
        code = 0
        try:
            script("grow_1b").main()
        except SystemExit as ended:
            code = ended.code
        return code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("path", RUNS, ids=stem)
def test_every_recipe_can_run(path, tmp_path):
    """Offline: neither a corpus nor a tokenizer is fetched, and no device with bf16 is needed."""
    config = RunConfig.from_yaml(path)
    spans = preview_run(config, tmp_path / "out")
    assert [span.steps > 0 for span in spans] == [tokens > 0 for tokens in config.read_schedule().tokens]
    assert spans[-1].steps


@pytest.mark.parametrize("path", [path for path in RUNS if path.stem != "grow_tiny"], ids=stem)
def test_steps_do_not_depend_on_devices(path, tmp_path):
    config = RunConfig.from_yaml(path)
    assert len({preview_run(config, tmp_path, devices=devices) for devices in (1, 8, 64)}) == 1


def test_the_tiny_recipes_schedule_is_the_planners():
    demo = script("demo")
    config = RunConfig.from_yaml(demo.RECIPE)
    schedule = config.read_schedule()
    assert schedule == demo.plan(config, demo.TOKENS)
    assert {operator for stage in schedule for operator in stage.operators} == {"layer", "ffn", "hidden", "mha"}
    model = {"model_type": "llama", "vocab_size": config.data.vocab_size, "tie_word_embeddings": True}
    sizes = [count_parameters(dims, model) for dims in (schedule.initial, schedule.target)]
    assert sizes == [237_888, 1_541_760]


def test_the_1b_recipe_is_the_papers(tmp_path):
    config = RunConfig.from_yaml(RECIPES / "grow_1b.yaml")
    schedule, args = config.read_schedule(), RunConfig(training={**config.training, "bf16": False}).arguments(tmp_path)
    recommended = next(run for run in paper.TABLE_1.runs if run.recommended)
    assert schedule.structures == recommended.path(paper.INITIAL)
    assert schedule.sequence == recommended.sequence == "l-f-h"
    assert schedule.tokens == (paper.INITIAL_TOKENS, *recommended.stage_tokens)
    # The paper's 65B tokens are enough for a fourth growth.
    assert sum(schedule.tokens) == paper.TOTAL_TOKENS - paper.STAGE_TOKENS == 55 * 10**9
    assert config.data.block_size == paper.SEQUENCE_LENGTH
    assert config.training["bf16"] is True
    assert args.batch_tokens == [256 * 1024]
    assert (args.learning_rate, args.warmup_steps, args.weight_decay) == (3e-4, 2000, 0.1)
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm) == (0.9, 0.95, 1.0)
    assert (args.lr_scheduler_type, args.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr_rate": 0.1})
    steps = [span.steps for span in preview_run(config, tmp_path)]
    assert steps == [round(tokens / (256 * 1024)) for tokens in schedule.tokens] == [95_367, 38_147, 38_147, 38_147]


def test_the_105m_recipe_is_table_11(tmp_path):
    config = RunConfig.from_yaml(RECIPES / "grow_105m.yaml")
    schedule, spans = config.read_schedule(), preview_run(config, tmp_path)
    ends = [(dims.hidden_size, dims.intermediate_size, dims.num_hidden_layers) for dims in schedule.structures[::3]]
    assert ends == [(384, 1024, 6), (768, 2048, 12)]
    assert [spans[0].parameters, spans[-1].parameters] == [27_583_872, 104_766_720]  # 27M and 105M
    assert sum(span.flops for span in spans) == pytest.approx(4.08e18, rel=1e-3)
    assert schedule == schedule.with_tokens(sum(schedule.tokens))  # shared by the paper's rule
    for objective in ("delta_params", "delta_params_eq3", "flops"):
        space = ConfigSpace(targets=[schedule.target], config=config.model, sequence_length=config.data.block_size)
        best = SlopPlanner(schedule.initial, space, objective=objective).plan(top_k=1, tokens=sum(schedule.tokens))[0]
        assert best.structures == schedule.structures


def test_the_13b_recipe_grows_llama_2(tmp_path):
    config = RunConfig.from_yaml(RECIPES / "grow_7b_13b.yaml")
    schedule = config.read_schedule()
    seven, thirteen = ModelDims(4096, 11008, 32, 32), ModelDims(5120, 13824, 40, 40)
    best = SlopPlanner(seven, ConfigSpace(targets=[thirteen])).plan(top_k=1)[0]
    assert schedule.structures == best.structures and schedule.sequence == best.sequence == "f-l-h"
    assert find_vocab_size(config) == 32000  # from the recipe, since its tokenizer needs the network
    assert [count_parameters(dims, config.model) for dims in (seven, thirteen)] == [6_738_415_616, 13_015_864_320]
    # Growth keeps the function of trained weights.
    assert schedule.initial_tokens == 0 and config.training["growth_init"] == "preserving"


def test_the_13b_recipe_needs_the_memory_that_its_comment_states(tmp_path, output_of):
    path = RECIPES / "grow_7b_13b.yaml"
    options = ["-o", tmp_path / "out", "--dry-run", "--devices", 64, "--zero-stage", 3]
    rows = json.loads(output_of("train", path, *options, "--json"))
    most = max((row["memory_bytes"] for row in rows), key=lambda memory: memory["total"])
    total, activations = (format_bytes(most[name]) for name in ("total", "activations"))
    assert f"most memory, {total} on each of 64 GPUs, of which {activations} are activations" in path.read_text()
    text = output_of("train", path, *options)
    assert f"largest in stage-3-hidden: {total} =" in text and "64 devices, ZeRO stage 3, micro-batch 1, bf16" in text


@pytest.mark.slow
def test_a_dry_run_through_the_script(tmp_path):
    """In a new process: the paper's run is the default, and stdout holds nothing but JSON."""
    command = [sys.executable, RECIPES / "grow_1b.py", "--dry-run", "--json", "--output-dir", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    stages = ["stage-0-initial", "stage-1-layer", "stage-2-ffn", "stage-3-hidden"]
    assert [row["stage"] for row in json.loads(done.stdout)] == stages
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_on_the_first_process_only(launch, monkeypatch, tmp_path):
    options = ["--dry-run", "--output-dir", tmp_path / "out", "--devices", 8, "--zero-stage", 3]
    monkeypatch.setenv("RANK", "0")
    code, out, err = launch(*options)
    assert code == 0, err
    assert "209,808" in out and "8 devices, ZeRO stage 3, micro-batch 8, bf16" in out
    monkeypatch.setenv("RANK", "1")
    assert launch(*options)[:2] == (0, "")


def test_the_launchers_errors_are_one_line(launch):
    code, out, err = launch("--dry-run", "--devices", 3)
    assert (code, out) == (2, "")
    assert err.startswith("error: a step has 128 blocks, which 3 devices cannot share equally")
    assert len(err.splitlines()) == 1


def test_the_launcher_trains_and_resumes(launch, config, tmp_path):
    options = ["--config", config, "--output-dir", tmp_path / "run", "--set", "training.learning_rate=1e-3"]
    code, out, err = launch(*options, "--json")
    assert code == 0, err
    assert [record["name"] for record in json.loads(out)] == ["stage-0-initial", "stage-1-layer", "stage-2-ffn"]
    code, out, err = launch(*options)
    assert code == 2 and "holds another run" in err
    code, out, err = launch(*options, "--resume")
    assert code == 0 and "3 stages" in out, err


@pytest.mark.parametrize("path", LAUNCHES, ids=stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    zero3 = path.stem.endswith("zero3")
    assert (config.distributed_type == "DEEPSPEED") is zero3
    fsdp2 = path.stem.endswith("fsdp2")
    assert (config.distributed_type == "FSDP") is fsdp2 and (not fsdp2 or config.fsdp_config["fsdp_version"] == 2)
    assert config.num_processes % config.num_machines == 0
    assert not config.use_cpu  # it would turn DeepSpeed and FSDP off
    if zero3:
        # accelerate rejects all other settings if there is a file.
        assert set(config.deepspeed_config) <= {
            "deepspeed_config_file",
            "deepspeed_multinode_launcher",
            "zero3_init_flag",
        }
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]) in DEEPSPEED


@pytest.mark.parametrize("path", DEEPSPEED, ids=stem)
def test_deepspeed_leaves_the_optimizer_to_the_trainer(path):
    settings = json.loads(path.read_text())
    assert not {"optimizer", "scheduler"} & set(settings)
    zero = settings["zero_optimization"]
    assert zero["stage"] == 3 and zero["stage3_gather_16bit_weights_on_model_save"]
    is_gpu = path.stem.endswith("gpu")
    assert zero["overlap_comm"] is is_gpu
    assert zero["stage3_param_persistence_threshold"] == "auto"  # follows the hidden size, which grows
    # So would buckets; on GPUs, those of small stages would be messages too small for the links between machines.
    buckets = {zero[name] for name in ("reduce_bucket_size", "stage3_prefetch_bucket_size")}
    assert buckets == ({50_000_000} if is_gpu else {"auto"})


def test_recipes_are_listed():
    text = (RECIPES / "README.md").read_text()
    for path in [*RUNS, *LAUNCHES, *DEEPSPEED, RECIPES / "accelerate" / "slurm.sh"]:
        assert f"`{path.name}`" in text, path
