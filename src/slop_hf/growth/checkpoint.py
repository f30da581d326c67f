"""`grow_checkpoint`: growth from a checkpoint directory to another."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..cost import count_parameters
from ..dims import ModelDims
from ..errors import GrowthError
from ..schedule import GrowthStage
from ..serialization import versions, write_text, written_aside
from .model import build_model, grow_weights
from .plan import GrowthPlan, plan_growth
from .receipt import RECEIPT_FILE, GrowthReceipt


def plan_checkpoint_growth(
    source: str | Path,
    target: str | Path,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
) -> GrowthPlan:
    """Decide the growth of a checkpoint, and refuse what cannot be done, without reading a weight.

    Arguments and errors are those of `grow_checkpoint`.
    """
    if Path(target).exists():
        raise GrowthError(f"{target} exists already; choose a new directory, nothing is overwritten")
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, HFValidationError) as caught:
        raise GrowthError(f"{source} is not a checkpoint that transformers can read: {_first_line(caught)}") from None
    return plan_growth(config, operator, new_dims, init=init, seed=seed)


def grow_checkpoint(
    source: str | Path,
    target: str | Path,
    operator: str | GrowthStage,
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    max_shard_size: str = "5GB",
) -> GrowthReceipt:
    """Grow a checkpoint into a new directory, with its tokenizer, generation config and a receipt.

    Both models are in memory at the same time. The directory is complete or absent.

    Args:
        source: a local directory or a Hub id.
        target: a directory that does not exist yet.
        operator, new_dims, init, seed: as for `grow_model`.
        max_shard_size: largest file of weights, as for `save_pretrained`.

    Raises:
        GrowthError: unreadable source, existing target, and as for `grow_model`.
    """
    began = time.perf_counter()
    plan = plan_checkpoint_growth(source, target, operator, new_dims, init=init, seed=seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    grown = build_model(model, plan, grow_weights(dict(model.named_parameters()), plan))
    with written_aside(target) as directory:
        grown.save_pretrained(directory, max_shard_size=max_shard_size)
        with suppress(OSError, ValueError):  # a checkpoint without a tokenizer is grown without one
            AutoTokenizer.from_pretrained(source).save_pretrained(directory)
        receipt = GrowthReceipt(
            source=str(source),
            operators=tuple(plan.inits),
            inits=dict(plan.inits),
            seed=seed,
            source_dims=plan.old,
            dims=plan.new,
            source_parameters=count_parameters(plan.old, model.config),
            parameters=count_parameters(plan.new, model.config),
            seconds=time.perf_counter() - began,
            versions=versions(),
        )
        write_text(directory / RECEIPT_FILE, receipt.to_json())
    return receipt


def _first_line(caught: Exception) -> str:
    return next(iter(str(caught).strip().splitlines()), type(caught).__name__)
