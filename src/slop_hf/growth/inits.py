"""Inits: the values of new entries, and the old layer that each new layer copies.

An init of a width operator is a pure function of the operator, a row of the axis table, and the row's role along the
growing axis. It returns the distribution of the new entries along that axis. Whether additional slots are new
or copies is decided by `axes.build_axis_maps`. An init of `layer` is a pure function of the layer counts. To add an
init, write the function, register it below, and name it in `operators.INITS`.

Which of them keep the function that the model computes:

| init | layer | ffn | mha | hidden | head_dim |
|---|---|---|---|---|---|
| `random` (the paper's; for layers the paper has `stack`) | no | no | no | no | no |
| `stack`, `interleave`, `middle`, `scaled` | no | | | | |
| `preserving` | exact | exact | exact | exact | exact |
| `spread` | | | | | exact |
| `copy` | | exact | exact | exact | |
| `rms_copy` | | exact | exact | exact for whole multiples | |

Exact means up to the rounding of the dtype; `copy` in bf16 is exact only if the number of copies is a power of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..architectures import Parameter, Role
from ..operators import INITS, resolve_inits

__all__ = ["EXACT", "INITS", "LAYER_INITS", "WIDTH_INITS", "InitDistribution", "resolve_inits"]


class InitDistribution(NamedTuple):
    """The normal distribution that new entries are drawn from; with `std` 0 they are constant."""

    mean: float
    std: float


ZERO = InitDistribution(0.0, 0.0)
ONE = InitDistribution(1.0, 0.0)

#: Operator, row, role of the row along the growing axis, `initializer_range` -> distribution of new entries.
WidthInit = Callable[[str, Parameter, Role, float], InitDistribution]
#: Old and new number of layers -> the old layer of each new one.
LayerInit = Callable[[int, int], list[int]]


def random(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """Draw new entries from N(0, initializer_range^2) and set new norm gains to 1: the paper's init, Eq. 15 to 20.

    The paper writes R for every new entry and does not define R further; we take the standard deviation with which
    transformers initialises the family. Norm gains are not in the equations; 1 is their usual initial value. The
    function of the model is not preserved. New layers begin as in a new model, with biases of 0.
    """
    if operator == "layer" and row.kind in ("bias", "norm_bias"):
        return ZERO
    return ONE if role == "norm" else InitDistribution(0.0, initializer_range)


def preserving(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """Preserve the function: zeros on one side of the new slots, random entries on the other.

    New slots of `hidden` are written with zeros (`GrowthPlan.config_changes` and the norm gains compensate for them);
    new slots of `ffn`, heads and `head_dim` are read with zeros. With zeros on both sides, the gradients of the new
    slots would stay zero. The key rows of new slots within a head are zero too, since the attention scores would
    otherwise read them. If a norm takes the mean square of all heads together, new heads write zero queries and keys
    (`GrowthPlan` compensates for their number), and learn through their values first. Their gains are random, or new
    heads with the same keys would stay equal.
    """
    if role == "norm":
        return InitDistribution(1.0, initializer_range) if operator == "mha" else ONE
    if operator == "hidden":
        is_zero = role == "write"
    else:
        is_zero = role == "read" or row.is_normalised or (operator == "head_dim" and row.part == "key")
    return ZERO if is_zero else InitDistribution(0.0, initializer_range)


def rms_copy(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """Copy every slot in turn, whatever the new size, so that activations keep their root mean square (RMS).

    Additional slots are copies of slots 0, 1, 2, ..., and weights that read copies are divided by their number, as
    under `copy`. But `hidden` is filled with copies to its end, also if it does not become a whole multiple. The mean
    square of the residual stream then stays about the same, and gains and epsilons of norms stay exactly as they are.
    With tied embeddings, the final norm's gain alone is multiplied by the old over the new width, because the tied
    matrix cannot be. The function of `hidden` is preserved only for a whole multiple.

    After SPARKLING (2602.02472). No slot is new, so this distribution fills none.
    """
    return preserving(operator, row, role, initializer_range)


def zeros(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """Begin new tokens with zeros: their logits are 0, and their embeddings add nothing to the residual stream."""
    return ZERO


def mean(operator: str, row: Parameter, role: Role, initializer_range: float) -> InitDistribution:
    """Begin new tokens with the mean of the old rows (`tensors.grow_parameter` computes it).

    The logit of a new token is then the mean of the old logits, and its probability at most the average of the old
    ones, by Jensen's inequality: new tokens take little from them.

    Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models" (2021).
    """
    return ZERO


WIDTH_INITS: dict[str, WidthInit] = {
    "random": random,
    "mean": mean,
    "zeros": zeros,
    "preserving": preserving,
    # `copy` has new slots only if hidden is not a whole number of tiles; `spread` only puts them elsewhere.
    "copy": preserving,
    "spread": preserving,
    "rms_copy": rms_copy,
}


def stack(old_layers: int, new_layers: int) -> list[int]:
    """Repeat the old model on top of itself: the paper's init of `layer` (Appendix G, StackBERT).

    New layer i is a copy of old layer `i mod old_layers`, for any new count. The function is not preserved.

    >>> stack(3, 5)
    [0, 1, 2, 0, 1]
    """
    return [layer % old_layers for layer in range(new_layers)]


def interleave(old_layers: int, new_layers: int) -> list[int]:
    """Insert copies next to their source: new layer i is a copy of old layer `i * old_layers // new_layers`.

    The function is not preserved. The init `preserving` of `layer` uses the same order, but every copy after the first
    adds nothing to the residual stream, because its output projections are zero.

    >>> interleave(3, 5)
    [0, 0, 1, 1, 2]
    """
    return [layer * old_layers // new_layers for layer in range(new_layers)]


def middle(old_layers: int, new_layers: int) -> list[int]:
    """Insert copies in the middle, each next to its source, and leave the first and the last layers single.

    Every layer is copied as often as the others, and what remains goes to the layers in the middle. For a whole
    multiple it is `interleave`. The first and the last layers of a trained model do work of their own, which copies
    disturb most. The function is not preserved.

    >>> middle(4, 6), middle(3, 8)
    ([0, 1, 1, 2, 2, 3], [0, 0, 0, 1, 1, 1, 2, 2])
    """
    times, more = divmod(new_layers, old_layers)
    first = (old_layers - more) // 2
    return [old for old in range(old_layers) for _ in range(times + (first <= old < first + more))]


def append(old_layers: int, new_layers: int) -> list[int]:
    """Put new layers behind the old ones: the order of the init `random`, whose new layers hold no old entry.

    >>> append(2, 4)
    [0, 1, 0, 0]
    """
    return [*range(old_layers), *[0] * (new_layers - old_layers)]


#: `scaled` is `interleave`, with the branches of a layer divided by the number of its copies (`GrowthPlan`).
LAYER_INITS: dict[str, LayerInit] = {
    "stack": stack,
    "interleave": interleave,
    "preserving": interleave,
    "middle": middle,
    "scaled": interleave,
    "random": append,
}

#: Inits that preserve the function.
EXACT = {"preserving", "copy", "spread"}
