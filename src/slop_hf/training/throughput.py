"""How fast a run trains and how long it will take: seconds of a stage, tokens per second, MFU, seconds left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..cost.device_peaks import peak_flops
from ..cost.hours import CostModel
from .spans import StageSpan

Clock = Callable[[], float]


class Throughput:
    """Tokens per second and model FLOPs utilisation, over the training seconds since it was last asked.

    `mfu` is as in Chowdhery et al., PaLM (2022), Appendix B: `FLOPs / (seconds * devices * peak_flops)`, with the
    FLOPs of `cost.flops_per_token`, so that recomputing activations is no gain.

    Args:
        peak_flops: of one device, in FLOP/s, as `devices.peak_flops` knows it; None where it is not known.
        devices: that share the work.
        clock: seconds that pass, from any zero.

    >>> seconds = iter([0.0, 2.0])
    >>> speed = Throughput(peak_flops=1e12, devices=2, clock=lambda: next(seconds))
    >>> speed.begin(tokens=0, flops=0.0)
    >>> speed.measure(tokens=1000, flops=1e12)
    {'tokens_per_second': 500.0, 'mfu': 0.25}
    """

    def __init__(self, peak_flops: float | None, devices: int = 1, clock: Clock = time.perf_counter) -> None:
        self.peak_flops = peak_flops
        self.devices = devices
        self._clock = clock
        self._began: float | None = None
        self._tokens, self._flops = 0.0, 0.0
        self._paused_since: float | None = None

    def begin(self, tokens: float, flops: float) -> None:
        """Count from now on: at the start of a run, of a stage, or after a resume.

        Args:
            tokens, flops: of the whole run so far, over all devices.
        """
        self._began, self._tokens, self._flops = self._clock(), tokens, flops

    def measure(self, tokens: float, flops: float) -> dict[str, float]:
        """The speed since `begin` or the last measurement, of which this is the end.

        Args:
            tokens, flops: of the whole run so far, over all devices.

        Returns:
            `tokens_per_second` of all devices together, and `mfu`, a share of 1, where the peak is known. Nothing
            while paused, before `begin` or where no token was trained on since: then the interval goes on.
        """
        if self._began is None or self._paused_since is not None or tokens <= self._tokens:
            return {}
        now = self._clock()
        seconds, new_tokens, new_flops = now - self._began, tokens - self._tokens, flops - self._flops
        if seconds <= 0:  # a clock too coarse for so short a step
            return {}
        self._began, self._tokens, self._flops = now, tokens, flops
        speed = {"tokens_per_second": new_tokens / seconds}
        if self.peak_flops is not None:
            speed["mfu"] = new_flops / (seconds * self.devices * self.peak_flops)
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the seconds within, which are not of training: evaluation, saving, growth. May be nested."""
        if self._paused_since is not None:
            yield
            return
        self._paused_since = self._clock()
        try:
            yield
        finally:
            if self._began is not None:
                # Where `begin` was called within, no second of the pause from before it is in the interval.
                self._began += self._clock() - max(self._paused_since, self._began)
            self._paused_since = None


class TimeLeft:
    """Estimates the seconds that a run has yet to go.

    What is left, as the cost model predicts it, times the ratio of measured to predicted seconds so far. The ratio
    weighs what was done recently more: half as much for each tenth of the run (in predicted seconds) that has passed
    since. It is one of wall time, so that the estimate holds for a run with its evaluations and checkpoints, and the
    number of devices cancels out.

    Args:
        spans: the stages of the run.
        cost_model: of this hardware. Without one, seconds go with FLOPs; small stages train at fewer FLOP/s, so that
            the estimate is too long until larger ones are measured.
        clock: seconds that pass, from any zero.
    """

    HALF_LIFE = 0.1

    def __init__(
        self, spans: Sequence[StageSpan], cost_model: CostModel | None = None, clock: Clock = time.perf_counter
    ) -> None:
        self.spans = tuple(spans)
        cost_model = cost_model or CostModel(hours_per_flop=1.0)
        self._costs = [
            float(cost_model.hours(span.flops / span.tokens, span.tokens)) if span.tokens else 0.0
            for span in self.spans
        ]
        self._clock = clock
        self._began: float | None = None
        self._done = 0.0
        self._measured = self._predicted = 0.0  # both fade with the same weights

    def begin(self, global_step: int) -> None:
        """Count from now on; called again, it leaves out the seconds since the last call, such as a boundary's."""
        self._began, self._done = self._clock(), self._cost_until(global_step)

    def seconds_left(self, global_step: int) -> float | None:
        """Seconds from a step to the end of the run; None before `begin` and before a first step was measured."""
        if self._began is None:
            return None
        now, done = self._clock(), self._cost_until(global_step)
        total = sum(self._costs)
        keep = 0.5 ** ((done - self._done) / (self.HALF_LIFE * total)) if total else 1.0
        self._measured = keep * self._measured + now - self._began
        self._predicted = keep * self._predicted + done - self._done
        self._began, self._done = now, done
        return (total - done) * self._measured / self._predicted if self._predicted else None

    def _cost_until(self, global_step: int) -> float:
        """Predicted device hours of the run up to a step."""
        cost = 0.0
        for span, of_span in zip(self.spans, self._costs, strict=True):
            steps = min(max(global_step - span.first_step, 0), span.steps)
            cost += of_span * (steps / max(span.steps, 1))
        return cost


class Pace:
    """The clocks of a run: of its stage in training, of its speed, and of what is left.

    Args:
        spans: the stages of the run.
        devices: that share the work.
        peak: of one device in FLOP/s; None where it is not known.
        cost_model: of this hardware, or None.
        clock: seconds that pass, from any zero.
    """

    def __init__(
        self,
        spans: Sequence[StageSpan],
        devices: int,
        peak: float | None,
        cost_model: CostModel | None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._throughput = Throughput(peak, devices, clock)
        self._left = TimeLeft(spans, cost_model, clock)
        self._before = self._began = self._excluded = 0.0
        self._pauses = 0

    def begin(self, span: StageSpan, global_step: int, seconds: float) -> None:
        """Count from now on, in a stage that has taken `seconds` of training before."""
        self._before, self._began, self._excluded = seconds, self._clock(), 0.0
        self._throughput.begin(*span.at_step(global_step))
        self._left.begin(global_step)

    @property
    def stage_seconds(self) -> float:
        """Of training the stage, without evaluation and saving."""
        return self._before + self._clock() - self._began - self._excluded

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the seconds within, which are not of training. May be nested."""
        paused = self._clock()
        self._pauses += 1
        try:
            with self._throughput.paused():
                yield
        finally:
            self._pauses -= 1
            if not self._pauses:
                self._excluded += self._clock() - max(paused, self._began)

    def measure(self, span: StageSpan, global_step: int) -> dict[str, float]:
        """`tokens_per_second`, `mfu` and `seconds_left`, as far as they are known."""
        left = self._left.seconds_left(global_step)
        speed = self._throughput.measure(*span.at_step(global_step))
        return speed if left is None else {**speed, "seconds_left": left}


def peak_of_device(device: torch.device, *, half: bool, tf32: bool) -> float | None:
    """The peak of the device in use in FLOP/s, for the precision that matrices are multiplied in.

    Args:
        device: in use.
        half: bfloat16 or float16.
        tf32: float32 matrices in TensorFloat-32.
    """
    if device.type != "cuda":
        return None
    dtype = "bf16" if half else "tf32" if tf32 else "fp32"
    return peak_flops(torch.cuda.get_device_name(device), dtype)
