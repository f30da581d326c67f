"""`Budget`: the tokens of each stage of a schedule; `TokenRule`: how a planner comes by them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import PlanError
from .scaling import ScalingLaw
from .tokens import PAPER_INITIAL_SHARE, token_shares, utility_shares


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
