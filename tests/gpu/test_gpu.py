"""Training, growth, resumption, calibration and evaluation on a GPU, compared with the same on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_runs
import xxhash
from safetensors.torch import load_file
from training_runs import BATCH, BLOCK, SCHEDULE, Interrupt, blocks, losses, small_model, trainer
from transformers import AutoModelForCausalLM

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory, calibrate, grow_checkpoint, grow_model
from slop_hf.evaluation.held_out import HeldOut, measure_perplexity
from slop_hf.growth.safetensors_io import create_shard, plan_shards, write_tensor
from slop_hf.operators import INITS
from slop_hf.training.calibration import _CHECKPOINTING
from slop_hf.training.checksums import RunningChecksum

pytestmark = pytest.mark.gpu

TOKENS = 4 * BATCH * BLOCK
#: One growth, of every axis at once.
GROWTH = GrowthSchedule(
    SCHEDULE.initial, (GrowthStage(("layer", "ffn", "hidden", "mha"), SCHEDULE.target, TOKENS),), TOKENS
)
ZERO3 = Path(__file__).parents[2] / "recipes/accelerate/zero3_gpu.json"
FSDP2 = ZERO3.with_name("eight_gpus_fsdp2.yaml")


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The losses of a run with a growth, in float32 on the CPU."""
    path = tmp_path_factory.mktemp("cpu") / "run"
    trainer(path, schedule=GROWTH, eval_dataset=None, model=small_model(dropout=0.0)).train()
    return dict(losses(path))


MODES = {
    "fp32": ({}, 1e-3),
    "tf32": ({"tf32": True}, 1e-2),
    "bf16": ({"bf16": True}, 5e-2),
    "fused AdamW": ({"optim": "adamw_torch_fused"}, 1e-3),
    "checkpointing": ({_CHECKPOINTING: True}, 1e-3),
    "torch_compile": ({"torch_compile": True}, 1e-2),  # in TF32, which transformers turns on
    "torch_compile and bf16": ({"torch_compile": True, "bf16": True}, 5e-2),
}


@pytest.mark.parametrize("mode", MODES)
def test_losses_are_those_of_the_cpu(build, device, on_cpu, mode):
    settings, tolerance = MODES[mode]
    if device == "cpu":  # which has no TF32
        settings = {name: value for name, value in settings.items() if name != "tf32"}
    run = build(schedule=GROWTH, eval_dataset=None, model=small_model(dropout=0.0), **settings)
    run.train()
    assert run.model.device.type == device
    assert RunDirectory(run.args.output_dir).is_finished
    assert dict(losses(run.args.output_dir)) == pytest.approx(on_cpu, abs=tolerance)


GROWN = {
    "layer": {"num_hidden_layers": 3},
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "ffn": {"intermediate_size": 48},
    "hidden": {"hidden_size": 32},
    "head_dim": {"head_dim": 16},
}


@pytest.mark.parametrize(("operator", "init"), [(operator, init) for operator in INITS for init in INITS[operator]])
def test_growth_has_the_bits_of_the_cpus_growth(device, operator, init):
    model = small_model()
    expected = grow_model(model, operator, GROWN[operator], init=init).state_dict()
    actual = grow_model(model.to(device), operator, GROWN[operator], init=init).state_dict()
    assert expected.keys() == actual.keys()
    assert all(actual[name].cpu().equal(expected[name]) for name in expected)


@pytest.mark.parametrize("length", [1, 5_000_003])
def test_files_of_the_devices_tensors_have_the_bytes_of_the_cpus(device, tmp_path, length):
    """The longer one, of 20 MB, passes through both pinned buffers more than once."""
    value, checksum = torch.arange(length, dtype=torch.float32), RunningChecksum()
    (shard,) = plan_shards({"a": ("F32", (length,))}, "1GB")
    create_shard(tmp_path, shard)
    write_tensor(tmp_path, shard.tensors[0], value.to(device) + 1, checksum.update)
    path = tmp_path / shard.file
    assert load_file(path)["a"].equal(value + 1)
    assert checksum.finish()["hash"] == xxhash.xxh3_128(path.read_bytes()[len(shard.header) :]).hexdigest()


def test_a_boundary_grows_as_grow_checkpoint_does(build, tmp_path):
    schedule = GrowthSchedule(GROWTH.initial, (GrowthStage(GROWTH.stages[0].operators, GROWTH.target, 0),), TOKENS)
    build(schedule=schedule, eval_dataset=None, growth_init="preserving").train()
    run = RunDirectory(tmp_path / "run")
    stage = replace(schedule.stages[0], init="preserving")
    grow_checkpoint(run.stage_dir(0), tmp_path / "grown", stage, seed=1)
    expected, actual = (load_file(path / "model.safetensors") for path in (tmp_path / "grown", run.stage_dir(1)))
    assert expected.keys() == actual.keys() and all(actual[name].equal(expected[name]) for name in expected)


def test_an_interrupted_run_ends_with_the_same_losses(build, tmp_path):
    settings = {"schedule": GROWTH, "eval_dataset": None}
    build("whole", **settings).train()
    with pytest.raises(KeyboardInterrupt):
        build("cut", callbacks=[Interrupt(7)], **settings).train()
    build("cut", **settings).train(resume_from_checkpoint=True)
    whole, cut = (dict(losses(tmp_path / name)) for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, abs=1e-4)  # atomic additions of a GPU have no order


def test_a_checkpoint_from_the_gpu_is_read_on_the_cpu(build, device, tmp_path):
    run = build(schedule=GROWTH, eval_dataset=None, bf16=True)
    with pytest.raises(KeyboardInterrupt):
        run.callback_handler.add_callback(Interrupt(7))
        run.train()
    on_cpu = trainer(tmp_path / "run", schedule=GROWTH, eval_dataset=None, bf16=True)
    on_cpu.train(resume_from_checkpoint=True)
    path = RunDirectory(tmp_path / "run").stage_dir(1)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(BLOCK)[None]
    with torch.no_grad():
        there, here = model.to(device)(ids.to(device)).logits.cpu(), model.cpu()(ids).logits
    torch.testing.assert_close(there, here, atol=1e-4, rtol=1e-4)


def test_calibration_times_the_device(device):
    times = []
    sizes = [ModelDims(32, 64, 2, 2), ModelDims(128, 512, 4, 2)]
    cost = calibrate(
        sizes,
        {"vocab_size": 64},
        sequence_length=32,
        batch_size=4,
        steps=4,
        warmup_steps=1,
        precision="bf16",
        training={"use_cpu": device == "cpu"},
        observe=times.append,
    )
    assert cost.hours(1e9, 1e6) > 0
    assert all(time.seconds_per_step > 0 for time in times)
    if device == "cuda":
        assert torch.cuda.get_device_name() in cost.hardware
        assert all(time.peak_bytes > 4 * time.parameters for time in times)


def test_perplexity_is_that_of_the_cpu(device):
    held_out = HeldOut({"corpus": blocks(8, seed=1)}, None, "", "")
    model = small_model(dropout=0.0)
    expected = measure_perplexity(model, held_out, batch_size=4).metrics["loss"]
    assert measure_perplexity(model.to(device), held_out, batch_size=4).metrics["loss"] == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("kind", [pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"])
def test_shards_on_one_rank(kind, device, on_cpu, tmp_path):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    if device == "cpu":
        pytest.skip("tests/training launches ZeRO-3 and FSDP2 on CPUs")
    GROWTH.to_yaml(tmp_path / "schedule.yaml")
    settings = {
        "output": str(tmp_path / "run"),
        "schedule": str(tmp_path / "schedule.yaml"),
        "arguments": {"use_cpu": False, "eval_after_growth": False},
    }
    command = [sys.executable]
    if kind == "zero3":
        settings["arguments"]["deepspeed"] = str(ZERO3)
    else:
        command += ["-m", "accelerate.commands.launch", "--config_file", str(FSDP2), "--num_processes", "1"]
    program = Path(training_runs.__file__).with_name("launched.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([*command, program, json.dumps(settings)], env=environment, check=True, timeout=120)
    assert dict(losses(tmp_path / "run")) == pytest.approx(on_cpu, abs=1e-3)
