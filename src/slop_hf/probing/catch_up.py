"""Catching up: how far a grown model is ahead for its small stage, from its held-out losses and those of a trunk.

A model trained on `n_s` tokens is grown, and the grown model trains on `n` further tokens at the constant rate. The
trunk is the large model from scratch at the same rate. With `t_eq(n)`, the tokens of the trunk that reach the grown
model's loss after `n` tokens,

    κ(n) = (t_eq(n) − n) / n_s

is how many tokens of the trunk one token of the small model has been worth. It is negative right after a growth that
has lost much, and settles once the grown model has caught up. The settled value is κ. The mixing time is the number of
tokens `n` from which on κ(n) stays within a tolerance of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from ..io.numbers import is_finite_number, is_positive_number
from ..io.record import Record

_FloatArray = NDArray[np.float64]

#: How an estimate ended; each but `settled` says why κ could not be determined.
Verdict = Literal["settled", "not settled", "too noisy", "above the trunk", "below the trunk"]
#: The fewest evaluations of a grown model that κ and a mixing time can be read from.
MIN_EVALUATIONS = 12
#: Default tolerance of the mixing time, as a difference of κ.
MIXING_TOLERANCE = 0.1

_WINDOW = 7  # evaluations that one smoothed loss is fitted to
_DRAWS = 400  # of the noise, for the intervals
_INTERVAL = (2.5, 97.5)  # percentiles
_PLACES = 6  # decimals of recorded numbers


@dataclass(frozen=True)
class LossTrack(Record, error=RunError):
    """Held-out losses of a model while it trains.

    Args:
        tokens: tokens that the model was trained on at each evaluation, positive and ascending, shape (evaluations,);
            of a grown model, since its growth.
        losses: held-out loss at each of them, in nats per token, shape (evaluations,).
    """

    tokens: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        ascends = all(before < after for before, after in zip((0, *self.tokens), self.tokens, strict=False))
        if len(self.tokens) != len(self.losses) or not ascends:
            raise RunError("a track needs one loss per number of tokens, and tokens that are positive and ascend")
        if not all(map(is_finite_number, self.losses)):
            raise RunError("a track has a loss that is not finite: its run diverged; lower learning_rate")


@dataclass(frozen=True)
class MixingEstimate(Record, error=RunError):
    """Estimates of κ and the mixing time from the losses of one grown model.

    The intervals cover 95% of the noise of held-out losses from one evaluation to the next. They do not contain the
    difference between seeds, nor between held-out texts.

    Args:
        verdict: `settled`; or why κ is not known: `not settled` (κ(n) changes by more than the tolerance in the last
            third of the evaluations), `too noisy` (half of κ's interval exceeds the tolerance), `above the trunk` (the
            grown model has not come down to the losses of the trunk) or `below the trunk` (it has passed the last of
            them).
        noise: standard deviation of a held-out loss from one evaluation to the next, in nats per token, the larger one
            of the two models.
        tokens: tokens since the growth at each evaluation, shape (evaluations,).
        kappas: κ(n) at each of them, from smoothed losses; None if the trunk has no such loss.
        kappa: settled value of κ, tokens of the trunk per token of the small model: the mean over the last third; None
            unless settled.
        kappa_low, kappa_high: interval of the mean over the last third; None if it does not exist.
        mixing_tokens: mixing time in tokens of the grown model; None unless settled.
        mixing_low, mixing_high: its interval; None if its end lies in the last third, or it does not exist.
        last: mean of κ(n) over the last third, settled or not; None if the trunk has no such losses.
        trend: change of κ(n) within the last third, by a straight line; None if the trunk has no such losses.
        is_drifting: whether the interval of the trend leaves 0 out, although κ(n) may be settled within the tolerance.
    """

    verdict: Verdict
    noise: float
    tokens: tuple[int, ...]
    kappas: tuple[float | None, ...]
    kappa: float | None = None
    kappa_low: float | None = None
    kappa_high: float | None = None
    mixing_tokens: float | None = None
    mixing_low: float | None = None
    mixing_high: float | None = None
    last: float | None = None
    trend: float | None = None
    is_drifting: bool = False


def estimate_mixing(
    trunk: LossTrack, grown: LossTrack, small_tokens: float, *, tolerance: float = MIXING_TOLERANCE
) -> MixingEstimate:
    """Estimate κ and the mixing time of a grown model.

    Both tracks are smoothed by lines through neighbouring evaluations, over the logarithm of tokens; the smoothed
    trunk is made monotone and interpolated. For the intervals, noise around the smoothed losses is drawn 400 times.

    Args:
        trunk: losses of the large model from scratch, by tokens.
        grown: losses of the grown model, by tokens since its growth.
        small_tokens: tokens `n_s` of the small model before the growth.
        tolerance: largest distance of κ(n) from its settled value after the mixing time.

    Raises:
        RunError: for a tolerance or a number of tokens that is not positive, or too few evaluations.

    >>> tokens = tuple(range(10, 1010, 10))
    >>> trunk = LossTrack(tokens, tuple(2 + 5 * t**-0.3 for t in tokens))
    >>> grown = LossTrack(tokens[:50], tuple(2 + 5 * (n + 0.8 * 400) ** -0.3 for n in tokens[:50]))
    >>> estimate = estimate_mixing(trunk, grown, 400)
    >>> estimate.verdict, round(estimate.kappa, 2)
    ('settled', 0.8)
    """
    for name, value in {"tolerance": tolerance, "small_tokens": small_tokens}.items():
        if not is_positive_number(value):
            raise RunError(f"{name} must be positive and finite, got {value!r}")
    if min(len(grown.tokens), len(trunk.tokens)) < MIN_EVALUATIONS:
        raise RunError(
            f"κ needs {MIN_EVALUATIONS} evaluations of each model or more, got {len(trunk.tokens)} of the trunk and "
            f"{len(grown.tokens)} of the grown model; evaluate more often, or train for longer"
        )
    curves = [_Smoothed.fit(track) for track in (trunk, grown)]
    after, tail = np.array(grown.tokens, dtype=float), _count_tail(len(grown.tokens))
    kappas = _compute_kappas(curves[0].tokens, curves[0].losses, after, curves[1].losses, small_tokens)
    random = np.random.default_rng(0)
    draws = [
        _compute_kappas(curves[0].tokens, of_trunk, after, of_grown, small_tokens)
        for of_trunk, of_grown in zip(*(curve.draw(random) for curve in curves), strict=True)
    ]
    last = kappas[-tail:]
    low, high = _find_interval([float(draw[-tail:].mean()) for draw in draws])
    verdict = _judge(kappas, tail, low, high, tolerance)
    is_settled, is_measured = verdict == "settled", bool(np.isfinite(last).all())
    times = [_find_mixing(draw, after, tail, tolerance) for draw in draws] if is_settled else []
    mixing_low, mixing_high = _find_interval(times) if times else (None, None)
    return MixingEstimate(
        verdict=verdict,
        kappa=_round(last.mean()) if is_settled else None,
        kappa_low=low if is_measured else None,
        kappa_high=high if is_measured else None,
        mixing_tokens=_round(_find_mixing(kappas, after, tail, tolerance)) if is_settled else None,
        mixing_low=mixing_low,
        mixing_high=mixing_high,
        last=_round(last.mean()) if is_measured else None,
        trend=_round(_measure_trend(last)) if is_measured else None,
        is_drifting=_is_drifting([draw[-tail:] for draw in draws]),
        noise=round(max(curve.noise for curve in curves), _PLACES),
        tokens=grown.tokens,
        kappas=tuple(_round(value) for value in kappas),
    )


@dataclass(frozen=True, eq=False)
class _Smoothed:
    """A smoothed track.

    Args:
        tokens, losses: tokens, and smoothed losses, shape (evaluations,).
        smoother: matrix from losses to smoothed losses, shape (evaluations, evaluations).
        noise: standard deviation of the losses around the smoothed ones, in nats per token.
    """

    tokens: _FloatArray
    losses: _FloatArray
    smoother: _FloatArray
    noise: float

    @classmethod
    def fit(cls, track: LossTrack) -> _Smoothed:
        tokens, losses = np.array(track.tokens, dtype=float), np.array(track.losses)
        smoother = _build_smoother(np.log(tokens))
        smoothed = smoother @ losses
        # In the second half alone: in the steep descent of a new model, lines miss the curve and not only the noise.
        later = slice(len(losses) // 2, None)
        freedom = np.square(np.eye(len(losses)) - smoother)[later].sum()
        noise = math.sqrt(np.square(losses - smoothed)[later].sum() / freedom)
        return cls(tokens, smoothed, smoother, noise)

    def draw(self, random: np.random.Generator) -> _FloatArray:
        """Return smoothed losses with the noise drawn again, shape (draws, evaluations)."""
        noise = self.noise * random.standard_normal((_DRAWS, len(self.losses)))
        return np.asarray((self.losses + noise) @ self.smoother.T)


def _build_smoother(x: _FloatArray) -> _FloatArray:
    """Return the matrix of local linear regression over the nearest evaluations, with tricube weights."""
    smoother = np.zeros((len(x), len(x)))
    for number, centre in enumerate(x):
        distance = np.abs(x - centre)
        reach = 1.1 * np.sort(distance)[min(_WINDOW, len(x)) - 1]
        root = np.sqrt((1 - np.minimum(distance / reach, 1) ** 3) ** 3)
        design = root[:, None] * np.stack([np.ones_like(x), x - centre], axis=1)  # [evaluations, 2]
        smoother[number] = np.linalg.pinv(design)[0] * root
    return smoother


def _compute_kappas(
    trunk_tokens: _FloatArray, trunk_losses: _FloatArray, after: _FloatArray, losses: _FloatArray, small_tokens: float
) -> _FloatArray:
    """Return κ(n) at each evaluation: -inf above the losses of the trunk, inf below them."""
    # The mean of the highest loss to come and the lowest one so far falls, and errs to neither side.
    to_come = np.maximum.accumulate(trunk_losses[::-1])[::-1]
    falling = (np.minimum.accumulate(trunk_losses) + to_come) / 2
    logs = np.interp(losses, falling[::-1], np.log(trunk_tokens)[::-1], left=math.inf, right=-math.inf)
    equal = np.where(np.isfinite(logs), np.exp(np.minimum(logs, 700)), logs)
    return np.asarray((equal - after) / small_tokens)


def _judge(kappas: _FloatArray, tail: int, low: float | None, high: float | None, tolerance: float) -> Verdict:
    last = kappas[-tail:]
    if (last == -math.inf).any():
        return "above the trunk"
    is_below = last == math.inf
    if is_below.mean() >= 0.5:
        return "below the trunk"
    if is_below.any() or low is None or high is None or (high - low) / 2 > tolerance:
        return "too noisy"
    has_left = (np.abs(last - last.mean()) > tolerance).any()
    return "not settled" if has_left or abs(_measure_trend(last)) > tolerance else "settled"


def _count_tail(evaluations: int) -> int:
    """Return the number of evaluations in the last third."""
    return evaluations - math.ceil(2 * evaluations / 3)


def _measure_trend(last: _FloatArray) -> float:
    slope, _ = np.polyfit(np.arange(len(last)), last, 1)
    return float(slope) * (len(last) - 1)


def _is_drifting(draws: Sequence[_FloatArray]) -> bool:
    if not np.isfinite(draws).all():
        return False
    low, high = _find_interval([_measure_trend(draw) for draw in draws])
    return low is not None and high is not None and low * high > 0


def _find_mixing(kappas: _FloatArray, after: _FloatArray, tail: int, tolerance: float) -> float:
    """Return the tokens from which on κ(n) stays within the tolerance; inf if they lie in the last third."""
    with np.errstate(invalid="ignore"):
        is_outside = ~(np.abs(kappas - kappas[-tail:].mean()) <= tolerance)
    first = int(np.flatnonzero(is_outside)[-1]) + 1 if is_outside.any() else 0
    return float(after[first]) if first <= len(after) - tail else math.inf


def _find_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the interval of some values; None for an end that is not finite."""
    low, high = np.percentile(values, _INTERVAL, method="nearest")
    return _round(low), _round(high)


def _round(value: float) -> float | None:
    return round(float(value), _PLACES) if math.isfinite(value) else None
