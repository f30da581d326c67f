"""`advise`: what to do with a model and a budget: go on, start from scratch, or grow; and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from ..architectures import get_architecture, read_setting
from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..cost.growth_law import WIDENING, GrowthLaw
from ..cost.hours import CostModel
from ..cost.law_transfer import load_default_law
from ..cost.least_squares import Z80
from ..cost.memory import MemoryLimit
from ..cost.rate_schedule import RATE_SPANS, RateSchedule, RateSpan, compute_usual_batch, compute_usual_peak
from ..cost.scaling_law import compute_chance_loss
from ..dims import ModelConfig, ModelDims
from ..errors import GrowthError, PlanError
from ..io.numbers import is_positive_number
from ..io.serialization import Json, to_plain
from ..io.units import format_count
from ..operators import find_operators
from ..schedule import GrowthSchedule, GrowthStage
from .budget import MOST_TOKENS
from .deployable import list_larger, list_paths_from, list_paths_to, list_shapes
from .final_loss import FinalLossSearch, LossSettings, Path, PlannedRun
from .structures import CostInputs, FloatArray

OptionKind: TypeAlias = Literal["unchanged", "scratch_target", "scratch_best", "growth"]
VerdictKind: TypeAlias = Literal["grow", "do_not_grow", "too_close", "outside"]

#: Chance from which a verdict says what to do.
SURE = 0.8
#: Decades outside the scales of a law from which a verdict that is not sure is "outside".
FAR = 1.0
#: Growths that are listed, each to another target.
MOST_GROWTHS = 3
#: Largest growth of the parameters that is proposed, of a model and in one stage: factors of 2 are the safest, and
#: beyond them a law has little to go by.
_LARGEST_GROWTH, _LARGEST_STEP = 2.0, 2.05
#: Hidden size / layers of proposed targets from scratch.
_ASPECTS = (40, 130)
#: Loss that a further growth has to be worth, in nats per token.
_STAGE_PRICE = 0.005
#: Differences in nats per token that do not count when moments of growth are compared: earlier is safer.
_SLACK = 0.002
#: Growths with the least predicted loss whose risk is looked at.
_LIKELY = 60
#: Sizes of targets from scratch that are proposed, relative to the best size without growth.
_TARGETS_NEAR = (0.7, 2.5)
#: Sequences of the shortest run from scratch: of less, a law says nothing.
_FEWEST_SEQUENCES = 100
#: Draws of what runs do not share, per replicate of the law.
_DRAWS = 400
#: Budgets relative to the one asked about, at which growth may have become the better way.
_MULTIPLES = tuple(2.0**power for power in range(1, 7))
#: Inits of growths: copies, which keep what a trained model has learnt; layers between the old ones.
GROWTH_INITS = {"layer": "interleave", "mha": "copy", "ffn": "copy", "hidden": "copy", "head_dim": "spread"}


@dataclass(frozen=True)
class Question:
    """A model, or none, and a budget.

    Args:
        budget: training FLOPs, device hours, or tokens.
        unit: unit of the budget. Tokens are those of `start`, or else of `target`, and all options have their FLOPs.
        start: structure of the model; None to begin from scratch.
        already_seen: tokens that it was trained on before, under a learning-rate schedule that has ended.
        target: structure to grow to; None to have one proposed.
        config, sequence_length: settings that growth does not change, and tokens per training sequence.
        cost_model: device hours of the hardware; needed for a budget in hours.
        memory: memory per device, and how training uses it; options that do not fit are left out.
        law: growth law; None is the default law.

    Raises:
        PlanError: if arguments contradict each other or are out of range.
    """

    budget: float
    unit: Literal["flops", "hours", "tokens"] = "flops"
    start: ModelDims | None = None
    already_seen: float = 0.0
    target: ModelDims | None = None
    config: ModelConfig = field(default_factory=lambda: DEFAULT_CONFIG)
    sequence_length: int = 2048
    cost_model: CostModel | None = None
    memory: MemoryLimit = field(default_factory=lambda: MemoryLimit(1e18))
    law: GrowthLaw = field(default_factory=load_default_law)

    def __post_init__(self) -> None:
        if self.unit not in ("flops", "hours", "tokens"):
            raise PlanError(f"unit must be 'flops', 'hours' or 'tokens', got {self.unit!r}")
        if get_architecture(self.config).has_experts:
            raise PlanError(
                f"the growth law is fitted to models without experts, so it has no forecast for "
                f"{get_architecture(self.config).model_type}; compare schedules with `slop plan --objective flops`"
            )
        if not is_positive_number(self.budget):
            raise PlanError(f"{self.unit} must be a positive number, got {self.budget!r}: give a budget")
        if self.unit == "tokens" and self.budget > MOST_TOKENS:
            raise PlanError(f"tokens must be at most {MOST_TOKENS:g}, got {self.budget:g}")
        if self.unit == "hours" and self.cost_model is None:
            raise PlanError("a budget in hours needs the speed of the hardware: give cost_model, or a budget in FLOPs")
        if self.already_seen and self.start is None:
            raise PlanError("already_seen belongs to a model: give initial, or leave already_seen out")
        if self.unit == "tokens" and self.start is None and self.target is None:
            raise PlanError("a budget in tokens needs a model that they are for: give target, or a budget in FLOPs")
        if self.start is not None and self.target is not None:
            try:
                if not find_operators(self.start, self.target):
                    raise PlanError("target is the model itself: give a larger one, or leave target out")
            except GrowthError as caught:
                raise PlanError(f"target {self.target} cannot be grown from {self.start}: {caught}") from None

    @property
    def inputs(self) -> CostInputs:
        """Inputs to the cost of structures."""
        return CostInputs(self.config, self.sequence_length, self.cost_model)

    def count_flops(self, dims: ModelDims) -> float:
        """Return the training FLOPs per token of a structure."""
        return float(count_flops_per_token(dims, self.config, self.sequence_length))

    def fits(self, dims: ModelDims) -> bool:
        """Whether a structure fits into the memory of a device."""
        return bool(self.memory.fits(dims, self.config, self.sequence_length))


@dataclass(frozen=True)
class AdvisedOption:
    """One way to spend the budget.

    Args:
        kind: "unchanged" to go on without growth, "scratch_target", "scratch_best" for the best size, or "growth".
        schedule: structures and tokens.
        parameters: parameters at the end.
        tokens, flops: tokens and training FLOPs of all stages.
        hours: device hours; None without a cost model.
        memory: largest bytes per device over the stages.
        learning_rate, lr_span: peak learning rate, and whether its schedule covers the run or each stage.
        loss, error: predicted loss at the end and half of its central 80% interval, in nats per token.
        difference, difference_error: loss above that of the first option, and half of the interval of this difference,
            which is narrower: options share most of their errors.
        chance: chance to have the lowest loss of all options.
        decades_outside: how far it is outside the scales of the law.
    """

    kind: OptionKind
    schedule: GrowthSchedule
    parameters: int
    tokens: int
    flops: float
    hours: float | None
    memory: int
    learning_rate: float
    lr_span: RateSpan
    loss: float
    error: float
    difference: float
    difference_error: float
    chance: float
    decades_outside: float

    @property
    def label(self) -> str:
        """A few words for a table.

        >>> small = ModelDims(64, 128, 4, 2)
        >>> stage = GrowthStage(("layer",), small.replace(num_hidden_layers=8), 30)
        >>> describe_option("growth", GrowthSchedule(small, (stage,), 10))
        'grow layers 4→8 at 25%'
        """
        return describe_option(self.kind, self.schedule)


@dataclass(frozen=True)
class AdviceVerdict:
    """A verdict on growth.

    Args:
        kind: "grow", "do_not_grow", "too_close" to call, or "outside" the scales that the law was fitted to.
        sentence: one sentence for people.
        chance_growth: chance that the best growth ends below the best option without growth; None without a growth, or
            if the law predicts more than the loss of guessing.
        growth_pays_from: smallest power of two times the budget, up to 64 times, at which that growth ends lowest
            with a chance of 80%, also compared with the best size from scratch there; None without one, or a model.
    """

    kind: VerdictKind
    sentence: str
    chance_growth: float | None
    growth_pays_from: float | None = None


@dataclass(frozen=True)
class Advice:
    """The options, best first, and the verdict.

    Args:
        budget, unit: budget that all options cost, in FLOPs or hours.
        options: options by predicted loss.
        verdict: what to do.
        search: how the growths were found.
        remarks: what a reader should know about the law.
    """

    budget: float
    unit: Literal["flops", "hours"]
    options: tuple[AdvisedOption, ...]
    verdict: AdviceVerdict
    search: str
    remarks: tuple[str, ...]


def describe_option(kind: OptionKind, schedule: GrowthSchedule) -> str:
    """Return a few words for a table."""
    if kind == "unchanged":
        return "go on without growing"
    if kind == "scratch_target":
        return "from scratch, this target"
    if kind == "scratch_best":
        return "from scratch, best size"
    total, done, parts = sum(schedule.tokens), 0, []
    names = {"num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "ffn"}
    for number, (before, stage) in enumerate(zip(schedule.structures, schedule.stages, strict=False)):
        done += schedule.tokens[number]
        old, new = before.as_dict(), stage.dims.as_dict()
        changed = [field for field in names if old[field] != new[field]]
        if "hidden_size" in changed:  # ffn grows with it
            changed = [field for field in changed if field != "intermediate_size"]
        changes = [f"{names[field]} {old[field]}→{new[field]}" for field in changed]
        parts.append(f"{', '.join(changes) or stage.label} at {done / total:.0%}")
    return "grow " + ", then ".join(parts)


def advise(question: Question) -> Advice:
    """Return the ways to spend a budget, compared by the loss that a growth law predicts, and a verdict.

    All options cost the same. Growths are those to structures that users deploy (`planning.deployable`), at any tenth
    of the tokens, in up to two steps; three are listed, to different targets.

    Raises:
        PlanError: if nothing fits into the budget or the memory.

    >>> advice = advise(Question(1e19, target=ModelDims(1024, 4096, 24, 16)))
    >>> sorted({option.kind for option in advice.options})
    ['growth', 'scratch_best', 'scratch_target']
    """
    searches = _Searches(question)
    unchanged, best = searches.find_unchanged(), searches.find_best_from_scratch()
    growths, search = searches.find_growths(best)
    target = question.target or (growths[0].path[-1] if growths else None)
    candidates = [_Row("growth", run, question.already_seen) for run in growths]
    if unchanged is not None:
        candidates.append(_Row("unchanged", unchanged, question.already_seen))
    if target is not None and question.fits(target):
        candidates.append(_Row("scratch_target", searches.train_from_scratch([target]), 0.0))
    if best is not None:
        candidates.append(_Row("scratch_best", best, 0.0))
    return _compare(searches, candidates, search)


def judge_schedule(question: Question, schedule: GrowthSchedule) -> Advice:
    """Return a schedule compared with the ways not to grow, at its training FLOPs: the verdict of `slop plan`.

    The other ways are to train the initial model on, and from scratch the target and the best size. The learning rate
    has one schedule over the run, or one per stage, whichever the law prefers.

    Args:
        question: question with the FLOPs of the schedule as its budget, and the schedule's initial model.
        schedule: schedule with tokens.

    Raises:
        PlanError: if neither the initial model nor the schedule has tokens before the first growth.
    """
    if not (schedule.initial_tokens or question.already_seen):
        raise PlanError("the training tokens of the initial model are unknown: give already_seen")
    searches = _Searches(question)
    tokens = np.array([schedule.tokens], dtype=np.float64)
    search = searches.get_search(question.already_seen)
    losses = {
        span: float(question.law.predict_ends(search.tabulate([schedule.structures], tokens, span))[0])
        for span in RATE_SPANS
    }
    span = min(RATE_SPANS, key=lambda name: losses[name])
    run = PlannedRun(schedule.structures, schedule.tokens, span, losses[span])
    candidates = [_Row("growth", run, question.already_seen, schedule)]
    unchanged = search.rank([(schedule.initial,)], 1).runs[0]
    candidates.append(_Row("unchanged", unchanged, question.already_seen))
    candidates.append(_Row("scratch_target", searches.train_from_scratch([schedule.target]), 0.0))
    best = searches.find_best_from_scratch()
    candidates += [_Row("scratch_best", best, 0.0)] if best is not None else []
    return _compare(searches, candidates, "", is_given=True)


def _compare(searches: _Searches, candidates: Sequence[_Row], search: str, *, is_given: bool = False) -> Advice:
    """Return the advice from some runs; `is_given` if the growth among them is the user's own."""
    known: dict[tuple[Path, float], _Row] = {}
    for candidate in candidates:  # the best size may be the target, or that of the model
        known.setdefault((candidate.run.path, candidate.seen), candidate)
    rows = sorted(known.values(), key=lambda row: row.run.loss)
    if not rows and searches.shape_costs:
        raise PlanError(
            f"a budget of {searches.budget:.3g} {searches.unit} is less than {_FEWEST_SEQUENCES} sequences of the "
            "smallest model: give more"
        )
    if not rows:
        raise PlanError("no model fits into the memory of a device: raise device_memory, or give more devices")
    samples = _Samples([(searches.get_search(row.seen), row.run) for row in rows], searches.question.law)
    options = tuple(searches.build_option(row, number, samples) for number, row in enumerate(rows))
    verdict = _judge(searches, rows, options, samples, is_given=is_given)
    return Advice(searches.budget, searches.unit, options, verdict, search, _list_remarks(searches.question, options))


class _Row(NamedTuple):
    """A run to compare, its kind, the tokens that its first model has seen before, and its schedule if it is given."""

    kind: OptionKind
    run: PlannedRun
    seen: float
    schedule: GrowthSchedule | None = None


class _Searches:
    """The searches that answer a question."""

    def __init__(self, question: Question) -> None:
        self.question = question
        if question.unit == "tokens":
            owner = question.start or question.target
            assert owner is not None
            self.budget: float = question.budget * question.count_flops(owner)
        else:
            self.budget = question.budget
        self.unit: Literal["flops", "hours"] = "hours" if question.unit == "hours" else "flops"
        self._searches: dict[tuple[float, float], FinalLossSearch] = {}

    def get_search(self, seen: float, budget: float | None = None) -> FinalLossSearch:
        """Return the search for models trained on this many tokens before, at a budget."""
        key = seen, budget or self.budget
        if key not in self._searches:
            settings = LossSettings(self.question.law, spans=("run",), already_seen=seen, slack=_SLACK)
            self._searches[key] = FinalLossSearch(self.question.inputs, key[1], settings, self.unit)
        return self._searches[key]

    def find_unchanged(self) -> PlannedRun | None:
        start = self.question.start
        if start is None:
            return None
        if not self.question.fits(start):
            memory = self.question.memory.explain(start, self.question.config, self.question.sequence_length)
            raise PlanError(f"the model itself does not fit: it {memory}")
        return self.get_search(self.question.already_seen).rank([(start,)], 1).runs[0]

    def train_from_scratch(self, shapes: Sequence[ModelDims], budget: float | None = None) -> PlannedRun:
        """Return the best of some structures from scratch."""
        return self.get_search(0.0, budget).rank([(dims,) for dims in shapes], 1).runs[0]

    def find_best_from_scratch(self, budget: float | None = None) -> PlannedRun | None:
        """Return the best size from scratch, or None if none fits into memory."""
        shapes = self._list_affordable(budget or self.budget)
        return self.train_from_scratch(shapes, budget) if shapes else None

    def _list_affordable(self, budget: float) -> list[ModelDims]:
        """Return the structures from scratch that a budget can train for `_FEWEST_SEQUENCES`."""
        return [dims for dims, cost in self.shape_costs.items() if cost * _FEWEST_SEQUENCES <= budget]

    @cached_property
    def shape_costs(self) -> dict[ModelDims, float]:
        """Structures from scratch that fit into memory, with what a sequence costs."""
        question = self.question
        shapes = list_shapes(question.config, question.start or question.target)
        flops = {dims: question.count_flops(dims) for dims in shapes if question.fits(dims)}
        length, model = float(question.sequence_length), question.cost_model
        if self.unit == "flops" or model is None:
            return {dims: cost * length for dims, cost in flops.items()}
        return {dims: model.hours(cost, length) for dims, cost in flops.items()}

    def find_growths(self, best: PlannedRun | None) -> tuple[list[PlannedRun], str]:
        """Return the best growths to different targets, and how they were found."""
        paths = [path for path in self._list_paths(best) if all(map(self.question.fits, path))]
        if not paths:
            return [], "No growth fits into the memory of a device."
        search = self.get_search(self.question.already_seen)
        outcome = search.rank(paths, len(paths))
        likely = list(outcome.runs[:_LIKELY])
        samples = _Samples([(search, run) for run in likely], self.question.law)
        # A growth has to earn its risk: without that, the most uncertain one would often look best.
        stages = np.array([len(run.path) for run in likely])
        risks = samples.losses + samples.errors.std(axis=0) + _STAGE_PRICE * stages
        growths: list[PlannedRun] = []
        for number in np.argsort(risks, kind="stable"):
            targets = [] if self.question.target else [other.path[-1] for other in growths]
            if len(growths) < MOST_GROWTHS and likely[number].path[-1] not in targets:
                growths.append(likely[number])
        return growths, outcome.describe()

    def _list_paths(self, best: PlannedRun | None) -> list[Path]:
        """Return the growths to compare: by up to `_LARGEST_STEP` per stage, unless none leads to the target."""
        question = self.question
        if question.start is not None:
            most = _LARGEST_GROWTH * self._count_parameters(question.start)
            larger = [dims for dims in list_larger(question.start) if self._count_parameters(dims) <= most]
            paths = list_paths_from(question.start, [question.target] if question.target else larger)
        elif question.target is not None:
            paths = list_paths_to(question.target)
        else:
            paths = [path for target in self._list_targets(best) for path in list_paths_to(target)]
        gentle = [
            path
            for path in paths
            if all(
                self._count_parameters(after) <= _LARGEST_STEP * self._count_parameters(before)
                for before, after in pairwise(path)
            )
        ]
        return gentle or paths

    def _list_targets(self, best: PlannedRun | None) -> list[ModelDims]:
        """Return the targets near the best size without growth."""
        if best is None:
            return []
        low, high = (factor * self._count_parameters(best.path[-1]) for factor in _TARGETS_NEAR)
        shapes = [dims for dims in self._list_affordable(self.budget) if low <= self._count_parameters(dims) <= high]
        usual = [dims for dims in shapes if _ASPECTS[0] <= dims.hidden_size / dims.num_hidden_layers <= _ASPECTS[1]]
        return usual or shapes

    def _count_parameters(self, dims: ModelDims) -> int:
        return int(count_parameters(dims, self.question.config))

    def build_option(self, row: _Row, number: int, samples: _Samples) -> AdvisedOption:
        """Return the option of a run, the `number`th of those sampled."""
        question, run = self.question, row.run
        schedule = row.schedule or build_schedule(run)
        flops = schedule.flops(question.config, question.sequence_length)
        earlier = row.seen * question.count_flops(run.path[0])
        law = question.law
        peak = compute_usual_peak(flops + earlier) if law.has_relative_rates else law.references[3]
        model = question.cost_model
        per_stage = zip(map(question.count_flops, run.path), run.tokens, strict=True)
        estimates = [question.memory.estimate(d, question.config, question.sequence_length) for d in run.path]
        difference, error = samples.compare(number, 0)
        return AdvisedOption(
            row.kind,
            schedule,
            parameters=int(count_parameters(run.path[-1], question.config)),
            tokens=sum(run.tokens),
            flops=flops,
            hours=None if model is None else float(sum(model.hours(cost, float(count)) for cost, count in per_stage)),
            memory=max(int(estimate.total) for estimate in estimates),
            learning_rate=float(f"{peak:.2g}"),
            lr_span=run.span,
            loss=run.loss,
            error=samples.get_error(number),
            difference=difference,
            difference_error=error,
            chance=samples.compute_chance(number),
            decades_outside=float(samples.distances[number]),
        )


def build_schedule(run: PlannedRun) -> GrowthSchedule:
    """Return the schedule of a run, with `GROWTH_INITS`."""
    stages = []
    for before, after, count in zip(run.path, run.path[1:], run.tokens[1:], strict=False):
        operators = find_operators(before, after)
        stages.append(GrowthStage(operators, after, count, {name: GROWTH_INITS[name] for name in operators}))
    return GrowthSchedule(run.path[0], tuple(stages), run.tokens[0])


class _Samples:
    """Joint errors of runs: by each replicate of the law, and what runs do not share.

    Args:
        runs: each with the search that found it.
        law: law that predicts them.
    """

    def __init__(self, runs: Sequence[tuple[FinalLossSearch, PlannedRun]], law: GrowthLaw) -> None:
        self.losses = np.array([run.loss for _, run in runs])
        self.errors: FloatArray = np.zeros((max(len(law.replicates), 1), len(runs)))  # replicates × runs
        self.distances, self.own = np.zeros(len(runs)), np.zeros(len(runs))
        groups: dict[tuple[int, int, RateSpan], list[int]] = {}
        for number, (search, run) in enumerate(runs):
            groups.setdefault((id(search), len(run.path), run.span), []).append(number)
        for (_, _, span), numbers in groups.items():
            tokens = np.array([runs[number][1].tokens for number in numbers], dtype=np.float64)
            table = runs[numbers[0]][0].tabulate([runs[number][1].path for number in numbers], tokens, span)
            if law.replicates:
                samples = law.sample_ends(table)
                self.errors[:, numbers] = samples - samples.mean(axis=0)
            self.distances[numbers] = law.measure_distances(table)
            self.own[numbers] = law.compute_own_deviations(table)
        self._deviation = law.deviation
        random = np.random.default_rng(0)
        draws = random.standard_normal((len(self.errors), _DRAWS, len(runs))) * self.own
        self._ends = (self.losses + self.errors[:, None] + draws).reshape(-1, len(runs))

    def get_error(self, number: int) -> float:
        """Return half of the central 80% interval of a loss."""
        spread = self.errors[:, number].var(ddof=1) if len(self.errors) > 1 else 0.0
        widening = WIDENING * self.distances[number]
        return float(Z80 * math.sqrt(spread + self._deviation**2 + widening**2))

    def compare(self, number: int, other: int) -> tuple[float, float]:
        """Return the difference of two losses, and half of its central 80% interval."""
        if number == other:
            return 0.0, 0.0
        errors = self.errors[:, number] - self.errors[:, other]
        spread = errors.var(ddof=1) if len(errors) > 1 else 0.0
        own = self.own[number] ** 2 + self.own[other] ** 2
        return float(self.losses[number] - self.losses[other]), float(Z80 * math.sqrt(spread + own))

    def compute_chance(self, number: int, others: Sequence[int] | None = None) -> float:
        """Return the chance that a run ends lowest, of all or of some."""
        columns = list(range(len(self.losses))) if others is None else [number, *others]
        is_lowest = self._ends[:, columns].argmin(axis=1) == columns.index(number)
        return float(is_lowest.mean())


def _judge(
    searches: _Searches,
    rows: Sequence[_Row],
    options: Sequence[AdvisedOption],
    samples: _Samples,
    *,
    is_given: bool,
) -> AdviceVerdict:
    """Return the verdict: the best growth against the best option without growth."""
    grown = [number for number, option in enumerate(options) if option.kind == "growth"]
    others = [number for number, option in enumerate(options) if option.kind != "growth"]
    if not grown or not others:
        return AdviceVerdict("do_not_grow", "Do not grow: no growth is possible within these limits.", None)
    chance_loss = compute_chance_loss(searches.question.config)
    growth, other = grown[0], others[0]
    # A user's own schedule is compared only if the law has a loss for it.
    if (max if is_given else min)(options[growth].loss, options[other].loss) > chance_loss:
        sentence = (
            "No verdict on growth: for so few FLOPs the law predicts a loss above ln(vocabulary) = "
            f"{chance_loss:.2f}, which is that of guessing."
        )
        return AdviceVerdict("outside", sentence, None)
    chance = samples.compute_chance(growth, [other])
    difference, error = samples.compare(growth, other)
    is_open = chance < SURE and not is_given and searches.question.start is not None
    pays_from = None if not is_open else _find_crossing(searches, rows[growth], rows[other])
    size = f"{abs(difference):.3f} ± {error:.3f} nats"
    where = "below" if difference < 0 else "above"
    name = "this schedule" if is_given else f"“{options[growth].label}”"
    best = f"{name} is predicted to end {size} {where} “{options[other].label}”"
    outside = _describe_outside(searches.question, rows)
    is_far = max(options[growth].decades_outside, options[other].decades_outside) > FAR
    if chance >= SURE or chance <= 1 - SURE:
        kind: VerdictKind = "grow" if chance >= SURE else "do_not_grow"
        sentence = f"{'Grow' if kind == 'grow' else 'Do not grow'}: {best}"
        sentence += f", outside what this law was fitted to ({outside})." if is_far else "."
    elif is_far:
        kind, sentence = "outside", f"Outside what this law was fitted to ({outside}), and too close to call: {best}."
    else:
        kind, sentence = "too_close", f"Too close to call: {best}."
    return AdviceVerdict(kind, sentence, chance, pays_from)


def _find_crossing(searches: _Searches, growth: _Row, other: _Row) -> float | None:
    """Return the budget from which on a growth is surely the best way, by the law; None if there is none.

    It is compared with another option, and with the best size from scratch at each budget.
    """
    for multiple in _MULTIPLES:
        budget = searches.budget * multiple
        pairs = []
        for row in (growth, other):
            search = searches.get_search(row.seen, budget)
            pairs.append((search, search.rank([row.run.path], 1).runs[0]))
        if best := searches.find_best_from_scratch(budget):
            pairs.append((searches.get_search(0.0, budget), best))
        if _Samples(pairs, searches.question.law).compute_chance(0) >= SURE:
            return budget
    return None


def forecast_options(question: Question, advice: Advice, budgets: Sequence[float]) -> tuple[FloatArray, FloatArray]:
    """Return what the options would give at other budgets, each with its structures and its best tokens there.

    Args:
        question: question.
        advice: its answer.
        budgets: budgets in the unit of the advice.

    Returns:
        Losses, options × budgets, and half of the central 80% interval of their difference from the first option.
    """
    searches = _Searches(question)
    losses, errors = (np.zeros((len(advice.options), len(budgets))) for _ in range(2))
    for column, budget in enumerate(budgets):
        runs = []
        for option in advice.options:
            seen = question.already_seen if option.kind in ("unchanged", "growth") else 0.0
            search = searches.get_search(seen, budget)
            runs.append((search, search.rank([option.schedule.structures], 1).runs[0]))
        samples = _Samples(runs, question.law)
        losses[:, column] = samples.losses
        errors[:, column] = [samples.compare(number, 0)[1] for number in range(len(runs))]
    return losses, errors


def _describe_outside(question: Question, rows: Sequence[_Row]) -> str:
    """Return the quantities of options that are outside the scales of the law."""
    values = {
        "parameters": [float(count_parameters(dims, question.config)) for row in rows for dims in row.run.path],
        "tokens": [sum(row.run.tokens) + row.seen for row in rows],
        "width": [float(dims.hidden_size) for row in rows for dims in row.run.path],
    }
    parts = []
    for name, (low, high) in question.law.scales.items():
        least, most = min(values[name]), max(values[name])
        if most > high or least < low:
            extreme = most if most > high else least
            limits = f"{format_count(low)} to {format_count(high)}"
            parts.append(f"{format_count(extreme)} {name}, fitted to {limits}")
    return "; ".join(parts)


def _list_remarks(question: Question, options: Sequence[AdvisedOption]) -> tuple[str, ...]:
    """Return what a reader should know about the law and the model."""
    remarks = []
    if question.already_seen:
        share = options[0].tokens / question.already_seen
        seen = format_count(question.already_seen)
        remarks.append(f"The model has seen {seen} tokens; the first option adds {share:.2g} times as many.")
    if question.law.has_relative_rates:
        remarks.append(
            "The law takes losses of one stage from a published law, and effects of growth from models of under 1M "
            "parameters, with wider errors. Fit a law to your own runs for narrower ones."
        )
    return tuple(remarks)


def build_run(
    question: Question, option: AdvisedOption, data: str | None, source: str | None = None
) -> dict[str, Json]:
    """Return the content of a file for `slop train` that runs an option.

    Args:
        question: question that the option answers.
        option: one of its options.
        data: source of the training text, as `data.source` names it; None to leave it out, to be filled in.
        source: model directory or Hub id of the model; None if it has no name.
    """
    settings = {name: read_setting(question.config, name) for name in ("model_type", "vocab_size")}
    settings["tie_word_embeddings"] = bool(read_setting(question.config, "tie_word_embeddings", False))
    begins_with_model = option.kind in ("unchanged", "growth") and bool(question.already_seen) and source is not None
    model: dict[str, Json] = {**settings, "max_position_embeddings": question.sequence_length}
    if begins_with_model:
        model = {"pretrained": source}  # whose config describes all of it
    text: dict[str, Json] = {} if data is None else {"source": data}
    text |= {"block_size": question.sequence_length}
    text |= {"vocab_size": settings["vocab_size"]} if source is None else {"tokenizer": source}
    schedule = RateSchedule(option.lr_span)
    training: dict[str, Json] = {
        "learning_rate": option.learning_rate,
        **schedule.describe_training(grows=bool(option.schedule.stages)),
        "batch_tokens": [compute_usual_batch(option.flops, option.tokens, question.sequence_length)],
        "per_device_train_batch_size": question.memory.micro_batch_size,
        **({"bf16": True} if question.memory.precision == "bf16" else {}),
        **({"gradient_checkpointing": True} if question.memory.checkpointing else {}),
    }
    return {"schedule": to_plain(option.schedule), "model": model, "data": text, "training": training}
