"""What crosses a boundary between stages: weights, AdamW's moments, the trainer's state; in memory and on disk."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerState

from ..errors import RunError
from ..growth import AdamWState, load_adamw_file, no_progress_bars, resolve_inits, save_adamw_state
from ..records import OPTIMIZER_FILE, RECORD_FILE, STATE_FILE, RunDirectory, StageRecord
from ..serialization import versions, write_text, written_aside
from .spans import StageSpan

MAX_EXPONENT = 700.0  # exp of more is no float: a diverged run has a perplexity of about 1e304


def read_adamw_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> AdamWState:
    """The state of a torch AdamW by parameter name; empty before its first step. Tensors are not copied."""
    return {
        name: {key: value for key, value in optimizer.state[parameter].items() if isinstance(value, torch.Tensor)}
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


def load_adamw_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module, state: AdamWState) -> None:
    """Put a state by parameter name into a fresh AdamW; its own groups and hyper-parameters stay."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    # load_state_dict puts each tensor where this kind of AdamW (fused, capturable, ...) wants it.
    optimizer.load_state_dict({"state": {i: state[name] for i, name in enumerate(order)}, "param_groups": groups})


def stage_record(
    span: StageSpan,
    history: list[dict[str, Any]],
    metrics: dict[str, float],
    seconds: float,
    devices: int,
    growth_seed: int,
) -> StageRecord:
    """The record of a stage that has just ended.

    Args:
        span: the stage.
        history: the run's log up to its end.
        metrics: of the evaluation at its end; empty without held-out data.
        seconds: of training.
        devices: processes that shared the work.
        growth_seed: of the growth at its beginning.
    """
    of_stage = [entry for entry in history if entry.get("stage") == span.number]
    losses = [entry["loss"] for entry in of_stage if "loss" in entry]
    at_growth = [held_out_loss(entry) for entry in of_stage if span.growth and entry["step"] == span.first_step]
    eval_loss = held_out_loss(metrics)
    return StageRecord(
        stage=span.number,
        name=span.name,
        operators=span.growth.operators if span.growth else (),
        dims=span.dims,
        parameters=span.parameters,
        tokens=span.tokens,
        total_tokens=span.first_token + span.tokens,
        first_token=span.first_token,
        steps=span.steps,
        global_step=span.end_step,
        flops=span.flops,
        total_flops=span.first_flops + span.flops,
        seconds=seconds,
        devices=devices,
        train_loss=losses[-1] if losses else None,
        eval_loss=eval_loss,
        eval_loss_after_growth=next((loss for loss in at_growth if loss is not None), None),
        perplexity=math.exp(min(eval_loss, MAX_EXPONENT)) if eval_loss is not None else None,
        init=resolve_inits(span.growth.operators, span.growth.init) if span.growth else {},
        growth_seed=growth_seed if span.growth else None,
        versions=versions(),
    )


def held_out_loss(metrics: dict[str, float]) -> float | None:
    """The loss in what `evaluate` returns; the mean over data sets where there are several."""
    losses = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("loss")]
    return sum(losses) / len(losses) if losses else None


def write_stage(
    run: RunDirectory,
    record: StageRecord,
    model: PreTrainedModel,
    processing_class: Any,
    trainer_state: TrainerState,
    optimizer_state: AdamWState,
) -> Path:
    """Write a finished stage: a stock model with its record, or nothing at all."""
    target = run.stage_dir(record.stage)
    use_cache = model.config.use_cache
    with written_aside(target) as directory, no_progress_bars():
        model.config.use_cache = True  # Trainer turns it off, and would leave it so in every published config
        try:
            model.save_pretrained(directory)
        finally:
            model.config.use_cache = use_cache
        if processing_class is not None:
            processing_class.save_pretrained(directory)
        if optimizer_state:
            save_adamw_state(optimizer_state, directory / OPTIMIZER_FILE)
        trainer_state.save_to_json(str(directory / STATE_FILE))
        write_text(directory / RECORD_FILE, record.to_json())
    return target


def read_stage(run: RunDirectory, number: int) -> tuple[PreTrainedModel, AdamWState, TrainerState]:
    """Model, AdamW's state (empty where none was kept) and trainer's state of a finished stage."""
    directory = run.stage_dir(number)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    optimizer_file = directory / OPTIMIZER_FILE
    state = load_adamw_file(optimizer_file) if optimizer_file.is_file() else {}
    return model, state, TrainerState.load_from_json(str(directory / STATE_FILE))


def last_checkpoint(run: RunDirectory, number: int) -> Path | None:
    """The newest of Trainer's checkpoints inside an unfinished stage; they are complete or absent."""
    found = run.running_dir(number).glob("checkpoint-*")
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def check_same_schedule(run: RunDirectory, schedule: Any) -> None:
    """Refuse to resume a run of another schedule.

    Raises:
        RunError: naming the first stage that differs.
    """
    found = run.schedule
    if found == schedule:
        return
    old = zip(found.structures, found.tokens, strict=True)
    new = zip(schedule.structures, schedule.tokens, strict=True)
    pairs = enumerate(zip(old, new, strict=False))
    where = next((number for number, (before, after) in pairs if before != after), None)
    what = f"stage {where} differs" if where is not None else "they differ in their number of stages or inits"
    raise RunError(
        f"{run.path} holds a run of another schedule ({what}); resume with {run.path / 'schedule.yaml'}, "
        "or choose another output directory"
    )
