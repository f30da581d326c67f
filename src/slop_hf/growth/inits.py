"""Inits: what new entries hold, and which old layer a new one copies.

An init of a width operator is a pure function of an operator, a row of the axis table and what the row does along the
growing axis; it says how entries that are new along that axis are filled. Whether new slots are copies is told by
`axes.axis_maps`. An init of `layer` is a pure function of the layer counts. To add one, write it and register it.

Which of them keep the function that the model computes:

| init | layer | ffn | mha | hidden | head_dim |
|---|---|---|---|---|---|
| `random` (the paper's; layers `stack`) | no | no | no | no | no |
| `interleave` | no | | | | |
| `preserving` | exact | exact | exact | exact | exact |
| `spread` | | | | | exact |
| `copy` | | exact | exact | exact | |

Exact means up to the rounding of the dtype, and for `copy` in bf16 only where the number of copies is a power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..architectures import Parameter, Role
from ..errors import GrowthError
from ..operators import OPERATORS


class InitDistribution(NamedTuple):
    """New entries are drawn from a normal distribution; `std` 0 makes them constant."""

    mean: float
    std: float


ZERO = InitDistribution(0.0, 0.0)
ONE = InitDistribution(1.0, 0.0)

WidthInit = Callable[[str, Parameter, Role, float], InitDistribution]
LayerInit = Callable[[int, int], list[int]]


def random(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """The paper's init, Eq. 15 to 20: new entries N(0, initializer_range), new norm gains 1.

    The paper writes R for every new entry and says no more of R; the standard deviation is the one that
    transformers initialises the family with. Gains of norms are not in its equations: 1 is their usual beginning.
    Not function-preserving.
    """
    return ONE if role == "norm" else InitDistribution(0.0, initializer_range)


def preserving(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """Function-preserving: zeros on one side of the new slots, random entries on the other.

    New slots of `hidden` are written with zeros (and the norms' gains and epsilon made up for it, see
    `GrowthPlan.config_changes`); new slots of `ffn`, heads and `head_dim` are read with zeros. With zeros on both
    sides the new slots would have no gradient for ever. Rows of new key slots within a head are zero too, since the
    attention scores would read them otherwise.
    """
    if role == "norm":
        return ONE
    if operator == "hidden":
        silent = role == "write"
    else:
        silent = role == "read" or (operator == "head_dim" and row.part == "key")
    return ZERO if silent else InitDistribution(0.0, initializer_range)


WIDTH_INITS: dict[str, WidthInit] = {
    "random": random,
    "preserving": preserving,
    # `copy` leaves new slots only where whole tiles of hidden do not fill it, `spread` is another place for the same.
    "copy": preserving,
    "spread": preserving,
}


def stack(old_layers: int, new_layers: int) -> list[int]:
    """The paper's init of `layer` (Appendix G, StackBERT): the old model repeated on top of itself.

    New layer i is a copy of old layer `i mod old_layers`, for any new count. Not function-preserving.

    >>> stack(3, 5)
    [0, 1, 2, 0, 1]
    """
    return [layer % old_layers for layer in range(new_layers)]


def interleave(old_layers: int, new_layers: int) -> list[int]:
    """Copies beside their source: new layer i is a copy of old layer `i * old_layers // new_layers`.

    Not function-preserving. With the init `preserving` of `layer`, the same order, and every copy after the first adds
    nothing to the residual stream (its output projections are zero).

    >>> interleave(3, 5)
    [0, 0, 1, 1, 2]
    """
    return [layer * old_layers // new_layers for layer in range(new_layers)]


LAYER_INITS: dict[str, LayerInit] = {"stack": stack, "interleave": interleave, "preserving": interleave}

#: The inits of each operator; the first is the default, and the paper's where the paper has the operator.
INITS: dict[str, tuple[str, ...]] = {
    "layer": ("stack", "interleave", "preserving"),
    "mha": ("random", "preserving", "copy"),
    "ffn": ("random", "preserving", "copy"),
    "hidden": ("random", "preserving", "copy"),
    "head_dim": ("preserving", "spread", "random"),
}
assert INITS.keys() == OPERATORS.keys()

#: Inits that keep the function.
EXACT = {"preserving", "copy", "spread"}


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
        names[operator] = chosen or INITS[operator][0]
        if names[operator] not in INITS[operator]:
            known = ", ".join(INITS[operator])
            raise GrowthError(f"unknown init {names[operator]!r} for operator {operator!r}; known: {known}")
    return names
