"""Graceful shutdown on SIGTERM, which cluster schedulers send before SIGKILL."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from .ranks import Ranks


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after SIGTERM, at the end of the same step on all ranks.

    The signal reaches the ranks at different moments. At the end of each step they start an all-reduce of whether one
    of them has received it, and read its result a step later, so that no rank waits.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.stopped = False  # the same on all ranks
        self._ranks = ranks
        self._received = False
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    @contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Only take note of SIGTERM inside the block, which trains all stages."""
        self.stopped = self._received = False
        if self._ranks.count > 1:
            self._group = dist.new_group(backend="gloo")
        in_main = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
        before = signal.signal(signal.SIGTERM, self._receive) if in_main else None
        try:
            yield
            self._finish_reduction()
        finally:
            self._pending = None
            if in_main:
                signal.signal(signal.SIGTERM, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step_end(self, args: object, state: object, control: TrainerControl, **kwargs: object) -> None:
        received = self._received
        if self._ranks.count > 1:
            received = self._finish_reduction()
            flag = torch.tensor(int(self._received))
            self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if received:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def _finish_reduction(self) -> bool:
        """Whether any rank had received the signal a step ago."""
        if self._pending is None:
            return False
        flag, work = self._pending
        self._pending = None
        work.wait()
        return bool(flag)
