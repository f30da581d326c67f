"""The learning rate over a stage, or over the run with its growths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from ..errors import RunError, SlopError
from .spans import StageSpan


def share_or_steps(value: float, steps: int) -> int:
    """A number of steps, or below 1 a share of `steps`, rounded up.

    >>> share_or_steps(0.1, 25), share_or_steps(2000, 25)
    (3, 2000)
    """
    return math.ceil(value * steps) if value < 1 else int(value)


def stage_scheduler(args: Any, optimizer: Optimizer, span: StageSpan, run_steps: int) -> LRScheduler:
    """The scheduler of a stage; its step 0 is the stage's first.

    Args:
        args: `SlopTrainingArguments`: lr_scheduler_type and its kwargs, lr_span, warmup_steps, rewarm_steps.
        optimizer: of the stage, with the peak learning rate.
        span: the stage.
        run_steps: of all stages together.

    Raises:
        RunError: for a schedule over the run that depends on more than the step.
    """
    whole_run = args.lr_span == "run"
    steps = run_steps if whole_run else max(span.steps, 1)
    grown = span.growth is not None
    rewarm = share_or_steps(args.rewarm_steps, span.steps) if grown and args.rewarm_steps is not None else None
    warmup = share_or_steps(args.warmup_steps, steps) if whole_run or rewarm is None else rewarm
    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=_in_steps(args.lr_scheduler_kwargs, steps),
    )
    if not whole_run:
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise RunError(f"lr_scheduler_type {kind!r} depends on more than the step; use lr_span stage")
    factors: list[Callable[[int], float]] = [
        partial(_shifted, one, span.first_step, rewarm or 0) for one in scheduler.lr_lambdas
    ]
    return LambdaLR(optimizer, factors)


def check_scheduler(args: Any, spans: Sequence[StageSpan]) -> None:
    """Refuse now a schedule that could not be made once training begins.

    Raises:
        RunError: naming its type.
    """
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        for span in spans:
            stage_scheduler(args, optimizer, span, spans[-1].end_step)
    except (TypeError, ValueError) as caught:
        if isinstance(caught, SlopError):
            raise
        raise RunError(f"lr_scheduler_type {kind!r}: {caught}; see lr_scheduler_kwargs") from None


def _shifted(factor: Callable[[int], float], first_step: int, rewarm: int, step: int) -> float:
    """A factor of the whole run at a stage's step, warmed up again after growth."""
    return factor(first_step + step) * (min(1.0, step / rewarm) if rewarm else 1.0)


def _in_steps(kwargs: Any, steps: int) -> Any:
    """A scheduler's arguments with shares of the span made steps."""
    if not isinstance(kwargs, dict):
        return kwargs
    return {
        name: share_or_steps(value, steps) if name in ("num_decay_steps", "num_stable_steps") and value else value
        for name, value in kwargs.items()
    }


def restore(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Go on with a scheduler where its `state_dict` was taken; the optimizer's learning rates as well."""
    scheduler.load_state_dict(state)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
