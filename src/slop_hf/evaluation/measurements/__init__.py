"""Measurements for the library `evaluate`: perplexity and marginal utility, loadable by path, without a network."""

from __future__ import annotations

from pathlib import Path

from ...errors import EvaluationError

_HERE = Path(__file__).parent
NAMES = ("marginal_utility", "perplexity")


def path_of(name: str) -> str:
    """What `evaluate.load` takes for a measurement.

    Raises:
        EvaluationError: for an unknown one.

    >>> path_of("perplexity").endswith("measurements/perplexity")
    True
    """
    if name not in NAMES:
        raise EvaluationError(f"no measurement is named {name!r}: there are {', '.join(NAMES)}")
    return str(_HERE / name)
