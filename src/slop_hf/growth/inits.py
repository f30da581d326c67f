"""Inits: what new entries hold, and which old layer a new one copies.

An init of a width operator is a pure function of the parameter's row in the axis table; an init of `layer` is one of
the layer counts. To add one, write it and register it in `INITS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..architectures import Parameter
from ..errors import GrowthError
from ..operators import OPERATORS


class Fill(NamedTuple):
    """New entries are drawn from a normal distribution; `std` 0 makes them constant."""

    mean: float
    std: float


WidthInit = Callable[[Parameter, float], Fill]
LayerInit = Callable[[int, int], list[int]]


def random(parameter: Parameter, initializer_range: float) -> Fill:
    """The paper's init, Eq. 15 to 20: new entries N(0, initializer_range), new norm gains 1.

    The paper writes R for every new entry and says no more of R; the standard deviation is the one that
    transformers initialises the family with. Gains of norms are not in its equations: 1 is their usual beginning.
    Not function-preserving.
    """
    return Fill(1.0, 0.0) if parameter.kind == "norm" else Fill(0.0, initializer_range)


def stack(old_layers: int, new_layers: int) -> list[int]:
    """The paper's init of `layer` (Appendix G, StackBERT): the old model repeated on top of itself.

    New layer i is a copy of old layer `i mod old_layers`, for any new count. Not function-preserving.

    >>> stack(3, 5)
    [0, 1, 2, 0, 1]
    """
    return [layer % old_layers for layer in range(new_layers)]


WIDTH_INITS: dict[str, WidthInit] = {"random": random}
LAYER_INITS: dict[str, LayerInit] = {"stack": stack}

#: The inits of each operator by name; the first is the default, and the paper's.
INITS: dict[str, Mapping[str, WidthInit | LayerInit]] = {
    name: LAYER_INITS if name == "layer" else WIDTH_INITS for name in OPERATORS
}


def resolve_inits(operators: Sequence[str], init: str | Mapping[str, str] | None) -> dict[str, str]:
    """The name of the init of each operator.

    Raises:
        GrowthError: for a name that the operator does not know.

    >>> resolve_inits(("layer", "ffn"), None)
    {'layer': 'stack', 'ffn': 'random'}
    """
    names = {}
    for operator in operators:
        chosen = init.get(operator) if isinstance(init, Mapping) else init
        names[operator] = chosen or next(iter(INITS[operator]))
        if names[operator] not in INITS[operator]:
            known = ", ".join(INITS[operator])
            raise GrowthError(f"unknown init {names[operator]!r} for operator {operator!r}; known: {known}")
    return names
