"""Finished models out of a trunk: runs that continue a checkpoint of a run at a constant rate, with a decay."""

from __future__ import annotations

import math
from dataclasses import replace

from ..errors import RunError
from ..io.files import check_output
from ..io.numbers import is_finite_number
from ..io.serialization import Json
from ..runs.branch import inherit
from ..runs.directory import RunDirectory, RunFacts, list_checkpoints, parse_step
from ..schedule import GrowthSchedule
from .batches import keep_first_stages
from .config import RunConfig, preview_rates
from .ranks import Ranks
from .spans import StageSpan

WSD = "warmup_stable_decay"


def plan_decay(config: RunConfig, trunk: RunDirectory, step: int, decay: float = 0.2) -> RunConfig:
    """Return the config of the run that continues a checkpoint of a trunk, and lets its learning rate fall to 0.

    The run ends with the weights of a run that had this schedule from its first step on, if the warm-up is a number of
    steps and not a share.

    Args:
        config: config of the trunk; its schedule is the one in the trunk's directory.
        trunk: run whose rate is still constant at the checkpoint, such as one with `constant_with_warmup`.
        step: global step of the checkpoint.
        decay: steps of the decay; below 1, a share of the span of its learning-rate schedule.

    Raises:
        RunError: if there is no such checkpoint, or the trunk's rate is not constant up to it.
    """
    if not is_finite_number(decay) or decay <= 0:
        raise RunError(f"the decay must have a positive number of steps, or a share of the steps, got {decay!r}")
    config = replace(config, schedule=trunk.schedule)
    spans, rates, _ = preview_rates(config, begun=RunFacts.load(trunk))
    span = _find_stage(trunk, spans, step)
    peak, rate = max(rates[span.number]), rates[span.number][step - span.first_step - 1]
    if rate < peak:
        raise RunError(
            f"the learning rate at step {step} is {rate:g}, below its peak {peak:g}: a decay begins at the peak; "
            "choose a checkpoint after the warm-up and before the decay"
        )
    before = step if config.training.get("lr_span") == "run" else step - span.first_step
    # Rounded, because 24 * 0.2 / 0.8 is 6.000000000000001 in floating point.
    steps = math.ceil(round(before * decay / (1 - decay), 6) if decay < 1 else decay)
    tokens = (step - span.first_step + steps) * (span.tokens // span.steps)
    stages = trunk.schedule.stages[: span.number]
    if stages:
        schedule = GrowthSchedule(
            trunk.schedule.initial, (*stages[:-1], replace(stages[-1], tokens=tokens)), trunk.schedule.initial_tokens
        )
    else:
        schedule = GrowthSchedule(trunk.schedule.initial, (), tokens)
    training = {
        **keep_first_stages(config.training, span.number + 1),
        "lr_scheduler_type": WSD,
        "lr_scheduler_kwargs": {"decay_type": "linear", **_get_shape(config), "num_decay_steps": steps},
    }
    return replace(config, training=training, schedule=schedule)


def begin_decay(trunk: RunDirectory, step: int, run: RunDirectory, config: RunConfig, *, resume: bool = False) -> None:
    """Begin the run that `plan_decay` has planned: it takes over the trunk's stages and the checkpoint.

    Under a launcher, every process makes the same call.

    Args:
        resume: whether the run may have begun already; it then stays as it is.

    Raises:
        RunError: if the directory holds a run and `resume` is not set, or other files.
    """
    ranks = Ranks.from_args(config.arguments(run.path))
    with ranks.raise_on_all():
        if ranks.is_first:
            check_output(run.path, "run directory", RunError, is_directory=True)
            if run.exists and not resume:
                raise RunError(f"{run.path} holds another run; resume it with --resume, or move it away")
            if not run.exists:
                _inherit_checkpoint(trunk, step, run, config)


def _inherit_checkpoint(trunk: RunDirectory, step: int, run: RunDirectory, config: RunConfig) -> None:
    if run.path.exists():
        raise RunError(f"{run.path} is in the way: it exists and holds no run; move it away")
    schedule = config.read_schedule()
    stage = len(schedule.stages)
    checkpoint = next(path for path in list_checkpoints(trunk, stage) if parse_step(path) == step)
    inherit(trunk, run, schedule, name=run.path.resolve().name, checkpoint=checkpoint, stages=stage)


def _get_shape(config: RunConfig) -> dict[str, Json]:
    """Return the shape of the decay that the trunk's own schedule has, if it has one."""
    kwargs = config.training.get("lr_scheduler_kwargs")
    if config.training.get("lr_scheduler_type") != WSD or not isinstance(kwargs, dict):
        return {}
    return {name: kwargs[name] for name in ("decay_type", "min_lr_ratio") if name in kwargs}


def _find_stage(trunk: RunDirectory, spans: tuple[StageSpan, ...], step: int) -> StageSpan:
    """Return the stage with the checkpoint of a step."""
    steps = []
    for span in spans:
        here = [parse_step(path) for path in list_checkpoints(trunk, span.number)]
        if step in here and step < span.end_step:
            return span
        steps += here
    there = f"it has those of steps {', '.join(map(str, sorted(steps)))}" if steps else "it has none"
    raise RunError(
        f"{trunk.path} has no checkpoint of step {step}: {there}; a trunk keeps all of them with "
        "save_total_limit: null and keep_checkpoints: true"
    )
