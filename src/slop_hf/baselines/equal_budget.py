"""What an arm may spend, and how it is shared out among its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..cost.flops import DEFAULT_CONFIG, flops_per_token
from ..dims import ModelDims
from ..errors import PlanError, ScheduleError
from ..operators import operators_between
from ..schedule import GrowthSchedule, GrowthStage

#: What arms have in common with the plan: training FLOPs, or tokens.
BudgetKind = Literal["flops", "tokens"]


@dataclass(frozen=True)
class Purse:
    """What an arm takes over from the plan.

    Args:
        total: the budget.
        price: of a token in a structure, in the budget's unit.
        pretrained: whether the first model is trained already, and not trained further.
        inits: of each operator that the plan names one for.
    """

    total: float
    price: Callable[[ModelDims], float]
    pretrained: bool
    inits: Mapping[str, str]

    @classmethod
    def of(cls, schedule: GrowthSchedule, config: Any, sequence_length: int, budget: str) -> Purse:
        """The purse of a plan.

        Raises:
            ScheduleError: for a plan without tokens.
            PlanError: for an unknown budget.
        """
        if budget not in ("flops", "tokens"):
            raise PlanError(f"unknown budget {budget!r}; arms spend as many 'flops' or as many 'tokens' as the plan")
        if not any(schedule.tokens):
            raise ScheduleError("the schedule has no tokens to compare at; share some out, schedule.with_tokens(10e9)")

        def price(dims: ModelDims) -> float:
            return float(flops_per_token(dims, config, sequence_length)) if budget == "flops" else 1.0

        total = sum(price(dims) * tokens for dims, tokens in zip(schedule.structures, schedule.tokens, strict=True))
        return cls(total, price, not schedule.initial_tokens, _inits_of(schedule))

    def from_random(self, inits: Mapping[str, str]) -> Purse:
        """The same purse for an arm that begins with random weights."""
        return replace(self, pretrained=False, inits=inits)


def schedule_of(structures: Sequence[ModelDims], shares: Sequence[float], purse: Purse) -> GrowthSchedule:
    """The schedule through structures; a stage that grows nothing leaves its share to the one before it."""
    path: list[ModelDims] = []
    weights: list[float] = []
    for dims, share in zip(structures, shares, strict=True):
        if path and dims == path[-1]:
            weights[-1] += share
        else:
            path.append(dims)
            weights.append(share)
    if purse.pretrained:
        weights[0] = 0
    tokens = _shared_out([purse.price(dims) for dims in path], weights, purse.total)
    return GrowthSchedule(path[0], tuple(_stages(path, tokens[1:], purse.inits)), tokens[0])


def at_equal_flops(
    structures: Sequence[ModelDims],
    shares: Sequence[float],
    flops: float,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
) -> list[int]:
    """Whole tokens for each stage of training, in proportion to its share, that together take so many training FLOPs.

    The last stage takes up what rounding the others leaves.

    Args:
        structures: the structure in each stage.
        shares: of the tokens, one for each.
        flops: to spend.
        config: what growth leaves alone, see `cost`.
        sequence_length: tokens of a training sequence.

    Raises:
        PlanError: for shares that are not one for each structure, or are none.

    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> at_equal_flops([small, large], [1, 3], flops_per_token(small) * 10 + flops_per_token(large) * 30)
    [10, 30]
    """
    if len(shares) != len(structures) or min(shares, default=0) < 0 or not any(shares):
        raise PlanError(f"{list(shares)} do not share tokens among {len(structures)} structures: give each 0 or more")
    return _shared_out([flops_per_token(dims, config, sequence_length) for dims in structures], shares, flops)


def _shared_out(prices: Sequence[float], shares: Sequence[float], total: float) -> list[int]:
    scale = total / sum(price * share for price, share in zip(prices, shares, strict=True))
    tokens = [round(scale * share) for share in shares[:-1]]
    spent = sum(price * count for price, count in zip(prices, tokens, strict=False))
    return [*tokens, max(round((total - spent) / prices[-1]), 0)]


def _stages(path: Sequence[ModelDims], tokens: Sequence[int], inits: Mapping[str, str]) -> Iterator[GrowthStage]:
    for old, new, count in zip(path[:-1], path[1:], tokens, strict=True):
        operators = operators_between(old, new)
        own = {name: inits[name] for name in operators if name in inits}
        yield GrowthStage(operators, new, count, own or None)


def _inits_of(schedule: GrowthSchedule) -> dict[str, str]:
    """How the plan initialises an operator where it says so, the first time that it grows it."""
    inits: dict[str, str] = {}
    for stage in reversed(schedule.stages):
        named = dict.fromkeys(stage.operators, stage.init) if isinstance(stage.init, str) else stage.init
        inits.update(named or {})
    return inits
