"""`SlopPlanner`: the best growth schedules through a space of configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, Protocol

import numpy as np

from ..cost.hours import CostModel
from ..cost.scaling_law import ScalingLaw
from ..dims import ModelDims
from ..errors import GrowthError, PlanError
from ..operators import OPERATORS, get_operator, find_operators
from ..schedule import PAPER_INITIAL_SHARE, GrowthSchedule, GrowthStage
from .best_paths import GrowthGraph, StageCost, check_size, count_edges, build_grid_edges, round_for_ties
from .budget import Budget, TokenAllocation
from .constraints import PathConstraints, is_at_least
from .corners import Corners, best_orders
from .grid import OWN_FIELD, GrowthGrid, list_axis_values, build_grid, get_grid_key, compute_grid_shape
from .objectives import OBJECTIVES, Objective, evaluate_objective, step_of
from .space import ConfigSpace
from .structures import DimsArray, CostInputs, DimsTable

Mode = Literal["once", "repeated", "joint"]
Sharing = Literal["paper", "utility"]
Path = tuple[ModelDims, ...]


class ScheduleProbe(Protocol):
    """What a planner may have its schedules tried by, such as `experiments.probe.Probe`."""

    def __call__(self, schedules: Sequence[GrowthSchedule], /) -> Sequence[GrowthSchedule]:
        """The same schedules in the order of what was measured, best first; their scores may tell it."""
        ...


#: Up to so many targets may have a grid each, where the boxes to them are small beside the box around all of them.
_MAX_ALONE = 64


@dataclass(frozen=True)
class SlopPlanner:
    """Finds growth schedules from an initial structure to the targets of a space.

    A dimension without an operator of its own follows `hidden`: heads always did in the paper's tables (fixed
    head_dim), and ffn does in its Table 4. Only structures that transformers can load and the space allows count.

    | mode | a stage grows | number of stages | cost |
    |---|---|---|---|
    | `once` (the paper) | one dimension, all the way to the target | one for each operator | targets x orders |
    | `repeated` | one dimension, by any amount | given, or free | structures x values of a dimension x stages |
    | `joint` | any number of dimensions, by any amounts | given, or free | pairs of structures x stages |

    All are exact. `once` scores every order of every target; the others are Algorithm 1 in its general form, a layered
    dynamic programme over (structure, number of stages) on the grid of the space's multiples.

    Args:
        initial: the structure to grow from.
        space: the targets, and what limits every structure on the way.
        operators: the dimensions to grow, in any order.
        objective: a name in `objectives.OBJECTIVES`.
        cost_model: hours of the hardware, for the objectives that need them.
        law: the scaling law that predicts losses.
        mode: see the table.
        stages: number of growth stages; None for `once`, or to leave it free.
        max_stages: the largest number where it is free.
        stage_price: what a stage costs beside its training, in the objective's unit; for sums that are to be small.
        max_factor: largest growth of the parameters in one stage; None for any.
        through: structures that every schedule has to pass.

    Raises:
        PlanError: for arguments that contradict one another or mean nothing.

    >>> space = ConfigSpace(targets=[ModelDims(2816, 7680, 8, 22), ModelDims(1280, 3584, 40, 10)])
    >>> best = SlopPlanner(ModelDims(768, 2048, 6, 6), space).plan(top_k=1)[0]
    >>> best.sequence, str(best.target), f"{best.scores['delta_params']:.3g}"
    ('l-f-h', '(2816, 7680, 8, 22)', '1.69e+24')
    """

    initial: ModelDims
    space: ConfigSpace
    operators: Sequence[str] = ("layer", "ffn", "hidden")
    objective: str = "delta_params"
    cost_model: CostModel | None = None
    law: ScalingLaw = field(default_factory=ScalingLaw)
    mode: Mode = "once"
    stages: int | None = None
    max_stages: int = 6
    stage_price: float = 0.0
    max_factor: float | None = None
    through: Sequence[ModelDims] = ()

    def __post_init__(self) -> None:
        if not self.operators or len(set(self.operators)) < len(self.operators):
            raise PlanError(f"operators must be one or more different names, got {list(self.operators)}")
        for name in self.operators:
            get_operator(name)
        if self.objective not in OBJECTIVES:
            raise PlanError(f"unknown objective {self.objective!r}; known: {', '.join(OBJECTIVES)}")
        if self.mode not in ("once", "repeated", "joint"):
            raise PlanError(f"mode must be 'once', 'repeated' or 'joint', got {self.mode!r}")
        if self._objective.needs_cost_model and self.cost_model is None:
            raise PlanError(f"objective {self.objective!r} needs hours: give a cost model, see `slop calibrate`")
        if self.max_factor is not None and not (math.isfinite(self.max_factor) and self.max_factor > 1):
            raise PlanError(f"max_factor must be a number above 1, such as 2, got {self.max_factor}")
        self._check_stages()
        for waypoint in self.through:
            try:
                find_operators(self.initial, waypoint)
            except GrowthError as caught:
                raise PlanError(f"no schedule can pass through {waypoint}: from {self.initial}, {caught}") from None
        if obstacle := self.space.obstacle(self.initial):
            raise PlanError(f"the initial structure is not one that the space allows: {obstacle}")

    def _check_stages(self) -> None:
        for name, value in (("stages", self.stages), ("max_stages", self.max_stages)):
            if value is not None and value < 1:
                raise PlanError(f"{name} must be at least 1, got {value}")
        if self.mode == "once" and self.stages not in (None, len(self.operators)):
            raise PlanError(
                f"mode 'once' has a stage for each of {len(self.operators)} operators, got stages={self.stages}; "
                "take mode 'repeated' or 'joint' for another number"
            )
        if not (math.isfinite(self.stage_price) and self.stage_price >= 0):
            raise PlanError(f"stage_price must be 0 or more, got {self.stage_price}")
        if self.stage_price and not self._objective.compares_stages:
            raise PlanError(f"a stage has no price in the unit of {self.objective!r}; take objective flops or hours")
        if self.mode != "once" and self.stages is None and not self._objective.compares_stages:
            raise PlanError(
                f"objective {self.objective!r} cannot choose the number of stages: each stage is one more factor (or "
                "summand), so that the choice would depend on the unit it is counted in; give stages, or take "
                "objective flops or hours"
            )

    @property
    def _objective(self) -> Objective:
        return OBJECTIVES[self.objective]

    @property
    def _prices(self) -> CostInputs:
        return CostInputs(self.space.config, self.space.sequence_length, self.cost_model, self.law)

    @property
    def rules(self) -> PathConstraints:
        """What the structures and growths of a schedule keep to."""
        return PathConstraints(self.space, self.max_factor, tuple(self.through))

    def plan(
        self,
        top_k: int = 5,
        *,
        tokens: float | Sequence[float] | None = None,
        initial_share: float = PAPER_INITIAL_SHARE,
        already_seen: float = 0.0,
        sharing: Sharing = "paper",
        probe: ScheduleProbe | None = None,
    ) -> list[GrowthSchedule]:
        """The best schedules, best first, all different.

        In mode `once` equal scores are ordered by the FLOPs of stages of equal length, then by target and sequence;
        in the others by number of stages, then by the structures along the way.

        Args:
            top_k: how many schedules.
            tokens: training tokens of the whole run, or of each stage, the initial model's first.
            initial_share: the initial model's share of the tokens, a growth stage having 1 (the paper's rule); 0 for
                a model that is trained already.
            already_seen: tokens that the initial model was trained on before.
            sharing: "utility" shares the tokens of the schedules found out once more, by equal marginal utility
                (`tokens.utility_shares`); they were ranked with the paper's shares.
            probe: tries the schedules found, and puts them into the order of what it measured; a `Probe` trains each
                for a little.

        Raises:
            PlanError: where no schedule exists; the message says what stands in the way.
        """
        rule = TokenAllocation(tokens, initial_share, already_seen, sharing)
        self._check_request(top_k, rule)
        targets = self._reachable_targets()
        found = self._ordered(targets, rule, top_k) if self.mode == "once" else self._searched(targets, rule, top_k)
        if not found:
            raise PlanError(self._no_path())
        if sharing == "utility":
            found = [(path, self._by_utility(path, rule)) for path, _ in found]
        schedules = [self._schedule(path, budget) for path, budget in found]
        return schedules if probe is None else self._tried(schedules, probe)

    def _tried(self, schedules: list[GrowthSchedule], probe: ScheduleProbe) -> list[GrowthSchedule]:
        """The schedules in the order that a probe found."""
        order = list(probe(schedules))
        if len(order) != len(schedules) or any(one not in order for one in schedules):
            raise PlanError(f"the probe was given {len(schedules)} schedules and returned others: it may order them")
        return order

    def _check_request(self, top_k: int, rule: TokenAllocation) -> None:
        if top_k < 1:
            raise PlanError(f"top_k must be at least 1, got {top_k}")
        if self._objective.needs_tokens and rule.tokens is None:
            raise PlanError(f"objective {self.objective!r} needs a token budget: give tokens, such as 65e9")
        if rule.is_for_each_stage and self.mode != "once" and self.stages is None:
            raise PlanError("tokens for each stage need a given number of stages: give stages")
        if self._objective.needs_start and not rule.knows_the_start:
            raise PlanError(
                f"objective {self.objective!r} has to know how good the initial model is: give the tokens that it was "
                "trained on (already_seen), or a share of the budget"
            )

    def _by_utility(self, path: Path, rule: TokenAllocation) -> Budget:
        structures = DimsTable(DimsArray.of(path), self._prices)
        costs = structures.flops_per_token if self.cost_model is None else structures.hours_per_token
        return rule.by_utility(structures.parameters.tolist(), costs.tolist(), self.law)

    def _reachable_targets(self) -> DimsArray:
        """The targets that the operators can grow to, with no dimension left behind."""
        targets = self.space.targets_from(self.initial)
        changed = {name: self._changes(targets, name) for name in OPERATORS}
        reached = self.space.allows(targets)
        for waypoint in (self.initial, *self.through):
            reached &= is_at_least(targets, waypoint)
        for name, changes in changed.items():
            if name in self.operators:
                reached &= changes | (self.mode != "once")
            elif name not in self._followers:
                reached &= ~changes
        reached &= np.logical_or.reduce(list(changed.values()))
        if not reached.any():
            more = f" (and {len(targets) - 1} more targets)" if len(targets) > 1 else ""
            raise PlanError(
                f"no target can be reached from {self.initial} by {', '.join(self.operators)}; "
                f"{targets.at(0)}: {self._obstacle(targets.at(0))}{more}"
            )
        return targets[reached]

    def _changes(self, targets: DimsArray, operator: str) -> np.ndarray:
        fields = OPERATORS[operator].fields
        return np.logical_or.reduce([getattr(targets, name) != getattr(self.initial, name) for name in fields])

    def _obstacle(self, target: ModelDims) -> str | None:
        """What stands in the way of one target."""
        try:
            needed = find_operators(self.initial, target)
            for waypoint in self.through:
                find_operators(waypoint, target)
        except GrowthError as caught:
            return str(caught)
        idle = [name for name in self.operators if name not in needed]
        if idle and (self.mode == "once" or not needed):
            return f"{', '.join(idle)} would grow nothing; leave it out of the operators"
        missing = [name for name in needed if name not in (*self.operators, *self._followers)]
        if missing:
            return f"needs {', '.join(missing)} among the operators"
        return self.space.obstacle(target)

    @property
    def _followers(self) -> tuple[str, ...]:
        """The operators that grow with `hidden`, having no stages of their own."""
        own = self.operators
        return tuple(name for name in ("ffn", "mha", "head_dim") if name not in own) if "hidden" in own else ()

    def _ordered(self, targets: DimsArray, rule: TokenAllocation, top_k: int) -> list[tuple[Path, Budget]]:
        """The best paths on which each dimension grows once."""
        budget = rule.budget(len(self.operators))
        grows = {name: (name, *self._followers) if name == "hidden" else (name,) for name in self.operators}
        corners = Corners(self.initial, targets, grows, self._prices, self.rules)
        found = []
        for target, order in best_orders(corners, self._objective, budget, top_k):
            own = replace(corners, targets=targets[[target]])
            found.append((tuple(own.at(grown).at(0) for grown in own.path(order)), budget))
        return found

    def _searched(self, targets: DimsArray, rule: TokenAllocation, top_k: int) -> list[tuple[Path, Budget]]:
        """The best paths by one or more dimensions a stage."""
        counts = range(1, self.max_stages + 1) if self.stages is None else [self.stages]
        budgets = [rule.budget(count) for count in counts]
        found = []
        for grid, graph in self._graphs([targets.at(number) for number in range(len(targets))]):
            for budget in budgets:
                for cost, path in self._best_paths(grid, graph, budget, top_k):
                    price = float(round_for_ties(np.float64(cost + self.stage_price * budget.stages)))
                    structures = tuple(graph.structures.dims.at(vertex) for vertex in path)
                    sizes = tuple(tuple(dims.as_dict().values()) for dims in structures)
                    found.append(((price, budget.stages, sizes), structures, budget))
        found.sort(key=lambda one: one[0])
        return [(structures, budget) for _, structures, budget in found[:top_k]]

    def _graphs(self, targets: Sequence[ModelDims]) -> Iterator[tuple[GrowthGrid, GrowthGraph]]:
        """The growths to the targets; those whose followers follow alike may share a grid."""
        values = self.axes(targets)

        def key(target: ModelDims) -> tuple[str, ...]:
            return tuple(map(str, get_grid_key(target, list(values))))

        for _, group in groupby(sorted(targets, key=key), key):
            goals = list(group)
            joint = self.mode == "joint"
            alone = sum(count_edges(compute_grid_shape([goal], values), joint) for goal in goals[:_MAX_ALONE])
            is_less = len(goals) <= _MAX_ALONE and alone < count_edges(compute_grid_shape(goals, values), joint)
            for some in [[goal] for goal in goals] if is_less else [goals]:
                check_size(compute_grid_shape(some, values), joint)
                grid = build_grid(self.initial, some, values, self.space.ffn_multiple)
                yield grid, self.graph(grid)

    def axes(self, targets: Sequence[ModelDims]) -> dict[str, np.ndarray]:
        """The values that each dimension with stages of its own may take on the way to targets, ascending.

        In mode `once` those at the two ends, otherwise also the space's multiples.
        """
        grown = {name for target in targets for name in find_operators(self.initial, target)}
        own = [name for name in self.operators if name in grown]
        if self.mode == "once":
            ends = (self.initial, *targets)
            return {name: np.unique([getattr(dims, OWN_FIELD[name]) for dims in ends]) for name in own}
        return {name: list_axis_values(name, self.initial, targets, self.space) for name in own}

    def graph(self, grid: GrowthGrid) -> GrowthGraph:
        """All growths on a grid that the mode and the rules allow."""
        structures = DimsTable(grid.structures, self._prices)
        edges = build_grid_edges(grid.shape, self.mode == "joint")
        loadable = self.rules.vertices(structures)
        allowed = loadable[edges.targets] & loadable[edges.from_each]
        if self.max_factor is not None or self.through:
            allowed &= self.rules.edges(structures.take(edges.from_each), structures.take(edges.targets))
        return GrowthGraph(structures, edges, allowed)

    def _best_paths(
        self, grid: GrowthGrid, graph: GrowthGraph, budget: Budget, top_k: int
    ) -> Iterator[tuple[float, tuple[int, ...]]]:
        cost, first = self.stage_cost(budget)
        same = self.has_fixed_costs(budget)
        for total, path in graph.best_paths(grid.start, grid.goals, budget.stages, cost, fixed_cost=same, top_k=top_k):
            yield first + total, path

    def has_fixed_costs(self, budget: Budget) -> bool:
        """Whether a growth costs the same in every stage: no tokens count, or they are as many in each."""
        equal = len(set(budget.tokens[1:])) == 1
        return not self._objective.needs_tokens or (self._objective.compares_stages and equal)

    def stage_cost(self, budget: Budget) -> tuple[StageCost, float]:
        """The cost of a stage under the objective, and that of training the initial model."""
        initial = DimsTable(DimsArray.of([self.initial]), self._prices)

        def cost(number: int, before: DimsTable, after: DimsTable) -> np.ndarray:
            return self._objective.cost(step_of(budget, number, initial, before, after))

        first = float(cost(0, initial, initial)[0]) if self._objective.counts_initial else 0.0
        return cost, first

    def _no_path(self) -> str:
        if self.max_factor is not None or self.through:
            return (
                "no schedule keeps to max_factor and passes through all that it has to; allow more growth in a stage, "
                "more stages, or mode 'repeated' or 'joint'"
            )
        if self.mode != "once" and self.stages is not None:
            return (
                f"no schedule of {self.stages} stages leads to a target: take more (each of the operators needs one, "
                "unless mode is 'joint') or fewer (each has to grow something on the space's multiples)"
            )
        return (
            "in every order some structure between initial and target has a hidden size that its heads do not divide, "
            "which transformers refuses, or breaks a limit of the space; let the heads follow hidden (leave out "
            "'mha'), or choose head counts that divide both hidden sizes"
        )

    def _schedule(self, path: Path, budget: Budget) -> GrowthSchedule:
        stages = []
        for before, after, count in zip(path, path[1:], budget.tokens[1:], strict=False):
            grown = find_operators(before, after)
            own = tuple(name for name in grown if name in self.operators)
            followers = tuple(name for name in grown if name not in own)
            stages.append(GrowthStage((*own, *followers), after, int(count)))
        return GrowthSchedule(path[0], tuple(stages), int(budget.tokens[0]), self.scores(path, budget))

    def scores(self, path: Sequence[ModelDims], budget: Budget) -> dict[str, float]:
        """What every objective makes of a schedule, those left out that lack a budget or a cost model."""
        structures = DimsTable(DimsArray.of(path)[None], self._prices)
        return {
            name: float(evaluate_objective(one, structures, budget)[0])
            for name, one in OBJECTIVES.items()
            if self._tells(name, budget)
        }

    def _tells(self, name: str, budget: Budget) -> bool:
        """Whether all that an objective needs is known."""
        objective = OBJECTIVES[name]
        if objective.needs_start and not (budget.seen_before(1) and all(budget.tokens[1:])):
            return False
        hours = self.cost_model is not None or not objective.needs_cost_model
        return hours and (budget.is_given or not objective.needs_tokens)
