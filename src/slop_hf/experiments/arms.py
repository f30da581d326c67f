"""The schedule of each arm of an experiment, at each of its budgets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from ..baselines import ARMS, ArmRequest
from ..baselines.arms import FROM_RANDOM
from ..cost.flops import count_flops_per_token, count_parameters
from ..dims import ModelConfig
from ..errors import PlanError, RunError
from ..io.serialization import Json, describe_unknown_key
from ..operators import OPERATORS, find_operators
from ..planning.budget import allocate_tokens, share_tokens_by_utility
from ..planning.planner import SlopPlanner
from ..planning.space import ConfigSpace
from ..schedule import GrowthSchedule, GrowthStage
from ..training.config import RunConfig, find_vocab_size
from .config import ArmConfig, Experiment

#: Fields of the model's config that FLOPs depend on.
_FIELDS_OF_COST = ("model_type", "vocab_size", "tie_word_embeddings")
#: The most orders that one target can have: each dimension grows in one stage.
_MAX_ORDERS = math.factorial(len(OPERATORS))


def build_arm_schedule(experiment: Experiment, arm: ArmConfig, budget: float = 1.0) -> GrowthSchedule:
    """Return the schedule of an arm, with as many tokens as `budget` times the scale's budget buys."""
    spend = experiment.sizes.budget * budget
    if arm.control in FROM_RANDOM and "pretrained" in experiment.run.model:
        raise RunError(
            f"control {arm.control} begins with random weights, but all runs begin with model.pretrained: "
            "leave the arm out"
        )
    if arm.schedule is not None or arm.chain is not None:
        if arm.shares == "utility":
            raise RunError("shares 'utility' are the planner's; give the shares of a schedule as its stages' tokens")
        if arm.schedule is None:
            return fit_to_budget(experiment, _build_chain(experiment, arm.chain or ()), arm.shares, spend)
        schedule = GrowthSchedule.from_yaml(arm.schedule) if isinstance(arm.schedule, str) else arm.schedule
        in_file = schedule.tokens if any(schedule.tokens) else None
        return fit_to_budget(experiment, schedule, arm.shares or in_file, spend)
    schedule = _plan_arm(experiment, arm)
    shares = _share_by_utility(experiment, arm, schedule, spend) if arm.shares == "utility" else arm.shares
    schedule = fit_to_budget(experiment, schedule, shares, spend)
    if arm.control is None:
        return schedule
    config, length = get_model_fields(experiment.run), experiment.run.data.block_size
    return ARMS[arm.control](ArmRequest(schedule, config, length, experiment.sizes.equal))


def _build_chain(experiment: Experiment, names: Sequence[str]) -> GrowthSchedule:
    """Return the schedule that grows through some structures, without tokens."""
    structures = [experiment.get_structure(name) for name in names]
    stages = [GrowthStage(find_operators(old, new), new) for old, new in pairwise(structures)]
    return GrowthSchedule(structures[0], tuple(stages))


def fit_to_budget(
    experiment: Experiment, schedule: GrowthSchedule, shares: Sequence[float] | None, spend: float
) -> GrowthSchedule:
    """Return a schedule with as many tokens as a budget in the experiment's unit buys.

    Args:
        shares: relative tokens of each stage, the initial model's first; by default the paper's 2.5 : 1 : 1 : …
    """
    weights = [float(share) for share in shares or schedule.with_tokens(1e9).tokens]
    if len(weights) != len(schedule.structures):
        raise RunError(
            f"{len(weights)} shares for {len(schedule.structures)} stages ({schedule.sequence}): give one per stage"
        )
    unit = experiment.sizes.equal
    costs = _get_flops_per_token(experiment, schedule) if unit == "flops" else None
    tokens = allocate_tokens(weights, spend, costs)
    if not sum(tokens):
        raise RunError(f"a budget of {spend:g} {unit} buys no token of ({schedule.sequence or 'no growth'}); raise it")
    return schedule.with_shares(tokens)


def _get_flops_per_token(experiment: Experiment, schedule: GrowthSchedule) -> list[float]:
    config, length = get_model_fields(experiment.run), experiment.run.data.block_size
    return [count_flops_per_token(dims, config, length) for dims in schedule.structures]


def get_model_fields(run: RunConfig) -> ModelConfig:
    """Return the fields of the model's config that growth leaves alone, as the planner takes them.

    Raises:
        RunError: if the run begins with a pretrained model whose fields are not next to it, or that gets experts.
    """
    if "experts" in run.model:
        raise RunError("experiments do not give their model experts: grow it first with `slop grow --experts`")
    fields = {name: value for name, value in run.model.items() if name != "pretrained"}
    if "pretrained" in run.model and (missing := [name for name in _FIELDS_OF_COST if name not in fields]):
        raise RunError(
            f"model.pretrained needs {', '.join(missing)} next to it, because FLOPs are counted before the model is "
            "loaded: add them as in its config"
        )
    return {"model_type": "llama", "vocab_size": find_vocab_size(run), **fields}


def build_planner(experiment: Experiment, arm: ArmConfig) -> SlopPlanner:
    """Return the planner that an arm takes its schedule from."""
    names = (arm.target,) if isinstance(arm.target, str) else arm.target
    operators = arm.operators
    if arm.order is not None:
        by_letter = {operator.letter: name for name, operator in OPERATORS.items()}
        operators = tuple(by_letter[letter] for letter in arm.order.split("-"))
    targets = [experiment.get_structure(name) for name in names]
    _check_keys(arm.planner, SlopPlanner, "planner", ("initial", "space", "operators"))
    _check_keys(arm.space, ConfigSpace, "space", ("targets", "target_params", "config", "sequence_length"))
    try:
        space = ConfigSpace(
            targets=targets,
            config=get_model_fields(experiment.run),
            sequence_length=experiment.run.data.block_size,
            **arm.space,
        )
        return SlopPlanner(experiment.get_structure(arm.initial), space, operators=operators, **arm.planner)
    except TypeError as caught:
        raise PlanError(f"planner or space: {caught}") from None


def _check_keys(given: Mapping[str, Json], cls: type, section: str, own: Sequence[str]) -> None:
    """Refuse keys of an arm's section that are no arguments of a class, or that the experiment itself gives."""
    known = [field.name for field in dataclasses.fields(cls) if field.init and field.name not in own]
    for key in given:
        if key in own:
            raise PlanError(f"{section}.{key} follows from the arm and the scale; leave it out")
        if key not in known:
            raise PlanError(describe_unknown_key(key, known, path=f"{section}.{key}"))


def _plan_arm(experiment: Experiment, arm: ArmConfig) -> GrowthSchedule:
    """Return the planner's answer that an arm asks for; for a control arm, the planner's best."""
    if arm.order is None and isinstance(arm.target, str):
        initial = experiment.get_structure(arm.initial)
        if experiment.get_structure(arm.target) == initial:
            return GrowthSchedule(initial)
    planner = build_planner(experiment, arm)
    rank = arm.plan if isinstance(arm.plan, int) else 1
    needs_all = arm.plan == "worst" or arm.order is not None
    if needs_all and planner.mode != "once":
        raise PlanError(f"`order` and `plan: worst` need the planner's mode 'once', not {planner.mode!r}: give a rank")
    tokens = experiment.sizes.tokens or 1e9  # objectives that use tokens only need their proportions
    count = _MAX_ORDERS * len(planner.space.targets or (None,)) if needs_all else rank
    schedules = planner.plan(count, tokens=tokens)
    if arm.order is not None:
        # The best schedule of an order, if there are two, overwrites the other.
        by_order = {_get_order(schedule): schedule for schedule in reversed(schedules)}
        if arm.order not in by_order:
            orders = ", ".join(map(_get_order, schedules))
            raise PlanError(f"no schedule has the order {arm.order}; the orders are {orders}")
        return by_order[arm.order]
    if arm.plan == "worst":
        return schedules[-1]
    if len(schedules) < rank:
        raise PlanError(f"the planner has {len(schedules)} schedules: `plan` must be at most that, got {rank}")
    return schedules[rank - 1]


def _get_order(schedule: GrowthSchedule) -> str:
    """Return the letters of the leading dimensions; `sequence` also lists the dimensions that grow with them."""
    return "-".join(OPERATORS[stage.operators[0]].letter for stage in schedule)


def _share_by_utility(
    experiment: Experiment, arm: ArmConfig, schedule: GrowthSchedule, spend: float
) -> Sequence[float]:
    """Return shares with equal marginal utility, for about as many tokens as the budget buys."""
    total = sum(fit_to_budget(experiment, schedule, None, spend).tokens)
    config = get_model_fields(experiment.run)
    params = [count_parameters(dims, config) for dims in schedule.structures]
    costs = _get_flops_per_token(experiment, schedule)
    return share_tokens_by_utility(total, params, costs, law=build_planner(experiment, arm).law)
