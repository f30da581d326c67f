"""`RunTimer`: seconds of a stage, tokens per second, MFU and time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..cost.device_peaks import look_up_peak_flops
from ..cost.hours import CostModel
from .spans import StageSpan

if TYPE_CHECKING:
    from .arguments import SlopTrainingArguments

#: Share of the run, in predicted seconds, after which a measurement counts half for the time left.
_HALF_LIFE = 0.1


def find_peak_flops(args: SlopTrainingArguments, dtype: torch.dtype) -> float | None:
    """Return the peak of a run's device in FLOP/s, or None if it is unknown.

    Args:
        args: arguments of the run, which may give the peak.
        dtype: dtype of the model's weights.
    """
    if args.peak_tflops:
        return args.peak_tflops * 1e12
    if args.device.type != "cuda":
        return None
    half = args.bf16 or args.fp16 or dtype in (torch.bfloat16, torch.float16)
    multiplied_in = "bf16" if half else "tf32" if args.tf32 or is_tf32_used() else "fp32"
    return look_up_peak_flops(torch.cuda.get_device_name(args.device), multiplied_in)


def is_tf32_used() -> bool:
    """Whether CUDA multiplies float32 matrices in TF32.

    torch 2.9 replaced the setting `allow_tf32` by `fp32_precision`; once a program has set the new one, as
    transformers does for `torch_compile`, the old one can no longer be read.
    """
    settings = torch.backends.cuda.matmul
    precision = getattr(settings, "fp32_precision", None)
    return bool(settings.allow_tf32) if precision is None else precision == "tf32"


class RunTimer:
    """Measures how fast a run trains, and estimates how long it will take.

    MFU is as in Chowdhery et al., PaLM (2022), Appendix B: `FLOPs / (seconds * devices * peak_flops)`, with the FLOPs
    of `cost.flops.count_flops_per_token`, so that recomputing activations does not raise it.

    Args:
        peak_flops: peak of one device in FLOP/s; None if it is unknown.
        cost_model: device hours on this hardware. Without one, time is taken to be proportional to FLOPs; small stages
            train at fewer FLOP/s, so the estimate of the time left is too long until larger stages are measured.
        clock: function that returns seconds since any fixed moment.
    """

    def __init__(
        self,
        spans: Sequence[StageSpan],
        *,
        devices: int = 1,
        peak_flops: float | None = None,
        cost_model: CostModel | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._spans = tuple(spans)
        self._devices = devices
        self._peak_flops = peak_flops
        self._clock = clock
        cost_model = cost_model or CostModel(hours_per_flop=1.0)
        #: Predicted device hours of each stage.
        self._costs = [
            float(cost_model.hours(span.flops / span.tokens, span.tokens)) if span.tokens else 0.0 for span in spans
        ]
        # Training seconds: the clock without the excluded blocks. It stands still inside of one.
        self._excluded = 0.0
        self._excluding_since: float | None = None
        # The stage in training, and the training seconds at which it would have begun without interruptions.
        self._span: StageSpan | None = None
        self._stage_began = 0.0
        # The interval of the throughput: training seconds, tokens and FLOPs at its beginning.
        self._interval_began, self._tokens, self._flops = 0.0, 0, 0.0
        # The interval of the time left: wall-clock seconds and predicted hours at its beginning, and faded sums.
        self._wall_began, self._cost_done = 0.0, 0.0
        self._measured = self._predicted = 0.0

    def begin_stage(self, span: StageSpan, global_step: int, seconds: float = 0.0) -> None:
        """Start measuring in a stage, which may have trained for some seconds before an interruption."""
        self._span = span
        self._interval_began = self._count_training_seconds()
        self._stage_began = self._interval_began - seconds
        self._tokens, self._flops = span.count_until(global_step)
        self._wall_began, self._cost_done = self._clock(), self._predict_cost(global_step)

    @contextmanager
    def exclude(self) -> Iterator[None]:
        """Exclude the time spent inside the block (evaluation, saving, growth) from training seconds. Re-entrant."""
        if self._excluding_since is not None:
            yield
            return
        self._excluding_since = self._clock()
        try:
            yield
        finally:
            self._excluded += self._clock() - self._excluding_since
            self._excluding_since = None

    def _count_training_seconds(self) -> float:
        now = self._clock() if self._excluding_since is None else self._excluding_since
        return now - self._excluded

    @property
    def stage_seconds(self) -> float:
        return self._count_training_seconds() - self._stage_began

    def throughput(self, global_step: int) -> dict[str, float]:
        """Return the speed since the stage began or since the last measurement, and begin the next interval.

        Returns:
            `tokens_per_second` of all devices together, and `mfu` (1 is the peak) if the peak is known. Nothing inside
            of `exclude`, before `begin_stage`, or if no token was trained on since: the interval then continues.
        """
        if self._span is None or self._excluding_since is not None:
            return {}
        tokens, flops = self._span.count_until(global_step)
        now = self._count_training_seconds()
        seconds, new_tokens, new_flops = now - self._interval_began, tokens - self._tokens, flops - self._flops
        if new_tokens <= 0 or seconds <= 0:  # the clock may be too coarse for a short step
            return {}
        self._interval_began, self._tokens, self._flops = now, tokens, flops
        speed = {"tokens_per_second": new_tokens / seconds}
        if self._peak_flops is not None:
            speed["mfu"] = new_flops / (seconds * self._devices * self._peak_flops)
        return speed

    def eta(self, global_step: int) -> float | None:
        """Return the seconds from a step to the end of the run; None before the first step has been measured.

        This is the cost model's prediction of the rest, times the ratio of measured to predicted seconds so far, in
        which recent steps count more (see `_HALF_LIFE`). It measures wall-clock time, so that the estimate includes
        evaluations and checkpoints; the number of devices cancels out.
        """
        if self._span is None:
            return None
        now, done = self._clock(), self._predict_cost(global_step)
        total = sum(self._costs)
        fading = 0.5 ** ((done - self._cost_done) / (_HALF_LIFE * total)) if total else 1.0
        self._measured = fading * self._measured + now - self._wall_began
        self._predicted = fading * self._predicted + done - self._cost_done
        self._wall_began, self._cost_done = now, done
        return (total - done) * self._measured / self._predicted if self._predicted else None

    def _predict_cost(self, global_step: int) -> float:
        """Return the predicted device hours of the run up to a step."""
        cost = 0.0
        for span, stage_cost in zip(self._spans, self._costs, strict=True):
            steps = min(max(global_step - span.first_step, 0), span.steps)
            cost += stage_cost * (steps / max(span.steps, 1))
        return cost
