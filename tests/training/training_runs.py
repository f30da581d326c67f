"""A staged run small enough for a test: four stages of eight steps, over random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory, SlopTrainer, SlopTrainingArguments

BLOCK, BATCH, STEPS = 16, 4, 8
TOKENS = BLOCK * BATCH * STEPS
SCHEDULE = GrowthSchedule(
    ModelDims(16, 32, 2, 2),
    (
        GrowthStage(("layer",), ModelDims(16, 32, 3, 2), TOKENS),
        GrowthStage(("ffn",), ModelDims(16, 48, 3, 2), TOKENS),
        GrowthStage(("hidden", "mha"), ModelDims(32, 48, 3, 4), TOKENS),
    ),
    initial_tokens=TOKENS,
)


def blocks(count: int, seed: int = 0, size: int = BLOCK) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 40, (count, size), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def small_model(dims: ModelDims = SCHEDULE.initial, dropout: float = 0.1, **settings: Any) -> LlamaForCausalLM:
    set_seed(0)
    defaults = {"vocab_size": 40, "max_position_embeddings": BLOCK, "tie_word_embeddings": True}
    config = LlamaConfig(**{**defaults, "attention_dropout": dropout, **settings})
    return LlamaForCausalLM(dims.to_config(config))


def freeze(model: torch.nn.Module, parts: Sequence[str]) -> torch.nn.Module:
    """Freeze the parameters of a model with one of the parts in their names, train the others, and return it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in parts))
    return model


def arguments(output_dir: Path, **settings: Any) -> SlopTrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_steps": 3,
        "save_total_limit": 2,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "learning_rate": 1e-2,
        "carry_optimizer_state": True,
        "report_to": "none",
    }
    return SlopTrainingArguments(**{**defaults, **settings})


def trainer(
    output_dir: Path, *, schedule: GrowthSchedule = SCHEDULE, data: Any = None, **settings: Any
) -> SlopTrainer:
    """Return a trainer of the run; settings may include `callbacks`, `eval_dataset` and so on."""
    names = ("callbacks", "eval_dataset", "compute_metrics", "processing_class", "data_collator", "model")
    names = (*names, "optimizers", "model_init", "optimizer_cls_and_kwargs")
    parts = {name: settings.pop(name) for name in names if name in settings}
    parts.setdefault("model", small_model(schedule.initial))
    parts.setdefault("eval_dataset", blocks(8, seed=1))
    train = blocks(4 * BATCH * STEPS + 8) if data is None else data
    return SlopTrainer(args=arguments(output_dir, **settings), schedule=schedule, train_dataset=train, **parts)


class Interrupt(TrainerCallback):
    """Stops the process's work at a step, before its checkpoint is written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def same_weights(one: Path, other: Path) -> bool:
    a, b = (load_file(run / "stage-3-hidden" / "model.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def losses(path):
    return [(entry["step"], entry["loss"]) for entry in RunDirectory(path).history() if "loss" in entry]


def weights_of_last_stage(run: RunDirectory) -> torch.Tensor:
    """Return all weights of the last finished stage in one vector."""
    path = run.stage_dir(run.finished_stages - 1) / "model.safetensors"
    return torch.cat([weight.flatten() for _, weight in sorted(load_file(path).items())])
