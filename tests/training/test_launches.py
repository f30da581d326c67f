"""Several ranks compute what one process does: DistributedDataParallel, DeepSpeed ZeRO-3 and FSDP2 on two ranks."""

import json
from dataclasses import replace

import pytest
import torch
from launching import largest_difference, launch_forked, weights
from safetensors.torch import load_file
from training_runs import BATCH, SCHEDULE, STEPS, freeze, small_model, trainer
from transformers import AutoModelForCausalLM

from slop_hf import RunDirectory, grow_model
from slop_hf.growth import grow_adamw_state, load_adamw_file, plan_growth

SETTINGS = {"learning_rate": 1e-3}
TOLERANCE = 1e-6  # sums over ranks come in another order; weights are about 1


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run in one process, with which the others are compared."""
    path = tmp_path_factory.mktemp("alone") / "out"
    trainer(path, model=small_model(dropout=0.0), **SETTINGS).train()
    return path


SHARDED = [pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"]


@pytest.fixture(scope="module", params=SHARDED)
def sharded(request, tmp_path_factory):
    """The run under ZeRO-3 and under FSDP2 on two ranks, with its dumps."""
    if request.param == "zero3":
        pytest.importorskip("deepspeed")
    path = tmp_path_factory.mktemp(request.param)
    (path / "dump").mkdir()
    arguments = {**SETTINGS, "keep_optimizer_states": True, "max_shard_size": "20KB"}
    ended = launch_forked(
        request.param, 2, output=path / "out", batch=BATCH // 2, dump=path / "dump", arguments=arguments
    )
    assert ended.code == 0, ended.text[-4000:]
    return path


def facts(path, stage, rank=0):
    return json.loads((path / "dump" / f"{stage}-rank-{rank}.json").read_text())


@pytest.mark.slow
def test_ddp_agrees_with_one_process(alone, tmp_path):
    ended = launch_forked("ddp", 2, output=tmp_path / "out", batch=BATCH // 2, arguments=SETTINGS)
    assert ended.code == 0, ended.text[-4000:]
    for stage in SCHEDULE.stage_names:
        assert largest_difference(alone, tmp_path / "out", stage) < TOLERANCE
    record = RunDirectory(tmp_path / "out").records()[-1]
    assert record.devices == 2 and record.total_tokens == RunDirectory(alone).records()[-1].total_tokens


def test_shards_agree_with_one_process(alone, sharded):
    for stage in SCHEDULE.stage_names:
        assert largest_difference(alone, sharded / "out", stage) < TOLERANCE
    one, two = (RunDirectory(path).history() for path in (alone, sharded / "out"))
    for name in ("loss", "eval_loss", "learning_rate"):
        expected = [(entry["step"], entry[name]) for entry in one if name in entry]
        assert [(entry["step"], entry[name]) for entry in two if name in entry] == [
            (step, pytest.approx(value, abs=1e-5)) for step, value in expected
        ]


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_each_stage_is_compiled(kind, alone, tmp_path):
    """With a compiler that traces forward and backward pass, and runs the graphs as they are."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    (tmp_path / "dump").mkdir()
    schedule = replace(SCHEDULE, stages=SCHEDULE.stages[:1])
    schedule.to_yaml(tmp_path / "schedule.yaml")
    settings = {**SETTINGS, "torch_compile": True, "torch_compile_backend": "aot_eager"}
    launched = {"schedule": tmp_path / "schedule.yaml", "batch": BATCH // 2, "dump": tmp_path / "dump"}
    ended = launch_forked(kind, 2, output=tmp_path / "out", **launched, arguments=settings)
    assert ended.code == 0, ended.text[-4000:]
    for number, stage in enumerate(schedule.stage_names):
        assert facts(tmp_path, number)["is_compiled"]
        assert largest_difference(alone, tmp_path / "out", stage) < TOLERANCE


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_sharded_stage_begins_with_the_states_of_growth_in_memory(sharded, number):
    """Masters and both moments, to the last bit, after passing through the parts of two ranks."""
    before = RunDirectory(sharded / "out").stage_dir(number - 1)
    old, stage = AutoModelForCausalLM.from_pretrained(before), SCHEDULE.stages[number - 1]
    entered = load_file(sharded / "dump" / f"{number}.safetensors")
    grown = grow_model(old, stage, seed=number)
    for name, weight in grown.named_parameters():
        assert torch.equal(entered[f"weight/{name}"], weight), name
    moments = grow_adamw_state(load_adamw_file(before), plan_growth(old.config, stage, seed=number))
    for name, state in moments.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(entered[f"{key}/{name}"], state[key]), (key, name)
        assert state["step"] == facts(sharded, number)["step"] == number * STEPS


def test_states_are_sharded(sharded):
    """No rank holds more weights and moments than its part, padded; masters are the weights themselves."""
    for number, dims in enumerate(SCHEDULE.structures):
        sizes = [parameter.numel() for parameter in small_model(dims).parameters()]
        each = (1 if number == 0 else 3) * (sum(sizes) / 2)  # AdamW has no moments before its first step
        for rank in (0, 1):
            assert each <= facts(sharded, number, rank)["held"] <= each + 3 * len(sizes)


def test_engines_of_earlier_stages_are_gone(sharded):
    """With their models and states, which would otherwise stay in memory to the end of the run."""
    assert [facts(sharded, number, rank)["alive"] for number in range(4) for rank in (0, 1)] == [1] * 8


def test_groups_of_a_sharded_stage(sharded):
    """Matrices decay, norms do not; the rate warms up again."""
    for number, dims in enumerate(SCHEDULE.structures):
        model = small_model(dims)
        norms = sum(value.numel() for name, value in model.named_parameters() if "norm" in name)
        decayed, others = facts(sharded, number)["groups"]
        assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
        assert (decayed["numbers"], others["numbers"]) == (model.num_parameters() - norms, norms)
        assert decayed["lr"] == others["lr"] == 0.0


def test_sharded_files_are_a_stock_checkpoint(sharded):
    """Both ranks write; the files load as one model."""
    stage = RunDirectory(sharded / "out").stage_dir(3)
    assert len(list(stage.glob("model-*.safetensors"))) > 2 and (stage / "model.safetensors.index.json").exists()
    model, stored = AutoModelForCausalLM.from_pretrained(stage), weights(sharded / "out", stage.name)
    assert all(torch.equal(value, stored[name]) for name, value in model.named_parameters())


@pytest.mark.deepspeed
def test_interrupted_under_zero3_and_finished_in_one_process(alone, tmp_path):
    """Up to rounding; `tests/recipes/test_tiny_recipe.py` tests bits on the same number of ranks."""
    path, here = tmp_path / "out", {**SETTINGS, "keep_optimizer_states": True}
    stop = STEPS + 5
    ended = launch_forked("zero3", 2, output=path, batch=BATCH // 2, at={stop: "interrupt"}, arguments=here)
    assert ended.code != 0 and not (path / "stage-1-layer").exists()
    kept = {one.name for one in RunDirectory(path).running_dir(1).iterdir()}
    assert kept == {f"checkpoint-{STEPS + 1}", f"checkpoint-{STEPS + 4}"}
    trainer(path, model=small_model(dropout=0.0), **SETTINGS).train(resume_from_checkpoint=True)
    assert largest_difference(path, alone) < TOLERANCE


#: Parts of the names of frozen parameters: a matrix that is sharded, and norms, which every rank keeps whole.
FROZEN = ["embed_tokens", "layers.1.mlp.up_proj", "layers.0.input_layernorm"]


@pytest.fixture(scope="module")
def partly_frozen(tmp_path_factory):
    """A run with frozen parameters in one process."""
    path = tmp_path_factory.mktemp("frozen") / "out"
    trainer(path, model=freeze(small_model(dropout=0.0), FROZEN), **SETTINGS, keep_optimizer_states=True).train()
    return path


def check_frozen(run, partly_frozen):
    """Every stage agrees with one process, and the growth of frozen weights to the last bit."""
    for stage in SCHEDULE.stage_names:
        assert largest_difference(partly_frozen, run, stage) < TOLERANCE
        ours, others = weights(run, stage), weights(partly_frozen, stage)
        trained = load_adamw_file(partly_frozen / stage)
        assert len(trained) < len(ours) and all(ours[name].equal(others[name]) for name in ours.keys() - trained)
    assert load_adamw_file(run / stage).keys() == trained.keys()


def test_frozen_parameters_under_ddp(partly_frozen, tmp_path):
    path = tmp_path / "out"
    ended = launch_forked("ddp", 2, output=path, batch=BATCH // 2, frozen=FROZEN, arguments=SETTINGS)
    assert ended.code == 0, ended.text[-4000:]
    check_frozen(path, partly_frozen)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_terminated_on_two_ranks_and_finished_on_one(kind, partly_frozen, tmp_path):
    """SIGTERM to one rank: all save at the same step, and the launch ends well; with frozen parameters.

    The second launch accumulates gradients, without a warning that accelerate has not been told.
    """
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    path, stop = tmp_path / "out", 2 * STEPS + 3
    settings = {"frozen": FROZEN, "arguments": SETTINGS}
    begun = launch_forked(kind, 2, output=path, batch=BATCH // 2, at={stop: "terminate"}, on=1, **settings)
    assert begun.code == 0, begun.text[-4000:]
    assert "resume to continue" in begun.text
    names = {one.name for one in RunDirectory(path).running_dir(2).iterdir()}
    assert f"checkpoint-{stop + 1}" in names, "a step later, when all ranks know"
    ended = launch_forked(kind, 1, output=path, batch=BATCH // 2, **settings)
    assert ended.code == 0, ended.text[-4000:]
    assert "mismatch" not in ended.text
    check_frozen(path, partly_frozen)
