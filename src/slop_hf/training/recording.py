"""What is written down of a stage that has ended, and whether a run is the same."""

from __future__ import annotations

import math
from typing import Any

from ..errors import RunError
from ..growth import resolve_inits
from ..records import RunDirectory, StageRecord
from ..schedule import GrowthSchedule
from ..serialization import versions
from .spans import StageSpan

MAX_EXPONENT = 700.0  # exp of more is no float: a diverged run has a perplexity of about 1e304


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
) -> StageRecord:
    """The record of a stage that has just ended.

    Args:
        span: the stage.
        history: the run's log up to its end.
        metrics: of the evaluation at its end; empty without held-out data.
        seconds: of training.
        devices: processes that shared the work.
        growth_seed: of the growth at its beginning.
    """
    of_stage = [entry for entry in history if entry.get("stage") == span.number]
    losses = [entry["loss"] for entry in of_stage if "loss" in entry]
    at_growth = [held_out_loss(entry) for entry in of_stage if span.growth and entry["step"] == span.first_step]
    eval_loss = held_out_loss(metrics)
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
        perplexity=math.exp(min(eval_loss, MAX_EXPONENT)) if eval_loss is not None else None,
        init=resolve_inits(span.growth.operators, span.growth.init) if span.growth else {},
        growth_seed=growth_seed if span.growth else None,
        versions=versions(),
    )


def held_out_loss(metrics: dict[str, float]) -> float | None:
    """The loss in what `evaluate` returns; the mean over data sets where there are several."""
    losses = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith("loss")]
    return sum(losses) / len(losses) if losses else None
