"""Small random models on which mistakes show, and how far apart two models are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..architectures import LAYER, get_architecture
from ..dims import ModelDims

VOCAB = 64
#: Longer than the sliding window of the models, where their family has one.
PROBE_LENGTH, WINDOW = 20, 8

#: Structures to grow from: as many key/value heads as query heads, fewer, one.
MHA, GQA, MQA = (ModelDims(48, 40, 2, 4, heads, 12) for heads in (4, 2, 1))


def tiny_model(
    model_type: str,
    dims: ModelDims = GQA,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    *,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A random model on which mistakes show: gains lie in 0.5 to 1.5, biases away from 0, and weights and the norms'
    epsilon are so large that attention and epsilon matter. Sliding windows are shorter than the probe.

    Args:
        model_type: a family with an axis table.
        dims: its structure.
        dtype: weights are drawn in float32 and then cast.
        tied: whether output and input embeddings share their weights.
        seed: of the weights; the global generator is not moved.
        config: further fields of its config.

    >>> tiny_model("qwen3", MQA).num_parameters()
    29472
    """
    table = get_architecture({"model_type": model_type})
    base = AutoConfig.for_model(model_type, vocab_size=VOCAB, max_position_embeddings=64)
    common = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}
    if getattr(base, "sliding_window", None):
        common["sliding_window"] = WINDOW
    fields = {**common, "tie_word_embeddings": tied, table.norm_eps: 1e-3, **config}
    with torch.random.fork_rng(devices=[]):
        # Not `.to(dtype)` in the end: it would round the rotary frequencies too, which loading a model does not.
        model = AutoModelForCausalLM.from_config(dims.to_config(base, **fields), dtype=dtype).eval()
        rows = {row.name: row for row in table.parameters}
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                row, drawn = rows.get(_row_name(name)), torch.empty(parameter.shape)
                if row is not None and row.kind == "norm":
                    drawn.uniform_(0.5, 1.5).sub_(table.gain_offset)
                elif parameter.dim() == 1:
                    drawn.uniform_(-0.3, 0.3)
                else:
                    drawn.normal_(std=0.2)
                parameter.copy_(drawn)
    return model


def probe(length: int = PROBE_LENGTH) -> torch.Tensor:
    """Token ids [2, length], always the same."""
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def logit_error(old: PreTrainedModel, new: PreTrainedModel, tokens: torch.Tensor | None = None) -> float:
    """`max|new - old| / max|old|` over the logits of a batch of token ids [B, S], by default `probe()`.

    Two float64 models are compared in float64 throughout: transformers computes most norms, the softmax and the rotary
    angles in float32 whatever the dtype, and its rounding would hide errors below 1e-6.

    >>> model = tiny_model("llama")
    >>> logit_error(model, model)
    0.0
    """
    tokens = probe() if tokens is None else tokens
    if old.dtype == new.dtype == torch.float64:
        with _Float64Throughout():
            before, after = (logits(_rebuilt(model), tokens) for model in (old, new))
    else:
        before, after = logits(old, tokens).double(), logits(new, tokens).double()
    return float((after - before).abs().max() / before.abs().max())


def logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, S, V] of token ids [B, S], without a gradient."""
    with torch.no_grad():
        return cast(torch.Tensor, model(tokens, use_cache=False).logits)


class _Float64Throughout(TorchFunctionMode):
    """Reads float32 as float64 in every call of torch."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*wide, **named)


def _rebuilt(model: PreTrainedModel) -> PreTrainedModel:
    """The same float64 model with buffers, such as rotary frequencies, made anew."""
    again = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), dtype=torch.float64).eval()
    again.load_state_dict(model.state_dict())
    return again


def _row_name(name: str) -> str:
    return ".".join(LAYER if part.isdigit() else part for part in name.split("."))
