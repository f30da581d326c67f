"""`ScalingLaw.fit`: it recovers a law from its runs, with intervals, and refuses runs that do not determine one."""

import dataclasses

import numpy as np
import pytest

from slop_hf import ScalingLaw, StagedRun, TrainedStage
from slop_hf.cost.least_squares import Z80
from slop_hf.errors import PlanError

TRUTH = ScalingLaw(1.5, 60.0, 0.4, 400.0, 0.42)
SIZES, TOKENS = (1e5, 4e5, 1.6e6), (1e6, 4e6, 1.6e7)


def measure(parameters, tokens, noise=0.0, text="", **others):
    loss = float(TRUTH.loss(parameters, tokens)) + noise
    return StagedRun((TrainedStage(parameters, 64, tokens, (1e-3,), losses=((1.0, loss),)),), text=text, **others)


RUNS = [measure(parameters, tokens) for parameters in SIZES for tokens in TOKENS]


@pytest.fixture(scope="module")
def noisy():
    noises = np.random.default_rng(0).normal(0, 0.02, 9)
    runs = [measure(*run, noise) for run, noise in zip(((a, b) for a in SIZES for b in TOKENS), noises, strict=True)]
    return ScalingLaw.fit(runs)


def test_a_fit_recovers_a_law_and_predicts_runs_outside_of_its_own():
    law = ScalingLaw.fit(RUNS, replicates=0)
    assert law.loss(3.2e6, 3.2e7) == pytest.approx(TRUTH.loss(3.2e6, 3.2e7), abs=0.02)
    assert law.params_exponent == pytest.approx(0.4, abs=0.05)
    assert law.tokens_exponent == pytest.approx(0.42, abs=0.05)
    assert (law.runs, law.replicates, law.compute_intervals()) == (9, (), {})
    assert law.deviation < 0.01


def test_noise_widens_intervals_and_the_deviation(noisy):
    assert 0.005 < noisy.deviation * Z80 < 0.1
    assert len(noisy.replicates) == 12
    for name, (low, high) in noisy.compute_intervals().items():
        assert low < high, name
    low, high = noisy.compute_intervals()["tokens_exponent"]
    assert low - 0.1 < TRUTH.tokens_exponent < high + 0.1


def test_grown_and_unfinished_runs_are_left_out():
    first = dataclasses.replace(RUNS[0].stages[0], losses=())
    grown = StagedRun((first, dataclasses.replace(RUNS[0].stages[0], factors={"depth": 2.0})))
    others = [grown, dataclasses.replace(RUNS[0], is_finished=False)]
    assert ScalingLaw.fit([*RUNS, *others], replicates=0) == ScalingLaw.fit(RUNS, replicates=0)


def test_a_fitted_law_is_written_and_read(noisy, tmp_path):
    noisy.to_yaml(tmp_path / "law.yaml")
    assert ScalingLaw.from_yaml(tmp_path / "law.yaml") == noisy


@pytest.mark.parametrize(
    "runs, message",
    [
        (RUNS[:3], "at least 4 finished runs of one stage with a loss at their end, got 3 of 3: add runs"),
        ([*RUNS[:3], dataclasses.replace(RUNS[3], is_finished=False)], "got 3 of 4"),
        ([measure(1e5, tokens) for tokens in (1e6, 2e6, 3e6, 4e6)], "all 4 runs have 100,000 parameters"),
        ([measure(size, 1e6) for size in (1e5, 2e5, 3e5, 4e5)], "all 4 runs have 1,000,000 tokens"),
        ([*RUNS, measure(1e5, 1e6, text="b")], "runs of one text, got , b: fit one law per text"),
    ],
)
def test_runs_that_do_not_determine_a_law_are_refused(runs, message):
    with pytest.raises(PlanError, match=message):
        ScalingLaw.fit(runs)


@pytest.mark.parametrize(
    "change, message",
    [({"deviation": -1.0}, "deviation"), ({"replicates": ((1.0,),)}, "a replicate of a scaling law has 5 constants")],
)
def test_wrong_marks_of_a_law_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        ScalingLaw(**change)
