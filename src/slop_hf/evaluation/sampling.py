"""`generate_text`: text that a model writes, for a first look at a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import EvaluationError
from ..io.numbers import is_finite_number, require_whole_number
from .scoring import EvaluatedModel


@dataclass(frozen=True)
class TextSample:
    """A text that a model wrote.

    Args:
        model: directory or Hub id of the model.
        prompt: text that it continued.
        text: its continuation.
        tokens: number of tokens of the continuation.
    """

    model: str
    prompt: str
    text: str
    tokens: int


def generate_text(
    model: PreTrainedModel | str | Path,
    prompt: str,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 0,
) -> TextSample:
    """Let a model continue a prompt; the random state of the process stays as it is.

        print(generate_text("runs/tiny/stage-1-layer", "def __init__(self").text)

    Args:
        model: directory or Hub id[@revision] of a model, or a loaded model.
        prompt: text to continue; it must not be empty.
        tokenizer: tokenizer of the model; default, the one in its directory.
        max_new_tokens: most tokens to write; fewer if the model's context or the text ends.
        temperature: divisor of the logits before a token is drawn; 0 takes the most likely token.
        seed: random seed of the draws.

    Raises:
        EvaluationError: for a value out of its range, a model without a tokenizer, or a prompt as long as the context.
        GrowthError: if there is no such model.
    """
    require_whole_number(max_new_tokens, "max_new_tokens", error=EvaluationError)
    require_whole_number(seed, "seed", least=0, error=EvaluationError)
    if not is_finite_number(temperature, least=0):
        raise EvaluationError(f"temperature must be a number, 0 or more, got {temperature!r}")
    subject = EvaluatedModel(model, tokenizer=tokenizer)
    if subject.tokenizer is None:
        raise EvaluationError(f"{subject.name} has no tokenizer ({subject.tokenizer_fault or 'none given'}); give one")
    inputs = subject.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(subject.device)
    length = inputs["input_ids"].shape[1]
    context = getattr(subject.model.config, "max_position_embeddings", None) or length + max_new_tokens
    if not 0 < length < context:
        raise EvaluationError(
            f"the prompt has {length} tokens, and the context of the model {context}: give from 1 to {context - 1}"
        )
    drawing = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    devices = [subject.model.device] if subject.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode():
        torch.manual_seed(seed)
        tokens = subject.model.eval().generate(
            **inputs,
            **drawing,
            max_new_tokens=min(max_new_tokens, context - length),
            pad_token_id=subject.tokenizer.eos_token_id,
        )[0, length:]
    text = subject.tokenizer.decode(tokens, skip_special_tokens=True)
    return TextSample(str(model) if isinstance(model, (str, Path)) else subject.name, prompt, text, len(tokens))
