"""One curve per run in TensorBoard, W&B, Trackio and MLflow, over all its stages and resumptions."""

from __future__ import annotations

import os
from collections.abc import Iterable

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, WandbCallback

from ..runs.directory import RunDirectory

#: Tag of a run in MLflow with the run's id, and the mark of a callback whose run was started here.
_TAG, _STARTED = "slop_hf.run_id", "_slop_hf_started"


def continue_curves(
    callbacks: Iterable[TrainerCallback], args: TrainingArguments, run: RunDirectory, run_id: str, first_step: int
) -> None:
    """Make the loggers continue the run's curves; to be called on the main process.

    By default they take each call of `Trainer.train` for a run: TensorBoard begins a directory named by the time (in
    the working directory if an evaluation is logged first), Trackio a run in every stage, W&B a run in every process.
    MLflow leaves its run open, so that the next one of the process would log into it. TensorBoard drops what an
    interrupted process logged after its last checkpoint; the others keep it and show those steps twice.

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
        elif isinstance(callback, MLflowCallback) and callback._ml_flow.active_run() is None:
            _start_mlflow_run(callback, args.run_name, run_id)


def end_curves(callbacks: Iterable[TrainerCallback]) -> None:
    """End the runs that `continue_curves` has started; W&B and Trackio end theirs with the process."""
    for callback in callbacks:
        if isinstance(callback, MLflowCallback) and getattr(callback, _STARTED, False):
            callback._ml_flow.end_run()
            setattr(callback, _STARTED, False)


def _start_mlflow_run(callback: MLflowCallback, name: str, run_id: str) -> None:
    """Start MLflow's run, or the one that an earlier process has started; its callback does not end what is active."""
    mlflow = callback._ml_flow
    earlier = mlflow.search_runs(filter_string=f"tags.`{_TAG}` = '{run_id}'", max_results=1, output_format="list")
    if earlier:
        mlflow.start_run(run_id=earlier[0].info.run_id)
        # A run keeps its parameters, and those of a later stage's model differ: its set-up would fail.
        callback._async_log, callback._initialized = True, True
    else:
        mlflow.start_run(run_name=name, tags={_TAG: run_id})
    setattr(callback, _STARTED, True)
