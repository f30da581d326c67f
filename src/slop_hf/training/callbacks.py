"""Callbacks that `SlopTrainer` attaches to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


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
