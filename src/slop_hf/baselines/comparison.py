"""A plan compared with its control arms: costs, and losses predicted by the scaling law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..cost.hours import CostModel
from ..cost.scaling_law import ScalingLaw, compute_chance_loss
from ..dims import ModelConfig
from ..errors import PlanError
from ..io.numbers import is_finite_number
from ..schedule import GrowthSchedule
from .arms import ARMS, FROM_RANDOM
from .equal_budget import ArmRequest

_PLAN = "plan"


@dataclass(frozen=True)
class Arm:
    """A schedule in a comparison, the costs of all its stages, and its predicted loss.

    Args:
        name: "plan", or a name in `ARMS`.
        hours: device hours; None without a cost model.
        loss: final loss by the scaling law; None if it cannot say, because the tokens seen by the initial model are
            unknown, or because it predicts more than `compute_chance_loss`.
    """

    name: str
    schedule: GrowthSchedule
    flops: float
    tokens: int
    hours: float | None
    loss: float | None


def compare_at_equal_flops(
    schedule: GrowthSchedule,
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    cost_model: CostModel | None = None,
    law: ScalingLaw | None = None,
    already_seen: float = 0.0,
) -> list[Arm]:
    """Compare a plan with all control arms at the plan's training FLOPs; the plan comes first.

    Losses come from `ScalingLaw.staged_losses` with all parameters: the best that growth can achieve, as if it kept
    the loss and the training dynamics. The law knows the size of a model, not its shape.

    Args:
        schedule: plan with tokens.
        config: settings that growth does not change, see `slop_hf.cost.flops`.
        sequence_length: tokens per training sequence.
        cost_model: device hours of the hardware.
        law: scaling law that predicts losses; default `ScalingLaw()`.
        already_seen: tokens that the plan's initial model was trained on before.

    Raises:
        ScheduleError: if the plan has no tokens.
        PlanError: for a negative `already_seen`.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(256, 768, 4, 4), ModelDims(512, 1536, 16, 8)
    >>> stage = GrowthStage(("layer", "mha", "ffn", "hidden"), large, tokens=2 * 10**9)
    >>> arms = compare_at_equal_flops(GrowthSchedule(small, (stage,), initial_tokens=10**8))
    >>> [arm.name for arm in arms]
    ['plan', 'from_scratch', 'single_stage', 'copies', 'msg', 'elle', 'stacking']
    """
    if not is_finite_number(already_seen, least=0):
        raise PlanError(f"already_seen must be a number, 0 or more, got {already_seen}")
    request = ArmRequest(schedule, config, sequence_length)
    schedules = {_PLAN: schedule, **{name: build(request) for name, build in ARMS.items()}}
    arms = []
    for name, arm in schedules.items():
        loss = forecast_final_loss(arm, config, law, 0.0 if name in FROM_RANDOM else already_seen)
        costs = [float(count_flops_per_token(dims, config, sequence_length)) for dims in arm.structures]
        hours = None if cost_model is None else float(sum(map(cost_model.hours, costs, arm.tokens)))
        arms.append(Arm(name, arm, arm.flops(config, sequence_length), sum(arm.tokens), hours, loss))
    return arms


def forecast_final_loss(
    schedule: GrowthSchedule,
    config: ModelConfig = DEFAULT_CONFIG,
    law: ScalingLaw | None = None,
    already_seen: float = 0.0,
) -> float | None:
    """Forecast the final loss of a schedule by a scaling law, as if growth kept the loss, in nats per token.

    Args:
        schedule: schedule with tokens.
        config: settings that growth does not change, see `slop_hf.cost.flops`.
        law: scaling law; default `ScalingLaw()`.
        already_seen: tokens that the initial model was trained on before.

    Returns:
        The loss; None if the tokens of the initial model are unknown, or if the law's loss is above chance.
    """
    if not (schedule.initial_tokens or already_seen):
        return None
    params = [count_parameters(dims, config) for dims in schedule.structures]
    loss = (law or ScalingLaw()).staged_losses(params, schedule.tokens, already_seen)[-1]
    return loss if loss < compute_chance_loss(config) else None


def is_growth_favoured(arms: Sequence[Arm]) -> bool | None:
    """Whether the plan's predicted loss is below the loss of training from scratch; None if either is unknown.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> plan = GrowthSchedule(small, (GrowthStage(("layer",), large, tokens=10**9),))
    >>> arms, arms_if_trained = compare_at_equal_flops(plan), compare_at_equal_flops(plan, already_seen=10**6)
    >>> is_growth_favoured(arms), is_growth_favoured(arms_if_trained)
    (None, True)
    """
    losses = {arm.name: arm.loss for arm in arms}
    plan, scratch = losses.get(_PLAN), losses.get("from_scratch")
    return None if plan is None or scratch is None else plan < scratch
