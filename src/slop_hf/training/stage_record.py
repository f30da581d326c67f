"""The record of a finished stage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..growth import resolve_inits
from ..io.serialization import Json, list_versions
from ..runs.directory import RunFacts
from ..runs.records import EVAL_LOSS, ConsumedTokens, StageRecord, compute_perplexity
from .arguments import SlopTrainingArguments
from .checkpoints import GrowthFacts
from .spans import StageSpan

_SOURCE_LOSS = re.compile("eval_.+_loss")


def build_stage_record(
    span: StageSpan,
    *,
    history: Iterable[Mapping[str, Json]],
    metrics: Mapping[str, float],
    seconds: float,
    devices: int,
    growth: GrowthFacts | None,
    data: tuple[ConsumedTokens, ...],
    facts: RunFacts,
) -> StageRecord:
    """Return the record of a finished stage.

    Args:
        history: log of the run up to the end of the stage.
        metrics: metrics of the evaluation at its end; empty without held-out data.
        devices: number of processes that shared the work.
        growth: the growth that the stage began with, whatever the arguments now say; None without one.
    """
    entries = [entry for entry in history if entry.get("stage") == span.number]
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    after_growth = [entry.get(EVAL_LOSS) for entry in entries if span.growth and entry["step"] == span.first_step]
    eval_loss = metrics.get(EVAL_LOSS)
    return StageRecord(
        stage=span.number,
        name=span.name,
        operators=span.growth.operators if span.growth else (),
        dims=span.dims,
        parameters=span.parameters,
        tokens=span.tokens,
        total_tokens=span.end_token,
        first_token=span.first_token,
        steps=span.steps,
        global_step=span.end_step,
        flops=span.flops,
        total_flops=span.first_flops + span.flops,
        seconds=seconds,
        devices=devices,
        train_loss=losses[-1] if losses else None,
        eval_loss=eval_loss,
        eval_loss_after_growth=next((loss for loss in after_growth if loss is not None), None),
        eval_losses=select_source_losses(metrics),
        perplexity=None if eval_loss is None else compute_perplexity(eval_loss),
        data=data,
        data_fingerprint=facts.data,
        data_seed=facts.data_seed,
        init=growth["init"] if growth else {},
        growth_seed=growth["seed"] if growth else None,
        growth_noise=growth["noise"] if growth else None,
        versions=list_versions(),
    )


def describe_growth(span: StageSpan, args: SlopTrainingArguments) -> GrowthFacts | None:
    """Return the growth that a stage begins with under the given arguments; None for the initial model."""
    if span.growth is None:
        return None
    inits = resolve_inits(span.growth.operators, span.growth.init)
    return {"init": inits, "seed": args.growth_seed + span.number, "noise": args.growth_noise}


def select_source_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the held-out loss of each source, from what `evaluate` returns.

    >>> select_source_losses({"eval_web_loss": 4.0, "eval_web_runtime": 1.0, "eval_loss": 4.0})
    {'web': 4.0}
    """
    names = (name for name in metrics if _SOURCE_LOSS.fullmatch(name))
    return {name.removeprefix("eval_").removesuffix("_loss"): metrics[name] for name in names}
