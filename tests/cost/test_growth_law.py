"""The growth law: it recovers known constants from synthetic runs, and says what it cannot predict."""

import dataclasses

import numpy as np
import pytest

from slop_hf import GrowthLaw, StagedRun, TrainedStage
from slop_hf.cost.growth_law import LEAST_RUNS, NAMES, WIDENING, GrowthConstants
from slop_hf.cost.least_squares import Z80
from slop_hf.cost.staged_run import PARTS, RunTable
from slop_hf.errors import PlanError

REFERENCES = 2e5, 40.0, 2e6, 3e-3
TRUTH = GrowthLaw(
    GrowthConstants(irreducible=1.2, token_exponent=0.3, hidden_forgets=0.9, depth_forgets=0.1, rate_noise=0.2),
    REFERENCES,
    deviation=0.0,
)
FALLING = tuple(np.linspace(3e-3, 0, 12))
CONSTANT = (3e-3,)


def stage(parameters=1e5, width=32, tokens=1e6, rates=FALLING, **others):
    return TrainedStage(parameters, width, tokens, rates, **others)


def measure(run, law=TRUTH, shift=0.0):
    """The run with the losses of a law at the middle and at the end of each stage."""
    losses = law.trace(run) + shift
    pairs = [((0.5, float(row[PARTS // 2 - 1])), (1.0, float(row[-1]))) for row in losses]
    stages = [dataclasses.replace(old, losses=pair) for old, pair in zip(run.stages, pairs, strict=True)]
    return dataclasses.replace(run, stages=tuple(stages))


def list_runs():
    """From scratch by size, tokens and peak, and grown in each dimension early and late."""
    sizes = ((5e4, 24), (1e5, 32), (4e5, 80))
    runs = [StagedRun((stage(*size, tokens),)) for size in sizes for tokens in (4e5, 1.6e6, 6.4e6)]
    runs += [StagedRun((stage(4e5, 80, 1.6e6, tuple(rate * x for x in FALLING)),)) for rate in (0.5, 2)]
    growths = (({"depth": 2.0}, 1e5, 24), ({"inner": 3.0}, 1e5, 24), ({"hidden": 3.0}, 4e5, 72))
    runs += [
        StagedRun((stage(5e4, 24, before), stage(parameters, width, 8e5, factors=factors)))
        for before in (4e5, 1.6e6, 6.4e6)
        for factors, parameters, width in growths
    ]
    return runs


@pytest.fixture(scope="module")
def fitted():
    return GrowthLaw.fit([measure(run) for run in list_runs()], replicates=3)


def test_a_fit_recovers_known_constants(fitted):
    for name, tolerance in (("irreducible", 0.25), ("token_exponent", 0.06), ("rate_noise", 0.05)):
        assert getattr(fitted.constants, name) == pytest.approx(getattr(TRUTH.constants, name), abs=tolerance), name
    assert fitted.constants.hidden_forgets - fitted.constants.depth_forgets > 0.3
    assert fitted.runs == len(list_runs())


def test_a_fit_predicts_runs_that_it_has_not_seen(fitted):
    new = [
        StagedRun((stage(2e5, 56, 3e6),)),
        StagedRun((stage(5e4, 24, 1e6, CONSTANT), stage(2e5, 48, 2e6, factors={"hidden": 2.0}))),
        StagedRun((stage(1e5, 32, 1e6), stage(2e5, 32, 1e6, factors={"depth": 2.0}))),
    ]
    for run, forecast in zip(new, fitted.predict_all(new), strict=True):
        truth = TRUTH.predict(run).loss
        assert forecast.loss == pytest.approx(truth, abs=0.03)
        assert forecast.low < forecast.loss < forecast.high
        assert forecast == fitted.predict(run)


def test_a_law_is_marked_with_its_scales_and_widens_outside_of_them(fitted):
    """A hundred times the parameters and tokens: two decades each."""
    inside, outside = StagedRun((stage(4e5, 80, 3e6),)), StagedRun((stage(4e7, 80, 7.2e8),))
    assert fitted.scales == {"parameters": (5e4, 4e5), "tokens": (4e5, 7.2e6), "width": (24, 80)}
    table = RunTable.of([inside, outside])
    distances = fitted.measure_distances(table)
    assert distances == pytest.approx([0, 8**0.5])
    lone = dataclasses.replace(fitted, replicates=())
    near, far = lone.predict_all([inside, outside])
    assert near.high - near.loss == pytest.approx(Z80 * fitted.deviation)
    assert far.high - far.loss == pytest.approx(Z80 * (fitted.deviation**2 + (WIDENING * 8**0.5) ** 2) ** 0.5)
    own = fitted.compute_own_deviations(table)
    assert own == pytest.approx([fitted.own_deviation, fitted.own_deviation * (1 + 8**0.5)])
    assert 0 <= fitted.own_deviation <= 2 * fitted.deviation
    # without a scale, a law does not know where it ends
    assert (dataclasses.replace(fitted, scales={}).measure_distances(table) == 0).all()


def test_what_runs_share_cancels_in_differences(fitted):
    """Both runs end lower if the entropy is lower, in each replicate."""
    table = RunTable.of([StagedRun((stage(1e5, 32, 2e6),)), StagedRun((stage(1e5, 32, 2.2e6),))])
    samples = fitted.sample_ends(table)
    assert samples.shape == (3, 2) and np.std(samples[:, 0] - samples[:, 1]) < np.std(samples[:, 0])
    assert dataclasses.replace(fitted, replicates=()).sample_ends(table).shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": {"depth": (1, 2)}}, "unknown scale 'depth'"),
        ({"scales": {"tokens": (2.0, 1.0)}}, "the smaller first"),
        ({"own_deviation": -1}, "own_deviation"),
    ],
)
def test_wrong_marks_of_a_law_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(TRUTH, **change)


def test_intervals_of_constants_are_those_of_the_replicates(fitted):
    intervals = fitted.compute_intervals()
    assert tuple(intervals) == NAMES and len(fitted.replicates) == 3
    assert all(low <= high for low, high in intervals.values())
    assert TRUTH.compute_intervals() == {}


def test_the_deviation_is_that_of_experiments_left_out():
    """Losses of one experiment are shifted: its errors are seen only by fits without it."""
    runs = [dataclasses.replace(run, experiment="ab"[number % 2]) for number, run in enumerate(list_runs())]
    same = GrowthLaw.fit([measure(run) for run in runs], replicates=0)
    shifted = GrowthLaw.fit([measure(run, shift=0.2 * (run.experiment == "a")) for run in runs], replicates=0)
    assert same.deviation < 0.05 < 0.1 < shifted.deviation


def test_texts_differ_by_a_constant():
    runs = [dataclasses.replace(run, text="ab"[number % 3 == 0]) for number, run in enumerate(list_runs())]
    law = GrowthLaw.fit([measure(run, shift=0.4 * (run.text == "b")) for run in runs], replicates=0)
    assert law.offsets["a"] == 0 and law.offsets["b"] == pytest.approx(0.4, abs=0.03)
    run = dataclasses.replace(runs[0], text="c")
    with pytest.raises(PlanError, match=r"knows no run of the text 'c' \(known: 'a', 'b'\): anchor it"):
        law.predict(run)
    anchored = law.anchor([measure(run, shift=1.0)])
    assert anchored.predict(run).loss == pytest.approx(TRUTH.predict(runs[0]).loss + 1, abs=1e-4)


@pytest.fixture(scope="module")
def few():
    """Runs of another text: two sizes from scratch, one of them longer, and one growth."""
    runs = [StagedRun((stage(5e4, 24, tokens),), text="new") for tokens in (8e5, 1.6e6)]
    runs += [StagedRun((stage(1e5, 32, 8e5),), text="new")]
    runs += [StagedRun((stage(5e4, 24, 8e5), stage(1e5, 24, 8e5, factors={"depth": 2.0})), text="new")]
    return [measure(run, shift=0.7) for run in runs]


def test_with_a_law_as_its_prior_few_runs_suffice(few):
    """The law is right about everything except for the level of the text, which few runs say."""
    law = GrowthLaw.fit(few, prior=TRUTH, replicates=2)
    far = StagedRun((stage(4e5, 80, 3e6), stage(1e6, 160, 3e6, factors={"hidden": 2.0})), text="new")
    assert law.predict(far).loss == pytest.approx(TRUTH.predict(far).loss + 0.7, abs=0.05)
    # The fit may move a part of the level into the entropy, but leaves the references of the prior.
    assert list(law.offsets) == ["new"] and law.offsets["new"] > 0.3 and law.references == REFERENCES
    with pytest.raises(PlanError, match="at least 6 finished runs"):
        GrowthLaw.fit(few)
    with pytest.raises(PlanError, match="at least 3 finished runs with a loss at their end, got 2 of 2"):
        GrowthLaw.fit(few[:2], prior=TRUTH)


def test_a_prior_that_knows_the_text_says_its_level(few):
    prior = dataclasses.replace(TRUTH, offsets={"old": 0.0, "new": 0.7})
    assert GrowthLaw.fit(few, prior=prior, replicates=0).offsets == {"old": 0.0, "new": pytest.approx(0.7, abs=0.03)}


def test_a_prior_with_relative_rates_takes_the_peak_of_the_runs(few):
    relative = dataclasses.replace(TRUTH, references=(*REFERENCES[:3], 1.0), has_relative_rates=True)
    law = GrowthLaw.fit(few, prior=relative, replicates=0)
    assert law.references == (*REFERENCES[:3], 3e-3) and not law.has_relative_rates


def test_a_law_is_written_and_read(fitted, tmp_path):
    fitted.to_yaml(tmp_path / "law.yaml")
    assert GrowthLaw.from_yaml(tmp_path / "law.yaml") == fitted
    with (tmp_path / "law.yaml").open("a") as file:
        file.write("offset: {}\n")
    with pytest.raises(PlanError, match="unknown key 'offset'; did you mean 'offsets'"):
        GrowthLaw.from_yaml(tmp_path / "law.yaml")


def test_a_stage_without_growth_changes_nothing():
    whole = StagedRun((stage(tokens=2e6, rates=CONSTANT),))
    halves = StagedRun((stage(tokens=1e6, rates=CONSTANT), stage(tokens=1e6, rates=CONSTANT)))
    longer = StagedRun((stage(tokens=1e6, rates=CONSTANT), stage(tokens=1e6, rates=CONSTANT), stage(tokens=0)))
    assert TRUTH.predict(halves).loss == pytest.approx(TRUTH.predict(whole).loss, abs=1e-9)
    assert TRUTH.predict(longer).loss == pytest.approx(TRUTH.predict(whole).loss, abs=1e-9)
    assert TRUTH.predict_all([halves, longer, whole])[2] == TRUTH.predict(whole)


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ({"tokens": 2e6}, {"tokens": 1e6}),
        ({"rates": (3e-3, 3e-3, 3e-3, 1e-3)}, {"rates": (2.5e-3,)}),  # the same mean rate
        ({}, {"factors": {"hidden": 3.0}}),
        ({"factors": {"hidden": 1.5}}, {"factors": {"hidden": 3.0}}),
        ({"factors": {"depth": 2.0}}, {"factors": {"hidden": 2.0}}),
    ],
)
def test_the_loss_falls_with_tokens_and_annealing_and_rises_with_what_growth_forgets(lower, higher):
    ends = [
        TRUTH.predict(StagedRun((stage(5e4, 24), dataclasses.replace(stage(2e5, 56), **changes)))).loss
        for changes in (lower, higher)
    ]
    assert ends[0] < ends[1] - 1e-3


@pytest.mark.parametrize("count", [0, LEAST_RUNS - 1])
def test_too_few_runs_are_refused(count):
    with pytest.raises(PlanError, match=f"at least {LEAST_RUNS} finished runs with a loss at their end, got {count}"):
        GrowthLaw.fit([measure(run) for run in list_runs()[:count]])


def test_unfinished_runs_are_no_ends():
    runs = [dataclasses.replace(measure(run), is_finished=False) for run in list_runs()]
    assert runs[0].end_loss is None
    with pytest.raises(PlanError, match=f"got 0 of {len(runs)}: add runs whose learning-rate schedule ends"):
        GrowthLaw.fit(runs)
    with pytest.raises(PlanError, match="anchored at finished runs of one text, got 1 runs"):
        TRUTH.anchor(runs[:1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stage(parameters=0), "parameters of a stage must be a positive number, got 0"),
        (lambda: stage(width=-1), "width of a stage must be a positive number, got -1"),
        (lambda: stage(tokens=-1), "tokens of a stage must be 0 or more, got -1"),
        (lambda: stage(rates=()), "rates of a stage must be one or more numbers"),
        (lambda: stage(factors={"heads": 2.0}), "unknown dimension 'heads' of growth; known: depth, inner, hidden"),
        (lambda: stage(factors={"depth": 0.5}), "growth factors must be 1 or more"),
        (lambda: stage(losses=((2.0, 3.0),)), "losses must be pairs"),
        (lambda: StagedRun(()), "at least one stage with tokens"),
        (lambda: StagedRun((stage(factors={"depth": 2.0}),)), "the first stage of a run cannot grow"),
        (lambda: GrowthConstants(irreducible=-1.0), "irreducible of a growth law must be a positive number, got -1"),
        (lambda: GrowthConstants(depth_forgets=float("nan")), "depth_forgets of a growth law must be a finite number"),
        (lambda: GrowthLaw(references=(0.0, 1.0, 1.0, 1.0)), "references of a growth law must be positive"),
        (lambda: GrowthLaw(deviation=-1.0), "deviation of a growth law must be 0 or more"),
        (lambda: GrowthLaw(replicates=((1.0,),)), f"a replicate of a growth law has {len(NAMES)} constants, got 1"),
    ],
)
def test_wrong_numbers_are_refused(make, message):
    with pytest.raises(PlanError, match=message):
        make()
