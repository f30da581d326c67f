"""Results of comparisons, on records made by hand."""

import dataclasses
import math

import pytest

from slop_hf import GrowthSchedule, GrowthStage, ModelDims
from slop_hf.cost.flops import count_flops_per_token
from slop_hf.errors import RunError
from slop_hf.experiments.comparison import Comparison, Curve, RunResult, StageResult
from slop_hf.experiments.planner_accuracy import (
    compute_measured_utility,
    compute_planner_accuracy,
    compute_predictions,
    describe_planner_accuracy,
    draw_utility,
    tabulate_predictions,
)
from slop_hf.experiments.results import (
    Spread,
    compute_arm_results,
    compute_cost_to_loss,
    compute_countings,
    compute_flops_saved,
    compute_loss_at,
    compute_rank_correlation,
    compute_saving,
    is_saving_bound,
)

SMALL, DEEP, LARGE = ModelDims(16, 32, 2, 2), ModelDims(16, 32, 4, 2), ModelDims(16, 64, 4, 2)
SCHEDULE = GrowthSchedule(SMALL, (GrowthStage(("layer",), DEEP, 100), GrowthStage(("ffn",), LARGE, 100)), 250)
SCRATCH = GrowthSchedule(LARGE, initial_tokens=300)
RUN = {"model": {"tie_word_embeddings": True}, "data": {"vocab_size": 300, "block_size": 16}}


def result(arm, seed, losses, *, budget=1.0, schedule=SCHEDULE, flops=100.0, curve=None, end_rate=0.0, tokens=1.0):
    """A run whose stages end with these losses and share its FLOPs and seconds evenly.

    Its learning rate ends at `end_rate` of its peak; it has `tokens` times the schedule's tokens.
    """
    share = flops * budget / len(losses)
    stages = tuple(
        StageResult(name, dims, 1000, round(tokens * planned), share, 60.0, loss)
        for name, dims, planned, loss in zip(
            schedule.stage_names, schedule.structures, schedule.tokens, losses, strict=True
        )
    )
    points = curve or [(number, share * (number + 1), loss) for number, loss in enumerate(losses)]
    numbers, places, values = (tuple(column) for column in zip(*points, strict=True))
    curve = Curve(numbers, places, places, values)
    return RunResult(arm, budget, seed, schedule, stages, curve, end_rate=end_rate)


def comparison(*runs, reference="scratch", **settings):
    arms = dict.fromkeys((run.arm for run in runs), "")
    given = {"settings": {"run": RUN}, "reference": reference, **settings}
    return Comparison("x", "nano", "X", "flops", 100.0, arms, runs, **given)


def scratch(seed, loss, budget=1.0, **changes):
    return result("scratch", seed, [loss], budget=budget, schedule=SCRATCH, tokens=budget, **changes)


def slop(loss, budget=1.0, seed=0, **changes):
    return result("slop", seed, [5.0, 4.0, loss], budget=budget, **changes)


BETWEEN = 100 * 0.5**0.5  # FLOPs halfway between the budgets 0.5 and 1, over the logarithm
PASSED = [(0, 20.0, 5.0), (2, 70.0, 3.1), (2, 80.0, 2.9), (2, 100.0, 3.1)]


@pytest.mark.parametrize(
    ("runs", "cost", "is_bound"),
    [
        pytest.param([slop(3.1)], math.inf, False, id="a run that ends above the loss"),
        pytest.param([slop(3.0)], 100.0, False, id="a run that ends at the loss"),
        pytest.param([slop(2.5, end_rate=0.1)], 100.0, True, id="a rate that ends at a tenth of its peak"),
        pytest.param([slop(2.5, end_rate=0.11)], math.inf, False, id="a rate that is still high at the end"),
        pytest.param([slop(2.5, end_rate=None)], math.inf, False, id="a rate that is not known"),
        pytest.param([slop(3.1, curve=PASSED)], math.inf, False, id="an evaluation within a run"),
        pytest.param([slop(2.5), slop(2.9, 0.5)], 50.0, True, id="a shorter run with its own schedule"),
        pytest.param([slop(2.5), slop(2.9, 0.5, end_rate=1.0)], 100.0, True, id="a shorter run without its decay"),
        pytest.param([slop(2.8), slop(3.2, 0.5)], BETWEEN, False, id="between two ends"),
        pytest.param([slop(2.8), slop(math.nan, 0.5)], 100.0, True, id="one of two runs has diverged"),
        pytest.param([slop(2.8), slop(math.inf, 0.5)], 100.0, True, id="a loss that is infinite"),
        pytest.param([slop(2.8), slop(3.2, 0.5, end_rate=1.0)], 100.0, True, id="only one of them is an end"),
    ],
)
def test_only_the_end_of_a_finished_schedule_reaches_a_loss(runs, cost, is_bound):
    assert compute_cost_to_loss(runs, 3.0) == pytest.approx(cost)
    record = comparison(scratch(0, 3.0), *runs)
    saved = compute_flops_saved(record, "slop")
    assert (saved and saved.values) == (None if math.isinf(cost) else (pytest.approx(1 - cost / 100),))
    assert is_saving_bound(record, "slop") == is_bound
    assert compute_flops_saved(record, "scratch").values == (0.0,)


@pytest.mark.parametrize(
    ("loss", "changes", "expected"),
    [
        pytest.param(3.2, {}, (1 - 40 / BETWEEN, False), id="halfway between two budgets"),
        pytest.param(3.4, {}, (1 - 40 / 50, False), id="at the end of the shorter run"),
        pytest.param(2.9, {}, (1 - 40 / 100, True), id="below the longest run, a lower bound"),
        pytest.param(3.5, {}, None, id="above the shortest run"),
        pytest.param(3.2, {"end_rate": 1.0}, None, id="a schedule that has not ended"),
        pytest.param(3.2, {"seed": 1}, None, id="no shared seed"),
    ],
)
def test_the_saving_at_the_arms_own_loss(loss, changes, expected):
    record = comparison(scratch(0, 3.0), scratch(0, 3.4, 0.5), slop(loss, flops=40.0, **changes))
    saving = compute_saving(record, "slop", 1.0)
    assert (saving and (*saving.shares.values, saving.is_bound)) == (expected and pytest.approx(expected))
    assert compute_saving(record, "scratch", 0.5) is None


def test_a_reference_whose_rate_is_still_high_is_no_goal():
    record = comparison(scratch(0, 3.0, end_rate=1.0), slop(2.5))
    assert compute_flops_saved(record, "slop") is None


def test_the_optimizers_flops_count():
    cheap, dear = (dataclasses.replace(slop(3.0), optimizer_flops=flops) for flops in (10.0, 60.0))
    record = comparison(dataclasses.replace(scratch(0, 3.0), optimizer_flops=60.0), cheap)
    assert compute_flops_saved(record, "slop").values == (pytest.approx(1 - 110 / 160),)
    assert compute_cost_to_loss([dear], 3.0) == 160.0


@pytest.mark.parametrize(
    ("cost", "unit", "loss"),
    [
        (100.0, "flops", 2.8),
        (99.5, "flops", 2.8),
        (100 * 0.5**0.5, "flops", 3.0),
        (49.0, "flops", None),
        (102.0, "flops", None),
        (300.0, "tokens", 2.8),
        (300 * 0.5**0.5, "tokens", 3.0),
        (151.0, "tokens", 3.2),
    ],
)
def test_losses_between_two_ends_lie_on_a_line_and_none_beyond(cost, unit, loss):
    found = compute_loss_at([scratch(0, 2.8), scratch(0, 3.2, 0.5)], cost, unit)
    assert found == (None if loss is None else pytest.approx(loss, abs=0.01))
    unfinished = [scratch(0, 2.8, end_rate=1.0), scratch(0, 3.2, 0.5, end_rate=None)]
    assert compute_loss_at(unfinished, cost, unit) is None


SMALL_ALONE = GrowthSchedule(SMALL, initial_tokens=300)


def small(seed, loss, **changes):
    return result("small", seed, [loss], schedule=SMALL_ALONE, **changes)


COUNTED = [
    *(scratch(seed, 3.0 + seed / 10) for seed in (0, 1)),
    *(scratch(seed, 3.4 + seed / 10, 0.5) for seed in (0, 1)),
    *(slop(3.1, 0.5, seed, tokens=2 / 3) for seed in (0, 1)),  # at half of the FLOPs, the reference's tokens
    *(small(seed, 3.3) for seed in (0, 1)),
]


@pytest.mark.parametrize(
    ("runs", "changed"),
    [
        pytest.param(COUNTED, {}, id="everything was run"),
        pytest.param(
            [run for run in COUNTED if run.arm != "small"], {"gap_closed": None}, id="the small model was not"
        ),
        pytest.param(
            [run for run in COUNTED if (run.arm, run.seed) != ("small", 1)], {"gap_closed": None}, id="a seed lacks"
        ),
        pytest.param(
            [run for run in COUNTED if run.budget != 1 or run.arm == "small"],
            {"equal_tokens": None, "gap_closed": None, "relative_flops": None},
            id="no long reference",
        ),
        pytest.param(
            [dataclasses.replace(run, end_rate=1.0) if run.arm == "scratch" else run for run in COUNTED],
            dict.fromkeys(("equal_flops", "equal_tokens", "gap_closed", "best_size", "against_best_size")),
            id="the reference's rate is still high",
        ),
        pytest.param(
            [*COUNTED, *(dataclasses.replace(small(seed, 3.2), arm="half", budget=0.5) for seed in (0, 1))],
            {},
            id="more FLOPs are no better size",
        ),
        pytest.param(
            [
                *COUNTED,
                *(result("half", seed, [3.2], schedule=SMALL_ALONE, budget=0.5, tokens=2.0) for seed in (0, 1)),
            ],
            {"best_size": "half", "against_best_size": (-0.1, -0.1)},
            id="a smaller model is better at equal FLOPs",
        ),
    ],
)
def test_every_way_of_counting(runs, changed):
    expected = {
        "seeds": (0, 1),
        "is_finished": True,
        "relative_flops": 0.5,
        "tokens_per_parameter": 0.301,
        "equal_flops": (-0.3, -0.4),
        "equal_tokens": (0.1, 0.0),
        "gap_closed": (2 / 3, 1.0),
        "best_size": "scratch",
        "against_best_size": (-0.3, -0.4),
        **changed,
    }
    counting = next(one for one in compute_countings(comparison(*runs)) if (one.arm, one.budget) == ("slop", 0.5))
    for name, value in expected.items():
        found = getattr(counting, name)
        found = found.values if isinstance(found, Spread) else found
        assert found == (value if value is None or isinstance(value, str) else pytest.approx(value, abs=1e-9)), name


def test_an_arm_that_misses_the_loss_with_one_seed_saves_nothing():
    runs = [scratch(0, 3.0), scratch(1, 3.0), result("slop", 0, [5, 4, 2.9]), result("slop", 1, [5, 4, 3.1])]
    assert compute_flops_saved(comparison(*runs), "slop") is None
    assert compute_flops_saved(comparison(*runs, reference=None), "slop") is None


def test_losses_are_compared_with_the_reference_at_the_same_budget_and_seed():
    runs = [scratch(0, 3.0), scratch(1, 3.2), scratch(0, 3.6, 0.5), scratch(1, 3.8, 0.5)]
    runs += [result("slop", seed, [5, 4, loss]) for seed, loss in ((0, 2.9), (1, 3.0))]
    runs += [result("slop", seed, [5, 4, loss], budget=0.5) for seed, loss in ((0, 3.7), (1, 3.7))]
    by_arm = {(one.arm, one.budget): one for one in compute_arm_results(comparison(*runs))}
    assert by_arm["slop", 1.0].against_reference.values == (pytest.approx(-0.1), pytest.approx(-0.2))
    assert by_arm["slop", 0.5].against_reference.values == (pytest.approx(0.1), pytest.approx(-0.1))
    assert by_arm["slop", 1.0].loss == Spread((2.9, 3.0))
    assert by_arm["slop", 1.0].perplexity.values[0] == pytest.approx(math.exp(2.9))
    assert by_arm["slop", 1.0].sequence == "l-f" and by_arm["scratch", 1.0].marginal_utility is None


def test_marginal_utility_is_eq_2():
    run = result("slop", 0, [3.0, 2.0, 1.0])
    drops = math.exp(3) - math.exp(2), math.exp(2) - math.exp(1)
    assert run.marginal_utility == pytest.approx(60 * sum(drops))
    assert compute_measured_utility(run) == pytest.approx(2 * 1.0 / (100 / 3 / 1e12))


def test_missing_seeds_of_the_reference_leave_the_difference_out():
    record = comparison(scratch(0, 3.0), result("slop", 0, [5, 4, 2.9]), result("slop", 1, [5, 4, 2.9]))
    assert compute_arm_results(record)[1].against_reference is None
    assert compute_flops_saved(record, "slop").values == (pytest.approx(0.0),), "of the seeds that both have"


def test_predictions_are_the_planners_and_ranks_are_compared(tmp_path):
    f_first = GrowthSchedule(
        SMALL,
        (GrowthStage(("ffn",), SMALL.replace(intermediate_size=64), 100), GrowthStage(("layer",), LARGE, 100)),
        250,
    )
    at_once = GrowthSchedule(SMALL, (GrowthStage(("layer", "ffn"), LARGE, 200),), 250)
    runs = [
        result("l-f", 0, [5.0, 4.0, 2.0]),
        result("f-l", 0, [5.0, 4.5, 4.0], schedule=f_first),
        result("lf", 0, [5.0, 4.9], schedule=at_once),
        scratch(0, 3.0),
    ]
    record = comparison(*runs)
    names = [one.arm for one in compute_predictions(record)]
    assert names == ["l-f", "f-l", "lf"], "what grows nothing has no utility"
    one = compute_predictions(record)[0]
    fields = {"model_type": "llama", "vocab_size": 300, "tie_word_embeddings": True}
    prices = [float(count_flops_per_token(dims, fields, 16)) for dims in SCHEDULE.structures]
    assert one.flops == pytest.approx(prices[0] * 250 + prices[1] * 100 + prices[2] * 100)
    accuracy = compute_planner_accuracy(record)
    assert accuracy.schedules == 3
    measured = [p.measured_utility.mean for p in compute_predictions(record)]
    assert accuracy.utility == compute_rank_correlation([p.utility for p in compute_predictions(record)], measured)
    assert compute_planner_accuracy(comparison(*runs[:2])) is None
    rows = tabulate_predictions(record).rows
    assert [row[0] for row in rows] == [p.arm for p in sorted(compute_predictions(record), key=lambda p: -p.utility)]
    assert describe_planner_accuracy(record).startswith(
        "Over 3 schedules, Spearman's correlation of predicted and measured"
    )
    assert draw_utility(record, tmp_path / "utility.png") is not None


def test_one_schedule_by_several_inits_has_no_ranking(tmp_path):
    record = comparison(*(result(name, 0, [5.0, 4.0, 2.0]) for name in "abc"))
    assert math.isnan(compute_planner_accuracy(record).utility) and describe_planner_accuracy(record) == ""
    assert draw_utility(record, tmp_path / "utility.png") is None


def test_schedules_are_compared_on_the_seeds_that_all_have():
    runs = [result(name, 0, [5.0, 4.0, 2.0]) for name in "ab"] + [result("a", 1, [5.0, 4.0, 3.0])]
    assert [one.loss for one in compute_predictions(comparison(*runs))] == [Spread((2.0,)), Spread((2.0,))]
    apart = [result("a", 1, [5.0, 4.0, 3.0]), result("b", 0, [5.0, 4.0, 2.0])]
    assert [one.loss for one in compute_predictions(comparison(*apart))] == [Spread((3.0,)), Spread((2.0,))]


def test_a_record_without_settings_cannot_be_predicted():
    with pytest.raises(RunError, match="lacks the config of its runs"):
        compute_predictions(comparison(result("slop", 0, [5, 4, 3]), settings={}))


def test_rank_correlation():
    assert compute_rank_correlation([1, 2, 3], [3, 2, 1]) == -1.0
    assert compute_rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(0.866025, abs=1e-6)
    assert math.isnan(compute_rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(RunError, match="cannot correlate 2 values with 3"):
        compute_rank_correlation([1, 2], [1, 2, 3])


def test_a_malformed_record_is_refused(tmp_path):
    path = tmp_path / "record.json"
    with pytest.raises(RunError, match="no such file"):
        Comparison.load(path)
    path.write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        Comparison.load(path)
    path.write_text("{}")
    with pytest.raises(RunError, match="missing key 'name'"):
        Comparison.load(path)
