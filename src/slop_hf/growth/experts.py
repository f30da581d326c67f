"""Growth of the number of experts: of a dense model into one with experts, and of a model with experts into more.

Let a router give expert i of E the probability p_i, and let the k largest be active, each with the weight w_i = p_i,
or p_i over the sum of the k if the model normalises them.

* A dense model (E = 1). All experts are copies of its feed-forward network, the router is new and random. The weights
  of the active experts add up to 1, so the function stays, for any k.
* Finer experts for a dense model. Its network of width f is cut into G shards of width f / G, whose outputs add up to
  its own: expert j is shard `j mod G`. The G experts of a copy of the network share a row of the router ("virtual
  groups"), so that their scores are equal, and the G k' best experts are all shards of k' copies. A shard is active
  k' times, with weights that add up to 1 / G. The matrices `up` and `down` are multiplied by sqrt(G) each, and the
  function stays. It would not if the weights were not normalised, or if a token passed through a part of a copy.
* n copies of each expert, with copies of its row in the router. Each copy has the probability p_i / n. If n k are
  active, these are all copies of the k experts, with the weights w_i / n, and the function stays, normalised or not.
  If fewer are active, some experts count more than before, and the function changes.

Sources: Komatsuzaki et al., "Sparse Upcycling" (2212.05055), for the dense model; He et al., "Upcycling Large Language
Models into Mixture of Experts" (2410.07524), for the weights and the virtual groups. They multiply all matrices alike,
which is exact for squared ReLU only, and found that a factor on `down` alone learns worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..architectures import ARCHITECTURES, LAYER, Architecture, Axis, Parameter, get_architecture, read_setting
from ..dims import LARGEST_SIZE, ModelConfig, ModelDims
from ..errors import GrowthError
from ..io.numbers import is_whole_number
from ..io.serialization import describe_alternatives

#: Family with experts that a dense family grows into.
FAMILIES_WITH_EXPERTS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
#: Axes of a router's weight.
ROUTER: tuple[Axis, ...] = ("experts", "hidden")
#: Active experts of a dense model that gets experts, unless more are asked for.
DEFAULT_ACTIVE = 2
#: Far more experts than any model has; their tensors are listed one by one.
MOST_EXPERTS = 4096


@dataclass(frozen=True)
class ExpertGrowth:
    """More experts per layer.

    Args:
        old, new: number of experts before and after growth; 1 before for a dense model.
        active: number of experts that a token passes through after growth.
        init: name in `operators.EXPERT_INITS`.
        dense: axis table of the old model if it has no experts.
        shards: number G of experts that a network of the dense model is cut into.
    """

    old: int
    new: int
    active: int
    init: str
    dense: Architecture | None = None
    shards: int = 1

    @property
    def preserves(self) -> bool:
        """Whether the function stays exactly, as derived at the top of this file."""
        return self.dense is not None or self.init == "preserving"

    def get_noise(self, row: Parameter) -> float:
        """Return the factor of the noise on the copies that a row holds.

        Copies that are always active together would stay equal: the matrices that write the residual stream differ by
        a noise that sums to zero. Under `noisy`, the rows of the router differ.
        """
        if self.dense is not None:
            return 0.0
        if self.init == "noisy":
            return float(row.axes == ROUTER)
        return float(row.is_stacked and row.axes[row.write_dimension] == "hidden")

    def get_scale(self, row: Parameter, part: int = 0) -> float:
        """Return the factor that makes up for the shares of the shards in a network's output.

        Args:
            part: index of the matrix in a stack of several, `gate` before `up`. The output of a network is linear in
                `up` and in `down`, and in `gate` it is not.
        """
        is_down = row.axes[row.write_dimension] == "hidden"
        return math.sqrt(self.shards) if row.is_stacked and (is_down or part == 1) else 1.0

    def list_networks(self, row: Parameter, layer: str) -> tuple[str, ...]:
        """Return the names of a dense layer's matrices that a stack of experts takes the place of, in their order."""
        assert self.dense is not None
        is_down = row.axes[row.write_dimension] == "hidden"
        axes = ("hidden", "ffn") if is_down else ("ffn", "hidden")
        return tuple(other.name.replace(LAYER, layer) for other in self.dense.parameters if other.axes == axes)

    def stack_networks(
        self, weights: Mapping[str, torch.Tensor], architecture: Architecture, layers: int
    ) -> dict[str, torch.Tensor]:
        """Return the weights of a dense model with the networks of its layers as stacks of one expert.

        Args:
            weights: weights by name; those that are stacked already, or missing, stay as they are.
            architecture: axis table with experts.
            layers: number of layers.
        """
        stacked = dict(weights)
        for row in architecture.parameters:
            for layer in range(layers) if row.is_stacked else ():
                names = self.list_networks(row, str(layer))
                if not all(name in stacked for name in names):
                    continue
                matrices = [stacked.pop(name) for name in names]
                stack = torch.cat([matrix.detach() for matrix in matrices])[None]
                stacked[row.name_in_layer(layer)] = stack.requires_grad_(all(m.requires_grad for m in matrices))
        return stacked


def plan_expert_growth(
    config: ModelConfig, new_sizes: object, init: str
) -> tuple[Architecture, PreTrainedConfig | ModelConfig, ExpertGrowth]:
    """Return the table of the grown model, the old model's config in its family, and the growth.

    Args:
        config: config of the old model; a dense one is given the config of a model with one expert.
        new_sizes: new number of experts, or a mapping with `num_experts` and, optionally, `num_experts_per_tok` and,
            for a dense model, the width of an expert, `moe_intermediate_size`.
        init: name in `operators.EXPERT_INITS`.

    Raises:
        GrowthError: if the model, the numbers and the init do not fit each other.
    """
    architecture = get_architecture(config)
    sizes = _read_sizes(new_sizes)
    new, active = sizes["num_experts"], sizes.get("num_experts_per_tok")
    if not architecture.has_experts:
        grown = _find_family_with_experts(architecture, config)
        if init != "preserving":
            raise GrowthError("a dense model gets a new router, which is random; leave out the init 'noisy'")
        shards = _count_shards(ModelDims.from_config(config).intermediate_size, sizes)
        if new < 2:
            raise GrowthError(f"num_experts must be 2 or more, got {new}; ask for more experts")
        active = min(DEFAULT_ACTIVE * shards, new) if active is None else active
        growth = ExpertGrowth(1, new, _check_active(active, new), init, architecture, shards)
        return grown, _build_config(config, grown), growth
    if "moe_intermediate_size" in sizes:
        raise GrowthError(
            "moe_intermediate_size cuts the networks of a dense model, and this one has experts already; leave it "
            "out, and grow the width of its experts with the operator 'ffn'"
        )
    old, old_active = (architecture.read(config, name) for name in ("num_experts", "num_experts_per_tok"))
    copies, remainder = divmod(new, old)
    if copies < 2 or remainder:
        raise GrowthError(
            f"num_experts is {old}, and grows to whole multiples only, got {new}; ask for {2 * old} or "
            "another multiple"
        )
    if init == "preserving":
        if active not in (None, copies * old_active):
            raise GrowthError(
                f"init 'preserving' keeps the function with num_experts_per_tok {copies * old_active}, got {active}; "
                "leave it out, or use init 'noisy'"
            )
        active = copies * old_active
    active = old_active if active is None else active
    return architecture, config, ExpertGrowth(old, new, _check_active(active, new), init)


def _read_sizes(sizes: object) -> dict[str, int]:
    """Return the new numbers of experts and of active ones, and the width of an expert, as far as they are given."""
    named: dict[str, Any] = dict(sizes) if isinstance(sizes, Mapping) else {"num_experts": sizes}
    most = {"num_experts": MOST_EXPERTS, "num_experts_per_tok": MOST_EXPERTS, "moe_intermediate_size": LARGEST_SIZE}
    if unknown := [name for name in named if name not in most]:
        raise GrowthError(f"experts have no {unknown[0]!r}{describe_alternatives(str(unknown[0]), most)}")
    for name in named:
        if not is_whole_number(named[name], least=1) or named[name] > most[name]:
            raise GrowthError(f"{name} must be a whole number from 1 to {most[name]:,}, got {named[name]!r}")
    if "num_experts" not in named:
        raise GrowthError("num_experts is missing; give the new number of experts")
    return {name: int(value) for name, value in named.items()}


def _count_shards(width: int, sizes: Mapping[str, int]) -> int:
    """Return the number of experts that a network of this width is cut into; refuse numbers that leave some over."""
    expert = sizes.get("moe_intermediate_size", width)
    shards, remainder = divmod(width, expert)
    if remainder or not shards:
        raise GrowthError(
            f"moe_intermediate_size must divide intermediate_size {width} of the dense model, got {expert}; ask for "
            f"{width // 2 if width % 2 == 0 else width}, or another divisor"
        )
    for name in ("num_experts", "num_experts_per_tok"):
        if (count := sizes.get(name, shards)) % shards:
            raise GrowthError(
                f"{shards} experts of width {expert} make up a network of the dense model, so {name} must be a "
                f"multiple of {shards}, got {count}; ask for {shards * -(-count // shards)}"
            )
    return shards


def _check_active(active: int, experts: int) -> int:
    if active > experts:
        raise GrowthError(f"num_experts_per_tok is {active}, but there are {experts} experts; ask for fewer")
    return active


def _find_family_with_experts(dense: Architecture, config: ModelConfig) -> Architecture:
    """Return the table of the family that a dense model grows into; refuse a model that it does not describe."""
    name = FAMILIES_WITH_EXPERTS.get(dense.model_type)
    if name is None:
        known = ", ".join(FAMILIES_WITH_EXPERTS)
        raise GrowthError(f"{dense.model_type} has no family with experts to grow into (known: {known})")
    if read_setting(config, "use_sliding_window"):
        raise GrowthError(f"{name} has no layers of several kinds of attention; set use_sliding_window to false")
    grown = ARCHITECTURES[name]
    names = {row.name for row in grown.parameters}
    networks = {row.name for row in dense.parameters if "ffn" in row.axes and row.kind == "projection"}
    if strays := [row.name for row in dense.rows(config) if row.name not in names | networks]:
        raise GrowthError(f"{name} has no {strays[0]}; take a model without it")
    return grown


def _build_config(config: ModelConfig, family: Architecture) -> PreTrainedConfig:
    """Return the config of a model with one expert that computes what a dense one does."""
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kind = CONFIG_MAPPING[family.model_type]
    known = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    dims = ModelDims.from_config(config)
    fields: dict[str, Any] = {
        **{name: value for name, value in settings.items() if name in known or name == "head_dim"},
        family.config_fields.get("num_experts", "num_experts"): 1,
        family.config_fields.get("intermediate_size", "intermediate_size"): dims.intermediate_size,
        "num_experts_per_tok": 1,
    }
    if "norm_topk_prob" in known:
        fields["norm_topk_prob"] = True  # the weights of the active experts have to add up to 1
    built = kind(**fields)
    built.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[kind].__name__]
    return cast(PreTrainedConfig, built)
