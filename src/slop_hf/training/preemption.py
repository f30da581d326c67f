"""Graceful stops: SIGTERM, which cluster schedulers send before SIGKILL, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl

from .ranks import Ranks

#: What a process has received; if the ranks received different signals, the larger value counts.
_NOTHING, _TERMINATED, _INTERRUPTED = range(3)

_ANSWER = b"\nStopping at the end of this step, with the state saved; press Ctrl-C again to stop at once.\n"


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops after SIGTERM or Ctrl-C (SIGINT), at the end of the same step on all ranks.

    The signal reaches the ranks at different moments. At the end of each step they start an all-reduce of whether one
    of them has received it, and read its result a step later, so that no rank waits. At the end of a stage, where they
    wait for each other anyway, they ask at once.

    A second Ctrl-C is treated as without this callback: Python raises `KeyboardInterrupt` wherever it is. A process of
    a launch ends instead, because it may be waiting for other ranks, where Python raises nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.received = _NOTHING  # by any rank; the same on all ranks
        self._ranks = ranks
        self._received_here = _NOTHING
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    @property
    def is_interrupted(self) -> bool:
        """Whether Ctrl-C was pressed, also after the last step, when there is nothing left to stop."""
        return _INTERRUPTED in (self.received, self._received_here)

    @contextmanager
    def watch_signals(self) -> Iterator[None]:
        """Only take note of the signals inside the block, which trains all stages."""
        self.received = self._received_here = _NOTHING
        if self._ranks.count > 1:
            self._group = dist.new_group(backend="gloo")
        before = {}
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
            signal.signal(signal.SIGTERM, self._note_termination)
            if before[signal.SIGINT] not in (signal.SIG_IGN, None):  # ignored in a shell's background jobs
                signal.signal(signal.SIGINT, lambda *_: self._note_interruption(before[signal.SIGINT]))
        try:
            yield
            self._finish_reduction()
        finally:
            self._pending = None
            for number, handler in before.items():
                if handler is not None:  # None: installed by other code than Python's, which cannot be put back
                    signal.signal(number, handler)

    def _note_termination(self, number: int, frame: FrameType | None) -> None:
        self._received_here = max(self._received_here, _TERMINATED)

    def _note_interruption(self, handler: signal._HANDLER) -> None:
        self._received_here = _INTERRUPTED
        signal.signal(signal.SIGINT, handler if self._ranks.count == 1 else signal.SIG_DFL)
        if self._ranks.is_first:
            with suppress(OSError):  # a program without stderr
                os.write(2, _ANSWER)  # not `print`, which may be what was interrupted

    def on_step_end(self, args: object, state: object, control: TrainerControl, **kwargs: object) -> None:
        received = self._received_here
        if self._ranks.count > 1:
            received = self._finish_reduction()
            flag = torch.tensor(self._received_here)
            self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        if received:
            self.received = received
            control.should_save = control.should_training_stop = True

    def agree(self, asked: bool) -> bool:
        """Return, at the end of a stage, whether to stop: after a signal, or because a rank is `asked` to."""
        self._finish_reduction()
        answers = self._ranks.gather_all((self._received_here, asked))
        self.received = max(self.received, *(received for received, _ in answers))
        return bool(self.received) or any(asked for _, asked in answers)

    def _finish_reduction(self) -> int:
        """Return what any rank had received a step ago."""
        if self._pending is None:
            return _NOTHING
        flag, work = self._pending
        self._pending = None
        work.wait()
        return int(flag)
