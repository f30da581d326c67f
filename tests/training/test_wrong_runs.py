"""Wrong run files and resumptions are refused in one line, before anything is trained or written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from training_runs import BATCH, SCHEDULE, STEPS, Interrupt, blocks, small_model, trainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from slop_hf import ModelDims, RunConfig, RunDirectory, build_trainer, preview_run
from slop_hf.errors import RunError, SlopError
from slop_hf.runs.directory import RunFacts, list_checkpoints
from slop_hf.runs.lock import LOCK_DIRECTORY
from slop_hf.runs.rollback import plan_rollback
from slop_hf.runs.settings import RunSettings
from slop_hf.training import arguments as training_arguments
from slop_hf.training import config as training_config
from slop_hf.training.checks import check_deepspeed_config, check_precision

INITIAL = ModelDims(16, 32, 2, 2)
RUN: dict[str, Any] = {
    "schedule": {
        "initial": INITIAL.as_dict(),
        "initial_tokens": 640,
        "stages": [{"operators": ["layer"], "dims": {**INITIAL.as_dict(), "num_hidden_layers": 3}, "tokens": 640}],
    },
    "model": {"max_position_embeddings": 32},
    "data": {"source": "python-stdlib", "vocab_size": 300, "block_size": 32},
    "training": {"per_device_train_batch_size": 2, "use_cpu": True},
}


def preview(path: Path, overrides: dict[str, Any]) -> None:
    preview_run(RunConfig.from_yaml(path, overrides), path.parent / "out")


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.yaml"
    path.write_text(yaml.safe_dump(RUN))
    preview(path, {})
    return path


WRONG_FILES = [
    ("", "it names no training data; give data.source"),
    ("# nothing yet\n", "it names no training data; give data.source"),
    ("- a\n- b\n", "expected a mapping with keys such as schedule, model, data and training"),
    ("model: {}\n", "it names no training data"),
    ("data: {block_size: 32}\n", "it names no training data"),
    ("data: {source: python-stdlib}\n", "the run has no schedule"),
    ("data: {source: python-stdlib}\ndata: {source: texts}\n", "the key 'data' is given twice, in lines 1 and 2"),
    ("data: {source: python-stdlib}\ntraining:\n", "training: expected a section"),
    ("data: {source: python-stdlib\n", "not valid YAML"),
    (b"\x89PNG\r\n\x1a\n", "not a text file in UTF-8"),
]

WRONG_VALUES = [
    # Sections and keys.
    ("dta.source", "x", "unknown key 'dta'; did you mean 'data'?"),
    ("data.blocksize", 3, "unknown key 'data.blocksize'; did you mean 'block_size'?"),
    ("data.mixture", {"sources": {"web": {"sauce": "a"}}}, "unknown key 'data.mixture.sources.web.sauce'; did you"),
    (
        "schedule.stages",
        [{"operator": ["ffn"]}],
        "unknown key 'schedule.stages.0.operator'; did you mean 'operators'?",
    ),
    ("schedule.initial.hidden", 5, "unknown key 'schedule.initial.hidden'; did you mean 'hidden_size'?"),
    ("evaluation.task", "piqa", "unknown key 'evaluation.task'; did you mean 'tasks'?"),
    ("model.tie_word_embedding", True, "unknown key 'tie_word_embedding'; did you mean 'tie_word_embeddings'?"),
    ("training.learning_rte", 1e-3, "unknown key 'learning_rte'; did you mean 'learning_rate'?"),
    ("training.output_dir", "runs/x", "training.output_dir: `slop train -o DIR` names the run directory"),
    ("training.resume_from_checkpoint", "x", "resume with `slop train --resume`"),
    ("model", 3, "model: expected a section, KEY: VALUE per line, got 3"),
    # The schedule.
    ("schedule", "no/such.yaml", "no/such.yaml: no such file"),
    ("schedule.initial_tokens", "many", "schedule.initial_tokens: "),
    # The model.
    ("model.model_type", "lama", "model.model_type 'lama' cannot be grown; did you mean 'llama'?"),
    (
        "model.model_type",
        "bert",
        "cannot be grown (known: llama, mistral, qwen2, qwen3, gemma2, gpt_neox, gemma, gemma3_text, gpt2, ",
    ),
    ("model.tie_word_embeddings", "maybe", "expected bool, got str (value: 'maybe')"),
    (
        "model.num_hidden_layers",
        7,
        "model.num_hidden_layers is 7, but the schedule decides on sizes, and begins with 2",
    ),
    ("model.hidden_size", 64, "model.hidden_size is 64, but the schedule decides on sizes"),
    ("model.vocab_size", 0, "model.vocab_size must be a whole number of at least 1, got 0"),
    ("model.max_position_embeddings", -1, "model.max_position_embeddings must be a whole number of at least 1"),
    ("model.max_position_embeddings", 16, "block_size 32 is above the model's max_position_embeddings 16"),
    ("model.attention_dropout", 2, "model.attention_dropout must be a number from 0 on and below 1, got 2"),
    ("model.hidden_act", "relus", "model.hidden_act 'relus' is unknown; did you mean 'relu'?"),
    (
        "model.attn_implementation",
        "flash",
        "model.attn_implementation 'flash' is unknown; did you mean 'flash_attention_2'?",
    ),
    ("model.attn_implementation", "kernels-community/x", "is unknown (known: eager, flash_attention_2, "),
    ("model.attn_implementation", "flash_attention_2", "computes in half precision only; set training.bf16"),
    ("model.dtype", "float16", "model.dtype must be float32 or float64, got 'float16'"),
    ("model.pretrained", "/no/such/model", "model.pretrained /no/such/model: no such directory, and not a Hub id"),
    ("model.pretrained", 5, "model.pretrained must be a model directory or a Hub id[@revision], got 5"),
    # The data.
    ("data.source", "no-such-folder", "no-such-folder"),
    ("data.source", None, "data.source: "),
    ("data.held_out", 1.5, "held_out must be a share of the documents in [0, 1), got 1.5"),
    ("data.tokenizer_kind", "words", "data.tokenizer_kind: "),
    # The training arguments.
    ("training.bf16", "perhaps", "training.bf16: Input should be a valid boolean"),
    ("training.learning_rate", "fast", "training.learning_rate: Input should be a valid number"),
    ("training.learning_rate", -1, "learning_rate must be a number, at least 0, got -1"),
    ("training.learning_rate", float("nan"), "learning_rate must be a number, at least 0, got nan"),
    ("training.learning_rate", float("inf"), "learning_rate must be a number, at least 0, got inf"),
    ("training.stage_learning_rates", [1e-3, float("nan")], "stage_learning_rates must be positive numbers"),
    ("training.stage_learning_rates", [1e-3] * 3, "stage_learning_rates has 3 values, but the run has 2 stages"),
    ("training.per_device_train_batch_size", 0, "per_device_train_batch_size must be a whole number of at least 1"),
    ("training.per_device_eval_batch_size", -2, "per_device_eval_batch_size must be a whole number of at least 1"),
    ("training.gradient_accumulation_steps", 0, "gradient_accumulation_steps must be a whole number of at least 1"),
    ("training.batch_tokens", 33, "batch_tokens 33 is not a multiple of the block size 32; take 32"),
    ("training.weight_decay", -0.1, "weight_decay must be a number, at least 0, got -0.1"),
    ("training.adam_beta2", 1, "adam_beta2 must be a number, at least 0 and below 1, got 1"),
    ("training.seed", -1, "seed must be a whole number of at least 0, got -1"),
    ("training.seed", 2**32, "seed must be at most 2147483647"),
    ("training.save_steps", -5, "save_steps must be a number, at least 0"),
    ("training.report_to", "wandb", "report_to 'wandb' is not installed here; install its package"),
    ("training.report_to", "wandbb", "report_to 'wandbb' is unknown; did you mean 'wandb'?"),
    ("training.optim", "adamw", "training.optim: 'adamw' is unknown; did you mean 'adamw_torch'?"),
    ("training.lr_scheduler_type", "cosin", "training.lr_scheduler_type: 'cosin' is unknown; did you mean 'cosine'?"),
    ("training.lr_scheduler_kwargs", {"min_rate": 0.1}, "lr_scheduler_type 'cosine_with_min_lr': "),
    (
        "training.eval_strategy",
        "sometimes",
        "training.eval_strategy: 'sometimes' is unknown (known: no, steps, epoch)",
    ),
    ("training.cost_model", "no-such.yaml", "no-such.yaml: no such file"),
    ("training.max_shard_size", "large", "max_shard_size must be a number of bytes or a size such as '5GB'"),
    ("training.growth_init", "", "growth_init is empty"),
    ("training.growth_init", "magic", "unknown init 'magic'"),
    # The evaluation.
    ("evaluation", {"tasks": "piqa", "limit": -1}, "evaluation: limit must be a whole number, 1 or more, got -1"),
    (
        "evaluation",
        {"tasks": "piqa", "batch_size": "large"},
        "evaluation: batch_size must be 'auto', or a whole number",
    ),
    ("evaluation", {"tasks": "piqa", "datasets": "no-such"}, "no-such: no such directory"),
]


@pytest.mark.parametrize(("content", "message"), WRONG_FILES, ids=[message for _, message in WRONG_FILES])
def test_a_wrong_file_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(SlopError) as caught:
        preview(path, {})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"), WRONG_VALUES, ids=[f"{key}={value!r:.30}" for key, value, _ in WRONG_VALUES]
)
def test_a_wrong_value_is_refused(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: object, message: str
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(SlopError) as caught:
        preview(run_file, {key: value})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert [path.name for path in run_file.parent.iterdir()] == ["run.yaml"]


def test_a_size_that_the_schedule_has_too_may_be_named(run_file: Path) -> None:
    preview(run_file, {"model.num_hidden_layers": 2})


@pytest.mark.parametrize(("below", "message"), [("", "run.yaml is a file"), ("out", "run.yaml is not a directory")])
def test_a_file_is_no_run_directory(run_file: Path, below: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        preview_run(RunConfig.from_yaml(run_file), run_file / below)


@pytest.mark.parametrize(
    ("changes", "has_liger", "message"),
    [
        (
            {"model.attn_implementation": "flash_attention_2", "training.bf16": True},
            False,
            "model.attn_implementation flash_attention_2 cannot be used here: .* Install what it needs, or take sdpa",
        ),
        (
            {"training.use_liger_kernel": True},
            False,
            r"needs the package liger-kernel \(0.3 or newer\)",
        ),
        ({"training.use_liger_kernel": True}, True, "use_liger_kernel needs a GPU, and training would run on the CPU"),
        pytest.param(
            {"training.bf16": True, "training.use_cpu": False},
            True,
            "bf16 needs a GPU .*--set training.bf16=false",
            marks=pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="this machine computes in bfloat16"),
        ),
    ],
)
def test_kernels_that_are_missing_here_are_refused_before_the_data_is_read(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], has_liger: bool, message: str
) -> None:
    """A preview accepts them: it may be on another machine than the run."""
    monkeypatch.setattr(training_arguments, "is_liger_kernel_available", lambda: has_liger)
    monkeypatch.setattr(training_config, "is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", raise_as_without_flash_attention)
    monkeypatch.setattr(training_config, "prepare_data", None)
    preview(run_file, changes)
    with pytest.raises(RunError, match=message) as caught:
        build_trainer(RunConfig.from_yaml(run_file, changes), run_file.parent / "out")
    assert "\n" not in str(caught.value)


def raise_as_without_flash_attention(*arguments: object, **settings: object) -> None:
    raise ImportError("FlashAttention2 cannot be used due to the following error: the package is not installed.")


# ---- Paths ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run's file, next to the working directory; both have texts of the same name."""
    for name in ("here", "there"):
        (tmp_path / name / "both").mkdir(parents=True)
    (tmp_path / "here" / "only_here").mkdir()
    (tmp_path / "there" / "only_there").mkdir()
    (tmp_path / "there" / "mixture.yaml").write_text("sources: {a: {source: [only_there, only_here, python-stdlib]}}")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "there"


@pytest.mark.parametrize(
    ("in_file", "typed", "expected"),
    [
        ({"source": "only_there"}, {}, "../there/only_there"),
        ({"source": "only_here"}, {}, "only_here"),
        ({"source": "both"}, {}, "../there/both"),
        ({"source": "x"}, {"data.source": "both"}, "both"),
        ({"source": "x"}, {"data.source": "only_there"}, "../there/only_there"),
        ({"source": "x"}, {"data": {"source": "only_there"}}, "../there/only_there"),
        ({"source": ["only_here", "only_there"]}, {}, ("only_here", "../there/only_there")),
        ({"source": "owner/name"}, {}, "owner/name"),
        ({"source": "https://example.org/only_there"}, {}, "https://example.org/only_there"),
        ({"mixture": "mixture.yaml"}, {}, ("../there/only_there", "only_here", "python-stdlib")),
        ({"mixture": {"sources": {"a": {"source": "only_there"}}}}, {}, "../there/only_there"),
    ],
)
def test_paths_belong_to_the_file_or_else_to_the_working_directory(
    folders: Path, in_file: dict[str, Any], typed: dict[str, Any], expected: str | tuple[str, ...]
) -> None:
    (folders / "run.yaml").write_text(yaml.safe_dump({"data": in_file}))
    config = RunConfig.from_yaml(Path("..") / "there" / "run.yaml", typed)
    (source,) = config.data.sources.values()
    assert source.source == expected


@pytest.mark.parametrize(
    ("section", "key"), [("model", "pretrained"), ("training", "cost_model"), ("data", "tokenizer")]
)
def test_other_paths_follow_the_same_rule(folders: Path, section: str, key: str) -> None:
    content: dict[str, dict[str, str]] = {"data": {"source": "both"}}
    content.setdefault(section, {})[key] = "only_there"
    (folders / "run.yaml").write_text(yaml.safe_dump({**content, "schedule": "only_there"}))
    config = RunConfig.from_yaml(Path("..") / "there" / "run.yaml")
    values = config.data.__dict__ if section == "data" else getattr(config, section)
    assert values[key] == config.schedule == "../there/only_there"


# ---- Precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bf16", "message"),
    [
        (torch.float16, False, "the model's weights are float16"),
        (torch.float16, True, "the model's weights are float16"),
        (torch.bfloat16, True, "the model's weights are bfloat16: mixed precision needs float32 weights"),
        (torch.bfloat16, False, None),
        (torch.float32, True, None),
    ],
)
def test_mixed_precision_needs_precise_weights(tmp_path: Path, dtype: torch.dtype, bf16: bool, message: str) -> None:
    model, args = small_model().to(dtype), TrainingArguments(str(tmp_path), use_cpu=True)
    args.bf16 = bf16  # whatever the device can compute
    if message is None:
        check_precision(model, args)
        return
    with pytest.raises(RunError, match=message):
        check_precision(model, args)
    model.requires_grad_(False)
    check_precision(model, args)


def test_a_pretrained_model_in_half_precision_is_loaded_in_float32(tmp_path: Path, config: Path) -> None:
    """`config` is the run's file of `tests/conftest.py`."""
    llama = LlamaConfig(vocab_size=300, max_position_embeddings=32)
    LlamaForCausalLM(INITIAL.to_config(llama)).half().save_pretrained(tmp_path / "half")
    changes = {"model": {"pretrained": str(tmp_path / "half"), "attn_implementation": "eager"}}
    trainer = build_trainer(RunConfig.from_yaml(config, changes), tmp_path / "out")
    assert trainer.model.config._attn_implementation == "eager"
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert trainer.plan.facts.dtype == "float32"


@pytest.mark.parametrize(
    ("zero", "rest", "message"),
    [
        ({"stage": 2}, {}, "ZeRO stage 2 is not supported"),
        ({"offload_param": {"device": "nvme"}}, {}, "offload_param to nvme is not supported"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, {}, "offload_optimizer with ratio 0.5"),
        ({"zero_quantized_weights": True}, {}, "zero_quantized_weights is not supported"),
        ({"zenflow": {"topk_ratio": 0.1}}, {}, "zenflow is not supported"),
        ({"mics_shard_size": 2}, {}, "hpZ and MiCS are not supported"),
        (
            {},
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "bf16_master_weights_and_grads is not",
        ),
        ({}, {"fp16": {"enabled": True}}, "fp16 under DeepSpeed is not supported"),
        ({}, {"scheduler": {"type": "WarmupLR"}}, "DeepSpeed's `scheduler` does not know the stages"),
    ],
)
def test_deepspeed_without_exact_states_is_refused(zero: dict[str, Any], rest: dict[str, Any], message: str) -> None:
    check_deepspeed_config({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 1.0}}})
    with pytest.raises(RunError, match=message):
        check_deepspeed_config({"zero_optimization": {"stage": 3, **zero}, **rest})


# ---- Resumptions ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four stages that stopped in its second one, with two checkpoints there."""
    path = tmp_path_factory.mktemp("interrupted") / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer(path, callbacks=[Interrupt(STEPS + 5)]).train()
    return path


@pytest.fixture
def run(interrupted: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(interrupted, tmp_path / "out")
    return RunDirectory(tmp_path / "out")


def list_files(run: RunDirectory) -> dict[str, int]:
    files = (path for path in run.path.rglob("*") if path.is_file() and path.parent.name != LOCK_DIRECTORY)
    return {str(path.relative_to(run.path)): path.stat().st_mtime_ns for path in files}


def refuse(run: RunDirectory, message: str, **settings: Any) -> None:
    """Assert that a resumption is refused with a message, and that it leaves the files alone."""
    before = list_files(run)
    with pytest.raises(RunError) as caught:
        trainer(run.path, **settings).train(resume_from_checkpoint=True)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list_files(run) == before


def other_rows() -> list[dict[str, torch.Tensor]]:
    return blocks(4 * BATCH * STEPS + 8, seed=1)


OTHER_RUNS = [
    ({"data_seed": 5}, "was begun with data_seed 42, not 5; resume with the same data and seeds"),
    ({"seed": 1}, "was begun with data_seed 42, not 1"),
    ({"seed": 1, "data_seed": 42}, "was begun with seed 42, not 1"),
    ({"data": lambda: blocks(4 * BATCH * STEPS + 7)}, "was begun with blocks 136, not 135"),
    ({"data": other_rows}, "was begun with other documents"),
    ({"data": lambda: Dataset.from_list(other_rows()).with_format("torch")}, "was begun with other documents"),
    ({"growth_seed": 99}, "was begun with growth_seed 0, not 99; resume with the same value"),
    ({"growth_noise": 0.5}, "was begun with growth_noise 0.1, not 0.5"),
    ({"growth_init": "preserving"}, "was begun with growth_init {'layer': 'stack'} in stage 1, not {'layer': 'preser"),
    ({"growth_init": {"ffn": "copy"}}, "was begun with growth_init {'ffn': 'random'} in stage 2, not {'ffn': 'copy'}"),
    ({"carry_optimizer_state": False}, "was begun with optimizer_state_at_growth carried, not new"),
    ({"optim": "adafactor", "carry_optimizer_state": False}, "was begun with "),
    ({"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"amsgrad": True})}, "AdamW keeps a state that cannot be grown"),
    ({"model": lambda: small_model(dropout=0.0)}, "with a model whose attention_dropout is 0.1, not 0.0"),
    ({"model": lambda: small_model().to(torch.float64)}, "was begun with dtype float32, not float64"),
    ({"model": lambda: small_model().to(torch.bfloat16)}, "was begun with dtype float32, not bfloat16"),
    (
        {"schedule": replace(SCHEDULE, stages=SCHEDULE.stages[:2])},
        "holds a run of another schedule (they differ in their number of stages)",
    ),
    (
        {"schedule": replace(SCHEDULE, stages=(replace(SCHEDULE.stages[0], init="preserving"), *SCHEDULE.stages[1:]))},
        "was begun with growth_init {'layer': 'stack'} in stage 1",
    ),
]


@pytest.mark.parametrize(("settings", "message"), OTHER_RUNS, ids=[message[:50] for _, message in OTHER_RUNS])
def test_what_would_be_another_run_is_refused(run: RunDirectory, settings: dict[str, Any], message: str) -> None:
    refuse(run, message, **{name: value() if callable(value) else value for name, value in settings.items()})


@pytest.mark.parametrize(
    ("carried", "given", "message"),
    [
        (True, {"optimizer_state_at_growth": "carried"}, ""),
        (True, {"optimizer_state_at_growth": "kept"}, "optimizer_state_at_growth carried, not kept"),
        (False, {"carry_optimizer_state": False, "optimizer_state_at_growth": "kept"}, "at_growth new, not kept"),
    ],
)
def test_an_earlier_release_wrote_down_the_boolean_alone(run, carried, given, message):
    facts = json.loads((run.path / "run.json").read_text())
    del facts["optimizer_state_at_growth"]
    (run.path / "run.json").write_text(json.dumps({**facts, "carry_optimizer_state": carried}))
    if message:
        refuse(run, message, **{"carry_optimizer_state": None, **given})
    else:
        loaded = RunFacts.load(run)
        assert loaded is not None and loaded.optimizer_state_at_growth == "carried"
        loaded.check(trainer(run.path, **given).plan.facts, run)


def test_another_optimizer_is_refused_by_its_name(run: RunDirectory) -> None:
    facts = json.loads((run.path / "run.json").read_text())
    del facts["carry_optimizer_state"], facts["optimizer_state_at_growth"]
    (run.path / "run.json").write_text(json.dumps(facts))
    refuse(run, "with optimizer adamw, not adafactor", optim="adafactor", carry_optimizer_state=False)
    del facts["optimizer"]  # as an earlier release wrote it
    (run.path / "run.json").write_text(json.dumps(facts))
    refuse(run, "holds AdamW's state, which adafactor cannot use", optim="adafactor", carry_optimizer_state=False)


def break_run(path: Path, *, without: tuple[str, ...] = (), empty: tuple[str, ...] = ()) -> None:
    for name in without:
        shutil.rmtree(path / name)
    for name in empty:
        (path / name).mkdir()


BROKEN = [
    ({"empty": ("stage-1-layer",)}, "stage-1-layer is not a finished stage: it has no stage.json; move it away"),
    ({"without": ("stage-0-initial",)}, "stage-0-initial is missing or not whole, but stage-1-layer.running is there"),
    (
        {"empty": ("stage-2-ffn",)},
        "stage-1-layer is missing or not whole, but stage-2-ffn is there; restore it from a",
    ),
    ({"empty": ("stage-3-hidden.running",)}, "stage-1-layer is missing or not whole, but stage-3-hidden.running is"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message[:40] for _, message in BROKEN])
def test_a_gap_in_the_stages_is_found_before_training(run: RunDirectory, damage: dict[str, Any], message: str) -> None:
    break_run(run.path, **damage)
    refuse(run, message)
    with pytest.raises(RunError, match=message[:30]):
        run.records()


def test_one_can_roll_back_from_a_gap(run: RunDirectory) -> None:
    break_run(run.path, empty=("stage-2-ffn",))
    plan_rollback(run, 0).apply()
    assert RunDirectory(run.path).finished_stages == 1


def test_a_copy_of_a_checkpoint_is_not_one(run: RunDirectory) -> None:
    running = run.running_dir(1)
    for name in ("checkpoint-4-bak", "checkpoint-", "checkpoint-x", "checkpoint-99.old"):
        (running / name).mkdir()
    assert [path.name for path in list_checkpoints(run, 1)] == ["checkpoint-12", "checkpoint-9"]


def test_rates_by_stage_need_the_runs_own_optimizer(tmp_path: Path) -> None:
    custom = (torch.optim.SGD, {"lr": 0.1})
    settings = {"optimizer_cls_and_kwargs": custom, "carry_optimizer_state": False}
    with pytest.raises(RunError, match="stage_learning_rates has no effect on optimizer_cls_and_kwargs"):
        trainer(tmp_path / "out", stage_learning_rates=[0.1, 0.1, 0.1, 0.2], **settings)
    assert trainer(tmp_path / "out", **settings).plan.facts.optimizer == "SGD"


# ---- What the books say --------------------------------------------------------------------------------------------


def test_what_may_change_is_written_down_with_its_step(run: RunDirectory) -> None:
    """The new values hold from the first step after the checkpoint on."""
    changes = {"learning_rate": 1e-3, "save_steps": 100, "per_device_train_batch_size": 2, "logging_steps": 1}
    trainer(run.path, callbacks=[Interrupt(STEPS + 7)], **changes)
    begun = RunSettings.load(run)
    with pytest.raises(KeyboardInterrupt):
        resumed = trainer(run.path, callbacks=[Interrupt(STEPS + 7)], **changes)
        resumed.train(resume_from_checkpoint=True)
    settings = RunSettings.load(run)
    assert begun is not None and settings is not None
    assert [change.step for change in settings.changes] == [0, STEPS + 4]
    assert settings.changes[0] == begun.changes[0] and begun.changes[0].settings["learning_rate"] == 1e-2
    assert settings.changes[1].settings == {
        "learning_rate": 1e-3,
        "save_steps": 100,
        "micro_batch_sizes": [2] * 4,
        "accumulation_steps": [2] * 4,
    }
    rates = {entry["step"]: entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry}
    assert rates[STEPS + 5] < 1e-3 < rates[STEPS + 4]

    with pytest.raises(KeyboardInterrupt):  # back to the first values, from the same checkpoint: no change is left
        trainer(run.path, callbacks=[Interrupt(STEPS + 7)]).train(resume_from_checkpoint=True)
    assert RunSettings.load(run) == begun


def test_the_record_tells_of_the_growth_that_happened(run: RunDirectory) -> None:
    """A run of an earlier release does not know its growth's seed, but its checkpoint does."""
    facts = json.loads((run.path / "run.json").read_text())
    first_release = ("block_size", "blocks", "blocks_per_step", "data_seed", "run_id")
    (run.path / "run.json").write_text(json.dumps({name: facts[name] for name in first_release}))
    (run.path / "settings.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        trainer(
            run.path, callbacks=[Interrupt(2 * STEPS + 4)], growth_init="preserving", growth_seed=99, save_steps=2
        ).train(resume_from_checkpoint=True)
    record = run.records()[1]
    assert (record.init, record.growth_seed, record.growth_noise) == ({"layer": "stack"}, 1, 0.1)
    settings, completed = RunSettings.load(run), RunFacts.load(run)
    assert settings is not None and [change.step for change in settings.changes] == [STEPS + 4]
    assert completed is not None and (completed.growth_seed, completed.growth_init) == (99, "preserving")
    refuse(run, "was begun with growth_seed 99, not 0", growth_init="preserving")
