"""Writing stages and checkpoints, all ranks together."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.trainer_callback import ExportableState

from ..growth import WEIGHT, no_progress_bars
from ..io.files import write_text
from ..runs.directory import RECORD_FILE, STATE_FILE, RunDirectory
from ..runs.records import StageRecord
from .checkpoints import CHECKPOINT, RESUME_FILE, rotate, written_together
from .checksums import seal
from .random_state import random_state
from .state_io import leave
from .states import States


def save_stage(
    run: RunDirectory,
    record: StageRecord,
    states: States,
    model: PreTrainedModel,
    processing_class: Any,
    trainer_state: TrainerState,
    max_shard_size: str,
) -> Path:
    """Write a finished stage: a stock model with its record, or nothing at all. Its checkpoints are removed.

    Args:
        run: the run's directory.
        record: of the stage.
        states: of the model.
        model: for its config.
        processing_class: the tokenizer, or None.
        trainer_state: with the log up to the stage's end.
        max_shard_size: of a file.

    Raises:
        SlopError: on all ranks, for a full disk and the like.
    """
    ranks, target = states.ranks, run.stage_dir(record.stage)
    with written_together(target, ranks) as directory:
        mine = _save_model(directory, states, model, processing_class, trainer_state, max_shard_size)
        with ranks.together():
            if ranks.is_first:
                write_text(directory / RECORD_FILE, record.to_json())
        seal(directory, mine, ranks)
    if ranks.is_first:
        shutil.rmtree(run.running_dir(record.stage), ignore_errors=True)
    return target


def save_checkpoint(
    run: RunDirectory,
    stage: int,
    resume: dict[str, Any],
    states: States,
    model: PreTrainedModel,
    processing_class: Any,
    trainer_state: TrainerState,
    max_shard_size: str,
    keep: int | None,
) -> Path:
    """Write a checkpoint inside a stage, or nothing at all; then remove all but the newest `keep`.

    Args:
        stage: in training.
        resume: what else the run needs to go on, as JSON; each rank's random state is added.
        keep: None or 0 keeps all.

    The other arguments are those of `save_stage`, and so are the errors.
    """
    ranks = states.ranks
    target = run.running_dir(stage) / f"{CHECKPOINT}{trainer_state.global_step}"
    with written_together(target, ranks) as directory:
        mine = _save_model(directory, states, model, processing_class, trainer_state, max_shard_size)
        random_states = ranks.all_gather(random_state())
        with ranks.together():
            if ranks.is_first:
                write_text(directory / RESUME_FILE, json.dumps({**resume, "random": random_states}))
        seal(directory, mine, ranks)
    if ranks.is_first:
        rotate(run, stage, keep)
    return target


def keep_callback_states(trainer: Trainer) -> None:
    """Put what callbacks want to keep into the trainer's state, where `Trainer` looks for it."""
    kept: dict[str, Any] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            kept[name] = [*kept.get(name, []), callback.state()]
    trainer.state.stateful_callbacks = {name: one if len(one) > 1 else one[0] for name, one in kept.items()}


def _save_model(
    directory: Path,
    states: States,
    model: PreTrainedModel,
    processing_class: Any,
    trainer_state: TrainerState,
    max_shard_size: str,
) -> list[str]:
    """Write what makes a stock model, AdamW's state and the log; the files with tensors that this rank has written."""
    config = copy.deepcopy(model.config)
    config.use_cache = True  # Trainer turns it off, and would leave it so in every published config
    config.architectures = [type(model).__name__]
    config.dtype = states.dtype(next(iter(states.shapes)), WEIGHT)
    mine = leave(states, config, directory, max_shard_size)
    with states.ranks.together(), no_progress_bars():
        if states.ranks.is_first:
            config.save_pretrained(directory)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(directory)
            if processing_class is not None:
                processing_class.save_pretrained(directory)
            trainer_state.save_to_json(str(directory / STATE_FILE))
    return mine
