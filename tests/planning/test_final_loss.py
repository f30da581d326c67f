"""Objective `final_loss`: the search agrees with brute force over runs that a law predicts one by one."""

import dataclasses
from itertools import pairwise, permutations, product

import numpy as np
import pytest

from slop_hf import ConfigSpace, GrowthLaw, ModelDims, SlopPlanner, StagedRun, TrainedStage
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.cost.growth_law import GrowthConstants
from slop_hf.cost.rate_schedule import RateSchedule
from slop_hf.cost.staged_run import compute_factors
from slop_hf.errors import PlanError
from slop_hf.planning import final_loss
from slop_hf.planning.explain import explain
from slop_hf.planning.final_loss import LossSettings

INITIAL = ModelDims(64, 96, 2, 4)
CONFIG = {"model_type": "llama", "vocab_size": 96, "tie_word_embeddings": False}
FLOPS, LENGTH = 3e13, 32
LAW = GrowthLaw(
    GrowthConstants(depth_forgets=0.1, inner_forgets=0.4, hidden_forgets=0.2, mixing=0.1),
    references=(1e5, 64.0, 1e7, 2e-3),
)
TARGETS = (INITIAL.replace(num_hidden_layers=4, intermediate_size=192), INITIAL.replace(num_hidden_layers=5))


def make_planner(targets=TARGETS[:1], operators=("layer", "ffn"), **settings):
    space = ConfigSpace(targets=targets, config=CONFIG, sequence_length=LENGTH, ffn_multiple=48)
    loss = settings.pop("loss", LossSettings(LAW, steps=5, schedule=RateSchedule(decay=0.2)))
    return SlopPlanner(INITIAL, space, operators=operators, objective="final_loss", loss=loss, **settings)


def predict(path, tokens, span, already_seen, settings):
    """The loss of one run, written out as a `StagedRun` whose decays are stages of their own."""
    schedule = dataclasses.replace(settings.schedule, span=span)
    stages = []
    if already_seen:
        stages += list_pieces(schedule, path[0], [already_seen], 0, {})
    for number, dims in enumerate(path):
        factors = compute_factors(path[number - 1], dims) if number else {}
        stages += list_pieces(schedule, dims, tokens, number, factors)
    return settings.law.predict(StagedRun(tuple(stages))).loss


def list_pieces(schedule, dims, tokens, number, factors):
    counts = np.array([tokens], dtype=float)
    decay = 0.2 * sum(tokens) if schedule.span == "run" else 0.2 * tokens[number]
    is_decaying = schedule.span == "stage" or number == len(tokens) - 1
    begin = 1 - decay / tokens[number] if is_decaying and tokens[number] else 1 - 0.2 * (schedule.span == "stage")
    size = count_parameters(dims, CONFIG)
    for first, last, grown in ((0.0, begin, factors), (begin, 1.0, {})):
        if first < last:
            rates = schedule.compute(counts, first, last)[0, number] * LAW.references[3]
            share = tokens[number] * (last - first)
            yield TrainedStage(size, dims.hidden_size, share, tuple(rates), grown, is_copied=True)


def list_paths(mode, targets, stages):
    layers, widths = (2, 3, 4, 5), (96, 144, 192)
    corners = [INITIAL.replace(num_hidden_layers=a, intermediate_size=f) for a, f in product(layers, widths)]
    for path in permutations(corners, stages):
        path = (INITIAL, *path)
        grown = [compute_factors(*pair) for pair in pairwise(path)]
        shrinks = any(
            b.num_hidden_layers < a.num_hidden_layers or b.intermediate_size < a.intermediate_size
            for a, b in pairwise(path)
        )
        if path[-1] not in targets or shrinks or not all(grown):
            continue
        if mode == "joint" or all(len(factors) == 1 for factors in grown):
            yield path


def search_by_brute_force(mode, targets, numbers, already_seen, settings):
    """The least loss of each path, over all token shares and spans."""
    best = {}
    for stages in numbers:
        for path in list_paths(mode, targets, stages):
            costs = [count_flops_per_token(dims, CONFIG, LENGTH) for dims in path]
            for span, shares in product(("run", "stage"), product(range(settings.steps + 1), repeat=stages + 1)):
                is_first_empty = not shares[0] and not already_seen
                if sum(shares) != settings.steps or not all(shares[1:]) or is_first_empty:
                    continue
                if stages and shares[-1] < settings.schedule.decay * settings.steps + 1:
                    continue
                scale = FLOPS / sum(share * cost for share, cost in zip(shares, costs, strict=True))
                loss = predict(path, [share * scale for share in shares], span, already_seen, settings)
                best[path] = min(best.get(path, np.inf), loss)
    return best


CASES = {
    "each once": ("once", TARGETS[:1], {}, (2,), 0),
    "two targets": ("repeated", TARGETS, {"max_stages": 2}, (1, 2), 0),
    "repeated": ("repeated", TARGETS[:1], {"stages": 3}, (3,), 0),
    "joint": ("joint", TARGETS[:1], {"max_stages": 2}, (1, 2), 0),
    "trained before": ("joint", TARGETS[:1], {"max_stages": 2}, (1, 2), 5e6),
}


@pytest.mark.parametrize(("mode", "targets", "settings", "numbers", "already_seen"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("is_small", [True, False], ids=["enumeration", "descent"])
def test_the_search_finds_what_brute_force_finds(
    mode, targets, settings, numbers, already_seen, is_small, monkeypatch
):
    if not is_small:
        monkeypatch.setattr(final_loss, "MOST_RUNS", 0)
        monkeypatch.setattr("slop_hf.planning.planner._MOST_PATHS", 0)
    planner = make_planner(targets, mode=mode, **settings)
    outcome = planner.search_final_loss(50, flops=FLOPS, already_seen=already_seen)
    truth = search_by_brute_force(mode, targets, numbers, already_seen, planner.loss)
    assert outcome.is_exact == is_small and outcome.describe().startswith("Exact" if is_small else "Not exact")
    assert outcome.runs[0].loss == pytest.approx(min(truth.values()), abs=1e-5)
    losses = {run.path: run.loss for run in outcome.runs}
    if is_small:
        assert losses == pytest.approx(truth, abs=1e-5)
    assert list(losses.values()) == sorted(losses.values())
    for run in outcome.runs:
        costs = [count_flops_per_token(dims, CONFIG, LENGTH) for dims in run.path]
        assert sum(map(np.multiply, costs, run.tokens)) == pytest.approx(FLOPS, rel=1e-4)
        assert predict(run.path, run.tokens, run.span, already_seen, planner.loss) == pytest.approx(run.loss)


def test_schedules_carry_the_loss_and_all_other_scores():
    planner = make_planner()
    best, *_ = planner.plan(2, flops=FLOPS)
    assert list(best.scores)[:3] == ["final_loss", "delta_params", "delta_params_eq3"]
    assert best.scores["final_loss"] == planner.search_final_loss(1, flops=FLOPS).runs[0].loss
    assert best.scores["flops"] == pytest.approx(FLOPS, rel=1e-4)


def test_a_law_that_forgets_everything_keeps_growth_to_the_beginning():
    """With such a law, tokens of the small model are lost, and the search gives it as few as it can."""
    constants = dataclasses.replace(LAW.constants, depth_forgets=20.0, jump=1e-9)
    settings = LossSettings(dataclasses.replace(LAW, constants=constants), steps=10)
    planner = make_planner(TARGETS[1:], ("layer",), mode="repeated", stages=1, loss=settings)
    (run,) = planner.search_final_loss(1, flops=FLOPS).runs
    assert run.tokens[0] / sum(run.tokens) == pytest.approx(0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "request_", "message"),
    [
        ({}, {}, "give flops"),
        ({}, {"flops": -1}, "give flops"),
        ({}, {"tokens": 1e6}, "leave tokens out"),
        ({}, {"flops": 1e3}, "give more"),
        ({}, {"flops": 1e13, "already_seen": -1}, "already_seen"),
        ({"stage_price": 1.0}, {"flops": 1e13}, "stage_price"),
        ({"mode": "repeated", "stages": 6}, {"flops": 1e13}, "fewer"),
        ({"loss": 7}, {"flops": 1e13}, "LossSettings"),
    ],
)
def test_wrong_requests_are_refused(settings, request_, message):
    with pytest.raises(PlanError, match=message):
        make_planner(**settings).plan(**request_)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"law": 7}, "GrowthLaw"),
        ({"steps": 1}, "steps"),
        ({"spans": ()}, "spans"),
        ({"spans": ("epoch",)}, "spans"),
        ({"relative_rate": 0}, "relative_rate"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        LossSettings(**settings)


def test_other_objectives_take_no_flops_and_this_one_is_not_explained():
    planner = make_planner()
    with pytest.raises(PlanError, match="give tokens"):
        dataclasses.replace(planner, objective="flops").plan(flops=1e13)
    with pytest.raises(PlanError, match="no value per stage"):
        explain(planner, planner.plan(1, flops=FLOPS)[0])
