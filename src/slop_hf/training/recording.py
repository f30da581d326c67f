"""What is written down of a stage that has ended, and whether a run is the same."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import RunError
from ..growth import resolve_inits
from ..io.serialization import list_versions
from ..runs.directory import RunDirectory, RunFacts
from ..runs.records import ConsumedTokens, StageRecord, perplexity
from ..schedule import GrowthSchedule
from .spans import StageSpan

HELD_OUT = "eval_loss"
_OF_SOURCE = re.compile("eval_.+_loss")


def check_same_schedule(run: RunDirectory, found: GrowthSchedule, schedule: GrowthSchedule) -> None:
    """Refuse to resume a run of another schedule.

    Args:
        run: its directory.
        found: its schedule.
        schedule: that is to be resumed with.

    Raises:
        RunError: naming the first stage that differs.
    """
    if found == schedule:
        return
    old = zip(found.structures, found.tokens, strict=True)
    new = zip(schedule.structures, schedule.tokens, strict=True)
    pairs = enumerate(zip(old, new, strict=False))
    where = next((number for number, (before, after) in pairs if before != after), None)
    what = f"stage {where} differs" if where is not None else "they differ in their number of stages or inits"
    raise RunError(
        f"{run.path} holds a run of another schedule ({what}); resume with {run.path / 'schedule.yaml'}, "
        "or choose another output directory"
    )


def stage_record(
    span: StageSpan,
    history: list[dict[str, Any]],
    metrics: dict[str, float],
    seconds: float,
    devices: int,
    growth_seed: int,
    growth_noise: float,
    data: tuple[ConsumedTokens, ...],
    facts: RunFacts,
) -> StageRecord:
    """The record of a stage that has just ended.

    Args:
        span: the stage.
        history: the run's log up to its end.
        metrics: of the evaluation at its end; empty without held-out data.
        seconds: of training.
        devices: processes that shared the work.
        growth_seed, growth_noise: of the growth at its beginning.
        data: what was trained on, by source.
        facts: of the run.
    """
    of_stage = [entry for entry in history if entry.get("stage") == span.number]
    losses = [entry["loss"] for entry in of_stage if "loss" in entry]
    at_growth = [entry.get(HELD_OUT) for entry in of_stage if span.growth and entry["step"] == span.first_step]
    eval_loss = metrics.get(HELD_OUT)
    return StageRecord(
        stage=span.number,
        name=span.name,
        operators=span.growth.operators if span.growth else (),
        dims=span.dims,
        parameters=span.parameters,
        tokens=span.tokens,
        total_tokens=span.first_token + span.tokens,
        first_token=span.first_token,
        steps=span.steps,
        global_step=span.end_step,
        flops=span.flops,
        total_flops=span.first_flops + span.flops,
        seconds=seconds,
        devices=devices,
        train_loss=losses[-1] if losses else None,
        eval_loss=eval_loss,
        eval_loss_after_growth=next((loss for loss in at_growth if loss is not None), None),
        eval_losses=losses_by_source(metrics),
        perplexity=None if eval_loss is None else perplexity(eval_loss),
        data=data,
        data_fingerprint=facts.data,
        data_seed=facts.data_seed,
        init=resolve_inits(span.growth.operators, span.growth.init) if span.growth else {},
        growth_seed=growth_seed if span.growth else None,
        growth_noise=growth_noise if span.growth else None,
        versions=list_versions(),
    )


def losses_by_source(metrics: Mapping[str, float]) -> dict[str, float]:
    """The held-out losses of single sources in what `evaluate` returns.

    >>> losses_by_source({"eval_web_loss": 4.0, "eval_web_runtime": 1.0, "eval_loss": 4.0})
    {'web': 4.0}
    """
    return {name[len("eval_") : -len("_loss")]: value for name, value in metrics.items() if _OF_SOURCE.fullmatch(name)}
