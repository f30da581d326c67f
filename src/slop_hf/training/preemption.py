"""Ending a run in good order when it is told to go: SIGTERM, as schedulers of clusters send it before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .ranks import Ranks

logger = logging.get_logger(__name__)


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after SIGTERM, at the end of the same step on all ranks.

    The signal reaches ranks at different moments. Each tells the others at the end of a step whether it has one, and
    hears their answers a step later, so that nobody waits.

    Args:
        ranks: of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.stopped = False  # all ranks agree on it
        self._ranks = ranks
        self._received = False
        self._group: Any = None
        self._asking: tuple[torch.Tensor, Any] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While a run goes on, over all of its stages, SIGTERM is only remembered."""
        self.stopped = self._received = False
        if self._ranks.count > 1:
            self._group = dist.new_group(backend="gloo")
        in_main = threading.current_thread() is threading.main_thread()  # elsewhere Python sets no handlers
        before = signal.signal(signal.SIGTERM, self._receive) if in_main else None
        try:
            yield
            self._answer()
        finally:
            self._asking = None
            if in_main:
                signal.signal(signal.SIGTERM, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._told_to_stop():
            self.stopped = True
            control.should_save = control.should_training_stop = True
        return control

    def _told_to_stop(self) -> bool:
        if self._ranks.count == 1:
            return self._received
        told = self._answer()
        flag = torch.tensor(int(self._received))
        self._asking = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return told

    def _answer(self) -> bool:
        """What all ranks said a step ago."""
        if self._asking is None:
            return False
        flag, work = self._asking
        self._asking = None
        work.wait()
        return bool(flag)
