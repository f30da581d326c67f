"""How tokens are split between the stages of a schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Literal, TypeAlias

import numpy as np

from ..cost.scaling_law import ScalingLaw
from ..errors import PlanError, ScheduleError
from ..io.numbers import is_finite_number, is_positive_number
from ..schedule import PAPER_INITIAL_SHARE, share_tokens

Sharing: TypeAlias = Literal["paper", "utility"]

#: A million times the tokens of the largest runs.
MOST_TOKENS = 1e20


@dataclass(frozen=True)
class Budget:
    """Training tokens per stage, the initial model's first (zeros without a budget), and those it saw before."""

    tokens: tuple[int, ...]
    already_seen: float = 0.0

    @property
    def stages(self) -> int:
        return len(self.tokens) - 1

    @property
    def has_tokens(self) -> bool:
        return any(self.tokens)

    def seen_before(self, number: int) -> float:
        """Tokens seen before stage `number` begins; stage 0 is the training of the initial model."""
        return self.already_seen + sum(self.tokens[:number])


@dataclass(frozen=True)
class TokenAllocation:
    """A planner's rule for splitting tokens between the stages of a schedule.

    Args:
        tokens: tokens of the whole run, or one number per stage, the initial model's first; None without a budget.
        initial_share: the initial model's share of a whole run's tokens, relative to one growth stage.
        already_seen: tokens that the initial model was trained on before.
        sharing: "paper", or "utility" to split by equal marginal utility once a schedule is chosen.

    >>> TokenAllocation(65e9).budget(stages=4).tokens
    (25000000000, 10000000000, 10000000000, 10000000000, 10000000000)
    """

    tokens: float | Sequence[float] | None = None
    initial_share: float = PAPER_INITIAL_SHARE
    already_seen: float = 0.0
    sharing: Sharing = "paper"

    def __post_init__(self) -> None:
        if self.sharing not in ("paper", "utility"):
            raise PlanError(f"sharing must be 'paper' or 'utility', got {self.sharing!r}")
        for name in ("initial_share", "already_seen"):
            if not is_finite_number(getattr(self, name), least=0):
                raise PlanError(f"{name} must be a number, 0 or more, got {getattr(self, name)}")
        if self.already_seen > MOST_TOKENS:
            raise PlanError(f"already_seen must be at most {MOST_TOKENS:g} tokens, got {self.already_seen:g}")
        if isinstance(self.tokens, (np.generic, np.ndarray)):
            object.__setattr__(self, "tokens", self.tokens.tolist())
        if not isinstance(self.tokens, (int, float, Sequence, NoneType)) or isinstance(self.tokens, str):
            raise PlanError(f"tokens must be a number, or one number per stage, got {self.tokens!r}")
        if self.sharing == "utility" and not isinstance(self.tokens, (int, float)):
            raise PlanError(f"sharing 'utility' splits the tokens of a whole run: give one number, got {self.tokens}")
        is_valid = all(is_finite_number(count, least=0) for count in self._counts) and sum(self._counts) > 0
        if self.tokens is not None and not is_valid:
            raise PlanError(f"tokens must be positive numbers, got {self.tokens}")
        if sum(self._counts) > MOST_TOKENS:
            raise PlanError(f"tokens must be at most {MOST_TOKENS:g} together, got {sum(self._counts):g}")

    @property
    def _counts(self) -> list[float]:
        return [self.tokens] if isinstance(self.tokens, (int, float)) else list(self.tokens or ())

    @property
    def is_per_stage(self) -> bool:
        """Whether the tokens of each stage are given."""
        return self.tokens is not None and not isinstance(self.tokens, (int, float))

    @property
    def trains_before_growth(self) -> bool:
        """Whether the initial model has seen any tokens before it is grown."""
        first = self._counts[0] if self.is_per_stage else self.initial_share * (self.tokens is not None)
        return bool(self.already_seen or first)

    def budget(self, stages: int) -> Budget:
        """Tokens of schedules with `stages` growth stages, by the paper's rule or as given."""
        if self.tokens is None:
            counts = [0] * (stages + 1)
        elif isinstance(self.tokens, (int, float)):
            counts = share_tokens(self.tokens, stages, initial_share=self.initial_share)
        elif len(self.tokens) == stages + 1:
            counts = [round(count) for count in self.tokens]
        else:
            raise PlanError(
                f"tokens has {len(self.tokens)} numbers for an initial model and {stages} stages: give one for each"
            )
        if self.tokens is not None and not any(counts):
            raise PlanError(f"tokens {self.tokens} are less than one per stage: give more")
        return Budget(tuple(counts), self.already_seen)


def allocate_tokens(
    shares: Sequence[float], total: float, costs_per_token: Sequence[float] | None = None
) -> list[int]:
    """Split a budget between stages in proportion to shares, in whole tokens.

    Args:
        shares: each stage's share of the tokens, 0 or more.
        total: tokens to split; with `costs_per_token`, what all tokens cost together.
        costs_per_token: cost of a token in each stage, such as `count_flops_per_token`. The last stage then takes up
            what rounding the others leaves of the cost; without costs, each stage is rounded by itself.

    Raises:
        PlanError: if there is not one share per cost, or no share is positive.

    >>> allocate_tokens([2.5, 1, 1], 450)
    [250, 100, 100]
    >>> allocate_tokens([1, 3], 6e9 * 10 + 8e9 * 30, costs_per_token=[6e9, 8e9])
    [10, 30]
    """
    stages = len(shares if costs_per_token is None else costs_per_token)
    if not is_positive_number(total):
        raise PlanError(f"the total to split must be a positive number, got {total}")
    if len(shares) != stages or not all(is_finite_number(share, least=0) for share in shares) or not any(shares):
        raise PlanError(
            f"shares {list(shares)} do not split tokens between {stages} structures: give each 0 or more, and one of "
            "them more than 0"
        )
    if costs_per_token is None:
        return [round(total * share / sum(shares)) for share in shares]
    scale = total / sum(cost * share for cost, share in zip(costs_per_token, shares, strict=True))
    tokens = [round(scale * share) for share in shares[:-1]]
    spent = sum(cost * count for cost, count in zip(costs_per_token, tokens, strict=False))
    return [*tokens, max(round((total - spent) / costs_per_token[-1]), 0)]


def share_tokens_by_utility(
    total: float,
    params: Sequence[float],
    costs: Sequence[float],
    *,
    law: ScalingLaw | None = None,
    already_seen: float = 0.0,
    train_initial: bool = True,
) -> list[int]:
    """Split tokens between stages so that at each growth the marginal utilities before and after it are equal.

    A model is trained until the next model would reduce the loss more per hour, according to the scaling law and if
    growth keeps the loss (`ScalingLaw.handover_loss`); the last model takes the rest. A stage that is never the best
    use of an hour has no tokens: growth then passes through it.

    Args:
        total: tokens of the whole run.
        params: parameters of each stage's model, the initial one first.
        costs: cost of a token in each stage, in hours or FLOPs.
        law: scaling law that predicts losses; default `ScalingLaw()`.
        already_seen: tokens that the initial model was trained on before.
        train_initial: whether the initial model is trained further.

    Raises:
        ScheduleError: if `total` is not a positive number.
        PlanError: if there is not one positive cost per model.

    >>> share_tokens_by_utility(20e9, [1e8, 1e9], [6e8, 6e9])
    [7308899045, 12691100955]
    """
    if not is_positive_number(total):
        raise ScheduleError(f"tokens must be a positive number, got {total}")
    if not params or len(params) != len(costs) or not all(map(is_positive_number, costs)):
        raise PlanError(f"{len(params)} models cost {list(costs)} per token: give one positive cost for each")
    law = law or ScalingLaw()
    useful = _find_useful_stages(params, costs, law, first=0 if train_initial else 1)
    shares, left = [0] * len(params), total
    reached = float(law.loss(params[0], already_seen)) if already_seen else math.inf
    for position, stage in enumerate(useful):
        tokens = left
        if position + 1 < len(useful):
            following = useful[position + 1]
            end = law.handover_loss(params[stage], costs[stage], params[following], costs[following])
            tokens = law.tokens_to(params[stage], end) - law.tokens_to(params[stage], reached)
        shares[stage] = round(min(max(tokens, 0.0), left))
        left -= shares[stage]
        seen = law.tokens_to(params[stage], reached) + shares[stage]
        reached = float(law.loss(params[stage], seen)) if seen else math.inf
    shares[-1] += round(left)
    return shares


def _find_useful_stages(params: Sequence[float], costs: Sequence[float], law: ScalingLaw, first: int) -> list[int]:
    """Return the stages that make the best use of an hour at some loss; the last stage always is, at the end."""
    useful: list[int] = []
    for stage in range(first, len(params)):

        def compute_handover(before: int, after: int) -> float:
            return law.handover_loss(params[before], costs[before], params[after], costs[after])

        # The losses of the handovers have to fall, or a stage would be left before it is entered.
        while useful and compute_handover(useful[-1], stage) == math.inf:
            useful.pop()
        while len(useful) > 1 and compute_handover(useful[-1], stage) >= compute_handover(useful[-2], useful[-1]):
            useful.pop()
        useful.append(stage)
    return useful
