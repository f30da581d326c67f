"""The growth operators: the config fields that each one enlarges, and its letter in a sequence.

Appendix G of the SLOP paper defines the first four; `mha` adds heads of a fixed size. `head_dim` is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .dims import ModelDims
from .errors import GrowthError


@dataclass(frozen=True)
class Operator:
    """One growth operator.

    Args:
        letter: letter in a sequence such as `l-f-h`.
        fields: config fields that it enlarges; an int given as `new_dims` is the new value of the first one.
    """

    name: str
    letter: str
    fields: tuple[str, ...]


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("layer", "l", ("num_hidden_layers",)),
        Operator("mha", "a", ("num_attention_heads", "num_key_value_heads")),
        Operator("ffn", "f", ("intermediate_size",)),
        Operator("hidden", "h", ("hidden_size",)),
        Operator("head_dim", "d", ("head_dim",)),
    )
}


def get_operator(name: str) -> Operator:
    """Return the operator with this name; raise a `GrowthError` if it is unknown."""
    if name not in OPERATORS:
        raise GrowthError(f"unknown operator {name!r}; known: {', '.join(OPERATORS)}")
    return OPERATORS[name]


def find_operators(old: ModelDims, new: ModelDims) -> tuple[str, ...]:
    """Return the operators that together lead from `old` to `new`, in the order of the table.

    Raises:
        GrowthError: if a dimension would shrink.

    >>> find_operators(ModelDims(64, 128, 2, 2), ModelDims(128, 128, 4, 4))
    ('layer', 'mha', 'hidden')
    """
    sizes = {name: (size, getattr(new, name)) for name, size in sorted(old.as_dict().items())}
    for name, (before, after) in sizes.items():
        if after < before:
            raise GrowthError(f"{name} would shrink from {before} to {after}; growth can only keep or enlarge it")
    changed = {name for name, (before, after) in sizes.items() if before != after}
    return tuple(operator.name for operator in OPERATORS.values() if changed & set(operator.fields))


def grow_dims(old: ModelDims, sizes: Mapping[str, int]) -> ModelDims:
    """Return `old` with new sizes, by config field.

    If the model has one key/value head per query head, new query heads bring key/value heads; under grouped-query
    attention their number stays, unless `sizes` names it.
    """
    if "num_attention_heads" in sizes and old.num_key_value_heads == old.num_attention_heads:
        sizes = {"num_key_value_heads": sizes["num_attention_heads"], **sizes}
    return old.replace(**sizes)
