"""`ArmRequest`: a plan whose budget a control arm spends in another way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Literal, TypeAlias

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError, ScheduleError
from ..operators import find_operators
from ..planning.budget import allocate_tokens
from ..schedule import GrowthSchedule, GrowthStage

#: What an arm spends as much of as the plan: training FLOPs, or tokens.
BudgetKind: TypeAlias = Literal["flops", "tokens"]


@dataclass(frozen=True)
class ArmRequest:
    """A request for a control arm of a plan, at equal budget.

    Args:
        schedule: the plan, with tokens.
        config: settings that growth does not change, see `slop_hf.cost.flops`.
        sequence_length: tokens per training sequence.
        budget: spend as many "flops" as the plan, or as many "tokens".

    Raises:
        ScheduleError: if the plan has no tokens.
        PlanError: for an unknown budget.
    """

    schedule: GrowthSchedule
    config: ModelConfig = field(default_factory=lambda: DEFAULT_CONFIG)
    sequence_length: int = 2048
    budget: BudgetKind = "flops"

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, GrowthSchedule):
            raise PlanError(f"schedule must be a GrowthSchedule, got {self.schedule!r}")
        if self.budget not in ("flops", "tokens"):
            raise PlanError(f"unknown budget {self.budget!r}; arms spend as many 'flops' or 'tokens' as the plan")
        if not any(self.schedule.tokens):
            raise ScheduleError("the schedule has no tokens to compare at; give it some: schedule.with_tokens(10e9)")

    def cost_per_token(self, dims: ModelDims) -> float:
        """Cost of training a structure on one token, in the unit of the budget."""
        if self.budget == "tokens":
            return 1.0
        return float(count_flops_per_token(dims, self.config, self.sequence_length))

    @property
    def total(self) -> float:
        """The budget: what the plan spends."""
        stages = zip(self.schedule.structures, self.schedule.tokens, strict=True)
        return sum(self.cost_per_token(dims) * tokens for dims, tokens in stages)

    @property
    def inits(self) -> dict[str, str]:
        """Init per operator: the one that the plan names when it first grows the operator, if it names one."""
        inits: dict[str, str] = {}
        for stage in reversed(self.schedule.stages):
            named = dict.fromkeys(stage.operators, stage.init) if isinstance(stage.init, str) else stage.init
            inits.update(named or {})
        return inits

    def build_schedule(
        self,
        structures: Sequence[ModelDims],
        shares: Sequence[float],
        inits: Mapping[str, str] | None = None,
        *,
        from_random: bool = False,
    ) -> GrowthSchedule:
        """Build the schedule through structures that spends the budget.

        A stage that would grow nothing is left out, and its share of the tokens goes to the stage before it.

        Args:
            structures, shares: structure of each stage, and its share of the tokens.
            inits: init per operator; default, the plan's.
            from_random: whether the first structure begins with random weights. Otherwise it is the plan's initial
                model, and trained only if the plan trains it.
        """
        groups = groupby(zip(structures, shares, strict=True), key=itemgetter(0))
        weights = {dims: sum(share for _, share in stages) for dims, stages in groups}
        path = list(weights)
        if not from_random and not self.schedule.initial_tokens:
            weights[path[0]] = 0
        first, *rest = allocate_tokens([*weights.values()], self.total, [self.cost_per_token(dims) for dims in path])
        inits = self.inits if inits is None else inits
        stages = []
        for before, after, tokens in zip(path[:-1], path[1:], rest, strict=True):
            operators = find_operators(before, after)
            named = {name: inits[name] for name in operators if name in inits}
            stages.append(GrowthStage(operators, after, tokens, named or None))
        # `replace` keeps the model that the plan is for.
        return replace(self.schedule, initial=path[0], stages=tuple(stages), initial_tokens=first, scores={})
