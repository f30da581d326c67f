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
* n_i copies of expert i, as many as its utility earns. The copies have the probabilities p_i / sum_j n_j p_j, which no
  factor of the experts restores: the sum depends on the token, and these routers have no bias that could take log n_i
  away. The function changes.

Sources: Komatsuzaki et al., "Sparse Upcycling" (2212.05055), for the dense model; He et al., "Upcycling Large Language
Models into Mixture of Experts" (2410.07524), for the weights and the virtual groups. They multiply all matrices alike,
which is exact for squared ReLU only, and found that a factor on `down` alone learns worse. Dwivedi et al., "Expert
Upcycling" (2604.19835), for utilities and the noise on copies in the router.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, TypeAlias, cast

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ..architectures import ARCHITECTURES, LAYER, Architecture, Axis, Parameter, get_architecture, read_setting
from ..cost.flops import count_experts
from ..dims import LARGEST_SIZE, ModelConfig, ModelDims
from ..errors import GrowthError
from ..io.numbers import is_finite_number, is_whole_number
from ..io.serialization import describe_alternatives

#: For each layer, the utility of each expert.
Utility: TypeAlias = Sequence[Sequence[float]]
#: Family with experts that a dense family grows into.
FAMILIES_WITH_EXPERTS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
#: Axes of a router's weight.
ROUTER: tuple[Axis, ...] = ("experts", "hidden")
#: Active experts of a dense model that gets experts, unless more are asked for.
DEFAULT_ACTIVE = 2
#: Copies that an expert of the highest utility gets before the next one gets any (Expert Upcycling, section 4).
MOST_COPIES_AT_ONCE = 3
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
        sources: for each layer, the old expert of each new one, if their utilities decide; else empty.
    """

    old: int
    new: int
    active: int
    init: str
    dense: Architecture | None = None
    shards: int = 1
    sources: tuple[tuple[int, ...], ...] = ()

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
    config: ModelConfig, new_sizes: object, init: str, utility: Utility | None = None
) -> tuple[Architecture, PreTrainedConfig | ModelConfig, ExpertGrowth]:
    """Return the table of the grown model, the old model's config in its family, and the growth.

    Args:
        config: config of the old model; a dense one is given the config of a model with one expert.
        new_sizes: new number of experts, or a mapping with `num_experts` and, optionally, `num_experts_per_tok` and,
            for a dense model, the width of an expert, `moe_intermediate_size`.
        init: name in `operators.EXPERT_INITS`.
        utility: utility of each expert, layer by layer, as `measure_expert_utility` returns them; None copies all
            experts equally often.

    Raises:
        GrowthError: if the model, the numbers and the init do not fit each other.
    """
    architecture = get_architecture(config)
    sizes = _read_sizes(new_sizes)
    if architecture.has_experts:
        return architecture, config, _plan_copies(architecture, config, sizes, init, utility)
    if utility is not None:
        raise GrowthError("a dense model has no experts whose utility could decide on copies; leave it out")
    grown = _find_family_with_experts(architecture, config)
    if init != "preserving":
        raise GrowthError("a dense model gets a new router, which is random; leave out the init 'noisy'")
    new, shards = sizes["num_experts"], _count_shards(ModelDims.from_config(config).intermediate_size, sizes)
    if new < 2:
        raise GrowthError(f"num_experts must be 2 or more, got {new}; ask for more experts")
    active = sizes.get("num_experts_per_tok", min(DEFAULT_ACTIVE * shards, new))
    growth = ExpertGrowth(1, new, _check_active(active, new), init, architecture, shards)
    return grown, _build_config(config, grown), growth


def _plan_copies(
    architecture: Architecture, config: ModelConfig, sizes: Mapping[str, int], init: str, utility: Utility | None
) -> ExpertGrowth:
    """Return the growth of a model with experts; arguments and errors as for `plan_expert_growth`."""
    if "moe_intermediate_size" in sizes:
        raise GrowthError(
            "moe_intermediate_size cuts the networks of a dense model, and this one has experts already; leave it "
            "out, and grow the width of its experts with the operator 'ffn'"
        )
    old, old_active = (architecture.read(config, name) for name in ("num_experts", "num_experts_per_tok"))
    new, active = sizes["num_experts"], sizes.get("num_experts_per_tok")
    if utility is not None:
        if init == "preserving":
            raise GrowthError(
                "init 'preserving' needs equally many copies of each expert, and utilities give some more; use init "
                "'noisy', or leave the utilities out"
            )
        sources = _choose_sources(utility, architecture.read(config, "num_hidden_layers"), old, new)
        return ExpertGrowth(old, new, _check_active(active or old_active, new), init, sources=sources)
    copies, remainder = divmod(new, old)
    if copies < 2 or remainder:
        raise GrowthError(
            f"num_experts is {old}, and without utilities it grows to whole multiples only, got {new}; ask for "
            f"{2 * old} or another multiple"
        )
    if init == "preserving":
        if active not in (None, copies * old_active):
            raise GrowthError(
                f"init 'preserving' keeps the function with num_experts_per_tok {copies * old_active}, got {active}; "
                "leave it out, or use init 'noisy'"
            )
        active = copies * old_active
    return ExpertGrowth(old, new, _check_active(active or old_active, new), init)


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


def _choose_sources(utility: Utility, layers: int, old: int, new: int) -> tuple[tuple[int, ...], ...]:
    """Return, for each layer, the old expert of each new one: the old ones, then copies of those of high utility.

    The expert of the highest utility gets `MOST_COPIES_AT_ONCE` copies, then the next one, until there are enough.
    """
    rows = utility if isinstance(utility, Sequence) else []
    values = [list(row) for row in rows if isinstance(row, Sequence)]
    if [len(layer) for layer in values] != [old] * layers:
        raise GrowthError(
            f"utility must have a list per layer ({layers}) with a number per expert ({old}), as "
            "measure_expert_utility returns it; measure it on this model"
        )
    if not all(is_finite_number(value, least=0) for layer in values for value in layer):
        raise GrowthError("utility must be finite numbers, 0 or more; measure it on a model that has not diverged")
    if new <= old:
        raise GrowthError(f"num_experts is {old}, and growth can only enlarge it, got {new}; ask for more experts")
    sources = []
    for layer in values:
        ranked = sorted(range(old), key=lambda expert: -layer[expert])
        each = [expert for expert in ranked for _ in range(MOST_COPIES_AT_ONCE)]
        sources.append((*range(old), *sorted(islice(cycle(each), new - old))))
    return tuple(sources)


def make_equal_utility(config: ModelConfig) -> list[list[float]]:
    """Return equal utilities of a model's experts, for a plan of which only the sizes matter.

    >>> make_equal_utility({"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 2})
    [[1.0, 1.0]]
    """
    return [[1.0] * count_experts(config)] * get_architecture(config).read(config, "num_hidden_layers")


def measure_expert_utility(model: PreTrainedModel, batches: Iterable[Mapping[str, torch.Tensor]]) -> list[list[float]]:
    """Return the squared norm of the loss's gradient for each expert: how much the loss depends on its weights.

    `u_e = ||g_e||^2`, where g_e is the mean over the batches of the gradient of the next-token loss for all matrices
    of expert e (Expert Upcycling, section 3.3). The gradients of all experts are in memory at the same time.

    Args:
        model: causal language model with experts; it is not changed.
        batches: arguments of the model, such as `input_ids`, int64 `[batch, length]`; `labels` default to them.

    Returns:
        For each layer, the utility of each expert.

    Raises:
        GrowthError: if the model has no experts, there is no batch, or the loss is not finite.

    >>> from transformers import MixtralConfig, MixtralForCausalLM
    >>> config = MixtralConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4)
    >>> utility = measure_expert_utility(MixtralForCausalLM(config), [{"input_ids": torch.arange(8)[None]}])
    >>> len(utility), len(utility[0]), min(utility[0]) >= 0
    (1, 4, True)
    """
    architecture = get_architecture(model.config)
    rows = [row for row in architecture.parameters if row.is_stacked]
    if not rows:
        raise GrowthError(f"{architecture.model_type} has no experts to compare; take a model with experts")
    layers = range(architecture.read(model.config, "num_hidden_layers"))
    stacks = [[model.get_parameter(row.name_in_layer(layer)) for row in rows] for layer in layers]
    gradients = _sum_gradients(model, [stack for layer in stacks for stack in layer], batches)
    norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64) for gradient in gradients]
    utility: list[list[float]] = torch.stack(norms).square().view(len(stacks), len(rows), -1).sum(1).tolist()
    return utility


def _sum_gradients(
    model: PreTrainedModel, parameters: Sequence[torch.nn.Parameter], batches: Iterable[Mapping[str, torch.Tensor]]
) -> list[torch.Tensor]:
    """Return the mean over batches of the loss's gradient for some of a model's parameters, in float32 or wider."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    is_training, count = model.training, 0
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    try:
        model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        for batch in batches:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            loss = model(**{"labels": inputs["input_ids"], **inputs}, use_cache=False).loss
            if not torch.isfinite(loss):
                raise GrowthError("the loss on the probe batch is not finite; take a model that has not diverged")
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient
            count += 1
    finally:
        model.train(is_training)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    if not count:
        raise GrowthError("there is no batch to measure utilities on; give at least one")
    return [total / count for total in sums]


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
