"""The growth operators: the config fields that each one enlarges, and its letter in a sequence.

Appendix G of the SLOP paper defines the first four; `mha` adds heads of a fixed size. `head_dim` is not in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass

from .dims import ModelDims
from .errors import GrowthError


@dataclass(frozen=True)
class Operator:
    """One growth operator.

    Args:
        name: name in schedules and on the command line.
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
    """Return the operator with this name.

    Raises:
        GrowthError: if the name is unknown.
    """
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
    changed = {name for name, value in new.as_dict().items() if value != old.as_dict()[name]}
    for name in sorted(changed):
        before, after = getattr(old, name), getattr(new, name)
        if after < before:
            raise GrowthError(f"{name} would shrink from {before} to {after}; growth can only keep or enlarge it")
    return tuple(operator.name for operator in OPERATORS.values() if changed & set(operator.fields))
