"""`StageCallback`: callbacks with an event for a written stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from transformers import TrainerCallback, TrainerControl, TrainerState

from ..runs.directory import RunDirectory
from .ranks import Ranks


class StageEnd(TrainerCallback):
    """Logs at the last step of each stage, so that its record and its curve end there.

    No checkpoint is saved at that step: the stage's directory is written right after it.
    """

    def __init__(self, get_end_step: Callable[[], int]) -> None:
        self.get_end_step = get_end_step

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step == self.get_end_step():
            control.should_log = True
            control.should_save = False


class StageCallback(TrainerCallback):
    """A callback with one more event: a stage has been written.

    Args:
        publishes: whether the callback uploads stages. Such callbacks are called after the others, whose results they
            upload too, in whatever order they were attached.
    """

    publishes: ClassVar[bool] = False

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        """Called on all ranks when a finished stage has been written, before the next one is grown from it."""
