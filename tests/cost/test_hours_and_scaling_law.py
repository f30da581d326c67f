"""Hours, predicted losses, and tokens shared out by them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slop_hf import ConfigSpace, ModelDims, SlopPlanner
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.cost.hours import CostModel, Measurement
from slop_hf.cost.scaling_law import HOFFMANN, ScalingLaw
from slop_hf.planning.budget import share_tokens_by_utility

LAW = ScalingLaw()
SIZES = st.floats(1e6, 1e12)


def measurements(per_flop, per_token, noise=0.0):
    runs = []
    for number, flops in enumerate((1e8, 5e8, 2e9, 9e9)):
        hours = (per_flop * flops + per_token) * 1e9 * (1 + noise * (-1) ** number)
        runs.append(Measurement(str(number), flops, 1e9, hours))
    return runs


def test_a_fit_finds_the_coefficients():
    cost = CostModel.fit(measurements(3e-18, 2e-10))
    assert (cost.hours_per_flop, cost.hours_per_token) == pytest.approx((3e-18, 2e-10), rel=1e-9)
    assert cost.mean_error == pytest.approx(0, abs=1e-12)


def test_a_fit_minimises_relative_errors():
    cost = CostModel.fit(measurements(3e-18, 2e-10, noise=0.05))
    best = sum(error**2 for error in cost.errors)
    for a, b in ((1.01, 1), (0.99, 1), (1, 1.01), (1, 0.99)):
        other = CostModel(cost.hours_per_flop * a, cost.hours_per_token * b, measurements=cost.measurements)
        assert sum(error**2 for error in other.errors) > best
    assert 0.01 < cost.mean_error < 0.06


def test_no_price_is_negative():
    slow = [Measurement("a", 1e9, 1e9, 1.0), Measurement("b", 2e9, 1e9, 2.5), Measurement("c", 4e9, 1e9, 5.5)]
    cost = CostModel.fit(slow)
    assert cost.hours_per_token == 0 and cost.hours_per_flop > 0


def test_a_cost_model_is_written_and_read(tmp_path):
    cost = CostModel.fit(measurements(3e-18, 2e-10, noise=0.01), hardware="a machine")
    cost.to_yaml(tmp_path / "cost.yaml")
    assert CostModel.from_yaml(tmp_path / "cost.yaml") == cost


@given(SIZES, SIZES)
def test_tokens_to_a_loss_lead_there(params, tokens):
    loss = float(LAW.loss(params, tokens))
    assert LAW.tokens_to(params, loss) == pytest.approx(tokens, rel=1e-6)
    assert LAW.tokens_to(params, float(LAW.floor(params))) == math.inf


def test_the_law_as_printed():
    """70B parameters and 1.4T tokens by the constants of Hoffmann et al. 2022, Eq. 10."""
    by_hand = 1.69 + 406.4 / 70e9**0.34 + 410.7 / 1.4e12**0.28
    assert float(HOFFMANN.loss(70e9, 1.4e12)) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(1.937, abs=1e-3)


def test_staged_losses_by_hand():
    first, second = LAW.staged_losses([1e8, 1e9], [2e9, 8e9])
    assert first == pytest.approx(float(LAW.loss(1e8, 2e9)))
    entered = LAW.tokens_to(1e9, first)
    assert entered < 2e9  # a larger model gets there sooner
    assert second == pytest.approx(float(LAW.loss(1e9, entered + 8e9)))
    assert LAW.staged_losses([1e9], [8e9]) == pytest.approx([float(LAW.loss(1e9, 8e9))])
    assert LAW.staged_losses([1e8, 1e9], [0, 8e9], seen=2e9)[1] == pytest.approx(second)


@given(st.floats(1e7, 1e9), st.floats(1.1, 20), st.floats(1.05, 30))
def test_marginal_utilities_are_equal_at_the_handover(params, factor, dearer):
    larger = params * factor
    loss = LAW.handover_loss(params, 1.0, larger, dearer)

    def slope(size, cost):
        tokens = LAW.tokens_to(size, loss)
        step = tokens * 1e-4
        return (float(LAW.loss(size, tokens)) - float(LAW.loss(size, tokens + step))) / step / cost

    assert loss > float(LAW.floor(params))
    assert slope(params, 1.0) == pytest.approx(slope(larger, dearer), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(1.1, 4.0), min_size=1, max_size=4),
    st.floats(1e9, 1e12),
    st.sampled_from([0.0, 1e9, 1e11]),
    st.booleans(),
)
def test_utility_shares_are_worth_more_than_their_neighbours(factors, total, seen, train_initial):
    params = np.cumprod([1e8, *factors]).tolist()
    costs = [6.0 * size for size in params]
    shares = share_tokens_by_utility(total, params, costs, already_seen=seen, train_initial=train_initial or not seen)
    assert sum(shares) == pytest.approx(total, rel=1e-9) and min(shares) >= 0
    budget = sum(cost * count for cost, count in zip(costs, shares, strict=True))
    best = LAW.staged_losses(params, shares, seen)[-1]
    # Compute moved from one stage to another makes the end worse.
    for source in range(len(shares)):
        for target in range(0 if train_initial or not seen else 1, len(shares)):
            moved = list(map(float, shares))
            flops = 0.01 * budget
            if source == target or moved[source] * costs[source] < flops:
                continue
            moved[source] -= flops / costs[source]
            moved[target] += flops / costs[target]
            assert LAW.staged_losses(params, moved, seen)[-1] >= best - 1e-9


def test_scores_by_hand():
    target = ModelDims(96, 256, 4, 6)
    config = {"model_type": "llama", "vocab_size": 128}
    cost = CostModel(2e-12, 3e-6)
    space = ConfigSpace(targets=[target], config=config, sequence_length=64)
    planner = SlopPlanner(ModelDims(64, 128, 2, 4), space, objective="loss_per_hour", cost_model=cost)
    schedule = planner.plan(1, tokens=5.5e6)[0]
    flops = [count_flops_per_token(dims, config, 64) for dims in schedule.structures]
    hours = [(2e-12 * per_token + 3e-6) * count for per_token, count in zip(flops, schedule.tokens, strict=True)]
    assert schedule.tokens == (2_500_000, 1_000_000, 1_000_000, 1_000_000)
    assert schedule.scores["flops"] == pytest.approx(sum(map(math.prod, zip(flops, schedule.tokens, strict=True))))
    assert schedule.scores["hours"] == pytest.approx(sum(hours))
    losses = [
        float(LAW.loss(count_parameters(dims, config), 2.5e6 + 1e6 * number))
        for number, dims in enumerate(schedule.structures)
    ]
    utility = sum((a - b) / hour for a, b, hour in zip(losses, losses[1:], hours[1:], strict=False))
    assert schedule.scores["loss_per_hour"] == pytest.approx(utility)


def test_utility_sharing_in_a_plan():
    space = ConfigSpace(targets=[ModelDims(2816, 7680, 8, 22)])
    planner = SlopPlanner(ModelDims(768, 2048, 6, 6), space)
    even, shared = planner.plan(1, tokens=65e9)[0], planner.plan(1, tokens=65e9, sharing="utility")[0]
    assert even.structures == shared.structures
    assert sum(shared.tokens) == pytest.approx(65e9, abs=4)
    assert shared.tokens[-1] > even.tokens[-1]
    assert shared.scores["flops"] > even.scores["flops"]
