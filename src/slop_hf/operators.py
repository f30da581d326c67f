"""The growth operators: the config fields that each one enlarges, its letter in a sequence, and its inits.

Appendix G of the SLOP paper defines the first four; `mha` adds heads of a fixed size. `head_dim` is not in the paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .dims import ModelDims
from .errors import DimsError, GrowthError
from .io.serialization import describe_alternatives, describe_unknown_key


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


#: Inits of each operator, which `growth.inits` defines. The first is the default: the paper's, if it has the operator.
INITS: dict[str, tuple[str, ...]] = {
    "layer": ("stack", "interleave", "preserving", "middle", "scaled", "random"),
    "mha": ("random", "preserving", "copy", "rms_copy"),
    "ffn": ("random", "preserving", "copy", "rms_copy"),
    "hidden": ("random", "preserving", "copy", "rms_copy"),
    "head_dim": ("preserving", "spread", "random"),
}
assert INITS.keys() == OPERATORS.keys()

#: The operator of the vocabulary, which is not among the dims: no schedule grows it, only `grow_model`,
#: `grow_checkpoint` and `slop grow` do.
VOCABULARY = "vocab"
#: Inits of its new rows. All keep the logits of the old tokens; the first is the default.
VOCABULARY_INITS = ("mean", "zeros", "random")

#: The operator of experts, which are not among the dims either: more experts, or experts for a dense model.
EXPERTS = "experts"
#: Its inits; the first is the default. `preserving` keeps the function, `noisy` keeps the number of active experts.
EXPERT_INITS = ("preserving", "noisy")


def get_operator(name: str) -> Operator:
    """Return the operator with this name; raise a `GrowthError` if it is unknown."""
    if not isinstance(name, str):
        raise GrowthError(
            f"operator must be one of {', '.join(OPERATORS)}, or a GrowthStage, got {type(name).__name__}"
        )
    if name not in OPERATORS:
        raise GrowthError(f"unknown operator {name!r}{describe_alternatives(name, OPERATORS)}")
    return OPERATORS[name]


def resolve_inits(operators: Sequence[str], init: str | Mapping[str, str] | None) -> dict[str, str]:
    """Return the name of each operator's init.

    Args:
        operators: operators that grow.
        init: one name for all operators, or a mapping from operator to name; operators without a name get the default.

    Raises:
        GrowthError: if an operator has no init of that name, or the mapping names something other than an operator.

    >>> resolve_inits(("layer", "ffn"), None)
    {'layer': 'stack', 'ffn': 'random'}
    >>> resolve_inits(("ffn",), {"fnn": "copy"})
    Traceback (most recent call last):
    slop_hf.errors.GrowthError: unknown key 'init.fnn'; did you mean 'ffn'?
    """
    names = init if isinstance(init, Mapping) else dict.fromkeys(operators, init)
    for operator, name in names.items():
        if operator not in INITS:
            raise GrowthError(describe_unknown_key(str(operator), INITS, path=f"init.{operator}"))
        if name is not None and name not in INITS[operator]:
            raise GrowthError(
                f"unknown init {name!r} for operator {operator!r}{describe_alternatives(str(name), INITS[operator])}"
            )
    return {operator: names.get(operator) or INITS[operator][0] for operator in operators}


def resolve_vocabulary_init(init: str | Mapping[str, str] | None) -> str:
    """Return the name of the init of a larger vocabulary's new rows.

    Args:
        init: name, or mapping from the operator "vocab" to it; None takes the default.

    Raises:
        GrowthError: if there is no such init, or the mapping names another operator.

    >>> resolve_vocabulary_init(None), resolve_vocabulary_init({"vocab": "zeros"})
    ('mean', 'zeros')
    """
    return _resolve_init(VOCABULARY, VOCABULARY_INITS, "the vocabulary grows", init)


def resolve_expert_init(init: str | Mapping[str, str] | None) -> str:
    """Return the name of the init of experts; arguments and errors as for `resolve_vocabulary_init`.

    >>> resolve_expert_init(None), resolve_expert_init({"experts": "noisy"})
    ('preserving', 'noisy')
    """
    return _resolve_init(EXPERTS, EXPERT_INITS, "the experts grow", init)


def _resolve_init(operator: str, inits: Sequence[str], what_grows: str, init: str | Mapping[str, str] | None) -> str:
    """Return the name of the init of an operator that grows alone; None takes the first."""
    if isinstance(init, Mapping):
        if unknown := [name for name in init if name != operator]:
            raise GrowthError(f"init names {unknown[0]!r}, but only {what_grows}; grow the dims before or after it")
        init = init.get(operator)
    name = inits[0] if init is None else init
    if name not in inits:
        raise GrowthError(f"unknown init {name!r} for operator {operator!r}{describe_alternatives(str(name), inits)}")
    return name


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

    Raises:
        DimsError: for an unknown field, or a structure that could not be built.
    """
    if strays := [name for name in sizes if not isinstance(name, str)]:
        raise DimsError(f"unknown dimension {strays[0]!r}; known: {', '.join(old.as_dict())}")
    if "num_attention_heads" in sizes and old.num_key_value_heads == old.num_attention_heads:
        sizes = {"num_key_value_heads": sizes["num_attention_heads"], **sizes}
    return old.replace(**sizes)
