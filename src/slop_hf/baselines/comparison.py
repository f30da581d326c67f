"""A plan beside its control arms: what each costs, and the loss that the scaling law predicts for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cost.flops import DEFAULT_CONFIG, count_parameters, flops_per_token
from ..cost.hours import CostModel
from ..cost.scaling_law import ScalingLaw
from ..schedule import GrowthSchedule
from .arms import ARMS, FROM_RANDOM
from .equal_budget import Purse

_PLAN = "plan"


@dataclass(frozen=True)
class Arm:
    """A schedule in a comparison, what it costs and what it is predicted to reach.

    Args:
        name: "plan", or a name in `ARMS`.
        schedule: its stages and tokens.
        flops: training FLOPs of all stages.
        tokens: of all stages.
        hours: device hours; None without a cost model.
        loss: at the end, by the scaling law; None where nothing says what the initial model has seen.
    """

    name: str
    schedule: GrowthSchedule
    flops: float
    tokens: int
    hours: float | None
    loss: float | None


def compare(
    schedule: GrowthSchedule,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    cost_model: CostModel | None = None,
    law: ScalingLaw | None = None,
    already_seen: float = 0.0,
) -> list[Arm]:
    """The plan and then all control arms, at the plan's training FLOPs.

    Losses are those of `ScalingLaw.staged_losses` on all parameters: the best that growth can hope for, as if it kept
    the loss and the training dynamics. The law knows how large a model is, not its shape.

    Args:
        schedule: a schedule with tokens.
        config: what growth leaves alone, see `cost`.
        sequence_length: tokens of a training sequence.
        cost_model: hours of the hardware.
        law: predicts losses; default, `ScalingLaw()`.
        already_seen: tokens that the plan's initial model was trained on before.

    Raises:
        ScheduleError: for a schedule without tokens.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(256, 768, 4, 4), ModelDims(512, 1536, 16, 8)
    >>> stage = GrowthStage(("layer", "mha", "ffn", "hidden"), large, tokens=2 * 10**9)
    >>> arms = compare(GrowthSchedule(small, (stage,), initial_tokens=10**8))
    >>> [arm.name for arm in arms]
    ['plan', 'from_scratch', 'single_stage', 'copies', 'msg', 'elle', 'stacking']
    """
    Purse.of(schedule, config, sequence_length, "flops")  # refuses a schedule without tokens
    schedules = {_PLAN: schedule, **{name: make(schedule, config, sequence_length) for name, make in ARMS.items()}}
    unknown = not schedule.initial_tokens and not already_seen
    arms = []
    for name, arm in schedules.items():
        loss = None
        if name in FROM_RANDOM or not unknown:
            params = [count_parameters(dims, config) for dims in arm.structures]
            seen = 0.0 if name in FROM_RANDOM else already_seen
            loss = (law or ScalingLaw()).staged_losses(params, arm.tokens, seen)[-1]
        prices = [flops_per_token(dims, config, sequence_length) for dims in arm.structures]
        hours = None if cost_model is None else float(sum(map(cost_model.hours, prices, arm.tokens)))
        arms.append(Arm(name, arm, arm.flops(config, sequence_length), sum(arm.tokens), hours, loss))
    return arms


def favours_growth(arms: Sequence[Arm]) -> bool | None:
    """Whether the plan's predicted loss is below that of training from scratch; None where it is unknown.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> plan = GrowthSchedule(small, (GrowthStage(("layer",), large, tokens=10**9),))
    >>> favours_growth(compare(plan)), favours_growth(compare(plan, already_seen=10**6))
    (None, True)
    """
    losses = {arm.name: arm.loss for arm in arms}
    plan, scratch = losses.get(_PLAN), losses.get("from_scratch")
    return None if plan is None or scratch is None else plan < scratch
