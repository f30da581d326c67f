"""From an experiment to the runs that it consists of: each arm's schedule at each budget, once with each seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..baselines import ARMS, at_equal_flops
from ..cost import count_parameters, flops_per_token
from ..errors import PlanError, RunError, SlopError
from ..operators import OPERATORS
from ..planner import SlopPlanner
from ..schedule import GrowthSchedule
from ..serialization import digest, plain
from ..space import ConfigSpace
from ..tokens import utility_shares
from ..training import RunConfig
from ..training.arguments import PER_STAGE
from ..training.checks import with_inits
from ..training.config import known_vocab_size
from .config import ArmConfig, Experiment

RUNS, TRUNKS = "runs", "trunks"
#: What lies beside a run's directory: its config, what it printed, the trunk that it has begun with.
CONFIG_FILE, LOG_FILE, TRUNK_FILE = "run.yaml", "log.txt", "trunk"
DIVERGED_FILE = "diverged.txt"  # in the directory of a run
#: Of one dimension a stage there are so many orders at most.
_ALL_ORDERS = math.factorial(len(OPERATORS))
#: Training arguments that matter only once a model has been grown.
_OF_GROWTH = ("carry_optimizer_state", "rewarm_steps", "growth_noise", "eval_after_growth", "growth_seed")
#: Growth seeds of one run are `growth_seed + stage`: those of different runs must not meet.
SEEDS_APART = 1000


@dataclass(frozen=True)
class ArmRun:
    """One run of a comparison, or a trunk: the beginning that several runs have in common.

    Args:
        arm: its name; "" for a trunk.
        budget: multiple of the scale's.
        seed: of weights, data order and growth.
        config: the run, with its schedule.
        place: of its directory in the comparison's.
        parent: the place of the trunk that it begins with; None where it begins alone.
    """

    arm: str
    budget: float
    seed: int
    config: RunConfig
    place: Path
    parent: Path | None = None

    @property
    def schedule(self) -> GrowthSchedule:
        """Its schedule."""
        return self.config.read_schedule()

    @property
    def name(self) -> str:
        """What to call it: arm, budget where that is another one, seed."""
        share = f" ×{self.budget:g}" if self.budget != 1 else ""
        return f"{self.arm}{share}, seed {self.seed}" if self.arm else f"trunk {self.place.name[:8]}, seed {self.seed}"


def diverged_places(runs: Sequence[ArmRun], root: Path) -> set[Path]:
    """The places of runs that have diverged, or cannot begin, as their trunk has.

    Args:
        runs: each after its trunk.
        root: the directory that their places are in.
    """
    found: set[Path] = set()
    for run in runs:
        if (root / run.place / DIVERGED_FILE).exists() or run.parent in found:
            found.add(run.place)
    return found


def beside(root: Path, run: ArmRun, name: str) -> Path:
    """A file beside the directory of a run, such as `seed-0.run.yaml`."""
    return (root / run.place).with_name(f"{run.place.name}.{name}")


def arm_runs(experiment: Experiment) -> list[ArmRun]:
    """All runs of an experiment, without trunks, in the order of its arms.

    Raises:
        SlopError: naming the arm whose schedule cannot be made.
    """
    found = []
    for name, arm in experiment.arms.items():
        try:
            schedules = {budget: arm_schedule(experiment, arm, budget) for budget in arm.budgets}
        except SlopError as caught:
            raise type(caught)(f"arm {name}: {caught}") from None
        for budget, schedule in schedules.items():
            for seed in arm.seeds or experiment.sizes.seeds:
                place = Path(RUNS, name, f"x{budget:g}", f"seed-{seed}")
                found.append(ArmRun(name, budget, seed, _run_config(experiment, arm, schedule, seed), place))
    return found


def arm_schedule(experiment: Experiment, arm: ArmConfig, budget: float = 1.0) -> GrowthSchedule:
    """The schedule of an arm, its tokens as many as the budget buys.

    Args:
        experiment: with the structures, and what growth leaves alone.
        arm: one of its arms, or another.
        budget: multiple of the scale's.

    Raises:
        SlopError: where there is none.
    """
    spend = experiment.sizes.budget * budget
    if arm.schedule is not None:
        given = arm.schedule
        schedule = GrowthSchedule.from_yaml(given) if isinstance(given, str) else given
        if arm.shares == "utility":
            raise RunError("shares 'utility' are the planner's; give those of a schedule in its tokens")
        return spending(experiment, schedule, arm.shares or _shares_in(schedule), spend)
    schedule = _planned(experiment, arm)
    shares = _utility_shares(experiment, arm, schedule, spend) if arm.shares == "utility" else arm.shares
    schedule = spending(experiment, schedule, shares, spend)
    if arm.control is None:
        return schedule
    config, length = model_fields(experiment.run), experiment.run.data.block_size
    return ARMS[arm.control](schedule, config, length, budget=experiment.sizes.equal)


def spending(
    experiment: Experiment, schedule: GrowthSchedule, shares: Sequence[float] | None, spend: float
) -> GrowthSchedule:
    """A schedule with as many tokens as a budget buys, in the experiment's unit.

    Args:
        experiment: that says what is equal.
        schedule: its tokens do not count.
        shares: of the tokens, for each stage, the initial model's first; None, the paper's 2.5 : 1 : 1 : …
        spend: the budget.

    Raises:
        RunError: for shares that are not one for each stage.
    """
    parts = [float(share) for share in shares or schedule.with_tokens(1e9).tokens]
    if len(parts) != len(schedule.structures):
        raise RunError(
            f"{len(parts)} shares for {len(schedule.structures)} stages ({schedule.sequence}): give as many"
        )
    if experiment.sizes.equal == "tokens":
        return schedule.with_shares([round(spend * part / sum(parts)) for part in parts])
    config, length = model_fields(experiment.run), experiment.run.data.block_size
    return schedule.with_shares(at_equal_flops(schedule.structures, parts, spend, config, length))


def run_flops(experiment: Experiment, run: ArmRun) -> float:
    """Training FLOPs of a run, the stages of its trunk included."""
    return run.schedule.flops(model_fields(experiment.run), experiment.run.data.block_size)


def model_fields(run: RunConfig) -> dict[str, Any]:
    """What growth leaves alone, as `cost` and the planner take it.

    Raises:
        RunError: for a run that begins with a pretrained model.
    """
    if "pretrained" in run.model:
        raise RunError("experiments begin with random weights, so that seeds differ in them; leave `pretrained` out")
    return {"model_type": "llama", "vocab_size": known_vocab_size(run), **run.model}


def planner_of(experiment: Experiment, arm: ArmConfig) -> SlopPlanner:
    """The planner that answers for an arm.

    Raises:
        SlopError: for a structure that the scale does not have, and arguments that the planner refuses.
    """
    names = (arm.target,) if isinstance(arm.target, str) else arm.target
    operators = arm.operators
    if arm.order is not None:
        by_letter = {operator.letter: name for name, operator in OPERATORS.items()}
        operators = tuple(by_letter[letter] for letter in arm.order.split("-"))
    targets = [experiment.structure(name) for name in names]
    try:
        space = ConfigSpace(
            targets=targets,
            config=model_fields(experiment.run),
            sequence_length=experiment.run.data.block_size,
            **arm.space,
        )
        return SlopPlanner(experiment.structure(arm.initial), space, operators=operators, **arm.planner)
    except TypeError as caught:
        raise PlanError(f"planner or space: {caught}") from None


def _planned(experiment: Experiment, arm: ArmConfig) -> GrowthSchedule:
    """The planner's answer that the arm asks for; a control's is the best."""
    if arm.order is None and isinstance(arm.target, str):
        initial = experiment.structure(arm.initial)
        if experiment.structure(arm.target) == initial:
            return GrowthSchedule(initial)
    planner = planner_of(experiment, arm)
    rank = arm.plan if isinstance(arm.plan, int) else 1
    all_of_them = arm.plan == "worst" or arm.order is not None
    if all_of_them and planner.mode != "once":
        raise PlanError(f"orders, and a worst one, are those of mode 'once', not {planner.mode!r}: give a rank")
    tokens = experiment.sizes.tokens or 1e9  # objectives that need tokens rank by proportions of them
    count = _ALL_ORDERS * len(planner.space.targets or (None,)) if all_of_them else rank
    found = planner.plan(count, tokens=tokens)
    if arm.order is not None:
        for schedule in found:
            if _order_of(schedule) == arm.order:
                return schedule
        raise PlanError(f"no schedule of the order {arm.order}; there are {', '.join(map(_order_of, found))}")
    if arm.plan == "worst":
        return found[-1]
    if len(found) < rank:
        raise PlanError(f"the planner has {len(found)} schedules: `plan` must be at most that, got {rank}")
    return found[rank - 1]


def _order_of(schedule: GrowthSchedule) -> str:
    """The dimensions that have stages of their own, in letters; `sequence` tells of those that follow, too."""
    return "-".join(OPERATORS[stage.operators[0]].letter for stage in schedule)


def _utility_shares(experiment: Experiment, arm: ArmConfig, schedule: GrowthSchedule, spend: float) -> Sequence[float]:
    """Shares by equal marginal utility at about the tokens that the budget buys."""
    about = sum(spending(experiment, schedule, None, spend).tokens)
    config, length = model_fields(experiment.run), experiment.run.data.block_size
    params = [count_parameters(dims, config) for dims in schedule.structures]
    prices = [flops_per_token(dims, config, length) for dims in schedule.structures]
    return utility_shares(about, params, prices, law=planner_of(experiment, arm).law)


def _shares_in(schedule: GrowthSchedule) -> Sequence[float] | None:
    return schedule.tokens if any(schedule.tokens) else None


def _run_config(experiment: Experiment, arm: ArmConfig, schedule: GrowthSchedule, seed: int) -> RunConfig:
    """The run of an arm with a seed: what all have in common, then the arm's changes, then what seeds decide."""
    seeds = {"seed": seed, "data_seed": seed, "growth_seed": seed * SEEDS_APART}
    training = {**experiment.run.training, **arm.training, **seeds}
    schedule = with_inits(schedule, training.pop("growth_init", None))  # where two runs that share stages may differ
    return dataclasses.replace(experiment.run, training=training, schedule=schedule)


# ---- What runs have in common -------------------------------------------------------------------------------------


def with_trunks(runs: Sequence[ArmRun]) -> list[ArmRun]:
    """The runs, and before them the trunks that two or more of them begin with, shortest first.

    Stages from the initial one on that have the same settings, structures, tokens, inits and seed give the same
    weights, bit for bit, and need no training twice. Under a learning rate that spans the run, a stage depends on
    those after it, and nothing is shared.
    """
    beginnings: dict[str, list[tuple[int, ArmRun]]] = {}
    for number, run in enumerate(runs):
        for length, key in _beginnings(run):
            beginnings.setdefault(f"{length}-{key}", []).append((number, run))
    shared = {key: found for key, found in beginnings.items() if len(found) > 1}
    trunks = {key: _trunk(key, found[0][1]) for key, found in _longest_only(shared).items()}
    in_order = sorted(trunks.items(), key=lambda item: len(item[1].schedule.structures))
    placed = [_on_trunk(run, key, trunks) for key, run in in_order]
    return placed + [_on_trunk(run, "", trunks) for run in runs]


def _beginnings(run: ArmRun) -> Iterator[tuple[int, str]]:
    """For each number of stages that could be shared with another run: what decides their weights."""
    if run.config.training.get("lr_span") == "run":
        return
    for length in range(1, len(run.schedule.structures)):
        if not any(run.schedule.tokens[:length]):
            continue  # a pretrained model: there is nothing to train once
        yield length, digest(plain(_beginning(run, length)))


def _beginning(run: ArmRun, length: int) -> RunConfig:
    """The first stages of a run, and no setting that does not reach them."""
    schedule, training = run.schedule, of_first_stages(run.config.training, length)
    if length == 1:
        training = {name: value for name, value in training.items() if name not in _OF_GROWTH}
    first = GrowthSchedule(schedule.initial, schedule.stages[: length - 1], schedule.initial_tokens)
    return dataclasses.replace(run.config, training=training, schedule=first)


def of_first_stages(training: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Training arguments with those that are given stage by stage cut to the first so many.

    >>> of_first_stages({"stage_learning_rates": [3e-3, 2e-3, 1e-3], "batch_tokens": [64]}, 2)
    {'stage_learning_rates': [0.003, 0.002], 'batch_tokens': [64]}
    """
    by_stage = {name: training[name] for name in PER_STAGE if isinstance(training.get(name), (list, tuple))}
    return {**training, **{name: list(values[:count]) for name, values in by_stage.items()}}


def _longest_only(shared: dict[str, list[tuple[int, ArmRun]]]) -> dict[str, list[tuple[int, ArmRun]]]:
    """Without beginnings that are shared by just the runs which share a longer one."""
    longest: dict[tuple[int, ...], str] = {}
    for key, found in shared.items():
        group = tuple(number for number, _ in found)
        if group not in longest or _length(key) > _length(longest[group]):
            longest[group] = key
    return {key: shared[key] for key in longest.values()}


def _length(key: str) -> int:
    return int(key.split("-")[0])


def _trunk(key: str, run: ArmRun) -> ArmRun:
    return ArmRun("", run.budget, run.seed, _beginning(run, _length(key)), Path(TRUNKS, key.partition("-")[2]))


def _on_trunk(run: ArmRun, own: str, trunks: dict[str, ArmRun]) -> ArmRun:
    """The run with the longest trunk that it begins with."""
    keys = [f"{length}-{key}" for length, key in _beginnings(run)]
    fitting = [key for key in keys if key in trunks and key != own]
    return dataclasses.replace(run, parent=trunks[fitting[-1]].place) if fitting else run
