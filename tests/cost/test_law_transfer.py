"""The default law: published losses of one stage, and growth's effects of the fitted law."""

import dataclasses
import math

import numpy as np
import pytest

from slop_hf import GrowthLaw
from slop_hf.cost.law_transfer import load_default_law, transfer_growth
from slop_hf.cost.rate_schedule import RateSchedule
from slop_hf.cost.scaling_law import HOFFMANN, ScalingLaw
from slop_hf.cost.staged_run import GROWN_DIMENSIONS, RunTable
from slop_hf.errors import PlanError

LAW = load_default_law()


def make_table(*runs):
    """Runs of one or two stages of (parameters, tokens, growth factors)."""
    stages = max(map(len, runs))
    filled = [[*run, *[(run[-1][0], 0.0, {})] * (stages - len(run))] for run in runs]
    parameters, tokens = (np.array([[stage[n] for stage in run] for run in filled], dtype=float) for n in (0, 1))
    factors = np.array([[[s[2].get(name, 1.0) for name in GROWN_DIMENSIONS] for s in run] for run in filled])
    ones = np.ones_like(parameters)
    rates = RateSchedule().compute(tokens)
    counts = np.array([len(run) for run in runs])
    return RunTable(parameters, 2048 * ones, tokens, rates, factors, ones, 0 * ones, counts)


@pytest.mark.parametrize(("parameters", "tokens"), [(1e8, 5e9), (1e9, 2e10), (7e9, 4e11)])
def test_one_stage_has_the_published_loss(parameters, tokens):
    """The rate that is left at the end adds a few hundredths."""
    (loss,) = LAW.predict_ends(make_table([(parameters, tokens, {})]))
    assert 0 <= loss - float(ScalingLaw().loss(parameters, tokens)) < 0.03


def compute_saving(law, tokens_per_parameter, factor=1.5, parameters=1e9):
    """FLOPs from scratch over those of growth in depth at half of the tokens, at equal losses; the best first."""
    tokens = tokens_per_parameter * parameters
    small = parameters / factor
    grown = make_table([(small, tokens / 2, {}), (parameters, tokens / 2, {"depth": factor})])
    counts = np.geomspace(tokens / 4, 3 * tokens, 200)
    trunk = make_table(*([(parameters, count, {})] for count in counts))
    flops = (small + parameters) * tokens / 2
    best = law.predict_ends(grown)[0], law.predict_ends(trunk)
    samples = [best, *zip(law.sample_ends(grown)[:, 0], law.sample_ends(trunk), strict=True)]
    needed = [np.interp(-loss, -losses, counts) for loss, losses in samples]
    return np.array(needed) * parameters / flops


def test_growth_saves_about_as_much_as_others_have_measured():
    """Q Labs (arXiv 2609.19107): 1.09 to 1.16 times the FLOPs for depth × 1.5 at half of the tokens."""
    savings = {tokens: compute_saving(LAW, tokens) for tokens in (10, 20, 40)}
    best = [saving[0] for saving in savings.values()]
    assert 1.09 < best[1] < 1.25 and best[1] == pytest.approx(1.17, abs=0.005), "as in docs/planning.md"
    assert best == sorted(best, reverse=True), "longer training leaves less to save"
    assert savings[20][1:].std() > 0.05, "the law is not sure"


def test_growth_never_gains_tokens():
    """A grown model is not better than one that had the tokens of both, within the error of averaged rates."""
    for factor in (1.5, 4.0):
        runs = [(1e9 / factor, 1e9, {}), (1e9, 1e10, {"inner": factor})], [(1e9, 1.1e10, {})]
        grown, trunk = LAW.predict_ends(make_table(*runs))
        assert grown > trunk - 0.005


def test_differences_are_known_better_than_losses():
    table = make_table([(1e9, 2e10, {})], [(1.1e9, 1.9e10, {})])
    samples = LAW.sample_ends(table)
    assert np.std(samples[:, 0] - samples[:, 1]) < np.std(samples[:, 0]) / 5
    assert LAW.own_deviation < LAW.deviation / 5


def test_scales_are_those_of_the_published_laws():
    table = make_table([(1e9, 2e10, {})], [(1e9, 5e12, {})])
    assert LAW.measure_distances(table) == pytest.approx([0, 1])


def test_replicates_are_farther_apart_than_those_of_the_fitted_law():
    """By their own size per decade: 1e6 parameters are 3 decades away, so 4 times."""
    fitted = GrowthLaw(replicates=[list(vars(LAW.constants).values())] * 2, references=(1e6, 64.0, 1e7, 1e-3))
    rows = [dict(vars(fitted.constants)), {**vars(fitted.constants), "depth_forgets": 0.5}]
    fitted = dataclasses.replace(fitted, replicates=tuple(tuple(row.values()) for row in rows))
    moved = transfer_growth(fitted, [ScalingLaw()])
    first, second = (dict(zip(vars(LAW.constants), row, strict=True)) for row in moved.replicates)
    assert first == pytest.approx(vars(moved.constants), rel=1e-4)
    assert second["depth_forgets"] - first["depth_forgets"] == pytest.approx(4 * (0.5 - 0.3), rel=1e-4)
    assert second["hidden_forgets"] == pytest.approx(first["hidden_forgets"], rel=1e-3)


def test_levels_take_turns_in_the_replicates():
    entropies = {row[0] for row in LAW.replicates}
    assert entropies == {ScalingLaw().irreducible, HOFFMANN.irreducible} and LAW.constants.irreducible == 1.8172
    assert math.isclose(LAW.constants.token_exponent, ScalingLaw().tokens_exponent)


@pytest.mark.parametrize(
    ("law", "levels", "step_tokens"),
    [(GrowthLaw(), [ScalingLaw()], 2048), (LAW, [], 2048), (LAW, [ScalingLaw()], 0)],
    ids=["no replicates", "no level", "no step"],
)
def test_what_cannot_be_transferred_is_refused(law, levels, step_tokens):
    with pytest.raises(PlanError, match=r"fit the law with|give a ScalingLaw|give tokens"):
        transfer_growth(law, levels, step_tokens=step_tokens)
