"""The growth operators: which config fields each one changes, and its letter in a sequence.

Appendix G of the SLOP paper defines the first four; `mha` adds heads of a fixed size. `head_dim` is beyond the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from .dims import ModelDims
from .errors import GrowthError


@dataclass(frozen=True)
class Operator:
    """One growth operator: name, letter in a sequence such as `l-f-h`, and the config fields that it grows.

    The first field is the operator's own: an int given as `new_dims` is its new value.
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


def operator_named(name: str) -> Operator:
    """The operator of that name.

    Raises:
        GrowthError: for an unknown name.
    """
    if name not in OPERATORS:
        raise GrowthError(f"unknown operator {name!r}; known: {', '.join(OPERATORS)}")
    return OPERATORS[name]


def operators_between(old: ModelDims, new: ModelDims) -> tuple[str, ...]:
    """The operators that lead from `old` to `new` together, in the order of the table.

    Raises:
        GrowthError: where a dimension shrinks.

    >>> operators_between(ModelDims(64, 128, 2, 2), ModelDims(128, 128, 4, 4))
    ('layer', 'mha', 'hidden')
    """
    changed = {name for name, value in new.as_dict().items() if value != old.as_dict()[name]}
    for name in sorted(changed):
        before, after = getattr(old, name), getattr(new, name)
        if after < before:
            raise GrowthError(f"{name} would shrink from {before} to {after}; growth can only keep or enlarge it")
    return tuple(operator.name for operator in OPERATORS.values() if changed & set(operator.fields))
