"""`GrowthPlan`: everything that is decided about one growth, before a tensor moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..architectures import LAYER, Architecture, Axis, Parameter, get_architecture, read_setting
from ..dims import ModelDims
from ..errors import GrowthError
from ..operators import get_operator, find_operators
from ..schedule import GrowthStage
from .axes import AxisMap, build_axis_maps
from .inits import EXACT, LAYER_INITS, WIDTH_INITS, InitDistribution, resolve_inits

#: Strength of the noise on copies, as a share of `initializer_range`.
DEFAULT_NOISE = 0.1

#: Rotary embeddings whose frequencies a change of rope_theta, or spreading pairs, can keep.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LOG_FLOAT32_MAX = 88.7


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter of the grown model comes about.

    Args:
        name: its name.
        source: the old parameter that it grows from.
        row: its row in the axis table.
        maps: the map of each of its dimensions.
        scale: factor of old entries, beside `1 / copies` along the dimension that it reads.
        gain_offset: added to a stored gain before scaling and taken away after.
        centre: whether the mean over the hidden axis is taken away first.
        noise: standard deviation of the noise on the copies that it reads; it sums to zero over the copies of a slot.
        silent: old entries (gains: as they are used) are zero, so that an inserted layer adds nothing; new ones too,
            but for gains.
        seed: of its random entries, beside its name.
        inits: the init of each operator.
        initializer_range: standard deviation of new entries.
    """

    name: str
    source: str
    row: Parameter
    maps: tuple[AxisMap, ...]
    scale: float
    gain_offset: float
    centre: bool
    noise: float
    silent: bool
    seed: int
    inits: Mapping[str, str]
    initializer_range: float

    @property
    def stored_name(self) -> str:
        """Its name in a checkpoint on disk."""
        return self.row.stored_as or self.name

    @property
    def stored_source(self) -> str:
        """The name in a checkpoint of the parameter that it grows from."""
        return self.row.stored_as or self.source

    @property
    def changes_nothing(self) -> bool:
        """Whether the grown parameter is the old one as it is."""
        computes = self.scale != 1.0 or self.centre or self.noise or self.silent
        return not computes and all(axis.is_identity for axis in self.maps)

    def fill(self, operators: Sequence[str | None]) -> InitDistribution:
        """What a block of entries holds that each of `operators` has added along one dimension (None: old there).

        Where one of them asks for zeros, the block is zero.
        """
        fills = [
            WIDTH_INITS[self.inits[operator]](operator, self.row, self.row.role(dimension), self.initializer_range)
            for dimension, operator in enumerate(operators)
            if operator is not None
        ]
        mean, std = min(fills, key=lambda fill: (abs(fill.mean), fill.std))
        return InitDistribution(mean - self.gain_offset, std)


@dataclass(frozen=True)
class GrowthPlan:
    """One growth from `old` to `new`; executors follow it and choose nothing.

    Args:
        architecture: the family's axis table.
        source_config: the old model's config.
        old, new: structures before and after.
        inits: the init of each operator that grows.
        seed: of the random entries.
        noise: strength of the noise on copies, as a share of `initializer_range`.
    """

    architecture: Architecture
    source_config: Any
    old: ModelDims
    new: ModelDims
    inits: Mapping[str, str]
    seed: int
    noise: float = DEFAULT_NOISE

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes what the old one does, up to rounding."""
        return all(init in EXACT for init in self.inits.values())

    @cached_property
    def axes(self) -> dict[Axis, AxisMap]:
        """The map of each axis."""
        vocab = read_setting(self.source_config, "vocab_size")
        return {**build_axis_maps(self.old, self.new, self.inits), "vocab": AxisMap.identity(vocab)}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """For each new layer, the old one that it copies."""
        init = self.inits.get("layer", "stack")
        return tuple(LAYER_INITS[init](self.old.num_hidden_layers, self.new.num_hidden_layers))

    @cached_property
    def inserted(self) -> frozenset[int]:
        """New layers that add nothing to the residual stream."""
        if self.inits.get("layer") != "preserving":
            return frozenset()
        return frozenset(i for i in range(len(self.layers)) if self.layers[i] in self.layers[:i])

    @cached_property
    def _has_closing_norms(self) -> bool:
        """Whether inserted layers are silenced by gains of 0 behind their branches, not by output projections of 0.

        Behind a norm, projections of 0 would have gradients as large as 1 / sqrt(eps) makes them.
        """
        return any(row.closes for row in self.architecture.parameters)

    @property
    def residual_share(self) -> float:
        """Mean square of the grown residual stream over the old one's: `kd / D` for k tiles of d in D slots.

        1 for the init `random`, which leaves norms as they are.
        """
        if self.inits.get("hidden", "random") not in EXACT:
            return 1.0
        return self.residual_copies * self.old.hidden_size / self.new.hidden_size

    @property
    def residual_copies(self) -> int:
        """Whole tiles of the residual stream."""
        return self.axes["hidden"].most_copies

    @property
    def centres(self) -> bool:
        """Whether the mean is taken out of all that writes the residual stream.

        LayerNorm takes it away anyway, and only without it does padding with zeros change the norm by a mere factor.
        """
        return self.architecture.norm == "layer" and self.residual_share != 1.0

    def config_changes(self) -> dict[str, Any]:
        """The config fields beside the dims that the growth changes."""
        changes: dict[str, Any] = {}
        config, architecture = self.source_config, self.architecture
        if self.residual_share != 1.0:
            # ms' = share * ms; gains take sqrt(share), and eps must shrink alike.
            changes[architecture.norm_eps] = read_setting(config, architecture.norm_eps) * self.residual_share
        if self.new.head_dim != self.old.head_dim and self.inits["head_dim"] != "spread":
            rope = dict(read_setting(config, "rope_parameters"))
            rope["rope_theta"] = rope["rope_theta"] ** (self.new.head_dim / self.old.head_dim)
            changes["rope_parameters"] = rope
        if (types := read_setting(config, "layer_types")) is not None and self.new.num_hidden_layers != len(types):
            changes["layer_types"] = [types[layer] for layer in self.layers]
        return changes

    def config(self) -> Any:
        """The grown model's config."""
        return self.new.to_config(self.source_config, **self.config_changes())

    def parameters(self) -> Iterator[ParameterPlan]:
        """The plan of every parameter of the grown model."""
        for row in self.architecture.rows(self.source_config):
            if not row.is_in_layer:
                yield self._parameter(row, row.name, row.name)
                continue
            for layer, source in enumerate(self.layers):
                name, old = (row.name.replace(LAYER, str(number)) for number in (layer, source))
                yield self._parameter(row, name, old, inserted=layer in self.inserted)

    def _parameter(self, row: Parameter, name: str, source: str, *, inserted: bool = False) -> ParameterPlan:
        writes_residual = row.kind in ("projection", "embedding", "bias") and any(
            axis == "hidden" and row.role(dimension) == "write" for dimension, axis in enumerate(row.axes)
        )
        initializer_range = read_setting(self.source_config, "initializer_range", 0.02)
        maps = tuple(self.axes[axis] for axis in row.axes)
        copied = row.reads is not None and maps[row.reads].most_copies > 1
        return ParameterPlan(
            name=name,
            source=source,
            row=row,
            maps=maps,
            scale=self._scale(row),
            gain_offset=self.architecture.gain_offset if row.kind == "norm" else 0.0,
            centre=self.centres and writes_residual,
            noise=self.noise * initializer_range if copied else 0.0,
            silent=inserted and (row.closes if self._has_closing_norms else writes_residual),
            seed=self.seed,
            inits=self.inits,
            initializer_range=initializer_range,
        )

    def _scale(self, row: Parameter) -> float:
        """The factor of a parameter's old entries."""
        scale, share, hidden = 1.0, self.residual_share, self.new.hidden_size / self.old.hidden_size
        exact_hidden = self.inits.get("hidden", "random") in EXACT
        tied = bool(read_setting(self.source_config, "tie_word_embeddings", False))
        scales_embedding = self.architecture.scaled_embedding and exact_hidden
        if row.kind == "norm" and row.axes == ("hidden",):
            scale *= math.sqrt(share)
        if row.kind in ("norm", "norm_bias") and not row.is_in_layer and tied:
            # A tied output projection cannot take 1 / copies itself, nor undo the embedding's own factor.
            scale *= math.sqrt(hidden) if scales_embedding else 1.0
            scale /= self.residual_copies
        if row.kind == "embedding" and scales_embedding:
            scale /= math.sqrt(hidden)
        if row.part == "query" and self.architecture.scale_follows_head_dim and self.inits.get("head_dim") in EXACT:
            scale *= math.sqrt(self.new.head_dim / self.old.head_dim)
        if row.part in ("query", "key") and self.architecture.has_head_norms:
            # These norms share the epsilon that the residual stream's need changed.
            scale *= math.sqrt(share)
        return scale


def plan_growth(
    config: Any,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    noise: float = DEFAULT_NOISE,
) -> GrowthPlan:
    """Decide a growth; arguments as for `grow_model`.

    Raises:
        GrowthError, DimsError, ArchitectureError: for what cannot be grown, before anything is.
    """
    architecture = get_architecture(config)
    old = ModelDims.from_config(config)
    if isinstance(operator, GrowthStage):
        if new_dims is not None or init is not None:
            raise GrowthError("a stage brings its own dims and init; leave out new_dims and init")
        operators, new, init = operator.operators, operator.dims, operator.init
        needed = find_operators(old, new)
        if set(needed) != set(operators):
            raise GrowthError(
                f"the stage grows {', '.join(operators)} to {new}, but from the model's {old} "
                f"that takes {', '.join(needed) or 'nothing'}"
            )
    else:
        new = resolve_dims(old, operator, new_dims)
        operators = tuple(_operators_of(old, new, operator))
    if not (noise >= 0 and math.isfinite(noise)):
        raise GrowthError(f"noise must be a share of initializer_range, 0 or more, got {noise}")
    plan = GrowthPlan(architecture, config, old, new, resolve_inits(operators, init), seed, noise)
    _check_family(plan)
    _ = plan.axes, plan.layers  # refuses maps that cannot be
    return plan


def _check_family(plan: GrowthPlan) -> None:
    """Refuse what the family cannot be, or cannot be exactly."""
    architecture, new = plan.architecture, plan.new
    if not architecture.has_own_head_dim and (
        new.head_dim * new.num_attention_heads != new.hidden_size or new.head_dim != plan.old.head_dim
    ):
        raise GrowthError(
            f"{architecture.model_type} takes head_dim from hidden_size / num_attention_heads: "
            f"grow both together, so that head_dim stays {plan.old.head_dim}"
        )
    if not architecture.has_own_head_dim and new.num_key_value_heads != new.num_attention_heads:
        raise GrowthError(f"{architecture.model_type} has a key/value head for each query head; grow both together")
    if "head_dim" in plan.inits:
        if architecture.has_head_norms and plan.inits["head_dim"] in EXACT:
            raise GrowthError(
                f"{architecture.model_type} normalises each head, which new slots of head_dim would change; "
                "only init 'random' can grow it, and not exactly"
            )
        _check_rope(plan)
    if plan.centres and read_setting(plan.source_config, "tie_word_embeddings", False):
        raise GrowthError(
            f"hidden of a {architecture.model_type} with tied embeddings cannot grow exactly by padding, because its "
            "LayerNorm takes the mean away; use init 'random', or 'copy' to a whole multiple"
        )


def _check_rope(plan: GrowthPlan) -> None:
    """Refuse to grow head_dim where the rotary frequencies could not stay."""
    rope, init = read_setting(plan.source_config, "rope_parameters"), plan.inits["head_dim"]
    if not isinstance(rope, Mapping) or "rope_theta" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise GrowthError("head_dim can only grow under full rotary embeddings with one rope_theta")
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise GrowthError(
            f"head_dim cannot grow under rope_type {kind!r}: no rope_theta makes up for what its frequencies take "
            f"from head_dim (supported: {', '.join(ROPE_TYPES)})"
        )
    if init != "spread" and math.log(rope["rope_theta"]) * plan.new.head_dim / plan.old.head_dim > LOG_FLOAT32_MAX:
        raise GrowthError(
            f"head_dim from {plan.old.head_dim} to {plan.new.head_dim} would raise rope_theta {rope['rope_theta']} "
            "above what float32 holds; use init 'spread', or a smaller head_dim"
        )
    if kind == "yarn" and init in EXACT:
        # Its ramp between pairs is rounded to whole pairs and cut off at head_dim - 1, so formulas do not tell.
        old, grown = (
            ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0]
            for config in (plan.old.to_config(plan.source_config), plan.config())
        )
        pairs = [slot for slot, source in enumerate(plan.axes["head_dim"].source[: len(grown)]) if source is not None]
        if not torch.allclose(grown[pairs], old, rtol=1e-4, atol=0.0):
            other = "use init 'preserving', or set truncate to false" if init == "spread" else "use init 'random'"
            raise GrowthError(
                f"init {init!r} cannot keep yarn's frequencies from head_dim {plan.old.head_dim} to "
                f"{plan.new.head_dim}: the ends of its ramp are rounded to other pairs; {other}"
            )


def resolve_dims(old: ModelDims, operator: str, new_dims: int | Mapping[str, int] | ModelDims | None) -> ModelDims:
    """The structure that `new_dims` asks for.

    An int is the operator's own dimension. Adding heads to a model with a key/value head for each query head adds
    key/value heads too; under grouped-query attention their number stays, unless `new_dims` names it.
    """
    fields = get_operator(operator).fields
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
    needed = find_operators(old, new)
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
