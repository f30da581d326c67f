"""One curve for a run, over its stages and resumptions, in the tools that `report_to` names."""

from __future__ import annotations

import os
from collections.abc import Iterable

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..runs.directory import RunDirectory


def continue_curves(
    callbacks: Iterable[TrainerCallback], args: TrainingArguments, run: RunDirectory, run_id: str, first_step: int
) -> None:
    """Tell reporters which run it is that begins or goes on; for the main process.

    Left to themselves they take each `train()` for a run: TensorBoard begins a directory by the clock (below the
    working directory where it is an evaluation that is logged first), Trackio a name of its own in every stage,
    Weights & Biases a run in every process. What an interrupted process logged after its last checkpoint is struck
    out in TensorBoard; the others keep it and show those steps twice.

    Args:
        callbacks: of the trainer.
        args: of the trainer; gets a `run_name` where there is none.
        run: its directory.
        run_id: the same whenever the run is resumed, and that of no other run.
        first_step: the global step that training goes on from.
    """
    args.run_name = args.run_name or run_id
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is None:
            callback.logging_dir = callback.logging_dir or str(run.path / "tensorboard")
            callback.tb_writer = callback._SummaryWriter(log_dir=callback.logging_dir, purge_step=first_step + 1)
        elif isinstance(callback, WandbCallback) and callback._wandb.run is None:
            project = os.environ.get("WANDB_PROJECT", "huggingface")
            callback._wandb.init(project=project, name=args.run_name, id=run_id, resume="allow")
