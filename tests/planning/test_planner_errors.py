"""Requests that a planner refuses, in one line with the fault and the remedy."""

import math

import pytest

from slop_hf import ConfigSpace, ModelDims, SlopPlanner
from slop_hf.cost.hours import CostModel, Measurement
from slop_hf.cost.memory import MemoryLimit
from slop_hf.cost.scaling_law import ScalingLaw
from slop_hf.errors import SlopError
from slop_hf.planning.budget import share_tokens_by_utility
from slop_hf.schedule import share_tokens

INITIAL = ModelDims(768, 2048, 6, 6)
TARGET = ModelDims(1280, 3584, 40, 10)
COST = CostModel(1e-18, 1e-10)
TOKENS = {"tokens": 65e9}


def plan(space=None, request=None, **planner):
    space = {"targets": [TARGET]} if space is None else space
    initial = planner.pop("initial", INITIAL)
    return SlopPlanner(initial, ConfigSpace(**space), **planner).plan(**(request or {}))


NAN = math.nan
CASES = {
    # the space
    "no target within tolerance": (
        dict(space={"target_params": 1e9, "tolerance": 0.0001, "max_layers": 8}),
        r"no structure grown .* within 0.0%; the nearest is \(2560, 10240, 8, 20\) with 1.003e\+09; raise",
    ),
    "target smaller": (
        dict(space={"targets": [ModelDims(512, 2048, 6, 4)]}),
        "hidden_size would shrink from 768 to 512",
    ),
    "target equal": (dict(space={"targets": [INITIAL]}), "would grow nothing"),
    "target too small by size": (dict(space={"target_params": 5e7}), "no structure grown from"),
    "NaN size": (dict(space={"target_params": NAN}), "target_params must be a positive number, got nan"),
    "no target": (dict(space={}), "give either targets or target_params"),
    "bounds on hidden contradict": (
        dict(space={"target_params": 1e9, "min_hidden": 900, "max_hidden": 800}),
        "bounds contradict: min_hidden 900 and max_hidden 800",
    ),
    "bounds on ffn contradict": (
        dict(space={"target_params": 1e9, "min_ffn": 9000, "max_ffn": 8000}),
        "bounds contradict: min_ffn",
    ),
    "bounds leave nothing": (dict(space={"target_params": 1e9, "max_hidden": 800}), "loosen the bounds"),
    "negative bound": (
        dict(space={"target_params": 1e9, "min_heads": -1}),
        "min_heads must be a whole number, 1 or more, got -1",
    ),
    "odd mode of heads": (dict(space={"target_params": 1e9, "heads": "many"}), "heads must be 'follow' or 'fixed'"),
    "vocabulary not shared": (dict(space={"target_params": 1e9, "tensor_parallel": 7}), "pad it to 32004"),
    "initial not shared": (
        dict(space={"targets": [TARGET], "tensor_parallel": 4}),
        "the space does not allow the initial structure: heads",
    ),
    "target not shared": (
        dict(initial=ModelDims(1024, 2048, 6, 8), space={"targets": [TARGET], "tensor_parallel": 4}),
        "not all multiples of tensor_parallel 4",
    ),
    "does not fit": (
        dict(space={"targets": [TARGET], "memory": MemoryLimit(8e9)}),
        r"does not fit: .*needs .* GB per device",
    ),
    # the search
    "unknown operator": (dict(operators=("depth",)), r"unknown operator 'depth' \(known: layer, "),
    "operator twice": (dict(operators=("ffn", "ffn")), "one or more different names"),
    "unknown objective": (dict(objective="luck"), r"unknown objective 'luck' \(known: delta_params, "),
    "unknown mode": (dict(mode="twice"), "mode must be 'once', 'repeated' or 'joint', got 'twice'"),
    "missing operator": (dict(operators=("layer", "ffn")), "needs mha, hidden among the operators"),
    "idle operator": (dict(operators=("layer", "ffn", "hidden", "head_dim")), "head_dim would grow nothing"),
    "other number of stages": (dict(stages=5), "mode 'once' has one stage for each of 3 operators, got stages=5"),
    "no stages": (dict(mode="joint", stages=0), "stages must be a whole number, 1 or more, got 0"),
    "no most stages": (
        dict(mode="joint", max_stages=0, objective="flops"),
        "max_stages must be a whole number, 1 or more",
    ),
    "product of a free number of stages": (
        dict(mode="repeated"),
        "cannot choose the number of stages: .* depend on the unit .*; give stages, or use objective flops or hours",
    ),
    "loss per hour of a free number of stages": (
        dict(mode="joint", objective="loss_per_hour", cost_model=COST, request=TOKENS),
        "cannot choose the number of stages",
    ),
    "price of a stage in a product": (
        dict(mode="repeated", stages=4, stage_price=2.0),
        "objective 'delta_params' has no use for a stage_price; choose flops or hours",
    ),
    "negative price": (dict(objective="flops", stage_price=-1.0), "stage_price must be 0 or more, got -1.0"),
    "too few stages": (dict(mode="repeated", stages=2), "no schedule of 2 stages leads to a target: use more"),
    "too many stages": (
        dict(space={"targets": [ModelDims(768, 2048, 8, 6)]}, operators=("layer",), mode="repeated", stages=4),
        "or fewer",
    ),
    "factor below 1": (dict(max_factor=0.5), "max_factor must be a number above 1, such as 2, got 0.5"),
    "factor too small": (dict(max_factor=1.01), "no schedule keeps to max_factor"),
    "waypoint below the start": (dict(through=[ModelDims(640, 2048, 6, 5)]), "no schedule can pass through"),
    "waypoint beyond the target": (dict(through=[ModelDims(1280, 3584, 41, 10)]), "would shrink from 41 to 40"),
    "waypoint off every order": (
        dict(through=[ModelDims(768, 2048, 7, 6)]),
        "passes through every structure of `through`",
    ),
    "too large to search": (
        dict(
            space={"targets": [ModelDims(12288, 49152, 96, 96)], "ffn_multiple": 8},
            mode="joint",
            stages=3,
        ),
        "are too many to search .*; take coarser multiples",
    ),
    # tokens, hours and memory
    "no schedules asked for": (dict(request={"top_k": 0}), "top_k must be a whole number, 1 or more, got 0"),
    "flops without tokens": (dict(objective="flops"), "objective 'flops' needs a token budget: give tokens"),
    "negative tokens": (dict(request={"tokens": -1.0}), "tokens must be positive numbers, got -1.0"),
    "NaN tokens": (dict(request={"tokens": NAN}), "tokens must be positive numbers, got nan"),
    "tokens of too few stages": (
        dict(request={"tokens": [1e9, 1e9]}),
        "tokens has 2 numbers for an initial model and 3",
    ),
    "tokens of free stages": (
        dict(mode="joint", objective="flops", request={"tokens": [1e9, 1e9]}),
        "tokens per stage need a fixed number of stages",
    ),
    "utility of given tokens": (
        dict(request={"tokens": [1e9] * 4, "sharing": "utility"}),
        "splits the tokens of a whole run: give one number",
    ),
    "unknown sharing": (dict(request={"tokens": 1e9, "sharing": "fair"}), "sharing must be 'paper' or 'utility'"),
    "negative share": (
        dict(request={"tokens": 1e9, "initial_share": -1.0}),
        "initial_share must be a number, 0 or more",
    ),
    "negative past": (dict(request={"already_seen": -1.0}), "already_seen must be a number, 0 or more"),
    "hours without a cost model": (dict(objective="hours", request=TOKENS), "needs hours: give a cost model"),
    "loss of an unknown model": (
        dict(objective="loss_per_hour", cost_model=COST, request={"tokens": 65e9, "initial_share": 0.0}),
        "has to know how good the initial model is",
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused(case):
    arguments, message = case
    with pytest.raises(SlopError, match=message) as caught:
        plan(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CostModel(0.0), "hours_per_flop must be a positive number"),
        (lambda: CostModel(1e-18, NAN), "hours_per_token must be 0 or more"),
        (lambda: CostModel.fit([]), "needs at least 2 measurements, got 0"),
        (lambda: Measurement("small", 1e9, 0.0, 1.0), "'small': tokens must be a positive number, got 0"),
        (lambda: ScalingLaw(tokens_exponent=0.0), "tokens_exponent of a scaling law must be a positive number"),
        (lambda: share_tokens(math.inf, 3), "tokens must be positive"),
        (lambda: share_tokens_by_utility(0.0, [1e8, 1e9], [6e8, 6e9]), "tokens must be a positive number, got 0"),
    ],
)
def test_refused_values(make, message):
    with pytest.raises(SlopError, match=message):
        make()


def test_hours_that_do_not_rise_are_refused():
    same = [Measurement("a", 1e9, 1e9, 10.0), Measurement("b", 2e9, 1e9, 5.0)]
    with pytest.raises(SlopError, match="do not rise with the FLOPs"):
        CostModel.fit(same)
