"""Callbacks that `SlopTrainer` attaches to itself, and `StageCallback` for those that are attached to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..runs.directory import RunDirectory
from .ranks import Ranks


class StageEnd(TrainerCallback):
    """Logs at the last step of each stage, so that its record and curve end where it ends.

    No checkpoint is saved there: the stage's directory is written at once.

    Args:
        end_step: tells the global step at which the stage in training ends.
    """

    def __init__(self, end_step: Callable[[], int]) -> None:
        self.end_step = end_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if state.global_step == self.end_step():
            control.should_log = True
            control.should_save = False
        return control


class StageCallback(TrainerCallback):
    """A callback that `SlopTrainer` also tells when a stage lies on disk.

    Args:
        publishes: whether it sends stages away. Such callbacks are told after the others, whose results they send too,
            in whatever order they were attached.
    """

    publishes: ClassVar[bool] = False

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        """Called on all ranks when a finished stage has been written, before the next one is grown from it.

        Args:
            run: the run's directory.
            stage: the stage's number.
            ranks: the processes of the run.
        """
