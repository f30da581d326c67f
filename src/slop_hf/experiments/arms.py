"""From an experiment to the runs that it consists of: each arm's schedule at each budget, once with each seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..baselines import ARMS, at_equal_flops
from ..cost.flops import count_parameters, count_flops_per_token
from ..errors import PlanError, RunError, SlopError
from ..operators import OPERATORS
from ..planning.budget import share_tokens_by_utility
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..schedule import GrowthSchedule
from ..training import RunConfig
from ..training.checks import with_inits
from ..training.config import known_vocab_size
from .config import ArmConfig, Experiment
from .jobs import RUNS, SEEDS_APART, Job

#: What lies beside a run's directory: its config, what it printed, the trunk that it has begun with.
#: Of one dimension a stage there are so many orders at most.
_ALL_ORDERS = math.factorial(len(OPERATORS))


def build_jobs(experiment: Experiment) -> list[Job]:
    """All runs of an experiment, without trunks, in the order of its arms.

    Raises:
        SlopError: naming the arm whose schedule cannot be made.
    """
    found = []
    for name, arm in experiment.arms.items():
        try:
            schedules = {budget: build_arm_schedule(experiment, arm, budget) for budget in arm.budgets}
        except SlopError as caught:
            raise type(caught)(f"arm {name}: {caught}") from None
        for budget, schedule in schedules.items():
            for seed in arm.seeds or experiment.sizes.seeds:
                place = Path(RUNS, name, f"x{budget:g}", f"seed-{seed}")
                found.append(Job(name, budget, seed, _run_config(experiment, arm, schedule, seed), place))
    return found


def build_arm_schedule(experiment: Experiment, arm: ArmConfig, budget: float = 1.0) -> GrowthSchedule:
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
        return fit_to_budget(experiment, schedule, arm.shares or _shares_in(schedule), spend)
    schedule = _planned(experiment, arm)
    shares = _utility_shares(experiment, arm, schedule, spend) if arm.shares == "utility" else arm.shares
    schedule = fit_to_budget(experiment, schedule, shares, spend)
    if arm.control is None:
        return schedule
    config, length = get_model_fields(experiment.run), experiment.run.data.block_size
    return ARMS[arm.control](schedule, config, length, budget=experiment.sizes.equal)


def fit_to_budget(
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
    config, length = get_model_fields(experiment.run), experiment.run.data.block_size
    return schedule.with_shares(at_equal_flops(schedule.structures, parts, spend, config, length))


def count_job_flops(experiment: Experiment, run: Job) -> float:
    """Training FLOPs of a run, the stages of its trunk included."""
    return run.schedule.flops(get_model_fields(experiment.run), experiment.run.data.block_size)


def get_model_fields(run: RunConfig) -> dict[str, Any]:
    """What growth leaves alone, as `cost` and the planner take it.

    Raises:
        RunError: for a run that begins with a pretrained model.
    """
    if "pretrained" in run.model:
        raise RunError("experiments begin with random weights, so that seeds differ in them; leave `pretrained` out")
    return {"model_type": "llama", "vocab_size": known_vocab_size(run), **run.model}


def build_planner(experiment: Experiment, arm: ArmConfig) -> SlopPlanner:
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
            config=get_model_fields(experiment.run),
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
    planner = build_planner(experiment, arm)
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
    about = sum(fit_to_budget(experiment, schedule, None, spend).tokens)
    config, length = get_model_fields(experiment.run), experiment.run.data.block_size
    params = [count_parameters(dims, config) for dims in schedule.structures]
    prices = [count_flops_per_token(dims, config, length) for dims in schedule.structures]
    return share_tokens_by_utility(about, params, prices, law=build_planner(experiment, arm).law)


def _shares_in(schedule: GrowthSchedule) -> Sequence[float] | None:
    return schedule.tokens if any(schedule.tokens) else None


def _run_config(experiment: Experiment, arm: ArmConfig, schedule: GrowthSchedule, seed: int) -> RunConfig:
    """The run of an arm with a seed: what all have in common, then the arm's changes, then what seeds decide."""
    seeds = {"seed": seed, "data_seed": seed, "growth_seed": seed * SEEDS_APART}
    training = {**experiment.run.training, **arm.training, **seeds}
    schedule = with_inits(schedule, training.pop("growth_init", None))  # where two runs that share stages may differ
    return dataclasses.replace(experiment.run, training=training, schedule=schedule)


# ---- What runs have in common -------------------------------------------------------------------------------------
