"""How a budget of training tokens is shared out over the stages of a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .errors import ScheduleError
from .scaling import ScalingLaw

#: The paper trains the initial model on 25B tokens and every stage on 10B (section 4.1).
PAPER_INITIAL_SHARE = 2.5


def token_shares(total: float, stages: int, *, initial_share: float = PAPER_INITIAL_SHARE) -> list[int]:
    """`total` tokens for the initial model and `stages` growth stages, in whole tokens; the paper's rule.

    >>> token_shares(65e9, 4)
    [25000000000, 10000000000, 10000000000, 10000000000, 10000000000]
    """
    if not (total > 0 and math.isfinite(total)) or not (initial_share >= 0 and math.isfinite(initial_share)):
        raise ScheduleError(f"tokens must be positive and shares not negative, got {total} and {initial_share}")
    parts = stages + initial_share
    if not parts:
        raise ScheduleError("a schedule without stages trains its initial model: give it a share of the tokens")
    return [round(total * initial_share / parts)] + [round(total / parts)] * stages


def utility_shares(
    total: float,
    params: Sequence[float],
    costs: Sequence[float],
    *,
    law: ScalingLaw | None = None,
    already_seen: float = 0.0,
    train_initial: bool = True,
) -> list[int]:
    """`total` tokens shared out so that at each growth the marginal utilities before and after it are equal.

    A model is trained until the next one would lose more loss in the next hour, by the scaling law and under growth
    that keeps the loss (`ScalingLaw.handover_loss`); the last one has what is left. A stage that is never the best
    use of an hour has no tokens: growth then passes through it.

    Args:
        total: the whole budget.
        params: parameters of each stage's model, the initial one first.
        costs: of a token in each, in hours or FLOPs.
        law: predicts losses.
        already_seen: tokens that the initial model was trained on before.
        train_initial: whether it is trained further.

    Raises:
        ScheduleError: for a total that is none.

    >>> utility_shares(20e9, [1e8, 1e9], [6e8, 6e9])
    [7308899045, 12691100955]
    """
    if not (total > 0 and math.isfinite(total)):
        raise ScheduleError(f"tokens must be a positive number, got {total}")
    law = law or ScalingLaw()
    useful = _useful(params, costs, law, first=0 if train_initial else 1)
    shares, left = [0] * len(params), total
    reached = float(law.loss(params[0], already_seen)) if already_seen else math.inf
    for place, stage in enumerate(useful):
        budget = left
        if place + 1 < len(useful):
            following = useful[place + 1]
            end = law.handover_loss(params[stage], costs[stage], params[following], costs[following])
            budget = law.tokens_to(params[stage], end) - law.tokens_to(params[stage], reached)
        shares[stage] = round(min(max(budget, 0.0), left))
        left -= shares[stage]
        begun = law.tokens_to(params[stage], reached)
        reached = float(law.loss(params[stage], begun + shares[stage])) if begun + shares[stage] else math.inf
    shares[-1] += round(left)
    return shares


def _useful(params: Sequence[float], costs: Sequence[float], law: ScalingLaw, first: int) -> list[int]:
    """The stages that are the best use of an hour at some loss; the last one always is, at the end."""
    chosen: list[int] = []
    for stage in range(first, len(params)):

        def handover(before: int, after: int) -> float:
            return law.handover_loss(params[before], costs[before], params[after], costs[after])

        # A stage that is left before it is entered is none: the losses of the handovers have to fall.
        while chosen and handover(chosen[-1], stage) == math.inf:
            chosen.pop()
        while len(chosen) > 1 and handover(chosen[-1], stage) >= handover(chosen[-2], chosen[-1]):
            chosen.pop()
        chosen.append(stage)
    return chosen
