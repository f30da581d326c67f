"""Small random models that reveal mistakes of growth, and the distance between two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..architectures import LAYER, get_architecture
from ..dims import ModelDims

VOCAB = 64
#: The probe is longer than any family's sliding window.
PROBE_LENGTH, WINDOW = 20, 8

#: Implementation of experts that takes every dtype; that of transformers' choice takes no float64.
EXPERTS_IMPLEMENTATION = "eager"

#: Structures to grow from: one key/value head per query head, one per two query heads, one in all.
MHA, GQA, MQA = (ModelDims(48, 40, 2, 4, heads, 12) for heads in (4, 2, 1))


def build_tiny_model(
    model_type: str,
    dims: ModelDims = GQA,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    *,
    seed: int = 0,
    **config: object,
) -> PreTrainedModel:
    """Build a small random model that reveals mistakes.

    Gains lie in 0.5 to 1.5 and biases are not 0. Weights and the norms' epsilon are so large that both attention and
    epsilon matter. Sliding windows are shorter than the probe.

    Args:
        model_type: family with an axis table.
        dims: structure of the model.
        dtype: dtype of the weights, drawn in float32 and then cast.
        tied: whether output and input embeddings share their weights.
        seed: random seed of the weights; torch's global generator is not moved.
        config: further fields of the config.

    >>> build_tiny_model("qwen3", MQA).num_parameters()
    29472
    """
    table = get_architecture({"model_type": model_type})
    base = AutoConfig.for_model(model_type, vocab_size=VOCAB, max_position_embeddings=64)
    fields: dict[str, object] = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    if getattr(base, "sliding_window", None):
        fields["sliding_window"] = WINDOW
    fields |= {"initializer_range": 0.2, "tie_word_embeddings": tied, table.norm_eps: 1e-3}
    fields |= {**table.test_settings, **config}
    with torch.random.fork_rng(devices=[]):
        # Not `.to(dtype)` at the end: it would round the rotary frequencies too, which loading a model does not do.
        model = AutoModelForCausalLM.from_config(
            dims.to_config(base, **fields),
            dtype=dtype,
            experts_implementation=EXPERTS_IMPLEMENTATION,
            trust_remote_code=False,
        ).eval()
        rows = {row.name: row for row in table.parameters}
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                row = rows.get(".".join(LAYER if part.isdigit() else part for part in name.split(".")))
                drawn = torch.empty(parameter.shape)
                if row is not None and row.kind == "norm":
                    drawn.uniform_(0.5, 1.5).sub_(table.gain_offset)
                elif parameter.dim() == 1:
                    drawn.uniform_(-0.3, 0.3)
                else:
                    drawn.normal_(std=0.2)
                parameter.copy_(drawn)
    return model


def make_probe_tokens(length: int = PROBE_LENGTH) -> torch.Tensor:
    """Return token ids `[2, length]`, the same ones on every call."""
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def compute_logit_error(old: PreTrainedModel, new: PreTrainedModel, tokens: torch.Tensor | None = None) -> float:
    """Return `max|new - old| / max|old|` over the logits of two models.

    Two float64 models are compared in float64 throughout: transformers computes most norms, the softmax and the rotary
    angles in float32 whatever the dtype, and their rounding would hide errors below 1e-6.

    Args:
        old: reference model.
        new: model to compare with it.
        tokens: token ids `[B, S]`; default `make_probe_tokens()`.

    >>> model = build_tiny_model("llama")
    >>> compute_logit_error(model, model)
    0.0
    """
    tokens = make_probe_tokens() if tokens is None else tokens
    if old.dtype == new.dtype == torch.float64:
        with _Float64Throughout():
            before, after = (compute_logits(_rebuild(model), tokens) for model in (old, new))
    else:
        before, after = compute_logits(old, tokens).double(), compute_logits(new, tokens).double()
    return float((after - before).abs().max() / before.abs().max())


def compute_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits `[B, S, V]` of token ids `[B, S]`, without a gradient."""
    with torch.no_grad():
        return cast(torch.Tensor, model(tokens, use_cache=False).logits)


class _Float64Throughout(TorchFunctionMode):
    """Replaces float32 by float64 in every call of torch."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)


def _rebuild(model: PreTrainedModel) -> PreTrainedModel:
    """Return the same float64 model with its buffers, such as rotary frequencies, computed again."""
    rebuilt = AutoModelForCausalLM.from_config(
        deepcopy(model.config), dtype=torch.float64, trust_remote_code=False
    ).eval()
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt
