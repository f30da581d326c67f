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
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and (least is None or float(value) >= least)
    except OverflowError:  # an integer of hundreds of digits
        return False


def is_positive_number(value: object) -> bool:
    """Whether a value is an integer or a float, finite, not a boolean, and above 0.

    >>> [is_positive_number(value) for value in (1e-9, 0, float("inf"), "1")]
    [True, False, False, False]
    """
    return is_finite_number(value, least=0) and bool(value)


def require_whole_number(
    value: object, name: str, *, least: int = 1, most: int | None = None, error: type[SlopError] = SlopError
) -> None:
    """Refuse anything but an integer of at least `least` and at most `most`.

    Args:
        value: number to check.
        name: name of the argument or key, for the message.
        least, most: smallest and largest number allowed; None for no largest one.
        error: class of error to raise.

    Raises:
        error: if the value is no such number.

    >>> require_whole_number(0, "block_size")
    Traceback (most recent call last):
    slop_hf.errors.SlopError: block_size must be a whole number, 1 or more, got 0
    """
    if not is_whole_number(value, least):
        raise error(f"{name} must be a whole number, {least} or more, got {value!r}")
    if most is not None and int(value) > most:  # type: ignore[call-overload]
        raise error(f"{name} must be a whole number from {least} to {most:,}, got {value:,}")
