"""Results of comparisons, on records made by hand."""

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
    compute_flops_saved,
    compute_rank_correlation,
)

SMALL, DEEP, LARGE = ModelDims(16, 32, 2, 2), ModelDims(16, 32, 4, 2), ModelDims(16, 64, 4, 2)
SCHEDULE = GrowthSchedule(SMALL, (GrowthStage(("layer",), DEEP, 100), GrowthStage(("ffn",), LARGE, 100)), 250)
SCRATCH = GrowthSchedule(LARGE, initial_tokens=300)
RUN = {"model": {"tie_word_embeddings": True}, "data": {"vocab_size": 300, "block_size": 16}}


def result(arm, seed, losses, *, budget=1.0, schedule=SCHEDULE, flops=100.0, curve=None):
    """A run whose stages end with these losses and share its FLOPs and seconds evenly."""
    share = flops * budget / len(losses)
    stages = tuple(
        StageResult(name, dims, 1000, tokens, share, 60.0, loss)
        for name, dims, tokens, loss in zip(
            schedule.stage_names, schedule.structures, schedule.tokens, losses, strict=True
        )
    )
    points = curve or [(number, share * (number + 1), loss) for number, loss in enumerate(losses)]
    numbers, places, values = (tuple(column) for column in zip(*points, strict=True))
    curve = Curve(numbers, places, places, values)
    return RunResult(arm, budget, seed, schedule, stages, curve)


def comparison(*runs, reference="scratch", **settings):
    arms = dict.fromkeys((run.arm for run in runs), "")
    given = {"settings": {"run": RUN}, "reference": reference, **settings}
    return Comparison("x", "nano", "X", "flops", 100.0, arms, runs, **given)


def scratch(seed, loss, budget=1.0):
    return result("scratch", seed, [loss], budget=budget, schedule=SCRATCH)


def test_the_saving_is_read_at_the_first_evaluation_that_reaches_the_references_loss():
    grown = [(0, 20.0, 5.0), (2, 70.0, 3.1), (2, 80.0, 2.9), (2, 100.0, 2.5)]
    record = comparison(scratch(0, 3.0), result("slop", 0, [5.0, 3.1, 2.5], curve=grown))
    saved = compute_flops_saved(record, "slop")
    assert saved is not None and saved.values == (pytest.approx(0.2),)
    assert compute_flops_saved(record, "scratch").values == (0.0,)


def test_a_model_that_has_not_grown_to_its_end_has_not_reached_the_references_loss():
    """The question is what the target costs: a smaller model with that loss is another thing."""
    entered = [(0, 30.0, 2.9), (1, 60.0, 2.8), (2, 60.0, 3.5), (2, 80.0, 2.9)]
    assert compute_cost_to_loss([result("slop", 0, [2.9, 2.8, 2.6], curve=entered)], 3.0) == 80.0
    kept = [(0, 30.0, 3.5), (1, 60.0, 2.9), (2, 60.0, 2.9), (2, 80.0, 2.8)]
    assert compute_cost_to_loss([result("slop", 0, [3.5, 2.9, 2.8], curve=kept)], 3.0) == 60.0, (
        "right after growth the target is there"
    )
    assert compute_cost_to_loss([result("slop", 0, [3.5, 2.9, 2.8], curve=kept)], 2.0) == math.inf


def test_a_shorter_run_with_its_own_schedule_may_get_there_first():
    short = result("slop", 0, [5.0, 4.0, 2.9], budget=0.5)
    record = comparison(scratch(0, 3.0), result("slop", 0, [5.0, 4.0, 2.5]), short)
    assert compute_flops_saved(record, "slop").values == (pytest.approx(0.5),)


def test_between_two_budgets_the_ends_lie_on_a_line_over_the_logarithm():
    short, whole = result("slop", 0, [5.0, 4.0, 3.2], budget=0.5), result("slop", 0, [5.0, 4.0, 2.8])
    record = comparison(scratch(0, 3.0), whole, short)
    assert compute_flops_saved(record, "slop").values == (pytest.approx(1 - 0.5**0.5),)
    assert compute_cost_to_loss([short, whole], 2.8) == pytest.approx(100.0), (
        "an end that was measured counts as it is"
    )
    assert compute_cost_to_loss([short, whole], 2.7) == math.inf, "nothing is read beyond the budgets that were run"
    assert compute_cost_to_loss([short], 3.0) == math.inf


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
