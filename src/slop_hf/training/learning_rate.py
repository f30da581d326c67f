"""Learning-rate schedules over each stage, or over the run with its growths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from ..errors import RunError, SlopError
from ..io.serialization import Json
from .parameter_groups import IS_NEW
from .spans import StageSpan

if TYPE_CHECKING:
    from .arguments import SlopTrainingArguments


def resolve_steps(value: float, steps: int) -> int:
    """Return a number of steps; a value below 1 is a share of `steps`, rounded up.

    >>> resolve_steps(0.1, 25), resolve_steps(2000, 25)
    (3, 2000)
    """
    return math.ceil(value * steps) if value < 1 else int(value)


def build_stage_scheduler(
    args: SlopTrainingArguments, optimizer: Optimizer, span: StageSpan, run_steps: int
) -> LRScheduler:
    """Return the scheduler of a stage; its step 0 is the first step of the stage.

    Args:
        args: training arguments: lr_scheduler_type and its kwargs, lr_span, warmup_steps, rewarm_steps.
        optimizer: optimizer of the stage, with the peak learning rate.
        run_steps: steps of all stages together.
    """
    whole_run = args.lr_span == "run"
    steps = run_steps if whole_run else max(span.steps, 1)
    grown = span.growth is not None
    rewarm = resolve_steps(args.rewarm_steps, span.steps) if grown and args.rewarm_steps is not None else None
    warmup = resolve_steps(args.warmup_steps, steps) if whole_run or rewarm is None else rewarm
    scheduler: LRScheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=_convert_shares(args.lr_scheduler_kwargs, steps),
    )
    if not whole_run:
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        name = _get_scheduler_name(args)
        raise RunError(f"lr_scheduler_type {name!r} depends on more than the step; use lr_span stage")
    factors = scheduler.lr_lambdas
    return LambdaLR(optimizer, [partial(_shift_factor, factor, span.first_step, rewarm or 0) for factor in factors])


def set_new_parameter_rates(args: SlopTrainingArguments, scheduler: LRScheduler, span: StageSpan) -> LRScheduler:
    """Return a stage's scheduler with `new_parameter_rate` for the groups that are marked as new.

    The factor holds for the first `new_parameter_steps` of the stage; after them, the rates of all groups are equal.
    """
    optimizer, factor = scheduler.optimizer, args.new_parameter_rate
    if factor == 1 or not any(group.get(IS_NEW) for group in optimizer.param_groups):
        return scheduler
    if not isinstance(scheduler, LambdaLR):
        raise RunError(
            f"lr_scheduler_type {_get_scheduler_name(args)!r} depends on more than the step; leave out "
            "new_parameter_rate, or choose another schedule"
        )
    steps = span.steps if args.new_parameter_steps is None else resolve_steps(args.new_parameter_steps, span.steps)
    factors = [
        partial(_multiply_first, rate, factor, steps) if group.get(IS_NEW) else rate
        for rate, group in zip(scheduler.lr_lambdas, optimizer.param_groups, strict=True)
    ]
    return LambdaLR(optimizer, factors)


def check_scheduler(args: SlopTrainingArguments, spans: Sequence[StageSpan]) -> None:
    """Refuse now a scheduler that could not be built once training begins."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        for span in spans:
            optimizer.param_groups[0][IS_NEW] = span.growth is not None
            set_new_parameter_rates(args, build_stage_scheduler(args, optimizer, span, spans[-1].end_step), span)
    except SlopError:
        raise
    except (TypeError, ValueError) as caught:
        name = _get_scheduler_name(args)
        raise RunError(f"lr_scheduler_type {name!r}: {caught}; see lr_scheduler_kwargs") from None


def compute_rates(
    args: SlopTrainingArguments, spans: Sequence[StageSpan], peaks: Sequence[float]
) -> list[list[float]]:
    """Return the learning rate at each step of each stage.

    Args:
        peaks: peak learning rate of each stage.

    Raises:
        RunError: for a schedule that depends on more than the step.
    """
    rates = []
    for span, peak in zip(spans, peaks, strict=True):
        factor = _find_factor(args, span, spans[-1].end_step)
        rates.append([peak * factor(step) for step in range(span.steps)])
    return rates


def compute_end_rate(args: SlopTrainingArguments, spans: Sequence[StageSpan]) -> float:
    """Return the learning rate that the run's last schedule ends with, as a share of its peak.

    A cosine or a linear decay to 0 ends with 0, one to a tenth with 0.1, and a constant rate with 1.

    Raises:
        RunError: for a schedule that depends on more than the step.
    """
    span = next(span for span in reversed(spans) if span.steps)
    return _find_factor(args, span, spans[-1].end_step)(span.steps)


def _find_factor(args: SlopTrainingArguments, span: StageSpan, run_steps: int) -> Callable[[int], float]:
    """Return the learning rate of a stage as a function of its step, as a share of the peak."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build_stage_scheduler(args, optimizer, span, run_steps)
    if not isinstance(scheduler, LambdaLR):
        name = _get_scheduler_name(args)
        raise RunError(f"lr_scheduler_type {name!r} depends on more than the step, so its rates are not known")
    (factor,) = scheduler.lr_lambdas
    return factor


def _get_scheduler_name(args: SlopTrainingArguments) -> str:
    return str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))


def _shift_factor(factor: Callable[[int], float], first_step: int, rewarm: int, step: int) -> float:
    """Return the run's factor at a step of a stage, warmed up again after growth."""
    return factor(first_step + step) * (min(1.0, step / rewarm) if rewarm else 1.0)


def _multiply_first(rate: Callable[[int], float], factor: float, steps: int, step: int) -> float:
    """Return a schedule's factor at a step of a stage, multiplied by another one in the first steps."""
    return rate(step) * (factor if step < steps else 1.0)


def _convert_shares(kwargs: dict[str, Json] | str | None, steps: int) -> dict[str, Json] | str | None:
    """Return a scheduler's arguments with shares of the span converted to steps."""
    if not isinstance(kwargs, dict):
        return kwargs
    shares = {name: kwargs[name] for name in ("num_decay_steps", "num_stable_steps") if kwargs.get(name)}
    return kwargs | {name: resolve_steps(share, steps) for name, share in shares.items()}


def restore_scheduler(scheduler: LRScheduler, state: dict[str, Json]) -> None:
    """Restore a scheduler from a `state_dict`, and with it the learning rates of its optimizer.

    A schedule that depends on the step alone keeps its own peaks and continues at the step, so that a resumption may
    change them.
    """
    if isinstance(scheduler, LambdaLR):
        step = int(state["last_epoch"])
        scheduler.last_epoch = step
        scheduler._step_count = step + 1
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler._last_lr = rates
    elif "lr_lambdas" not in state:  # else the run was on another kind of schedule, and a fresh one begins
        scheduler.load_state_dict(state)
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
