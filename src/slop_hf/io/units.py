"""Counts, bytes and durations as text.

A missing value (None) is `NOTHING`. Bytes are decimal, as disks and `max_shard_size` count them: 1 GB = 1e9 bytes.
"""

from __future__ import annotations

import math

#: The text of a value that does not exist.
NOTHING = "–"

_COUNT_UNITS = (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
_BYTE_UNITS = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def format_count(count: float | None) -> str:
    """Return a count with three significant digits and k, M, B (1e9) or T.

    >>> format_count(65_000_000_000), format_count(1_234_567), format_count(999_999), format_count(512)
    ('65B', '1.23M', '1M', '512')
    """
    if count is None:
        return NOTHING
    for unit, size in _COUNT_UNITS:
        if count >= size * 0.9995:
            return _format_three_digits(count / size) + unit
    return f"{count:,.0f}"


def format_bytes(nbytes: float | None) -> str:
    """Return a number of bytes with three significant digits, in the unit that fits.

    >>> format_bytes(900), format_bytes(64_000), format_bytes(5.25e9)
    ('900 B', '64 kB', '5.25 GB')
    """
    if nbytes is None:
        return NOTHING
    for unit, size in _BYTE_UNITS:
        if nbytes >= size * 0.9995:
            return f"{_format_three_digits(nbytes / size)} {unit}"
    return f"{nbytes:,.0f} B"


def format_duration(seconds: float | None) -> str:
    """Return a duration in the unit that fits: seconds, minutes, hours or days.

    >>> [format_duration(seconds) for seconds in (4.2, 95, 7300, 200_000)]
    ['4.2 s', '1.6 min', '2.0 h', '2.3 days']
    """
    if seconds is None:
        return NOTHING
    for unit, size, from_ in (("days", 86_400, 172_800), ("h", 3600, 3600), ("min", 60, 60)):
        if seconds >= from_:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def format_power(value: float | None) -> str:
    """Return a large number in scientific notation, as in Table 1 of the SLOP paper.

    >>> format_power(1.6901e24), format_power(None), format_power(0)
    ('1.69e+24', '–', '0')
    """
    if value is None:
        return NOTHING
    return f"{value:.2e}" if value else "0"


def format_decimals(value: float | None, places: int) -> str:
    """Return a number with a fixed number of decimal places, and commas between thousands.

    >>> format_decimals(1234.567, 1)
    '1,234.6'
    """
    return NOTHING if value is None else f"{value:,.{places}f}"


def format_seconds(value: float | None) -> str:
    """Return seconds without a unit, with one decimal place below 1000.

    >>> format_seconds(8.649), format_seconds(12345.6)
    ('8.6', '12,346')
    """
    return NOTHING if value is None else format_decimals(value, 1 if value < 1000 else 0)


def format_significant(value: float | None) -> str:
    """Return a number of any size and sign with three significant digits.

    >>> format_significant(-0.012345), format_significant(123456.0), format_significant(None)
    ('-0.0123', '123,000', '–')
    """
    if value is None:
        return NOTHING
    if not value:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"


def _format_three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"  # %g would write 1000 as 1e+03
