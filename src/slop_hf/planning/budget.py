"""`Budget`: the tokens of each stage of a schedule; `TokenRule`: how a planner comes by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..cost.scaling_law import ScalingLaw
from ..errors import PlanError, ScheduleError
from ..schedule import PAPER_INITIAL_SHARE, token_shares


@dataclass(frozen=True)
class Budget:
    """Tokens that schedules of one number of stages train on.

    Args:
        tokens: of each stage, the initial model's first; zeros where there is no budget.
        already_seen: tokens that the initial model was trained on before.
    """

    tokens: tuple[int, ...]
    already_seen: float = 0.0

    @property
    def stages(self) -> int:
        """Number of growth stages."""
        return len(self.tokens) - 1

    @property
    def is_given(self) -> bool:
        """Whether there are any tokens."""
        return any(self.tokens)

    def seen_before(self, number: int) -> float:
        """Tokens seen before the stage of that number begins; 0 is the initial model's training."""
        return self.already_seen + sum(self.tokens[:number])


@dataclass(frozen=True)
class TokenRule:
    """How tokens are shared out over the stages of a schedule.

    Args:
        tokens: of the whole run; or of each stage, the initial model's first; None without a budget.
        initial_share: the initial model's share of a whole run's tokens, a growth stage having 1.
        already_seen: tokens that the initial model was trained on before.
        sharing: "paper", or "utility" to share them out by equal marginal utility once a schedule is chosen.

    Raises:
        PlanError: for tokens that are none, and where there is nothing to share out.

    >>> TokenRule(65e9).budget(stages=4).tokens
    (25000000000, 10000000000, 10000000000, 10000000000, 10000000000)
    """

    tokens: float | Sequence[float] | None = None
    initial_share: float = PAPER_INITIAL_SHARE
    already_seen: float = 0.0
    sharing: Literal["paper", "utility"] = "paper"

    def __post_init__(self) -> None:
        if self.sharing not in ("paper", "utility"):
            raise PlanError(f"sharing must be 'paper' or 'utility', got {self.sharing!r}")
        for name in ("initial_share", "already_seen"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise PlanError(f"{name} must be a number, 0 or more, got {getattr(self, name)}")
        if self.sharing == "utility" and not isinstance(self.tokens, (int, float)):
            raise PlanError(
                f"sharing 'utility' shares out the tokens of a whole run: give one number, got {self.tokens}"
            )
        if self.tokens is not None:
            counts = self._counts
            if not all(math.isfinite(count) and count >= 0 for count in counts) or not sum(counts) > 0:
                raise PlanError(f"tokens must be positive numbers, got {self.tokens}")

    @property
    def _counts(self) -> list[float]:
        return [self.tokens] if isinstance(self.tokens, (int, float)) else list(self.tokens or ())

    @property
    def is_for_each_stage(self) -> bool:
        """Whether the tokens of each stage are given."""
        return self.tokens is not None and not isinstance(self.tokens, (int, float))

    @property
    def knows_the_start(self) -> bool:
        """Whether the initial model has seen any tokens before it is grown."""
        first = self._counts[0] if self.is_for_each_stage else self.initial_share * (self.tokens is not None)
        return bool(self.already_seen or first)

    def budget(self, stages: int) -> Budget:
        """The tokens of so many growth stages, by the paper's rule or as given.

        Raises:
            PlanError: where tokens are given for another number of stages.
        """
        if self.tokens is None:
            return Budget((0,) * (stages + 1), self.already_seen)
        if isinstance(self.tokens, (int, float)):
            shares = token_shares(self.tokens, stages, initial_share=self.initial_share)
            return Budget(tuple(shares), self.already_seen)
        if len(self.tokens) != stages + 1:
            raise PlanError(
                f"tokens has {len(self.tokens)} numbers for an initial model and {stages} stages: give one for each"
            )
        return Budget(tuple(round(count) for count in self.tokens), self.already_seen)

    def by_utility(self, params: Sequence[float], costs: Sequence[float], law: ScalingLaw) -> Budget:
        """The tokens of a schedule's stages by equal marginal utility, see `tokens.utility_shares`."""
        assert isinstance(self.tokens, (int, float))
        shares = utility_shares(
            self.tokens,
            params,
            costs,
            law=law,
            already_seen=self.already_seen,
            train_initial=self.initial_share > 0,
        )
        return Budget(tuple(shares), self.already_seen)


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
