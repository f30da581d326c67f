"""`GrowthPlan`: every decision about one growth, before a tensor moves.

An operator and an init lead to one map per axis and one list of source layers. From these and the axis table follow
the plan of every parameter and the new config. Growth in memory (`model.py`), from disk to disk (`checkpoint.py`) and
while a stage's states are read (`state_reader.py`) execute the same plan, so they give the same bits.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar, cast

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..architectures import EXPERT, JOINED_AXES, LAYER, Architecture, Axis, Parameter, get_architecture, read_setting
from ..cost.flops import count_parameters
from ..dims import ModelConfig, ModelDims
from ..errors import GrowthError
from ..io.numbers import is_finite_number, is_whole_number
from ..io.serialization import Json
from ..operators import (
    EXPERTS,
    VOCABULARY,
    find_operators,
    get_operator,
    grow_dims,
    resolve_expert_init,
    resolve_vocabulary_init,
)
from ..schedule import GrowthStage
from .axes import AxisMap, build_axis_maps
from .experts import ROUTER, ExpertGrowth, Utility, plan_expert_growth
from .inits import EXACT, LAYER_INITS, WIDTH_INITS, InitDistribution, resolve_inits

#: Standard deviation of the noise on copies, as a fraction of `initializer_range`.
DEFAULT_NOISE = 0.1

#: More noise than this is a slip: the weights of a trained model have a standard deviation of a few initializer_range.
LARGEST_NOISE = 100.0

#: What growth lists one by one, slots of an axis and tensors of a model, is bounded, far above any model that exists.
MOST_SLOTS = 2**20
MOST_TENSORS = 2**16

#: Kinds of rotary embeddings whose frequencies can be kept by changing rope_theta or by spreading the pairs.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
LOG_FLOAT32_MAX = 88.7


PartT = TypeVar("PartT")


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter of the grown model is computed.

    Args:
        name: name in the grown model.
        source: name of the old parameter that it grows from. For the first layers of a model that has none, it is an
            embedding or a norm, of which only the dtype is taken (`takes_nothing`).
        maps: axis map of each dimension.
        scale: factor of old entries, in addition to `1 / copies` along the dimension that the parameter reads.
        gain_offset: constant added to a stored gain before it is scaled, and subtracted afterwards.
        is_centred: whether the mean over the hidden axis is subtracted first.
        noise: standard deviation of the noise on the copies that the parameter reads; it sums to zero over the copies
            of a slot.
        zeroed: whether old entries become zero (for a gain: its effective value), so that an inserted layer adds
            nothing to the residual stream. New entries become zero too, except gains.
        is_added: whether the parameter belongs to an added layer: no parameter of the old model lives on in it.
        branch_share: share of its layer in what the copies of the old layer add to the residual stream: under the init
            `scaled`, one over their number, else 1. All its gradients, times the scale, shrink alike.
        part_scales: factor of each part of a fused parameter, in place of `scale`; empty for all others.
        stored_names, stored_sources: names of the parameter, and of its source, in a checkpoint. A parameter that
            stacks the matrices of all experts has one name per part of an expert's matrix, with `{expert}` for its
            index.
        source_shape: shape of the source if it differs from the maps' old sizes, as for the first layers of a model
            with experts.
        copy_noise: standard deviation of the noise on copies of experts: on their matrices, with opposite signs in
            the two copies of a pair, or on the rows of a router.
        noise_name: name of the random numbers that the two copies of a pair share; "" for a router.
        shards: number of experts that a network of a dense model is cut into; they share a row of the router.
        inits: init of each operator.
        initializer_range: standard deviation of new random entries.
    """

    name: str
    source: str
    row: Parameter
    maps: tuple[AxisMap, ...]
    scale: float
    gain_offset: float
    is_centred: bool
    noise: float
    zeroed: bool
    seed: int
    inits: Mapping[str, str]
    initializer_range: float
    is_added: bool = False
    branch_share: float = 1.0
    part_scales: tuple[float, ...] = ()
    stored_names: tuple[str, ...] = ()
    stored_sources: tuple[str, ...] = ()
    source_shape: tuple[int, ...] = ()
    copy_noise: float = 0.0
    noise_name: str = ""
    shards: int = 1

    @cached_property
    def joined_dimension(self) -> int | None:
        """The dimension along which a fused parameter holds several others; None for all others."""
        return next((dimension for dimension, axis in enumerate(self.maps) if axis.parts), None)

    @cached_property
    def parts(self) -> tuple[ParameterPlan, ...]:
        """The plans of what a parameter holds, in order; empty if it is one matrix or vector.

        A stack holds the matrix of each expert, a fused parameter queries, keys and values.
        """
        if self.row.is_stacked:
            copies = Counter(self.maps[0].source)
            return tuple(
                self._plan_expert(expert, source, 1 if source is None else copies[source])
                for expert, source in enumerate(self.maps[0].source)
            )
        dimension = self.joined_dimension
        if dimension is None:
            return ()
        is_stored_apart = len(self.stored_names) > 1

        def put(items: tuple[PartT, ...], item: PartT) -> tuple[PartT, ...]:
            return (*items[:dimension], item, *items[dimension + 1 :])

        names, axis = JOINED_AXES[self.row.axes[dimension]], self.maps[dimension]
        return tuple(
            replace(
                self,
                name=self.stored_names[number] if is_stored_apart else f"{self.name}[{number}]",
                source=self.stored_sources[number] if is_stored_apart else self.source,
                row=replace(self.row, axes=put(self.row.axes, name), part=part),
                maps=put(self.maps, part_map),
                scale=scale,
                part_scales=(),
                stored_names=self.stored_names[number : number + 1] if is_stored_apart else (),
                stored_sources=self.stored_sources[number : number + 1] if is_stored_apart else (),
            )
            for number, ((name, part), part_map, scale) in enumerate(
                zip(names, axis.parts, self.part_scales, strict=True)
            )
        )

    def _plan_expert(self, expert: int, source: int | None, copies: int) -> ParameterPlan:
        """Return the plan of the matrix of one expert; a new expert takes only the dtype of its source, the first.

        Each of n copies of an expert receives 1/n of its gradient.

        Args:
            copies: number of experts with the same source.
        """
        old_size = self.maps[0].old_size
        pair, is_second = divmod(expert // old_size, 2)
        is_paired = bool(self.copy_noise) and 2 * pair + 1 < copies
        first = 2 * pair * old_size + (source or 0)
        names, sources = (
            tuple(name.replace(EXPERT, str(index)) for name in stored)
            for stored, index in ((self.stored_names, expert), (self.stored_sources, source or 0))
        )
        return replace(
            self,
            name=names[0],
            source=sources[0],
            row=replace(self.row, axes=self.row.axes[1:], stored_parts=()),
            maps=tuple(self._cut_map(dimension, expert) for dimension in range(1, len(self.maps))),
            shards=1,
            stored_names=names,
            stored_sources=sources,
            is_added=self.is_added or (copies > 1 and expert >= old_size),
            branch_share=self.branch_share / copies,
            copy_noise=(-1) ** is_second * self.copy_noise if is_paired else 0.0,
            noise_name=f"{self.stored_names[0].replace(EXPERT, str(first))}+noise" if is_paired else "",
        )

    def _cut_map(self, dimension: int, expert: int) -> AxisMap:
        """Return the map of a dimension of an expert's matrix; an expert takes one shard of a network that is cut."""
        axis = self.maps[dimension]
        if self.shards == 1 or self.row.axes[dimension] not in ("ffn", "gate_up"):
            return axis
        parts = [AxisMap.cut(part.old_size, self.shards, expert % self.shards) for part in axis.parts or (axis,)]
        return AxisMap.join(parts) if axis.parts else parts[0]

    @cached_property
    def pieces(self) -> tuple[ParameterPlan, ...]:
        """The plans of the tensors that a checkpoint holds in the parameter's place: itself, unless it is a stack."""
        if not self.row.is_stacked and len(self.stored_names) < 2:
            return (self,)
        return tuple(piece for part in self.parts for piece in part.pieces)

    @property
    def takes_nothing(self) -> bool:
        """Whether all entries are new, as in random layers."""
        return all(segment.old is None for axis in self.maps for segment in axis.segments)

    @property
    def stored_name(self) -> str:
        """Its name in a checkpoint on disk."""
        return self.stored_names[0]

    @property
    def stored_source(self) -> str:
        """The name of its source in a checkpoint on disk."""
        return self.stored_sources[0]

    @property
    def old_shape(self) -> tuple[int, ...]:
        return self.source_shape or tuple(axis.old_size for axis in self.maps)

    @property
    def new_shape(self) -> tuple[int, ...]:
        return tuple(axis.new_size for axis in self.maps)

    @property
    def is_identity(self) -> bool:
        """Whether the grown parameter equals the old one."""
        computes = set((self.scale, *self.part_scales)) != {1.0} or self.is_centred or self.noise or self.zeroed
        computes = computes or self.copy_noise
        return not computes and all(axis.is_identity for axis in self.maps)

    def choose_distribution(self, operators: Sequence[str | None]) -> InitDistribution:
        """Return the distribution of a block of new entries; zeros win over everything else.

        `operators` names, for each dimension, the operator that added the block's slots; None for old slots.
        """
        distributions = [
            # Whatever the init, entries of a layer without a source are those of a new model.
            WIDTH_INITS["random" if operator == "layer" else self.inits[operator]](
                operator, self.row, self.row.role(dimension), self.initializer_range
            )
            for dimension, operator in enumerate(operators)
            if operator is not None
        ]
        mean, std = min(distributions, key=lambda distribution: (abs(distribution.mean), distribution.std))
        return InitDistribution(mean - self.gain_offset, std)


@dataclass(frozen=True)
class GrowthPlan:
    """One growth from `old` to `new`. Executors follow it and decide nothing.

    Args:
        architecture: axis table of the family.
        source_config: config of the old model.
        old, new: structures before and after growth.
        inits: init of each operator that grows.
        noise: standard deviation of the noise on copies, as a fraction of `initializer_range`.
        vocab_size: number of tokens after growth; None if it stays.
        experts: growth of the number of experts; None if it stays.

    Raises:
        GrowthError: for an unknown init, or a seed or noise that is not a number of its kind.
    """

    architecture: Architecture
    source_config: ModelConfig
    old: ModelDims
    new: ModelDims
    inits: Mapping[str, str]
    seed: int
    noise: float = DEFAULT_NOISE
    vocab_size: int | None = None
    experts: ExpertGrowth | None = None

    def __post_init__(self) -> None:
        if self.vocab_size is not None:
            inits = {VOCABULARY: resolve_vocabulary_init(self.inits)}
        elif self.experts is not None:
            inits = {EXPERTS: resolve_expert_init(self.inits)}
        else:
            inits = resolve_inits(tuple(dict.fromkeys((*self.inits, *find_operators(self.old, self.new)))), self.inits)
        if not is_whole_number(self.seed):
            raise GrowthError(f"seed must be a whole number, got {self.seed!r}")
        if not is_finite_number(self.noise, least=0) or self.noise > LARGEST_NOISE:
            raise GrowthError(
                f"noise must be a fraction of initializer_range, from 0 to {LARGEST_NOISE:g}, got {self.noise!r}"
            )
        # A frozen dataclass sets its fields through object.__setattr__; numpy's numbers cannot be written as JSON.
        for name, value in (("inits", inits), ("seed", int(self.seed)), ("noise", float(self.noise))):
            object.__setattr__(self, name, value)

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes the same function as the old one, up to rounding.

        A larger vocabulary leaves the logits of the old tokens as they are, whatever its init.
        """
        if self.vocab_size is not None:
            return True
        if self.experts is not None:
            return self.experts.preserves
        return all(
            init in EXACT or (init == "rms_copy" and self._copies_evenly(name)) for name, init in self.inits.items()
        )

    def _copies_evenly(self, operator: str) -> bool:
        """Whether copies of an operator keep the mean squares of all norms."""
        axes: list[Axis] = ["hidden"] if operator == "hidden" else self._normalised_axes if operator == "mha" else []
        return all(self.axes[axis].has_even_copies for axis in axes)

    @property
    def _normalised_axes(self) -> list[Axis]:
        """The axes of heads that a norm takes the mean square of: those of queries and keys in OLMo 2."""
        rows = self.architecture.parameters
        return list(dict.fromkeys(row.axes[row.write_dimension] for row in rows if row.is_normalised))

    @cached_property
    def axes(self) -> dict[Axis, AxisMap]:
        config, axes = self.source_config, build_axis_maps(self.old, self.new, self.inits)
        old_tokens = read_setting(config, "vocab_size")
        axes["vocab"] = AxisMap.append(old_tokens, self.vocab_size or old_tokens, VOCABULARY)
        if any("position" in row.axes for row in self.architecture.parameters):
            axes["position"] = AxisMap.identity(self.architecture.read(config, "max_position_embeddings"))
        if self.architecture.has_experts:
            experts = self.architecture.read(config, "num_experts")
            axes["experts"] = AxisMap.tile(experts, self.experts.new if self.experts else experts, EXPERTS)
        if self.experts is not None and self.experts.shards > 1:
            # The map of the first shard; each expert has its own (`ParameterPlan._cut_map`).
            axes["ffn"] = AxisMap.cut(self.old.intermediate_size, self.experts.shards, 0)
            axes["gate_up"] = AxisMap.join([axes["ffn"]] * 2)
        return axes

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """For each new layer, the old one that it copies."""
        init = self.inits.get("layer", "stack")
        return tuple(LAYER_INITS[init](self.old.num_hidden_layers, self.new.num_hidden_layers))

    @cached_property
    def added_layers(self) -> frozenset[int]:
        """New layers in which no old one lives on: all but the first copy of each old layer."""
        if not self.old.num_hidden_layers:
            return frozenset(range(len(self.layers)))
        originals = {old: new for new, old in reversed(list(enumerate(self.layers)))}
        return frozenset(range(len(self.layers))) - frozenset(originals.values())

    @property
    def inserted_layers(self) -> frozenset[int]:
        """Added layers that add nothing to the residual stream, as with the init `preserving`."""
        return self.added_layers if self.inits.get("layer") == "preserving" else frozenset()

    @property
    def _hidden_is_exact(self) -> bool:
        """Whether `hidden` grows by an init that preserves the function; else norms and embeddings stay unscaled."""
        return self.inits.get("hidden") in EXACT

    @property
    def _hidden_is_copied(self) -> bool:
        """Whether every slot of `hidden` is a copy, so that mean squares stay and norms need no compensation."""
        return self.inits.get("hidden") == "rms_copy"

    @property
    def residual_share(self) -> float:
        """Ratio of the mean squares of the grown and the old residual stream; 1 for `random` and `rms_copy`.

        With k copies of the d old slots, and zeros in the rest of the D new slots, it is `k d / D`.
        """
        if not self._hidden_is_exact:
            return 1.0
        return self.residual_copies * self.old.hidden_size / self.new.hidden_size

    @property
    def residual_copies(self) -> float:
        """Number k of complete copies of the old residual stream in the new one; under `rms_copy`, with a fraction."""
        if self._hidden_is_copied:
            return self.new.hidden_size / self.old.hidden_size
        return self.axes["hidden"].max_copies

    @property
    def needs_centring(self) -> bool:
        """Whether the mean must be subtracted from everything that writes the residual stream.

        LayerNorm subtracts it anyway, so the function stays. And only if the mean is 0 does padding with zeros change
        the norm's input by a mere factor.
        """
        return self.architecture.norm == "layer" and self.residual_share != 1.0

    def config_changes(self) -> dict[str, Json]:
        """Return the config fields, other than the dims, that the growth changes."""
        changes: dict[str, Json] = {}
        config, architecture = self.source_config, self.architecture
        if self.vocab_size is not None:
            changes["vocab_size"] = self.vocab_size
        if self.experts is not None:
            changes[architecture.config_fields.get("num_experts", "num_experts")] = self.experts.new
            changes["num_experts_per_tok"] = self.experts.active
        if self.residual_share != 1.0:
            # RMSNorm divides by sqrt(ms + eps). Here ms' = share * ms: with eps' = share * eps the quotient changes by
            # 1 / sqrt(share), which the gains make up for (`_compute_scale`).
            changes[architecture.norm_eps] = read_setting(config, architecture.norm_eps) * self.residual_share
        if self.new.head_dim != self.old.head_dim and self.inits["head_dim"] != "spread":
            # Pair i turns at theta^(-2i / head_dim); this theta keeps the frequency of every old pair.
            rope, power = read_setting(config, "rope_parameters"), self.new.head_dim / self.old.head_dim
            tables = {
                name: {**table, "rope_theta": table["rope_theta"] ** power}
                for name, table in _list_rope_tables(rope).items()
            }
            changes["rope_parameters"] = tables.get("", tables)
        if self.inits.get("layer", "random") != "random":
            for name in architecture.layer_lists:
                if values := read_setting(config, name):
                    changes[name] = [values[layer] for layer in self.layers]
        return changes

    def config(self) -> PreTrainedConfig:
        """Return the config of the grown model."""
        return cast(PreTrainedConfig, self.new.to_config(self.source_config, **self.config_changes()))

    def parameters(self) -> Iterator[ParameterPlan]:
        """Yield the plan of every parameter of the grown model."""
        for row in self.architecture.rows(self.source_config):
            if not row.is_in_layer:
                yield self._plan_parameter(row, row.name, row.name)
                continue
            for layer, source in enumerate(self.layers):
                name, old = (row.name.replace(LAYER, str(number)) for number in (layer, source))
                yield self._plan_parameter(row, name, old, layer)

    def find_source(self, name: str) -> str:
        """Return the name of the old parameter, buffer or module that one of the grown model comes from."""
        prefix, layer, rest = self._split_at_layer(name)
        return name if layer is None else f"{prefix}{self.layers[layer]}{rest}"

    def find_grown(self, name: str) -> list[str]:
        """Return the names of the grown parameters, buffers or modules that come from an old one."""
        prefix, layer, rest = self._split_at_layer(name)
        if layer is None:
            return [name]
        return [f"{prefix}{new}{rest}" for new, old in enumerate(self.layers) if old == layer]

    def _split_at_layer(self, name: str) -> tuple[str, int | None, str]:
        """Split a name into what precedes the number of its layer, the number (None: no layer) and the rest."""
        prefix = next(row.name.partition(LAYER)[0] for row in self.architecture.parameters if row.is_in_layer)
        match = re.match(rf"{re.escape(prefix)}(\d+)", name)
        return (prefix, int(match[1]), name[match.end() :]) if match else (prefix, None, "")

    def _plan_parameter(self, row: Parameter, name: str, source: str, layer: int | None = None) -> ParameterPlan:
        writes_residual = row.kind in ("projection", "embedding", "bias") and any(
            axis == "hidden" and row.role(dimension) == "write" for dimension, axis in enumerate(row.axes)
        )
        initializer_range = read_setting(self.source_config, "initializer_range", 0.02)
        is_added, branch_share = layer in self.added_layers, 1 / self._count_copies(layer)
        maps = tuple(self._get_map(axis, layer) for axis in row.axes)
        old_row = row
        source_shape: tuple[int, ...] = ()
        if is_added and (self.inits["layer"] == "random" or not self.old.num_hidden_layers):
            old = maps
            if not self.old.num_hidden_layers:
                old_row = self._find_stand_in(row)
                source, old = old_row.name, tuple(self.axes[axis] for axis in old_row.axes)
            if row.is_stacked:
                source_shape = () if old_row is row else tuple(axis.old_size for axis in old)
                maps = tuple(axis.renew_all("layer") for axis in maps)
            else:
                sizes = zip(old, maps, strict=True)
                maps = tuple(AxisMap.renew(axis.old_size, new.new_size, "layer") for axis, new in sizes)
        is_new_router = self.dense is not None and row.axes == ROUTER
        if is_new_router:
            old_row = self._find_stand_in(row)
            source, source_shape = old_row.name, tuple(self.axes[axis].old_size for axis in old_row.axes)
            maps = tuple(axis.renew_all("layer") for axis in maps)  # as in a new model
        reads_copies = row.read_dimension is not None and maps[row.read_dimension].max_copies > 1
        # If the branches of a layer end in norms (Gemma 2), inserted layers are disabled by post-norm gains of 0 and
        # not by output projections of 0: a norm behind zeros multiplies their gradients by 1 / sqrt(eps).
        has_post_norms = any(row.is_post_norm for row in self.architecture.parameters)
        adds_to_residual = row.is_in_layer and (row.is_post_norm if has_post_norms else writes_residual)
        share = branch_share if adds_to_residual else 1.0
        joined = JOINED_AXES.get(row.axes[row.write_dimension], ())
        return ParameterPlan(
            name=name,
            source=source,
            row=row,
            maps=maps,
            scale=self._compute_scale(row) * share,
            gain_offset=self.architecture.gain_offset if row.kind == "norm" else 0.0,
            is_centred=self.needs_centring and writes_residual,
            noise=self.noise * initializer_range if reads_copies else 0.0,
            zeroed=layer in self.inserted_layers and adds_to_residual,
            seed=self.seed,
            inits=self.inits,
            initializer_range=initializer_range,
            is_added=is_added,
            branch_share=branch_share,
            part_scales=tuple(
                self._compute_scale(replace(row, part=part), number) * share for number, (_, part) in enumerate(joined)
            ),
            stored_names=_list_stored_names(row, name),
            stored_sources=self._list_stored_sources(row, old_row, source),
            source_shape=source_shape,
            copy_noise=self.experts.get_noise(row) * self.noise * initializer_range if self.experts else 0.0,
            shards=self.experts.shards if self.experts and (row.is_stacked or is_new_router) else 1,
        )

    def _get_map(self, axis: Axis, layer: int | None) -> AxisMap:
        """Return the map of an axis; if utilities decide on the copies of experts, each layer has its own."""
        if axis == "experts" and self.experts is not None and self.experts.sources and layer is not None:
            return AxisMap.from_source(self.experts.sources[layer], self.experts.old, EXPERTS)
        return self.axes[axis]

    def _list_stored_sources(self, row: Parameter, old_row: Parameter, source: str) -> tuple[str, ...]:
        """Return the names in a checkpoint of what a parameter grows from, as many as it has names itself."""
        if row.is_stacked and old_row is row and self.experts is not None and self.dense is not None:
            return self.experts.list_networks(row, row.find_layer(source) or "")
        return _list_stored_names(old_row, source) * (1 if old_row is row else len(row.stored_parts) or 1)

    @property
    def dense(self) -> Architecture | None:
        """Axis table of the old model if it has no experts and gets some."""
        return None if self.experts is None else self.experts.dense

    @property
    def source_parameters(self) -> int:
        """Number of parameters of the old model."""
        count = int(count_parameters(self.old, self.source_config))
        # The config of a dense model that gets experts has one expert, and so a router, which the model lacks.
        return count if self.dense is None else count - self.old.num_hidden_layers * self.old.hidden_size

    def _find_stand_in(self, row: Parameter) -> Parameter:
        """Return a row outside the layers of the same kind: the embedding, or the gain of the final norm."""
        kind = "norm" if len(row.axes) == 1 else "embedding"
        rows = self.architecture.rows(self.source_config)
        return next(other for other in rows if not other.is_in_layer and other.kind == kind)

    def _count_copies(self, layer: int | None) -> int:
        """Return the divisor of a layer's branches: under the init `scaled`, the number of copies of its old layer.

        If a layer is a step of a differential equation along the depth, n copies take n steps, each 1/n of its size.
        All branches together add to the residual stream what the old ones added, to first order.
        """
        if layer is None or self.inits.get("layer") != "scaled":
            return 1
        return self.layers.count(self.layers[layer])

    def _compute_scale(self, row: Parameter, part_number: int = 0) -> float:
        """Return the factor of a parameter's old entries. It is 1 unless it compensates for something that grew.

        Args:
            part_number: index of the part of a fused parameter that the factor is for.
        """
        scale, share, widening = 1.0, self.residual_share, self.new.hidden_size / self.old.hidden_size
        is_tied = bool(read_setting(self.source_config, "tie_word_embeddings", False))
        scales_embedding = self.architecture.scales_embedding and (self._hidden_is_exact or self._hidden_is_copied)
        if row.kind == "norm" and row.axes == ("hidden",):
            scale *= math.sqrt(share)  # see `config_changes`
        if row.kind in ("norm", "norm_bias") and not row.is_in_layer and is_tied:
            # The final norm takes the factors of a tied output projection: 1 / copies for reading them, and the
            # inverse of the embedding's factor.
            scale *= math.sqrt(widening) if scales_embedding else 1.0
            scale /= self.residual_copies
        if row.kind == "embedding" and scales_embedding:
            scale /= math.sqrt(widening)  # the family multiplies by sqrt(hidden_size), which has grown
        if row.part == "query" and self.architecture.scale_follows_head_dim and self.inits.get("head_dim") in EXACT:
            scale *= math.sqrt(self.new.head_dim / self.old.head_dim)  # scores are divided by sqrt(head_dim)
        if row.part in ("query", "key") and (
            self.architecture.has_head_norms or self.architecture.has_projection_norms
        ):
            scale *= math.sqrt(share)  # the norms of heads share the epsilon that the residual stream has changed
        if self.inits.get("mha") in EXACT and (factor := self._find_normalised_share(row)) != 1.0:
            # With zeros in the new heads, their mean square stays if the old heads grow by 1 / sqrt(share); the gain
            # takes that back.
            scale *= math.sqrt(factor) if row.kind == "norm" else 1 / math.sqrt(factor)
        return scale if self.experts is None else scale * self.experts.get_scale(row, part_number)

    def _find_normalised_share(self, row: Parameter) -> float:
        """Return the share of old slots and their copies in an axis of heads with a norm over it, else 1."""
        axis = row.axes[row.write_dimension]
        if axis not in self._normalised_axes or not (row.is_normalised or row.kind == "norm"):
            return 1.0
        return self.axes[axis].max_copies * self.axes[axis].old_size / self.axes[axis].new_size


def _list_stored_names(row: Parameter, name: str) -> tuple[str, ...]:
    """Return the names in a checkpoint of a parameter; those of a stack keep `{expert}`."""
    if row.is_stacked:
        return tuple(part.replace(LAYER, row.find_layer(name) or "") for part in row.stored_parts)
    return tuple(row.list_stored_names(name))


def plan_growth(
    config: ModelConfig,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    noise: float = DEFAULT_NOISE,
    utility: Utility | None = None,
) -> GrowthPlan:
    """Decide a growth; takes the arguments of `grow_model`, with the model's config in place of the model.

    Raises:
        GrowthError, DimsError, ArchitectureError: if the model cannot grow in this way.
    """
    if not isinstance(config, Mapping | PreTrainedConfig):
        raise GrowthError(f"expected the config of a transformers model, or its dict, got {type(config).__name__}")
    architecture = get_architecture(config)
    old = ModelDims.from_config(config)
    if utility is not None and operator != EXPERTS:
        raise GrowthError(
            "utility decides on the copies of experts; leave it out, or grow with the operator 'experts'"
        )
    if operator == VOCABULARY:
        inits = {VOCABULARY: resolve_vocabulary_init(init)}
        tokens = _read_vocabulary(config, new_dims)
        plan = GrowthPlan(architecture, config, old, old, inits, seed, noise, tokens)
        _check_family(plan)
        return plan
    if operator == EXPERTS:
        init = "noisy" if init is None and utility is not None else init
        inits = {EXPERTS: resolve_expert_init(init)}
        architecture, config, experts = plan_expert_growth(config, new_dims, inits[EXPERTS], utility)
        old = ModelDims.from_config(config)
        new = old.replace(intermediate_size=old.intermediate_size // experts.shards)
        plan = GrowthPlan(architecture, config, old, new, inits, seed, noise, experts=experts)
        _check_family(plan)
        return plan
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
        operators = _find_joint_operators(old, new, operator)
    plan = GrowthPlan(architecture, config, old, new, resolve_inits(operators, init), seed, noise)
    _check_size(plan)
    _check_family(plan)
    if not old.num_hidden_layers and (layer_init := plan.inits.get("layer", "random")) not in ("random", "preserving"):
        raise GrowthError(
            f"init {layer_init!r} copies layers, but {old} has none; set the init of layer to 'random' or 'preserving'"
        )
    _ = plan.axes, plan.layers  # raises if no valid axis map exists
    return plan


def _read_vocabulary(config: ModelConfig, size: object) -> int:
    """Return the number of tokens that a vocabulary is to grow to; refuse any that is not larger."""
    old = read_setting(config, "vocab_size")
    if isinstance(size, Mapping) and list(size) == ["vocab_size"]:
        size = size["vocab_size"]
    if not is_whole_number(size):
        raise GrowthError(f"new_dims must be the new vocab_size, a whole number, got {size!r}")
    new = int(cast(int, size))
    if new <= old:
        raise GrowthError(f"vocab_size is {old}, and growth can only enlarge it, got {new}; ask for more tokens")
    if new > MOST_SLOTS:
        raise GrowthError(f"vocab_size would be {new:,}, but growth takes at most {MOST_SLOTS:,}; ask for less")
    return new


def require_plan(plan: object) -> None:
    """Refuse anything but a `GrowthPlan`."""
    if not isinstance(plan, GrowthPlan):
        raise GrowthError(f"plan must be a GrowthPlan, as plan_growth returns it, got {type(plan).__name__}")


def _check_size(plan: GrowthPlan) -> None:
    """Reject a model that is too large, before anything is listed slot by slot or tensor by tensor."""
    new, config = plan.new, plan.source_config
    widths = {
        "hidden_size": new.hidden_size,
        "intermediate_size": new.intermediate_size,
        "num_attention_heads * head_dim": new.num_attention_heads * new.head_dim,
    }
    for name, width in widths.items():
        if width > MOST_SLOTS:
            raise GrowthError(f"{name} would be {width:,}, but growth takes at most {MOST_SLOTS:,}; ask for less")
    tensors = sum(new.num_hidden_layers if row.is_in_layer else 1 for row in plan.architecture.rows(config))
    if tensors > MOST_TENSORS:
        raise GrowthError(
            f"num_hidden_layers {new.num_hidden_layers:,} would make a model of {count_parameters(new, config):,} "
            f"parameters in {tensors:,} tensors, but growth takes at most {MOST_TENSORS:,}; ask for fewer layers"
        )


def _check_family(plan: GrowthPlan) -> None:
    """Reject growths that this model family does not support, or cannot do exactly."""
    architecture, new, model_type = plan.architecture, plan.new, plan.architecture.model_type
    if quantization := read_setting(plan.source_config, "quantization_config"):
        raise GrowthError(
            f"the config has a quantization_config ({_name_quantization(quantization)}), but only weights in full "
            "precision can grow; if they are, remove it from the config, and else dequantise them first"
        )
    if reason := architecture.explain_refusal(plan.source_config):
        raise GrowthError(reason)
    if not architecture.has_own_head_dim and (
        new.head_dim * new.num_attention_heads != new.hidden_size or new.head_dim != plan.old.head_dim
    ):
        raise GrowthError(
            f"{model_type} takes head_dim from hidden_size / num_attention_heads: "
            f"grow both together, so that head_dim stays {plan.old.head_dim}"
        )
    if not architecture.has_grouped_heads and new.num_key_value_heads != new.num_attention_heads:
        raise GrowthError(f"{model_type} has one key/value head per query head; grow both together")
    if "head_dim" in plan.inits:
        if (architecture.has_head_norms or architecture.has_projection_norms) and plan.inits["head_dim"] in EXACT:
            norms = "each head" if architecture.has_head_norms else "all heads together"
            raise GrowthError(
                f"{model_type} normalises {norms}, which new slots of head_dim would change; "
                "only init 'random' can grow it, and not exactly"
            )
        _check_rope(plan)
    _check_normalised_heads(plan)
    if plan.needs_centring and read_setting(plan.source_config, "tie_word_embeddings", False):
        raise GrowthError(
            f"hidden of a {model_type} model with tied embeddings cannot be padded exactly, because its LayerNorm "
            "subtracts the mean; use init 'random', or 'copy' to a whole multiple"
        )


def _check_normalised_heads(plan: GrowthPlan) -> None:
    """Reject new heads that would change the mean square of all heads, or could never learn."""
    model_type, init = plan.architecture.model_type, plan.inits.get("mha")
    if init not in EXACT or not plan.architecture.has_projection_norms:
        return
    uneven = [axis for axis in plan._normalised_axes if not plan.axes[axis].has_even_copies]
    if uneven:
        raise GrowthError(
            f"{model_type} normalises all heads together, so init 'copy' has to copy all of them equally often: grow "
            f"{plan.old.num_attention_heads} query and {plan.old.num_key_value_heads} key/value heads to whole "
            "multiples, or use init 'rms_copy', which is then not exact"
        )
    if plan.new.head_dim != plan.old.head_dim:
        raise GrowthError(
            f"{model_type} normalises all heads together, which new slots of head_dim would change: grow head_dim and "
            "the heads in growths of their own"
        )
    if plan.axes["key_value"].new_slots:
        raise GrowthError(
            f"{model_type} normalises all heads together, so new key/value heads would begin with keys and queries of "
            f"0 and never learn; keep num_key_value_heads at {plan.old.num_key_value_heads}, or use init 'copy' and a "
            "whole multiple, or 'random'"
        )


def _list_rope_tables(rope: Mapping[str, Json]) -> dict[str, Mapping[str, Json]]:
    """Return the settings of rotary embeddings by type of layer (Gemma 3); "" if all layers have the same ones."""
    tables = {name: table for name, table in rope.items() if isinstance(table, Mapping)}
    return tables if tables and len(tables) == len(rope) else {"": rope}


def _name_quantization(quantization: object) -> str:
    method = read_setting(cast(ModelConfig, quantization), "quant_method")
    return str(getattr(method, "value", method))


def _check_rope(plan: GrowthPlan) -> None:
    """Reject a growth of head_dim that cannot keep the rotary frequencies."""
    rope = read_setting(plan.source_config, "rope_parameters")
    tables = _list_rope_tables(rope) if isinstance(rope, Mapping) else {"": {}}
    for layer_type, table in tables.items():
        _check_rope_table(plan, table, layer_type)


def _check_rope_table(plan: GrowthPlan, rope: Mapping[str, Json], layer_type: str) -> None:
    init = plan.inits["head_dim"]
    if "rope_theta" not in rope or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise GrowthError("head_dim can only grow under full rotary embeddings with a single rope_theta")
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise GrowthError(
            f"head_dim cannot grow under rope_type {kind!r}: no rope_theta restores the frequencies that depend on "
            f"head_dim (supported: {', '.join(ROPE_TYPES)})"
        )
    if init != "spread" and math.log(rope["rope_theta"]) * plan.new.head_dim / plan.old.head_dim > LOG_FLOAT32_MAX:
        raise GrowthError(
            f"head_dim from {plan.old.head_dim} to {plan.new.head_dim} would raise rope_theta {rope['rope_theta']} "
            "above the largest float32; use init 'spread', or a smaller head_dim"
        )
    if kind == "yarn" and init in EXACT:
        # Yarn rounds the ends of its ramp to whole pairs and clips them at head_dim - 1: no formula says whether the
        # frequencies stay, so compare them.
        arguments = {"layer_type": layer_type} if layer_type else {}
        old, grown = (
            ROPE_INIT_FUNCTIONS[kind](config, "cpu", **arguments)[0]
            for config in (plan.old.to_config(plan.source_config), plan.config())
        )
        pairs = [slot for slot, source in enumerate(plan.axes["head_dim"].source[: len(grown)]) if source is not None]
        if not torch.allclose(grown[pairs], old, rtol=1e-4, atol=0.0):
            remedy = "use init 'preserving', or set truncate to false" if init == "spread" else "use init 'random'"
            raise GrowthError(
                f"init {init!r} cannot keep yarn's frequencies from head_dim {plan.old.head_dim} to "
                f"{plan.new.head_dim}: the ends of its ramp are rounded to other pairs; {remedy}"
            )


def resolve_dims(old: ModelDims, operator: str, new_dims: int | Mapping[str, int] | ModelDims | None) -> ModelDims:
    """Return the structure that `new_dims` describes; an int is the new value of the operator's first field."""
    fields = get_operator(operator).fields
    if isinstance(new_dims, ModelDims):
        return new_dims
    if is_whole_number(new_dims):
        new_dims = {fields[0]: new_dims}  # type: ignore[dict-item]
    if not isinstance(new_dims, Mapping):
        raise GrowthError(f"new_dims must be the new {fields[0]} or a mapping of config fields, got {new_dims!r}")
    return grow_dims(old, new_dims)


def _find_joint_operators(old: ModelDims, new: ModelDims, operator: str) -> tuple[str, ...]:
    """Return `operator` and the operators that must grow with it; only `hidden` may bring heads and ffn along."""
    needed = find_operators(old, new)
    if operator not in needed:
        raise GrowthError(f"{operator!r} has nothing to grow: the model already has {old}, asked for {new}")
    followers = ("mha", "ffn") if operator == "hidden" else ()
    if others := [name for name in needed if name not in (operator, *followers)]:
        raise GrowthError(
            f"growing {operator!r} from {old} to {new} would change {', '.join(others)} too; "
            "grow them one after another, or pass a GrowthStage that names them all"
        )
    return (operator, *(name for name in needed if name != operator))
