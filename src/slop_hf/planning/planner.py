"""`SlopPlanner`: the best growth schedules through a space of configurations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from types import NoneType
from typing import Literal, Protocol, TypeAlias

import numpy as np

from ..architectures import get_architecture
from ..cost.hours import CostModel
from ..cost.scaling_law import ScalingLaw
from ..dims import IntArray, ModelDims
from ..errors import GrowthError, PlanError
from ..io.numbers import is_finite_number, is_positive_number, require_whole_number
from ..io.serialization import describe_alternatives
from ..operators import OPERATORS, find_operators, get_operator
from ..schedule import PAPER_INITIAL_SHARE, GrowthSchedule, GrowthStage
from .best_paths import GrowthGraph, StageCost, build_grid_edges, check_size, count_edges, round_for_ties
from .budget import Budget, Sharing, TokenAllocation, share_tokens_by_utility
from .constraints import PathConstraints, is_at_least
from .final_loss import (
    SEED_COSTS,
    FinalLossSearch,
    LossSettings,
    Path,
    PlannedRun,
    SearchOutcome,
    compute_no_cost,
    list_indexed_graphs,
    list_neighbours,
)
from .grid import (
    OWN_FIELD,
    GrowthGrid,
    build_grid,
    compute_grid_shape,
    find_growing_edges,
    get_grid_key,
    list_axis_values,
)
from .objectives import FINAL_LOSS, OBJECTIVE_NAMES, OBJECTIVES, Objective, evaluate_objective
from .orderings import find_best_orders
from .space import ConfigSpace, check_structures
from .structures import BoolArray, CostInputs, DimsArray, DimsTable

Mode: TypeAlias = Literal["once", "repeated", "joint"]


class ScheduleProbe(Protocol):
    """A callable that re-ranks schedules by short trial runs, e.g. `Probe`."""

    def __call__(self, schedules: Sequence[GrowthSchedule], /) -> Sequence[GrowthSchedule]:
        """Return the same schedules, best first by its measurements; it may add to their scores."""
        ...


#: More schedules than anyone reads; the search holds many times as many paths in memory.
_MAX_SCHEDULES = 10_000
#: Targets, and growths of all grids together, that modes `repeated` and `joint` search within about ten minutes.
_MAX_GRAPH_TARGETS = 100_000
_MAX_TOTAL_EDGES = 2_000_000_000
#: Orders, and paths of the other modes, that objective `final_loss` compares one by one.
_MOST_ORDERS, _MOST_PATHS = 20_000, 2_000
#: Paths per number of stages that its search begins with if there are more, by each of `SEED_COSTS`.
_SEEDS = 4
#: Each target gets a grid of its own only if there are no more targets than this.
_MAX_SEPARATE_GRIDS = 64


@dataclass(frozen=True)
class SlopPlanner:
    """Finds growth schedules from an initial structure to the targets of a space.

    A dimension without an operator of its own follows `hidden`: heads always did in the paper's tables (fixed
    head_dim), and ffn does in its Table 4. Schedules use only structures that transformers can load and the space
    allows.

    Modes, with what a stage grows and the cost of the search:

    * `once` (the paper): one dimension, all the way to the target, so one stage per operator; targets x orders.
    * `repeated`: one dimension, by any amount; structures x values per dimension x stages.
    * `joint`: any number of dimensions, by any amounts; pairs of structures x stages.

    All are exact. `once` scores every order to every target; the others are Algorithm 1 in its general form, a layered
    dynamic programme over (structure, number of stages) on the grid of the space's multiples.

    Args:
        initial: structure to grow from.
        space: targets, and limits on every structure on the way.
        operators: dimensions to grow, in any order.
        objective: a name in `OBJECTIVES`, or `final_loss`, the loss at the end by a growth law. Each schedule is then
            the best of its path over the tokens of its stages and the span of the learning-rate schedule.
        cost_model: device hours of the hardware, for objectives that need them.
        law: scaling law that predicts losses.
        loss: growth law and grid of objective `final_loss`; None is the default law.
        mode: see the list.
        stages: number of growth stages; None for mode `once`, or to let the planner choose.
        max_stages: largest number of stages if the planner chooses.
        stage_price: fixed cost added per stage, in the objective's unit; only for objectives that are summed and
            minimised.
        max_factor: largest growth of the parameters in one stage; None for no limit.
        through: structures that every schedule passes through.

    Raises:
        PlanError: if arguments contradict each other or are out of range.

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
    loss: LossSettings | None = None
    mode: Mode = "once"
    stages: int | None = None
    max_stages: int = 6
    stage_price: float = 0.0
    max_factor: float | None = None
    through: Sequence[ModelDims] = ()

    def __post_init__(self) -> None:
        for name, value, kind in (("initial", self.initial, ModelDims), ("space", self.space, ConfigSpace)):
            if not isinstance(value, kind):
                raise PlanError(f"{name} must be a {kind.__name__}, got {value!r}")
        if not isinstance(self.cost_model, (CostModel, NoneType)):
            raise PlanError(f"cost_model must be a CostModel, see CostModel.from_yaml, got {self.cost_model!r}")
        if not isinstance(self.law, ScalingLaw):
            raise PlanError(f"law must be a ScalingLaw, got {self.law!r}")
        if isinstance(self.operators, str):
            raise PlanError(f"operators must be a list of names, got {self.operators!r}: give [{self.operators!r}]")
        if not self.operators or len(set(self.operators)) < len(self.operators):
            raise PlanError(f"operators must be one or more different names, got {list(self.operators)}")
        for name in self.operators:
            get_operator(name)
        if self.objective not in OBJECTIVE_NAMES:
            alternatives = describe_alternatives(self.objective, OBJECTIVE_NAMES)
            raise PlanError(f"unknown objective {self.objective!r}{alternatives}")
        if self.mode not in ("once", "repeated", "joint"):
            alternatives = describe_alternatives(str(self.mode), ["once", "repeated", "joint"], list_all=False)
            raise PlanError(f"mode must be 'once', 'repeated' or 'joint', got {self.mode!r}{alternatives}")
        if self.objective in (FINAL_LOSS, "loss_per_hour") and get_architecture(self.space.config).has_experts:
            raise PlanError(
                f"objective {self.objective!r} needs a law of the loss, and no law is fitted to models with experts; "
                "choose flops, hours or delta_params"
            )
        if not isinstance(self.loss, (LossSettings, NoneType)):
            raise PlanError(f"loss must be LossSettings, got {self.loss!r}")
        if not self._is_of_runs and self._objective.needs_cost_model and self.cost_model is None:
            raise PlanError(f"objective {self.objective!r} needs hours: give a cost model, see `slop calibrate`")
        if self.max_factor is not None and not (is_finite_number(self.max_factor) and self.max_factor > 1):
            raise PlanError(f"max_factor must be a number above 1, such as 2, got {self.max_factor}")
        self._check_stages()
        for waypoint in check_structures(self.through, "through"):
            try:
                find_operators(self.initial, waypoint)
            except GrowthError as caught:
                raise PlanError(f"no schedule can pass through {waypoint}: from {self.initial}, {caught}") from None
        if obstacle := self.space.find_obstacle(self.initial):
            raise PlanError(f"the space does not allow the initial structure: {obstacle}")

    def _check_stages(self) -> None:
        for name, value in (("stages", self.stages), ("max_stages", self.max_stages)):
            if value is not None:
                require_whole_number(value, name, error=PlanError)
        if self.mode == "once" and self.stages not in (None, len(self.operators)):
            raise PlanError(
                f"mode 'once' has one stage for each of {len(self.operators)} operators, got stages={self.stages}; "
                "use mode 'repeated' or 'joint' for another number"
            )
        if not is_finite_number(self.stage_price, least=0):
            raise PlanError(f"stage_price must be 0 or more, got {self.stage_price}")
        if self._is_of_runs:
            if self.stage_price:
                raise PlanError("objective 'final_loss' has no use for a stage_price; choose flops or hours")
            return
        if self.stage_price and not self._objective.compares_stages:
            raise PlanError(f"objective {self.objective!r} has no use for a stage_price; choose flops or hours")
        if self.mode != "once" and self.stages is None and not self._objective.compares_stages:
            raise PlanError(
                f"objective {self.objective!r} cannot choose the number of stages: each stage adds a factor or a "
                "term, so the choice would depend on the unit of measurement; give stages, or use objective flops or "
                "hours"
            )

    @property
    def _is_of_runs(self) -> bool:
        """Whether the objective is the loss of whole runs, and not a sum over stages."""
        return self.objective == FINAL_LOSS

    @property
    def _objective(self) -> Objective:
        if self._is_of_runs:
            raise PlanError(
                "objective 'final_loss' has no value per stage: the loss depends on the whole run; use another "
                "objective to explain a schedule"
            )
        return OBJECTIVES[self.objective]

    @property
    def _inputs(self) -> CostInputs:
        return CostInputs(self.space.config, self.space.sequence_length, self.cost_model, self.law)

    @property
    def constraints(self) -> PathConstraints:
        """Constraints on the structures and growths of a schedule."""
        return PathConstraints(self.space, self.max_factor, tuple(self.through))

    def plan(
        self,
        top_k: int = 5,
        *,
        tokens: float | Sequence[float] | None = None,
        flops: float | None = None,
        initial_share: float = PAPER_INITIAL_SHARE,
        already_seen: float = 0.0,
        sharing: Sharing = "paper",
        probe: ScheduleProbe | None = None,
        observe: Callable[[SearchOutcome], object] | None = None,
    ) -> list[GrowthSchedule]:
        """Find the best schedules, best first, all different.

        In mode `once` equal scores are ordered by the FLOPs of stages of equal length, then by target and sequence;
        in the other modes by number of stages, then by the structures on the way.

        Args:
            top_k: largest number of schedules.
            tokens: training tokens of the whole run, or one number per stage, the initial model's first.
            flops: training FLOPs of the whole run, for objective `final_loss`, which splits them itself.
            initial_share: the initial model's share of the tokens, relative to one growth stage (the paper's rule); 0
                for an already trained model.
            already_seen: tokens that the initial model was trained on before.
            sharing: "paper", or "utility" to split the tokens of the schedules by equal marginal utility
                (`share_tokens_by_utility`) after they are ranked with the paper's shares.
            probe: callable that re-ranks the schedules by short trial runs, such as a `Probe`; None keeps the
                planner's order.
            observe: function that is called with the outcome of the search under objective `final_loss`.

        Raises:
            PlanError: if no schedule exists; the message says what is in the way.
        """
        allocation = TokenAllocation(tokens, initial_share, already_seen, sharing)
        if self._is_of_runs:
            if tokens is not None or sharing != "paper":
                raise PlanError("objective 'final_loss' splits the budget itself: give flops, and leave tokens out")
            if not initial_share and not already_seen:
                raise PlanError(
                    "objective 'final_loss' has to know how good the initial model is: give the tokens that it was "
                    "trained on (already_seen), or leave pretrained out"
                )
            outcome = self.search_final_loss(top_k, flops=flops, already_seen=already_seen)
            if observe is not None:
                observe(outcome)
            schedules = [self.build_planned_schedule(run, already_seen) for run in outcome.runs]
            return schedules if probe is None else _rerank(schedules, probe)
        if flops is not None:
            raise PlanError(f"flops are for objective 'final_loss', got objective {self.objective!r}: give tokens")
        self._check_request(top_k, allocation)
        targets = self._find_reachable_targets()
        search = self._search_orders if self.mode == "once" else self._search_graphs
        paths = search(targets, allocation, top_k)
        if not paths:
            raise PlanError(self._explain_no_path())
        if sharing == "utility":
            paths = [(path, self._share_by_utility(path, allocation)) for path, _ in paths]
        schedules = [self._build_schedule(path, budget) for path, budget in paths]
        return schedules if probe is None else _rerank(schedules, probe)

    def search_final_loss(self, top_k: int = 5, *, flops: float | None, already_seen: float = 0.0) -> SearchOutcome:
        """Return the runs with the least predicted loss at a budget, the best of each path, and how they were found.

        Every path of the mode is compared if there are at most `_MOST_PATHS`; otherwise paths are improved one
        structure at a time, from some with little, with even and with early growth.

        Args:
            top_k: largest number of runs.
            flops: training FLOPs of each run.
            already_seen: tokens that the initial model was trained on before, under a schedule that has ended.

        Raises:
            PlanError: without a budget, if no path exists, or there are too many targets.
        """
        require_whole_number(top_k, "top_k", most=_MAX_SCHEDULES, error=PlanError)
        if not is_positive_number(flops):
            wrong = "" if flops is None else f", got {flops!r}"
            raise PlanError(f"objective 'final_loss' needs a budget: give flops, such as 1e20{wrong}")
        settings = replace(self.loss or LossSettings(), already_seen=already_seen)
        search = FinalLossSearch(self._inputs, float(flops or 0.0), settings)
        targets = self._find_reachable_targets()
        if self.mode == "once":
            paths, list_changes = self._list_orders(targets), None
        else:
            paths, list_changes = self._list_graph_paths([targets.at(number) for number in range(len(targets))])
        if not paths:
            raise PlanError(self._explain_no_path())
        return search.rank(paths, top_k) if list_changes is None else search.improve(paths, list_changes, top_k)

    def build_planned_schedule(self, run: PlannedRun, already_seen: float = 0.0) -> GrowthSchedule:
        """Return the schedule of a run, with its scores by all objectives."""
        schedule = self._build_schedule(run.path, Budget(run.tokens, already_seen))
        return replace(schedule, scores={FINAL_LOSS: run.loss, **schedule.scores})

    def _list_orders(self, targets: DimsArray) -> list[Path]:
        """Return the paths on which each dimension grows once, in every order to every target."""
        count = len(targets) * math.factorial(len(self.operators))
        if count > _MOST_ORDERS:
            raise PlanError(
                f"{count:,} orders of growth are too many to compare by their final loss (at most {_MOST_ORDERS:,}); "
                "lower tolerance or narrow the bounds"
            )
        return find_best_orders(
            self.initial, targets, self._list_stage_fields(), self._inputs, self.constraints, compute_no_cost, count
        )

    def _list_graph_paths(
        self, goals: Sequence[ModelDims]
    ) -> tuple[list[Path], Callable[[Path], Sequence[Path]] | None]:
        """Return all paths to the goals, or some and a function that lists their neighbours."""
        longest = sum(len(axis) - (name != "mha") for name, axis in self.list_axes(goals).items())
        first, last = (1, self.max_stages) if self.stages is None else (self.stages, self.stages)
        numbers = range(first, min(last, longest) + 1)
        graphs = list(self._build_graphs(goals))
        total = sum(graph.count_paths(grid.start, grid.goals, number) for grid, graph in graphs for number in numbers)
        is_small = total <= _MOST_PATHS
        costs = (compute_no_cost,) if is_small else SEED_COSTS
        paths = [
            tuple(graph.structures.dims.at(vertex) for vertex in vertices)
            for grid, graph in graphs
            for number in numbers
            for cost in costs
            for _, vertices in islice(
                graph.find_best_paths(grid.start, grid.goals, number, cost, fixed_cost=True),
                None if is_small else _SEEDS,
            )
        ]
        return paths, None if is_small else partial(list_neighbours, list_indexed_graphs(graphs))

    def _check_request(self, top_k: int, allocation: TokenAllocation) -> None:
        require_whole_number(top_k, "top_k", most=_MAX_SCHEDULES, error=PlanError)
        if self._objective.needs_tokens and allocation.tokens is None:
            raise PlanError(f"objective {self.objective!r} needs a token budget: give tokens, such as 65e9")
        if allocation.is_per_stage and self.mode != "once" and self.stages is None:
            raise PlanError("tokens per stage need a fixed number of stages: give stages")
        if self._objective.needs_start and not allocation.trains_before_growth:
            raise PlanError(
                f"objective {self.objective!r} has to know how good the initial model is: give the tokens that it was "
                "trained on (already_seen), or a share of the budget"
            )

    def _share_by_utility(self, path: Path, allocation: TokenAllocation) -> Budget:
        assert isinstance(allocation.tokens, (int, float))
        structures = DimsTable(DimsArray.of(path), self._inputs)
        costs = structures.flops_per_token if self.cost_model is None else structures.hours_per_token
        tokens = share_tokens_by_utility(
            allocation.tokens,
            structures.parameters.tolist(),
            costs.tolist(),
            law=self.law,
            already_seen=allocation.already_seen,
            train_initial=allocation.initial_share > 0,
        )
        return Budget(tuple(tokens), allocation.already_seen)

    def _find_reachable_targets(self) -> DimsArray:
        """Return the targets to which the operators can grow every dimension that differs."""
        targets = self.space.list_targets(self.initial)
        changes = {name: self._find_changes(targets, name) for name in OPERATORS}
        reached = self.space.allows(targets) & np.any(list(changes.values()), axis=0)
        for waypoint in (self.initial, *self.through):
            reached &= is_at_least(targets, waypoint)
        for name, changed in changes.items():
            if name in self.operators:
                reached &= changed | (self.mode != "once")
            elif name not in self._followers:
                reached &= ~changed
            else:
                reached &= ~changed | changes["hidden"]
        if not reached.any():
            more = f" (and {len(targets) - 1} more targets)" if len(targets) > 1 else ""
            raise PlanError(
                f"no target can be reached from {self.initial} by {', '.join(self.operators)}; "
                f"{targets.at(0)}: {self._find_obstacle(targets.at(0))}{more}"
            )
        return targets[reached]

    def _find_changes(self, targets: DimsArray, operator: str) -> BoolArray:
        """Return whether each target differs from the initial structure in the fields of an operator."""
        fields = OPERATORS[operator].fields
        return np.any([getattr(targets, name) != getattr(self.initial, name) for name in fields], axis=0)

    def _find_obstacle(self, target: ModelDims) -> str | None:
        """Explain why one target cannot be reached."""
        try:
            needed = find_operators(self.initial, target)
            for waypoint in self.through:
                find_operators(waypoint, target)
        except GrowthError as caught:
            return str(caught)
        idle = [name for name in self.operators if name not in needed]
        if idle and (self.mode == "once" or not needed):
            return f"{', '.join(idle)} would grow nothing; leave it out of the operators"
        followers = self._followers if "hidden" in needed else ()
        if missing := [name for name in needed if name not in (*self.operators, *followers)]:
            return f"needs {', '.join(missing)} among the operators"
        return self.space.find_obstacle(target)

    @property
    def _followers(self) -> tuple[str, ...]:
        """Operators that grow with `hidden`, since they have no stages of their own."""
        candidates = ("ffn", "mha", "head_dim") if "hidden" in self.operators else ()
        return tuple(name for name in candidates if name not in self.operators)

    def _search_orders(self, targets: DimsArray, allocation: TokenAllocation, top_k: int) -> list[tuple[Path, Budget]]:
        """Return the best paths on which each dimension grows once."""
        budget = allocation.budget(len(self.operators))
        cost, _ = self.stage_cost(budget)
        fields = self._list_stage_fields()
        paths = find_best_orders(self.initial, targets, fields, self._inputs, self.constraints, cost, top_k)
        return [(path, budget) for path in paths]

    def _list_stage_fields(self) -> dict[str, list[str]]:
        """Return the fields that grow in the stage of each operator if each dimension grows once."""
        stage_fields = {name: [*OPERATORS[name].fields] for name in self.operators}
        for name in self._followers:
            stage_fields["hidden"] += OPERATORS[name].fields
        return stage_fields

    def _search_graphs(self, targets: DimsArray, allocation: TokenAllocation, top_k: int) -> list[tuple[Path, Budget]]:
        """Return the best paths whose stages grow a dimension, or several, by any amount."""
        if len(targets) > _MAX_GRAPH_TARGETS:
            raise PlanError(
                f"{len(targets):,} targets are too many to search in mode {self.mode!r} (at most "
                f"{_MAX_GRAPH_TARGETS:,}); lower tolerance or narrow the bounds, or use mode 'once'"
            )
        goals = [targets.at(number) for number in range(len(targets))]
        # every stage takes at least one step along an axis; key/value heads may grow at one number of query heads
        longest = sum(len(axis) - (name != "mha") for name, axis in self.list_axes(goals).items())
        first, last = (1, self.max_stages) if self.stages is None else (self.stages, self.stages)
        budgets = [allocation.budget(count) for count in range(first, min(last, longest) + 1)]
        ranked = []
        for grid, graph in self._build_graphs(goals):
            for budget in budgets:
                cost, initial_cost = self.stage_cost(budget)
                fixed_cost = self.has_fixed_costs(budget)
                paths = graph.find_best_paths(grid.start, grid.goals, budget.stages, cost, fixed_cost=fixed_cost)
                for growth_cost, vertices in islice(paths, top_k):
                    path = tuple(graph.structures.dims.at(vertex) for vertex in vertices)
                    sizes = tuple(tuple(dims.as_dict().values()) for dims in path)
                    total = float(round_for_ties(initial_cost + growth_cost + self.stage_price * budget.stages))
                    ranked.append(((total, budget.stages, sizes), path, budget))
        return [(path, budget) for _, path, budget in sorted(ranked, key=lambda entry: entry[0])[:top_k]]

    def _build_graphs(self, targets: Sequence[ModelDims]) -> Iterator[tuple[GrowthGrid, GrowthGraph]]:
        """Yield graphs that cover all targets; targets share a graph if it saves work."""
        values = self.list_axes(targets)
        joint = self.mode == "joint"
        get_key = partial(get_grid_key, operators=list(values))
        grids, edges = [], 0
        for _, group in groupby(sorted(targets, key=get_key), get_key):
            goals = list(group)
            few = goals[:_MAX_SEPARATE_GRIDS]
            separate = sum(count_edges(compute_grid_shape(self.initial, [goal], values), joint) for goal in few)
            shared = count_edges(compute_grid_shape(self.initial, goals, values), joint)
            is_less = len(goals) == len(few) and separate < shared
            grids += [[goal] for goal in goals] if is_less else [goals]
            edges += separate if is_less else shared
            check_size(compute_grid_shape(self.initial, grids[-1], values), joint)
        if edges > _MAX_TOTAL_EDGES:
            raise PlanError(
                f"{len(targets):,} targets with {edges:,} growths on the way are too many to search (at most "
                f"{_MAX_TOTAL_EDGES:,}); lower tolerance, or take coarser multiples or narrower bounds"
            )
        for goals_of_grid in grids:
            yield self.build_graph(goals_of_grid, values)

    def list_axes(self, targets: Sequence[ModelDims]) -> dict[str, IntArray]:
        """Return the values of each dimension with stages of its own on the way to targets, ascending.

        In mode `once` these are the values at both ends, in the other modes also the space's multiples.
        """
        grown = {name for target in targets for name in find_operators(self.initial, target)}
        axes = [name for name in self.operators if name in grown]
        if self.mode == "once":
            ends = (self.initial, *targets)
            return {name: np.unique([getattr(dims, OWN_FIELD[name]) for dims in ends]) for name in axes}
        return {name: list_axis_values(name, self.initial, targets, self.space) for name in axes}

    def build_graph(
        self, goals: Sequence[ModelDims], values: Mapping[str, IntArray]
    ) -> tuple[GrowthGrid, GrowthGraph]:
        """Build the grid to goals, and the graph of all growths on it that the mode and the constraints allow."""
        joint = self.mode == "joint"
        check_size(compute_grid_shape(self.initial, goals, values), joint)
        grid = build_grid(self.initial, goals, values, self.space.ffn_multiple)
        structures, edges = DimsTable(grid.structures, self._inputs), build_grid_edges(grid.shape, joint)
        origins = edges.origins
        growths = self.constraints.allow_growths(structures.select(origins), structures.select(edges.targets))
        growths = growths & find_growing_edges(grid, origins, edges.targets)
        # paths begin at the initial structure, checked before: it is enough to look at the end of each edge
        return grid, GrowthGraph(structures, edges, self.space.allows(grid.structures)[edges.targets] & growths)

    def has_fixed_costs(self, budget: Budget) -> bool:
        """Whether a growth costs the same in every stage: tokens do not count, or all stages have equally many."""
        equal = len(set(budget.tokens[1:])) == 1
        return not self._objective.needs_tokens or (self._objective.compares_stages and equal)

    def stage_cost(self, budget: Budget) -> tuple[StageCost, float]:
        """The cost of a stage as a function, and the cost of training the initial model."""
        initial = DimsTable(DimsArray.of([self.initial]), self._inputs)
        cost = partial(self._objective.stage_cost, budget, initial)
        return cost, float(cost(0, initial, initial)[0])

    def _explain_no_path(self) -> str:
        limits, remedies = [], []
        if self.max_factor is not None:
            limits.append(f"keeps to max_factor {self.max_factor:g}")
            remedies.append("raise max_factor")
        if self.through:
            limits.append("passes through every structure of `through`")
        if limits:
            remedies.append("use mode 'repeated' or 'joint'" if self.mode == "once" else "allow more stages")
            if self.mode != "once" and "mha" in self._followers:
                remedies.append("give the heads stages of their own ('mha' among the operators)")
            return f"no schedule {' and '.join(limits)}: {', or '.join(remedies)}"
        if self.mode != "once" and self.stages is not None:
            return (
                f"no schedule of {self.stages} stages leads to a target: use more (each operator needs one, unless "
                "mode is 'joint') or fewer (each stage has to grow something on the space's multiples)"
            )
        return (
            "in every order some structure between initial and target has a hidden size that its heads do not divide, "
            "which transformers refuses, or breaks a limit of the space; let the heads follow hidden (leave out "
            "'mha'), or choose head counts that divide both hidden sizes"
        )

    def _build_schedule(self, path: Path, budget: Budget) -> GrowthSchedule:
        stages = []
        for before, after, count in zip(path, path[1:], budget.tokens[1:], strict=False):
            leading_first = sorted(find_operators(before, after), key=lambda name: name not in self.operators)
            stages.append(GrowthStage(tuple(leading_first), after, int(count)))
        return GrowthSchedule(path[0], tuple(stages), int(budget.tokens[0]), self.score_path(path, budget))

    def score_path(self, path: Sequence[ModelDims], budget: Budget) -> dict[str, float]:
        """Return the value of every objective for a schedule, except objectives that lack tokens or a cost model."""
        structures = DimsTable(DimsArray.of(path)[None], self._inputs)
        return {
            name: float(evaluate_objective(objective, structures, budget)[0])
            for name, objective in OBJECTIVES.items()
            if self._can_evaluate(objective, budget)
        }

    def _can_evaluate(self, objective: Objective, budget: Budget) -> bool:
        if objective.needs_start and not (budget.seen_before(1) and all(budget.tokens[1:])):
            return False
        has_hours = self.cost_model is not None or not objective.needs_cost_model
        return has_hours and (budget.has_tokens or not objective.needs_tokens)


def _rerank(schedules: list[GrowthSchedule], probe: ScheduleProbe) -> list[GrowthSchedule]:
    reranked = list(probe(schedules))
    if len(reranked) != len(schedules) or any(schedule not in reranked for schedule in schedules):
        raise PlanError(
            f"the probe was given {len(schedules)} schedules and returned others: it may only reorder them"
        )
    return reranked
