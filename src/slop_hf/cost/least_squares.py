"""Nonlinear least squares by the method of Levenberg and Marquardt, and the uncertainty of a fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[np.float64]

#: Step of the finite differences; values are of the order of 1.
_DIFFERENCE = 1e-4
_MOST_DAMPING = 1e8
#: Bound of the central 80% of a normal distribution, in standard deviations.
Z80 = 1.2815515655446004
#: The search ends once a step lowers the sum of squares by less than this share.
_LEAST_GAIN = 1e-5


def fit_least_squares(compute_residuals: Callable[[_Array], _Array], start: _Array, *, iterations: int = 40) -> _Array:
    """Return values near a minimum of the sum of squared residuals.

    A step that would not lower the sum is damped more, one that does is followed by a bolder one (Marquardt 1963).
    No value changes by more than 1 in a step.

    Args:
        compute_residuals: residuals of some values, more residuals than values.
        start: values to begin with.
        iterations: most steps.

    >>> fit_least_squares(lambda x: np.array([x[0] - 3, 2 * (x[1] + 1), x[0] + x[1] - 2]), np.zeros(2)).round(3)
    array([ 3., -1.])
    """
    values, residuals, damping = start, compute_residuals(start), 1e-2
    for _ in range(iterations):
        shifts = _DIFFERENCE * np.eye(len(values))
        slopes = np.stack([compute_residuals(values + shift) - residuals for shift in shifts], axis=1) / _DIFFERENCE
        curvature, gradient = slopes.T @ slopes, slopes.T @ residuals
        before = residuals @ residuals
        while damping < _MOST_DAMPING:
            damped = curvature + damping * np.diag(np.diag(curvature) + 1e-12)
            candidate = values - np.clip(np.linalg.solve(damped, gradient), -1, 1)
            left = compute_residuals(candidate)
            after = left @ left
            if after < before:  # false for nan
                break
            damping *= 4
        else:
            return values
        values, residuals, damping = candidate, left, damping / 5
        if after > before * (1 - _LEAST_GAIN):
            return values
    return values


def draw_counts(runs: int, replicates: int, seed: int = 0) -> list[_Array]:
    """Return how often each run counts in each of some bootstrap replicates: as many runs, drawn with replacement.

    >>> [count.sum() for count in draw_counts(5, 2)]
    [np.float64(5.0), np.float64(5.0)]
    """
    draws = np.random.default_rng(seed).multinomial(runs, np.ones(runs) / runs, size=replicates)
    return list(draws.astype(float))


def round_constant(value: float) -> float:
    """Return a number with six significant digits, as files of laws hold it.

    >>> round_constant(1 / 3)
    0.333333
    """
    return float(f"{value:.6g}")


def compute_intervals(names: Sequence[str], replicates: Sequence[Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Return the central 80% of the replicates of each constant; empty without replicates.

    Args:
        names: names of the constants.
        replicates: constants fitted to resampled runs, one row per fit.

    >>> compute_intervals(["a"], [[1.0], [2.0], [3.0]])
    {'a': (1.2, 2.8)}
    """
    if not replicates:
        return {}
    low, high = np.quantile(np.array(replicates), [0.1, 0.9], axis=0)
    return {name: (float(low[number]), float(high[number])) for number, name in enumerate(names)}


def compute_deviation(errors: _Array) -> float:
    """Return the standard deviation of a normal distribution whose central 80% is as wide as that of some errors."""
    return float(np.quantile(np.abs(errors), 0.8)) / Z80
