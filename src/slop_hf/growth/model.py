"""`grow_model`: growth in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

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
    """A larger model that begins with the weights of `model`.

    Old weights keep their values at the slots that the axis maps give them; new entries are initialised by `init`
    (Eq. 15 to 20 of the paper by default). The result is a stock transformers model with the grown config, the
    source's dtype, device and training mode, and embeddings tied if the source's are. `model` is left untouched.

    Args:
        model: a causal language model of a family in `architectures.ARCHITECTURES`, or a `PeftModel` of one with LoRA
            adapters, which grow with their base (`growth.peft.grow_adapters` says what is refused).
        operator: "layer", "mha", "ffn", "hidden" or "head_dim"; or a `GrowthStage`, which brings dims and init.
        new_dims: the new value of the operator's own dimension, a mapping of config fields, or `ModelDims`. Heads
            and ffn may follow `hidden`; the size of a head changes by `head_dim` alone.
        init: a name in `growth.INITS`, or a mapping from operator to name; None takes the paper's (`random`; layers
            `stack`).
        seed: the new entries depend on it and on each parameter's name, and on nothing else.
        noise: standard deviation, as a share of `initializer_range`, of the noise that parts copies under the init
            `copy`. It sums to zero over the copies of a slot, so that the function stays.

    Raises:
        GrowthError: unknown operator or init, shrinking, nothing to grow, a model that its table does not describe.
        DimsError: a structure that transformers could not reload.
        ArchitectureError: a family without a table.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2)
    >>> grown = grow_model(LlamaForCausalLM(config), "ffn", 96)
    >>> grown.config.intermediate_size, grown.model.layers[0].mlp.down_proj.weight.shape
    (96, torch.Size([32, 96]))
    """
    adapted = is_peft_model(model)
    base, weights = extract_base_model(model) if adapted else (model, dict(model.named_parameters()))
    plan = plan_growth(base.config, operator, new_dims, init=init, seed=seed, noise=noise)
    grown = build_model(base, plan, grow_weights(weights, plan))
    return cast(PreTrainedModel, grow_adapters(model, grown, plan)) if adapted else grown


def grow_weights(weights: Mapping[str, torch.Tensor], plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """The grown weights by name; the source is not changed and shares no storage with them.

    Raises:
        GrowthError: where the weights are not those that the family's table describes.
    """
    weights = {plan.architecture.live_name(name): tensor for name, tensor in weights.items()}
    expected = {parameter.source for parameter in plan.parameters()}
    missing, strays = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or strays:
        what = f"has no {missing[0]}" if missing else f"has a parameter {strays[0]}"
        raise GrowthError(
            f"the model {what}, unlike the axis table of {plan.architecture.model_type!r}; "
            "merge adapters and undo quantisation before growing"
        )
    parameters = list(plan.parameters())
    with start_worker_threads(torch.get_num_threads()) as pool:
        grown = list(pool.map(lambda one: grow_parameter(weights[one.source], one), parameters))
    return {parameter.name: tensor for parameter, tensor in zip(parameters, grown, strict=True)}


def build_model(source: PreTrainedModel, plan: GrowthPlan, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A stock model of the plan's new dims around `weights`, which it takes over without a copy."""
    config = plan.config()
    config._attn_implementation = source.config._attn_implementation
    with hide_progress_bars():
        grown = type(source).from_pretrained(None, config=config, state_dict=weights, dtype=source.dtype)
    if source.generation_config is not None:
        grown.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    return grown.to(source.device).train(source.training)


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Keeps transformers' bars for reading and writing weights away, which would bury the trainer's own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
