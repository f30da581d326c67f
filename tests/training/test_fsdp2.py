"""FSDP2: a run that changes its strategy, settings that it cannot have, and shapes that do not fit the ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from launching import largest_difference, launch, launch_forked, weights
from training_runs import BATCH, BLOCK, STEPS, small_model, trainer

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory
from slop_hf.errors import RunError
from slop_hf.growth import load_adamw_file
from slop_hf.runs.settings import RunSettings
from slop_hf.training.checks import check_fsdp2
from slop_hf.training.launch import prepare_launch

SETTINGS = {"learning_rate": 1e-3}
TOLERANCE = 1e-6  # sums over ranks come in another order; weights are about 1


@pytest.mark.slow
@pytest.mark.deepspeed
def test_begun_under_zero3_resumed_under_fsdp2_and_finished_in_one_process(tmp_path):
    """Killed twice within a stage; the second launch is `accelerate launch` with the recipes' configuration."""
    pytest.importorskip("deepspeed")
    alone, path = tmp_path / "alone", tmp_path / "out"
    trainer(alone, model=small_model(dropout=0.0), **SETTINGS).train()
    settings = {"output": path, "batch": BATCH // 2, "arguments": SETTINGS}
    assert launch_forked("zero3", 2, **settings, at={STEPS + 5: "interrupt"}).code != 0
    ended = launch("fsdp2", 2, **settings, at={2 * STEPS + 5: "interrupt"})
    assert ended.code != 0 and (path / "stage-1-layer").exists(), ended.text[-4000:]
    trainer(path, model=small_model(dropout=0.0), **SETTINGS).train(resume_from_checkpoint=True)
    assert largest_difference(path, alone) < TOLERANCE
    changes = RunSettings.load(RunDirectory(path)).changes
    assert [(change.step, change.settings["strategy"]) for change in changes] == [
        (0, "zero3"),
        (STEPS + 4, "fsdp2"),  # the last checkpoint before each kill
        (2 * STEPS + 2, "replicated"),
    ]
    assert [record.devices for record in RunDirectory(path).records()] == [2, 2, 1, 1]


@pytest.mark.slow
def test_ranks_without_a_row(tmp_path):
    """Matrices of two rows on three ranks, with accumulated gradients, and layers that are computed again."""
    tokens = 6 * BLOCK * 4
    dims = [ModelDims(2, 2, 1, 1), ModelDims(2, 2, 2, 1), ModelDims(2, 3, 2, 1)]
    stages = [GrowthStage(("layer",), dims[1], tokens), GrowthStage(("ffn",), dims[2], tokens)]
    schedule = GrowthSchedule(dims[0], tuple(stages), initial_tokens=tokens)
    schedule.to_yaml(tmp_path / "schedule.yaml")
    settings = {**SETTINGS, "keep_optimizer_states": True}
    model = small_model(dims[0], dropout=0.0)
    trainer(tmp_path / "alone", schedule=schedule, model=model, **settings, per_device_train_batch_size=6).train()
    more = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    launched = {"schedule": tmp_path / "schedule.yaml", "batch": 1, "arguments": {**settings, **more}}
    ended = launch_forked("fsdp2", 3, output=tmp_path / "out", **launched)
    assert ended.code == 0, ended.text[-4000:]
    for name in schedule.stage_names:
        assert largest_difference(tmp_path / "alone", tmp_path / "out", name) < TOLERANCE
        one, three = (load_adamw_file(tmp_path / run / name) for run in ("alone", "out"))
        assert one.keys() == three.keys()
        for parameter, state in one.items():
            assert state["step"] == three[parameter]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.allclose(state[key], three[parameter][key], rtol=1e-3, atol=1e-8), (key, parameter)


@pytest.mark.slow
def test_bf16_keeps_weights_and_losses_in_float32(tmp_path):
    """With FSDP2 and its offloading asked for by the training arguments, under a launcher that does not know them."""
    alone = trainer(tmp_path / "alone", model=small_model(dropout=0.0), **SETTINGS)
    alone.train()
    settings = {**SETTINGS, "bf16": True, "fsdp": True, "fsdp_config": {"cpu_offload": True}}
    ended = launch_forked("ddp", 2, output=tmp_path / "out", batch=BATCH // 2, arguments=settings)
    assert ended.code == 0, ended.text[-4000:]
    assert {weight.dtype for weight in weights(tmp_path / "out", "stage-3-hidden").values()} == {torch.float32}
    one, two = ([record.eval_loss for record in RunDirectory(tmp_path / run).records()] for run in ("alone", "out"))
    assert two == pytest.approx(one, abs=0.01)
    assert RunSettings.load(RunDirectory(tmp_path / "out")).changes[0].settings["strategy"] == "fsdp2"
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in two)


VERSION_1 = "FSDP version 1 is not supported; set fsdp_version: 2"
ONE_RANK = "FSDP needs the processes of a launch"
LAUNCHES = [
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "RANK": "0"}, {}, VERSION_1),
    ({"ACCELERATE_USE_FSDP": "true", "RANK": "0"}, {}, VERSION_1),  # accelerate's default
    ({"RANK": "0"}, {"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, VERSION_1),
    ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, ONE_RANK),
    ({}, {"fsdp": True}, ONE_RANK),
    (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "RANK": "0", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
        {},
        "fsdp_cpu_ram_efficient_loading may have left the model empty on this rank; set it to false",
    ),
]


@pytest.mark.parametrize(("environment", "settings", "message"), LAUNCHES)
def test_launches_that_fsdp_cannot_use_are_refused(monkeypatch, environment, settings, message):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION", "RANK", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    plain = {"fsdp": None, "fsdp_config": None, "use_cpu": True, "ddp_backend": None, "deepspeed": None}
    with pytest.raises(RunError, match=message):
        prepare_launch(SimpleNamespace(**{**plain, **settings}))


SIZES = {"dp_replicate_size": 1, "tp_size": 1, "cp_size": 1, "sp_size": 1}
REFUSED = [
    ({"activation_checkpointing": True}, {}, "no", "set gradient_checkpointing among the training arguments"),
    ({"ignored_modules": "lm_head"}, {}, "no", "fsdp_ignored_modules is not supported"),
    ({}, {"dp_replicate_size": 2}, "no", "dp_replicate_size 2 is not supported next to FSDP2; leave it out"),
    ({}, {"tp_size": 4}, "no", "tp_size 4 is not supported next to FSDP2; leave it out"),
    ({}, {}, "fp16", "fp16 under FSDP2 is not supported: .*; use bf16"),
]


@pytest.mark.parametrize(("plugin", "sizes", "precision", "message"), REFUSED)
def test_settings_that_growth_cannot_follow_are_refused(plugin, sizes, precision, message):
    plain = {"activation_checkpointing": False, "ignored_modules": None}
    check_fsdp2(SimpleNamespace(**plain), SimpleNamespace(**SIZES), "bf16")
    with pytest.raises(RunError, match=message):
        check_fsdp2(SimpleNamespace(**{**plain, **plugin}), SimpleNamespace(**{**SIZES, **sizes}), precision)
