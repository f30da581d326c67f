"""`grow_model`: growth in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.utils import logging

from ..dims import ModelDims
from ..errors import GrowthError
from ..schedule import GrowthStage
from .buffers import carry_buffers, check_buffers, list_persistent_buffers
from .experts import Utility
from .growable import check_weights, require_growable
from .peft import extract_base_model, grow_adapters, is_peft_model
from .plan import DEFAULT_NOISE, GrowthPlan, plan_growth, require_plan
from .tensors import grow_parameter, start_worker_threads


def grow_model(
    model: PreTrainedModel,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    noise: float = DEFAULT_NOISE,
    utility: Utility | None = None,
) -> PreTrainedModel:
    """Return a larger model that starts from the weights of `model`.

    Old weights keep their values, in the slots that the axis maps assign to them; new entries are initialised by
    `init` (by default Eq. 15 to 20 of the paper). The result is a stock transformers model with the grown config, the
    source's device and training mode, and tied embeddings if the source's are tied. Each parameter keeps its dtype,
    and a frozen one grows into a frozen one. `model` is not changed.

    Buffers of transformers' modules are computed from the grown config, in float32. If `model.to(torch.bfloat16)` has
    rounded the rotary frequencies of the source, a growth that preserves the function therefore equals the source as
    it is after saving and loading, not the live one.

    Args:
        model: causal language model of a family in `architectures.ARCHITECTURES`; or a `PeftModel` of such a model
            with LoRA adapters, which grow with their base (`growth.peft.grow_adapters` lists what is refused).
        operator: "layer", "mha", "ffn", "hidden" or "head_dim"; or a `GrowthStage`, which brings dims and init; or
            "vocab", with the new number of tokens and the init "mean" (default), "zeros" or "random" of their rows:
            the logits of the old tokens stay; or "experts", with the new number of experts, or a mapping with
            `num_experts`, `num_experts_per_tok` and, for a dense model, the width `moe_intermediate_size` of an expert
            (`growth.experts`).
        new_dims: new value of the operator's first field, mapping of config fields, or `ModelDims`. The operator
            "hidden" may change heads and ffn too; only "head_dim" changes the size of a head.
        init: name in `growth.INITS`, or mapping from operator to name; None takes the paper's (`random`; for layers
            `stack`).
        seed: random seed; new entries depend on it and on the name of their parameter alone.
        noise: standard deviation, as a fraction of `initializer_range`, of the noise that breaks the symmetry of
            copies under the init `copy`. It sums to zero over the copies of a slot, so the function does not change.
        utility: for the operator "experts", the utility of each expert, layer by layer, as
            `growth.measure_expert_utility` returns them: the experts with the highest are copied most often. The init
            is then `noisy`, and any number of experts above the old one is allowed. None copies all equally often.

    Raises:
        GrowthError: for an unknown operator or init, if a dimension would shrink or nothing would grow, or if the
            model is not a plain causal language model in memory with the parameters of its family's table.
        DimsError: for a structure that transformers could not reload.
        ArchitectureError: for a family without a table.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2)
    >>> grown = grow_model(LlamaForCausalLM(config), "ffn", 96)
    >>> grown.config.intermediate_size, grown.model.layers[0].mlp.down_proj.weight.shape
    (96, torch.Size([32, 96]))
    """
    has_adapters = is_peft_model(model)
    if not has_adapters:
        require_growable(model)
    base, weights = extract_base_model(model) if has_adapters else (model, dict(model.named_parameters()))
    plan = plan_growth(base.config, operator, new_dims, init=init, seed=seed, noise=noise, utility=utility)
    if plan.experts is not None:
        if has_adapters:
            raise GrowthError("adapters do not grow with the number of experts; merge_and_unload the adapter first")
        weights = dict(_stack_networks(weights, plan))
    check_buffers(base, plan)
    grown = build_model(base, plan, grow_weights(weights, plan))
    carry_requires_grad({name: weight.requires_grad for name, weight in weights.items()}, grown, plan)
    return grow_adapters(model, grown, plan) if has_adapters else grown


def grow_weights(weights: Mapping[str, torch.Tensor], plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """Return the grown weights by name; the old ones are not changed and share no storage with them.

    Raises:
        GrowthError: if the weights are not those that the plan grows, or not plain floating point.
    """
    require_plan(plan)
    if not isinstance(weights, Mapping):
        raise GrowthError(f"weights must map names to tensors, got {type(weights).__name__}")
    weights = {plan.architecture.canonical_name(name): tensor for name, tensor in weights.items()}
    weights = _stack_networks(weights, plan)
    check_weights(weights, plan)
    parameters = list(plan.parameters())
    with start_worker_threads(torch.get_num_threads()) as pool:
        grown = list(pool.map(lambda parameter: grow_parameter(weights[parameter.source], parameter), parameters))
    return {parameter.name: tensor for parameter, tensor in zip(parameters, grown, strict=True)}


def _stack_networks(weights: Mapping[str, torch.Tensor], plan: GrowthPlan) -> Mapping[str, torch.Tensor]:
    """Return the weights by the names of the plan's family, if a dense model grows into one with experts."""
    if plan.experts is None or plan.dense is None:
        return weights
    return plan.experts.stack_networks(weights, plan.architecture, plan.old.num_hidden_layers)


def build_model(source: PreTrainedModel, plan: GrowthPlan, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Return a stock model of the plan's new dims that holds `weights` themselves, not a copy."""
    config = plan.config()
    config._attn_implementation = source.config._attn_implementation
    config._experts_implementation = source.config._experts_implementation
    state_dict = {**weights, **list_persistent_buffers(source, plan)}
    kind, dtype = type(source), source.dtype
    if plan.dense is not None:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with hide_progress_bars():
        grown: PreTrainedModel
        grown, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state_dict,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if strays := sorted({*report["missing_keys"], *report["unexpected_keys"]}):
        raise GrowthError(f"{kind.__name__} does not take {strays[0]}, which it has; grow a model of a stock class")
    if any(row.stored_as or row.is_stacked for row in plan.architecture.parameters):
        # The names that were converted on loading decide those on saving. None were here: return to the family's.
        vars(grown).pop("_weight_conversions", None)
    for name, parameter in grown.named_parameters():
        weight = weights[plan.architecture.canonical_name(name)]
        if parameter.dtype != weight.dtype:  # `from_pretrained` gives all of them the same one
            parameter.data = weight
    carry_buffers(source, grown, plan)
    if source.generation_config is not None:
        grown.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    return grown.to(source.device).train(source.training)


def carry_requires_grad(is_trainable: Mapping[str, bool], grown: torch.nn.Module, plan: GrowthPlan) -> None:
    """Freeze each parameter of a grown model if the one that it grows from is frozen, and else train it.

    A new layer is frozen like the layer that it copies; a random one is trained.

    Args:
        is_trainable: `requires_grad` of each parameter of the old model, by name.
        grown: grown model, changed in place.
        plan: growth between the two.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> model, plan = LlamaForCausalLM(config), plan_growth(config, "layer", 2)
    >>> frozen = {parameter.source: parameter.row.kind != "embedding" for parameter in plan.parameters()}
    >>> carry_requires_grad(frozen, model, plan)
    >>> [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    ['model.embed_tokens.weight']
    """
    flags = {plan.architecture.canonical_name(name): flag for name, flag in is_trainable.items()}
    grown_flags = {
        parameter.name: parameter.takes_nothing or flags[parameter.source] for parameter in plan.parameters()
    }
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(grown_flags[plan.architecture.canonical_name(name)])


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars for reading and writing weights, which would interrupt the trainer's bar."""
    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()
