"""The objective `final_loss`: runs ranked by the loss that a growth law predicts for their end, at one budget.

A run is a path of structures, the tokens of each stage and the span of its learning-rate schedule. The loss of a stage
depends on all stages before it, so no dynamic programme applies. In small spaces every run on a grid of token shares
is compared; in larger ones coordinate descent finds runs that no single change improves. The outcome says which.

No run grows later than a step of the grid before the tokens of a decay over the run: laws were not fitted to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, permutations
from typing import Literal, TypeAlias

import numpy as np

from ..cost.growth_law import GrowthLaw
from ..cost.law_transfer import load_default_law
from ..cost.rate_schedule import RATE_SPANS, RateSchedule, RateSpan
from ..cost.staged_run import GROWN_DIMENSIONS, RunTable, compute_factors
from ..dims import IntArray, ModelDims
from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number, require_whole_number
from .best_paths import GrowthGraph
from .budget import MOST_TOKENS, allocate_tokens
from .grid import GrowthGrid
from .structures import CostInputs, DimsArray, DimsTable, FloatArray

Path: TypeAlias = tuple[ModelDims, ...]
BudgetUnit: TypeAlias = Literal["flops", "hours"]

#: Most runs that are compared one by one: about a second.
MOST_RUNS = 60_000
#: Runs whose losses are computed at once, to bound the memory.
_CHUNK = 4096
#: Most rounds of coordinate descent; each improves every run that is not at its best yet.
_MOST_ROUNDS = 40
#: Runs whose changes are tried in a round of the descent over structures, and paths of each that are looked into.
_TURNS, _PROMISING = 3, 12


@dataclass(frozen=True)
class LossSettings:
    """How losses are predicted, and which runs are compared.

    Args:
        law: growth law; None is the default law.
        schedule: learning-rate schedule; its span is one of `spans`.
        spans: spans of the schedule to choose from.
        already_seen: tokens that the initial model was trained on before, under a schedule that has ended.
        steps: token shares of stages are multiples of 1 / steps.
        is_copied, is_carried: as in `TrainedStage`, for all growths.
        relative_rate: peak learning rate over the usual one.
        slack: difference in nats that does not count: of the runs of a path that are this close to its best, the one
            that grows first is taken. Only if all runs are compared.

    Raises:
        PlanError: for settings out of range.
    """

    law: GrowthLaw = field(default_factory=load_default_law)
    schedule: RateSchedule = field(default_factory=RateSchedule)
    spans: Sequence[RateSpan] = RATE_SPANS
    already_seen: float = 0.0
    steps: int = 10
    is_copied: bool = True
    is_carried: bool = False
    relative_rate: float = 1.0
    slack: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.law, GrowthLaw):
            raise PlanError(f"loss_law must be a GrowthLaw, see GrowthLaw.from_yaml, got {self.law!r}")
        if not is_finite_number(self.already_seen, least=0) or self.already_seen > MOST_TOKENS:
            raise PlanError(f"already_seen must be a number from 0 to {MOST_TOKENS:g}, got {self.already_seen}")
        require_whole_number(self.steps, "steps", least=2, most=100, error=PlanError)
        if not self.spans or any(span not in RATE_SPANS for span in self.spans):
            raise PlanError(f"spans must be one or more of {', '.join(RATE_SPANS)}, got {list(self.spans)}")
        if not is_finite_number(self.slack, least=0):
            raise PlanError(f"slack must be 0 or more nats, got {self.slack!r}")
        if not is_positive_number(self.relative_rate):
            raise PlanError(
                f"relative_rate must be a positive number, got {self.relative_rate!r}: 1 is the usual peak"
            )


@dataclass(frozen=True)
class PlannedRun:
    """A path of structures, its tokens per stage, the span of its learning-rate schedule, and its predicted loss."""

    path: Path
    tokens: tuple[int, ...]
    span: RateSpan
    loss: float


@dataclass(frozen=True)
class SearchOutcome:
    """The best run of each path, best first.

    Args:
        runs: the runs.
        is_exact: whether all runs on the grid of token shares were compared.
        compared: number of runs whose loss was predicted.
        steps: shares on the grid are multiples of 1 / steps.
    """

    runs: tuple[PlannedRun, ...]
    is_exact: bool
    compared: int
    steps: int

    def describe(self) -> str:
        """Return a sentence that says how the runs were found.

        >>> SearchOutcome((), True, 1200, 10).describe()
        'Exact: the best of all 1,200 runs whose stages have multiples of 1/10 of the tokens.'
        """
        grid = f"whose stages have multiples of 1/{self.steps} of the tokens"
        if self.is_exact:
            return f"Exact: the best of all {self.compared:,} runs {grid}."
        return f"Not exact: found by coordinate descent among runs {grid}; {self.compared:,} were compared."


class _Group:
    """Paths with one number of stages, and what their losses depend on besides tokens: P paths, K structures."""

    def __init__(self, paths: Sequence[Path], inputs: CostInputs, unit: BudgetUnit) -> None:
        self.paths = list(paths)
        columns = zip(*self.paths, strict=True)
        tables = [DimsTable(DimsArray.of(list(column)), inputs) for column in columns]
        self.parameters = np.stack([table.parameters for table in tables], axis=1)
        self.widths = np.stack([table.dims.hidden_size for table in tables], axis=1).astype(np.float64)
        costs = [table.flops_per_token if unit == "flops" else table.hours_per_token for table in tables]
        self.costs = np.stack(costs, axis=1)
        self.factors = np.ones((*self.parameters.shape, len(GROWN_DIMENSIONS)))
        for number, path in enumerate(self.paths):
            for stage, pair in enumerate(pairwise(path), start=1):
                grown = compute_factors(*pair)
                self.factors[number, stage] = [grown.get(name, 1.0) for name in GROWN_DIMENSIONS]

    @property
    def stages(self) -> int:
        return self.parameters.shape[1]


class _Best:
    """The best shares and span of each path so far."""

    def __init__(self, paths: int, stages: int) -> None:
        self.losses = np.full(paths, np.inf)
        self.shares: IntArray = np.zeros((paths, stages), dtype=np.int64)
        self.spans: list[RateSpan] = [RATE_SPANS[0]] * paths

    def update(self, losses: FloatArray, shares: IntArray, span: RateSpan) -> None:
        """Keep what is better; of equal losses, the first stays."""
        is_less = losses < self.losses
        self.losses, self.shares = (
            np.where(is_less, losses, self.losses),
            np.where(is_less[:, None], shares, self.shares),
        )
        self.spans = [span if less else old for less, old in zip(is_less, self.spans, strict=True)]


class FinalLossSearch:
    """Finds the best tokens and spans of paths by their predicted losses at one budget.

    Args:
        inputs: config, sequence length and cost model.
        budget: FLOPs, or device hours, that every run costs.
        unit: unit of the budget.
        settings: how losses are predicted.

    Raises:
        PlanError: for a budget that is not a positive number, or hours without a cost model.
    """

    def __init__(self, inputs: CostInputs, budget: float, settings: LossSettings, unit: BudgetUnit = "flops") -> None:
        if not is_positive_number(budget):
            raise PlanError(
                f"{unit} must be a positive number, got {budget!r}: give the budget of a run, such as 1e20"
            )
        self.inputs, self.budget, self.settings, self.unit = inputs, budget, settings, unit
        self.compared = 0
        rate = 1.0 if settings.law.has_relative_rates else settings.law.references[3]
        self._peak = rate * settings.relative_rate

    def count_runs(self, stages: int) -> int:
        """Return the number of runs on the grid of a path with a number of structures."""
        return len(self._list_shares(stages)) * len(self._list_spans(stages))

    def rank(self, paths: Sequence[Path], top_k: int) -> SearchOutcome:
        """Return the best run of each path, best first; equal losses are ordered by stages, then by structures.

        Args:
            paths: structures from the initial one to the target.
            top_k: largest number of runs.
        """
        total = sum(self.count_runs(len(path)) for path in paths)
        is_exact = total <= MOST_RUNS
        runs: list[PlannedRun] = []
        for length in sorted({len(path) for path in paths}):
            group = _Group([path for path in paths if len(path) == length], self.inputs, self.unit)
            shares, spans = self._enumerate(group) if is_exact else self._descend(group)
            runs += self._build_runs(group, shares, spans)
        runs.sort(key=_get_order)
        return SearchOutcome(tuple(runs[:top_k]), is_exact, self.compared, self.settings.steps)

    def improve(
        self, paths: Sequence[Path], list_changes: Callable[[Path], Sequence[Path]], top_k: int
    ) -> SearchOutcome:
        """Return runs that neither another structure in one place nor another share of tokens improves.

        Args:
            paths: paths to begin with.
            list_changes: function that returns the paths that differ from one in a single structure.
            top_k: largest number of runs.
        """
        known = {run.path: run for run in self.rank(paths, len(paths)).runs}
        settled: set[Path] = set()
        for _ in range(_MOST_ROUNDS):
            best = sorted(known.values(), key=_get_order)[:top_k]
            turns = [run for run in best if run.path not in settled][:_TURNS]
            if not turns:
                break
            settled |= {run.path for run in turns}
            promising = [path for run in turns for path in self._screen(run, list_changes(run.path))]
            new = list(dict.fromkeys(path for path in promising if path not in known))
            if new:
                known |= {run.path: run for run in self.rank(new, len(new)).runs}
        best = sorted(known.values(), key=_get_order)[:top_k]
        return SearchOutcome(tuple(best), False, self.compared, self.settings.steps)

    def _screen(self, run: PlannedRun, paths: Sequence[Path]) -> list[Path]:
        """Return the most promising of some paths: those with the least loss at the token shares of a run."""
        if len(paths) <= _PROMISING:
            return list(paths)
        group = _Group(paths, self.inputs, self.unit)
        rows = np.arange(len(paths))
        shares = np.tile(np.array(run.tokens, dtype=np.float64), (len(paths), 1))
        losses = self._predict(group, rows, shares, run.span)
        return [paths[number] for number in np.argsort(losses, kind="stable")[:_PROMISING]]

    def tabulate(self, group_paths: Sequence[Path], tokens: FloatArray, span: RateSpan) -> RunTable:
        """Return runs as a law sees them.

        Args:
            group_paths: paths of one length.
            tokens: tokens of each stage, paths × stages.
            span: span of the learning-rate schedule.
        """
        return self._tabulate(_Group(group_paths, self.inputs, self.unit), np.arange(len(tokens)), tokens, span)

    def _get_fewest(self, stages: int) -> list[int]:
        """Return the fewest steps of tokens of each stage.

        An initial model that was trained before may have none. The last stage has those of a decay over the run, and
        one more.
        """
        fewest = [0 if self.settings.already_seen and stages > 1 else 1, *[1] * (stages - 1)]
        if stages > 1:
            fewest[-1] = 1 + math.ceil(self.settings.schedule.decay * self.settings.steps - 1e-9)
        return fewest

    def _list_shares(self, stages: int) -> IntArray:
        """Return the shares of the tokens on the grid, in steps, R × stages."""
        fewest = self._get_fewest(stages)
        free = self.settings.steps - sum(fewest)
        if free < 0:
            raise PlanError(
                f"{stages - 1} growths need more than {self.settings.steps} steps of tokens: give fewer stages"
            )
        places = list(combinations(range(free + stages - 1), stages - 1))
        bars = np.array(places, dtype=np.int64).reshape(len(places), stages - 1)
        edges = [np.full((len(bars), 1), -1), bars, np.full((len(bars), 1), free + stages - 1)]
        shares: IntArray = np.diff(np.concatenate(edges, axis=1), axis=1) - 1 + np.array(fewest)
        return shares

    def _list_spans(self, stages: int) -> tuple[RateSpan, ...]:
        """Return the spans to choose from; in a single stage they are the same."""
        return tuple(self.settings.spans) if stages > 1 else (self.settings.spans[0],)

    def _enumerate(self, group: _Group) -> tuple[IntArray, list[RateSpan]]:
        """Return the best shares of each path, and the best spans, by comparing all."""
        best = _Best(len(group.paths), group.stages)
        for span in self._list_spans(group.stages):
            shares = self._list_shares(group.stages)
            rows = np.repeat(np.arange(len(group.paths)), len(shares))
            losses = self._predict(group, rows, np.tile(shares, (len(group.paths), 1)), span)
            losses = losses.reshape(len(group.paths), len(shares))
            least = losses.min(axis=1)
            chosen = (losses <= least[:, None] + self.settings.slack).argmax(axis=1)  # shares begin with early growth
            best.update(least, shares[chosen], span)
        return best.shares, best.spans

    def _descend(self, group: _Group) -> tuple[IntArray, list[RateSpan]]:
        """Return shares and spans of each path that no move of one step of tokens improves."""
        stages = group.stages
        moves = np.array([[0] * stages, *_list_moves(stages)])
        best = _Best(len(group.paths), stages)
        for span in self._list_spans(stages):
            fewest = np.array(self._get_fewest(stages))
            shares = np.tile(self._list_shares(stages)[0], (len(group.paths), 1))  # the target has most tokens
            open_paths = np.arange(len(group.paths))
            least = np.full(len(group.paths), np.inf)
            for _ in range(_MOST_ROUNDS):
                candidates = shares[open_paths][:, None] + moves  # paths × moves × stages
                is_valid = (candidates >= fewest).all(axis=2)
                losses = np.full(is_valid.shape, np.inf)
                rows = np.repeat(open_paths, len(moves)).reshape(is_valid.shape)[is_valid]
                losses[is_valid] = self._predict(group, rows, candidates[is_valid], span)
                choice = losses.argmin(axis=1)
                shares[open_paths] = candidates[np.arange(len(choice)), choice]
                least[open_paths] = losses.min(axis=1)
                open_paths = open_paths[choice > 0]
                if not len(open_paths):
                    break
            best.update(least, shares, span)
        return best.shares, best.spans

    def _predict(self, group: _Group, rows: IntArray, shares: IntArray | FloatArray, span: RateSpan) -> FloatArray:
        """Return the losses of runs: the path of each, and its shares."""
        self.compared += len(rows)
        losses = np.empty(len(rows))
        for first in range(0, len(rows), _CHUNK):
            part = slice(first, first + _CHUNK)
            scale = self.budget / (shares[part] * group.costs[rows[part]]).sum(axis=1, keepdims=True)
            table = self._tabulate(group, rows[part], shares[part] * scale, span)
            losses[part] = self.settings.law.predict_ends(table)
        return losses

    def _tabulate(self, group: _Group, rows: IntArray, tokens: FloatArray, span: RateSpan) -> RunTable:
        settings = self.settings
        schedule = replace(settings.schedule, span=span)
        pieces = [*_split_decays(group.parameters[rows], group.widths[rows], tokens, group.factors[rows], schedule)]
        if settings.already_seen:
            first = group.parameters[rows][:, :1], group.widths[rows][:, :1]
            earlier, ones = np.full((len(rows), 1), settings.already_seen), np.ones((len(rows), 1, 3))
            pieces = [*_split_decays(*first, earlier, ones, schedule), *pieces]
        parameters, widths, counts, rates, factors = (np.stack(part, axis=1) for part in zip(*pieces, strict=True))
        copied, carried = (np.full(counts.shape, float(is_so)) for is_so in (settings.is_copied, settings.is_carried))
        stages = np.full(len(rows), counts.shape[1], dtype=np.int64)
        return RunTable(parameters, widths, counts, rates * self._peak, factors, copied, carried, stages)

    def _build_runs(self, group: _Group, shares: IntArray, spans: Sequence[RateSpan]) -> Iterator[PlannedRun]:
        """Yield the runs in whole tokens, with the losses of those."""
        pairs = zip(shares.tolist(), group.costs.tolist(), strict=True)
        tokens = [tuple(allocate_tokens(row, self.budget, costs)) for row, costs in pairs]
        counts = np.array(tokens, dtype=np.float64)
        if not counts.any(axis=1).all():
            target = group.paths[int(np.flatnonzero(~counts.any(axis=1))[0])][-1]
            raise PlanError(f"a budget of {self.budget:.3g} {self.unit} is less than one token of {target}: give more")
        losses = np.empty(len(tokens))
        for span in set(spans):
            rows = np.flatnonzero([other == span for other in spans])
            losses[rows] = self.settings.law.predict_ends(self._tabulate(group, rows, counts[rows], span))
        for run in zip(group.paths, tokens, spans, losses.tolist(), strict=True):
            yield PlannedRun(*run)


def _split_decays(
    parameters: FloatArray, widths: FloatArray, tokens: FloatArray, factors: FloatArray, schedule: RateSchedule
) -> Iterator[tuple[FloatArray, ...]]:
    """Yield the columns of a `RunTable`, with a decay of the learning rate as a stage of its own, without growth.

    A law averages rates over equal parts of a stage: decays in stages of different lengths would not compare.
    """
    begins = schedule.find_decays(tokens)
    constant = schedule.compute(tokens, 0.0, begins)
    falling = schedule.compute(tokens, begins, 1.0) if (begins < 1).any() else constant
    for k in range(tokens.shape[1]):
        share = begins[:, k]
        yield parameters[:, k], widths[:, k], tokens[:, k] * share, constant[:, k], factors[:, k]
        if (share < 1).any():
            no_growth = np.ones_like(factors[:, k])
            yield parameters[:, k], widths[:, k], tokens[:, k] * (1 - share), falling[:, k], no_growth


def _list_moves(stages: int) -> list[list[int]]:
    """Return all moves of one step of tokens from one stage to another."""
    moves = []
    for source, target in permutations(range(stages), 2):
        move = [0] * stages
        move[source], move[target] = -1, 1
        moves.append(move)
    return moves


def _get_order(run: PlannedRun) -> tuple[float, int, tuple[tuple[int, ...], ...]]:
    return round(run.loss, 9), len(run.path), tuple(tuple(dims.as_dict().values()) for dims in run.path)


def compute_no_cost(_: int, before: DimsTable, after: DimsTable) -> FloatArray:
    """Return costs of growths by which all paths are equal."""
    return np.zeros(np.broadcast_shapes(before.dims.hidden_size.shape, after.dims.hidden_size.shape))


def _cost_late(_: int, before: DimsTable, after: DimsTable) -> FloatArray:
    """Return costs by which the best path is small for long."""
    return after.flops_per_token + compute_no_cost(_, before, after)


def _cost_early(_: int, before: DimsTable, after: DimsTable) -> FloatArray:
    """Return costs by which the best path grows at once."""
    return -_cost_late(_, before, after)


def _cost_even(_: int, before: DimsTable, after: DimsTable) -> FloatArray:
    """Return costs by which the best path has equal factors."""
    squares: FloatArray = np.log(after.flops_per_token / before.flops_per_token) ** 2
    return squares


#: Costs whose best paths a search begins with.
SEED_COSTS = (_cost_late, _cost_early, _cost_even)

IndexedGraph: TypeAlias = tuple[GrowthGrid, GrowthGraph, dict[ModelDims, int]]


def list_indexed_graphs(graphs: Sequence[tuple[GrowthGrid, GrowthGraph]]) -> list[IndexedGraph]:
    """Return graphs with the vertex of each structure that transformers can load."""
    return [
        (grid, graph, {grid.structures.at(vertex): int(vertex) for vertex in np.flatnonzero(grid.structures.loadable)})
        for grid, graph in graphs
    ]


def list_neighbours(graphs: Sequence[IndexedGraph], path: Path) -> list[Path]:
    """Return the paths that differ from one in a single structure, the target included."""
    for grid, graph, vertices in graphs:
        if path[-1] not in vertices or vertices[path[-1]] not in grid.goals:
            continue
        numbers = [vertices[dims] for dims in path]
        between = [graph.list_between(a, b) for a, b in zip(numbers, numbers[2:], strict=False)]
        goals = [vertex for vertex in graph.list_after(numbers[-2]) if vertex in grid.goals]
        return [
            (*path[:place], grid.structures.at(vertex), *path[place + 1 :])
            for place, choices in enumerate([*between, goals], start=1)
            for vertex in choices
            if vertex != numbers[place]
        ]
    return []
