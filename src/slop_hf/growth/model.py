"""`grow_model`: growth in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..dims import ModelDims
from ..errors import GrowthError
from ..schedule import GrowthStage
from .peft import extract_base_model, grow_adapters, is_peft_model
from .plan import DEFAULT_NOISE, GrowthPlan, plan_growth
from .tensors import grow_parameter, start_worker_threads


def grow_model(
    model: PreTrainedModel,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    noise: float = DEFAULT_NOISE,
) -> PreTrainedModel:
    """Return a larger model that starts from the weights of `model`.

    Old weights keep their values, in the slots that the axis maps assign to them; new entries are initialised by
    `init` (by default Eq. 15 to 20 of the paper). The result is a stock transformers model with the grown config, the
    source's dtype, device and training mode, and tied embeddings if the source's are tied. A frozen parameter grows
    into a frozen one. `model` is not changed.

    Args:
        model: causal language model of a family in `architectures.ARCHITECTURES`; or a `PeftModel` of such a model
            with LoRA adapters, which grow with their base (`growth.peft.grow_adapters` lists what is refused).
        operator: "layer", "mha", "ffn", "hidden" or "head_dim"; or a `GrowthStage`, which brings dims and init.
        new_dims: new value of the operator's first field, mapping of config fields, or `ModelDims`. The operator
            "hidden" may change heads and ffn too; only "head_dim" changes the size of a head.
        init: name in `growth.INITS`, or mapping from operator to name; None takes the paper's (`random`; for layers
            `stack`).
        seed: random seed; new entries depend on it and on the name of their parameter alone.
        noise: standard deviation, as a fraction of `initializer_range`, of the noise that breaks the symmetry of
            copies under the init `copy`. It sums to zero over the copies of a slot, so the function does not change.

    Raises:
        GrowthError: for an unknown operator or init, if a dimension would shrink or nothing would grow, or if the
            model has other parameters than its family's table.
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
    base, weights = extract_base_model(model) if has_adapters else (model, dict(model.named_parameters()))
    plan = plan_growth(base.config, operator, new_dims, init=init, seed=seed, noise=noise)
    grown = build_model(base, plan, grow_weights(weights, plan))
    carry_requires_grad({name: weight.requires_grad for name, weight in weights.items()}, grown, plan)
    return grow_adapters(model, grown, plan) if has_adapters else grown


def grow_weights(weights: Mapping[str, torch.Tensor], plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """Return the grown weights by name; the old ones are not changed and share no storage with them.

    Raises:
        GrowthError: if the names of the weights differ from the family's table.
    """
    weights = {plan.architecture.canonical_name(name): tensor for name, tensor in weights.items()}
    parameters = list(plan.parameters())
    expected = {parameter.source for parameter in parameters}
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        fault = f"has no {missing[0]}" if missing else f"has a parameter {unexpected[0]}"
        raise GrowthError(
            f"the model {fault}, unlike the axis table of {plan.architecture.model_type!r}; "
            "merge adapters and undo quantisation before growing"
        )
    with start_worker_threads(torch.get_num_threads()) as pool:
        grown = list(pool.map(lambda parameter: grow_parameter(weights[parameter.source], parameter), parameters))
    return {parameter.name: tensor for parameter, tensor in zip(parameters, grown, strict=True)}


def build_model(source: PreTrainedModel, plan: GrowthPlan, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Return a stock model of the plan's new dims that holds `weights` themselves, not a copy."""
    config = plan.config()
    config._attn_implementation = source.config._attn_implementation
    with hide_progress_bars():
        grown: PreTrainedModel = type(source).from_pretrained(
            None, config=config, state_dict=weights, dtype=source.dtype, trust_remote_code=False
        )
    if source.generation_config is not None:
        grown.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    return grown.to(source.device).train(source.training)


def carry_requires_grad(is_trainable: Mapping[str, bool], grown: torch.nn.Module, plan: GrowthPlan) -> None:
    """Freeze each parameter of a grown model if the one that it grows from is frozen, and else train it.

    A new layer is frozen like the layer that it copies.

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
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_(flags[plan.find_source(plan.architecture.canonical_name(name))])


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
