"""`RateSchedule`: the learning rate over a run in stages, computed without torch, and the usual peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number
from ..io.record import Record
from ..io.serialization import Json
from .staged_run import PARTS

_Array = npt.NDArray[np.float64]

#: Span of a schedule: the run once, or each stage again.
RateSpan: TypeAlias = Literal["run", "stage"]
RATE_SPANS: tuple[RateSpan, ...] = ("run", "stage")
#: Points per part of a stage at which the rate is computed.
_POINTS = 4


@dataclass(frozen=True)
class RateSchedule(Record, error=PlanError):
    """Warm-up, a constant rate, and a linear decay to 0 (`lr_scheduler_type: warmup_stable_decay` in training).

    Args:
        span: whether the schedule covers the "run", or each "stage" again.
        warmup, decay: shares of the span.
        rewarm: share of a stage for the warm-up after a growth if the schedule covers the run.

    Raises:
        PlanError: for another span, or shares that do not fit into the span.

    >>> RateSchedule(warmup=0, decay=0.5).compute(np.array([[1e9]])).round(2)[0, 0].tolist()[6:12]
    [1.0, 1.0, 0.94, 0.81, 0.69, 0.56]
    """

    span: RateSpan = "run"
    warmup: float = 0.02
    decay: float = 0.2
    rewarm: float = 0.01

    def __post_init__(self) -> None:
        if self.span not in RATE_SPANS:
            raise PlanError(f"span of a learning-rate schedule must be 'run' or 'stage', got {self.span!r}")
        for name in ("warmup", "decay", "rewarm"):
            if not is_finite_number(getattr(self, name), least=0):
                raise PlanError(f"{name} must be a share of the span from 0 to 1, got {getattr(self, name)!r}")
        if self.warmup + self.decay > 1 or self.rewarm > 1:
            raise PlanError(
                f"warmup {self.warmup:g} and decay {self.decay:g} must leave their span a share of 0 or more, and "
                f"rewarm {self.rewarm:g} must be at most 1: lower them"
            )

    def compute(self, tokens: _Array, begins: _Array | float = 0.0, ends: _Array | float = 1.0) -> _Array:
        """Return the mean rate in each of `PARTS` equal parts of each stage, as a share of the peak.

        Args:
            tokens: tokens of each stage, R × K; a stage without tokens has no rate that matters.
            begins, ends: where the parts of a stage begin and end, as shares of its tokens.

        Returns:
            Rates, R × K × `PARTS`.
        """
        points = (np.arange(PARTS * _POINTS) + 0.5) / (PARTS * _POINTS)
        firsts, lasts = (np.broadcast_to(edge, tokens.shape)[..., None] for edge in (begins, ends))
        within = firsts + (lasts - firsts) * points
        if self.span == "run":
            total = tokens.sum(axis=1, keepdims=True)
            before = np.cumsum(tokens, axis=1) - tokens
            rates = self._compute_factor((before[..., None] + tokens[..., None] * within) / total[..., None])
            if self.rewarm:
                rates[:, 1:] *= np.minimum(within[:, 1:] / self.rewarm, 1.0)
        else:
            rates = self._compute_factor(within)
        means: _Array = rates.reshape(*tokens.shape, PARTS, _POINTS).mean(axis=-1)
        return means

    def find_decays(self, tokens: _Array) -> _Array:
        """Return where each stage begins to decay, as a share of its tokens, R × K; 1 if it does not."""
        if self.span == "stage":
            return np.full(tokens.shape, 1 - self.decay)
        decay = self.decay * tokens.sum(axis=1, keepdims=True)
        after = np.cumsum(tokens[:, ::-1], axis=1)[:, ::-1] - tokens
        decaying = np.clip(decay - after, 0.0, tokens)
        return 1 - np.divide(decaying, tokens, out=np.zeros_like(decaying), where=tokens > 0)

    def _compute_factor(self, at: _Array) -> _Array:
        """Return the rate at a share of the span, as a share of the peak."""
        rising = at / self.warmup if self.warmup else np.ones_like(at)
        falling = (1 - at) / self.decay if self.decay else np.ones_like(at)
        factor: _Array = np.clip(np.minimum(rising, falling), 0.0, 1.0)
        return factor

    def describe_training(self, *, grows: bool) -> dict[str, Json]:
        """Return the training arguments of this schedule, as a run's YAML has them.

        Args:
            grows: whether the run grows after some training, so that a warm-up after growth is needed.
        """
        training: dict[str, Json] = {
            "lr_scheduler_type": "warmup_stable_decay",
            "lr_scheduler_kwargs": {"num_decay_steps": self.decay, "min_lr_ratio": 0.0, "decay_type": "linear"},
            "lr_span": self.span,
            "warmup_steps": self.warmup,
        }
        return {**training, "rewarm_steps": self.rewarm} if grows and self.span == "run" else training


def compute_usual_peak(flops: float) -> float:
    """Return the peak learning rate that is usual for the compute of a run: `0.3118 * FLOPs^-0.125`, at most 0.01.

    DeepSeek-AI 2024 (arXiv 2401.02954, section 3.1) fitted it to runs of 1e17 to 2e19 FLOPs with AdamW and checked it
    up to 3e23.

    Args:
        flops: training FLOPs, those of earlier training included.

    Raises:
        PlanError: if they are not a positive number.

    >>> f"{compute_usual_peak(1.2e20):.2g}"
    '0.00096'
    """
    if not is_positive_number(flops):
        raise PlanError(f"flops must be a positive number, got {flops!r}: give the training FLOPs of the run")
    return float(min(0.3118 * flops**-0.125, 0.01))


def compute_usual_batch(flops: float, tokens: int, block_size: int) -> int:
    """Return the tokens per optimizer step that are usual for the compute of a run: `0.292 * FLOPs^0.3271`.

    The source is that of `compute_usual_peak`. The batch is a power of two of blocks, and a run has at least about a
    hundred steps.

    >>> compute_usual_batch(1e20, 20_000_000_000, 2048)
    1048576
    """
    usual = min(0.292 * flops**0.3271, tokens / 100)
    return int(2 ** max(0, round(math.log2(max(usual, 1.0) / block_size)))) * block_size
