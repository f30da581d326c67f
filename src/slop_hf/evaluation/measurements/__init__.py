"""Measurements for the library `evaluate`: perplexity and marginal utility, loaded by path, without a network."""

from __future__ import annotations

from pathlib import Path

from ...errors import EvaluationError

NAMES = ("marginal_utility", "perplexity")


def path_of(name: str) -> str:
    """Return the path of a measurement, as `evaluate.load` takes it.

    >>> path_of("perplexity").endswith("measurements/perplexity")
    True
    """
    if name not in NAMES:
        raise EvaluationError(f"no measurement is named {name!r}: choose one of {', '.join(NAMES)}")
    return str(Path(__file__).parent / name)
