"""`GrowthPlan`: everything that is decided about one growth, before a tensor moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..architectures import LAYER, Architecture, Axis, Parameter, architecture_of, setting
from ..dims import ModelDims
from ..errors import GrowthError
from ..operators import operator_named, operators_between
from ..schedule import GrowthStage
from .axes import AxisMap, axis_maps
from .inits import LAYER_INITS, WIDTH_INITS, Fill, resolve_inits


@dataclass(frozen=True)
class GrowthPlan:
    """One growth from `old` to `new`; executors follow it and choose nothing.

    Args:
        architecture: the family's axis table.
        config: the old model's config.
        old, new: structures before and after.
        inits: the init of each operator that grows.
        seed: of the random entries.
        axes: the map of each axis.
        layers: for each new layer, the old one that it copies.
    """

    architecture: Architecture
    config: Any
    old: ModelDims
    new: ModelDims
    inits: Mapping[str, str]
    seed: int
    axes: Mapping[Axis, AxisMap]
    layers: tuple[int, ...]

    def parameters(self) -> Iterator[tuple[str, str, Parameter]]:
        """`(new name, old name, row)` of every parameter of the grown model."""
        for row in self.architecture.rows(self.config):
            if not row.in_layer:
                yield row.name, row.name, row
                continue
            for layer, source in enumerate(self.layers):
                yield row.name.replace(LAYER, str(layer)), row.name.replace(LAYER, str(source)), row

    def maps(self, row: Parameter) -> tuple[AxisMap, ...]:
        """The map of each dimension of a parameter."""
        vocab = setting(self.config, "vocab_size")
        return tuple(AxisMap.append(vocab, vocab) if axis == "vocab" else self.axes[axis] for axis in row.axes)

    def fill(self, row: Parameter) -> Fill:
        """What a parameter's new entries hold."""
        # A stage's leading width operator decides for those that follow it.
        name = next((name for operator, name in self.inits.items() if operator != "layer"), "random")
        return WIDTH_INITS[name](row, setting(self.config, "initializer_range", 0.02))


def plan_growth(
    config: Any,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
) -> GrowthPlan:
    """Decide a growth; arguments as for `grow_model`.

    Raises:
        GrowthError, DimsError, ArchitectureError: for what cannot be grown, before anything is.
    """
    architecture = architecture_of(config)
    old = ModelDims.from_config(config)
    if isinstance(operator, GrowthStage):
        if new_dims is not None or init is not None:
            raise GrowthError("a stage brings its own dims and init; leave out new_dims and init")
        operators, new, init = operator.operators, operator.dims, operator.init
        needed = operators_between(old, new)
        if set(needed) != set(operators):
            raise GrowthError(
                f"the stage grows {', '.join(operators)} to {new}, but from the model's {old} "
                f"that takes {', '.join(needed) or 'nothing'}"
            )
    else:
        new = resolve_dims(old, operator, new_dims)
        operators = tuple(_operators_of(old, new, operator))
    inits = resolve_inits(operators, init)
    layers = LAYER_INITS[inits.get("layer", "stack")](old.num_hidden_layers, new.num_hidden_layers)
    return GrowthPlan(architecture, config, old, new, inits, seed, axis_maps(old, new), tuple(layers))


def resolve_dims(old: ModelDims, operator: str, new_dims: int | Mapping[str, int] | ModelDims | None) -> ModelDims:
    """The structure that `new_dims` asks for.

    An int is the operator's own dimension. Adding heads to a model with a key/value head for each query head adds
    key/value heads too; under grouped-query attention their number stays, unless `new_dims` names it.
    """
    fields = operator_named(operator).fields
    if isinstance(new_dims, ModelDims):
        return new_dims
    if isinstance(new_dims, int) and not isinstance(new_dims, bool):
        new_dims = {fields[0]: new_dims}
    if not isinstance(new_dims, Mapping):
        raise GrowthError(f"new_dims must be the new {fields[0]} or a mapping of config fields, got {new_dims!r}")
    changes = dict(new_dims)
    if "num_attention_heads" in changes and old.num_key_value_heads == old.num_attention_heads:
        changes.setdefault("num_key_value_heads", changes["num_attention_heads"])
    return old.replace(**changes)


def _operators_of(old: ModelDims, new: ModelDims, operator: str) -> Sequence[str]:
    """The operators of a growth that `operator` leads; heads and ffn may follow hidden."""
    needed = operators_between(old, new)
    if operator not in needed:
        raise GrowthError(f"{operator!r} has nothing to grow: the model has {old} already, asked for {new}")
    followers = ("mha", "ffn") if operator == "hidden" else ()
    strays = [name for name in needed if name != operator and name not in followers]
    if strays:
        raise GrowthError(
            f"growing {operator!r} from {old} to {new} would change {', '.join(strays)} too; "
            "grow them one after the other, or pass a GrowthStage that names them all"
        )
    return (operator, *(name for name in needed if name != operator))
