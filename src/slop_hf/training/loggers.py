"""One curve per run in TensorBoard, W&B and Trackio, over all its stages and resumptions."""

from __future__ import annotations

import os
from collections.abc import Iterable

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..runs.directory import RunDirectory


def continue_curves(
    callbacks: Iterable[TrainerCallback], args: TrainingArguments, run: RunDirectory, run_id: str, first_step: int
) -> None:
    """Make the loggers continue the run's curves; to be called on the main process.

    By default they take each call of `Trainer.train` for a run: TensorBoard begins a directory named by the time (in
    the working directory if an evaluation is logged first), Trackio a run in every stage, W&B a run in every process.
    TensorBoard drops what an interrupted process logged after its last checkpoint; the other two keep it and show
    those steps twice.

    Args:
        args: arguments of the trainer; a missing `run_name` is set.
        run_id: unique name of the run, the same whenever it is resumed.
        first_step: number of global steps done.
    """
    args.run_name = args.run_name or run_id
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is None:
            callback.logging_dir = callback.logging_dir or str(run.path / "tensorboard")
            callback.tb_writer = callback._SummaryWriter(log_dir=callback.logging_dir, purge_step=first_step + 1)
        elif isinstance(callback, WandbCallback) and callback._wandb.run is None:
            project = os.environ.get("WANDB_PROJECT", "huggingface")
            callback._wandb.init(project=project, name=args.run_name, id=run_id, resume="allow")
