"""Checks of numbers that users give: whole numbers and finite numbers, of Python and of numpy alike."""

from __future__ import annotations

import math
from numbers import Integral, Real

from ..errors import SlopError


def is_whole_number(value: object, least: int | None = None) -> bool:
    """Whether a value is an integer, not a boolean, and at least `least`.

    >>> import numpy as np
    >>> [is_whole_number(value, least=1) for value in (3, np.int64(3), 0, True, 3.0, "3")]
    [True, True, False, False, False, False]
    """
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    return is_number and (least is None or int(value) >= least)  # type: ignore[call-overload]


def is_finite_number(value: object, least: float | None = None) -> bool:
    """Whether a value is an integer or a float, finite, not a boolean, and at least `least`.

    >>> [is_finite_number(value, least=0) for value in (0, 1.5, -1, float("nan"), True, "1")]
    [True, True, False, False, False, False]
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and (least is None or float(value) >= least)  # type: ignore[arg-type]


def require_whole_number(value: object, name: str, *, least: int = 1, error: type[SlopError] = SlopError) -> None:
    """Refuse anything but an integer of at least `least`.

    Args:
        value: number to check.
        name: name of the argument or key, for the message.
        least: smallest number allowed.
        error: class of error to raise.

    Raises:
        error: if the value is no such number.

    >>> require_whole_number(0, "block_size")
    Traceback (most recent call last):
    slop_hf.errors.SlopError: block_size must be a whole number, 1 or more, got 0
    """
    if not is_whole_number(value, least):
        raise error(f"{name} must be a whole number, {least} or more, got {value!r}")
