"""Callbacks at a step or a stage: `StageEnd`, `StopAtStep` and `StageCallback`."""

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


class StopAtStep(TrainerCallback):
    """Stops a run when a number of global steps is done: inside a stage with a checkpoint, or after a finished stage.

    The run can be resumed, and other runs can branch off from it.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.global_step >= self.step:
            control.should_training_stop = True


class StageCallback(TrainerCallback):
    """A callback with one more event: a stage has been written.

    Every finished stage of a run is reported to every callback, in order, and once, however often the run is stopped
    or killed in between: the stage's directory notes which callbacks have returned (`callbacks.json`). Stages that a
    callback missed are reported when the run is resumed, before training continues. They include all stages that
    finished before the callback was first attached. Stages written by a release without these notes count as reported.

    If the process dies during a call, or after it and before its end is noted, the resumed run makes the call again,
    with `is_repeated` set. Therefore a call should either do its work in one step, or first look for what is there.

    The notes know a callback by the name of its class; several of the same class are told apart by their order.

    Args:
        publishes: whether the callback uploads stages. Such callbacks are called after the others, whose results they
            upload too, in whatever order they were attached.
        is_repeated: during a call, whether an earlier call for the same stage was begun, and may have done its work.
    """

    publishes: ClassVar[bool] = False
    is_repeated: bool = False

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        """Called on all ranks when a finished stage has been written, before the next one is grown from it."""
