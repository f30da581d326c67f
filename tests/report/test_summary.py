"""The summary of a run, compared with values computed by hand."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from subprocess import run as run_process

import pytest
from report_runs import FFN, GROWN, HIDDEN, INITIAL, LAYER, SCRATCH

from slop_hf.cost.flops import count_parameters
from slop_hf.errors import RunError
from slop_hf.report import compute_marginal_utility, name_runs, summarise
from slop_hf.report.summary import describe_outcomes
from slop_hf.runs.directory import RunDirectory


def test_summary_of_a_grown_run_by_hand(make_run):
    run = make_run(seconds=36.0, devices=2)
    summary, records = summarise(run), run.records()
    assert (summary.name, summary.initial, summary.target, summary.sequence) == ("grown", INITIAL, HIDDEN, "l-f-h")
    assert summary.delta_params == 1.69e14
    assert summary.stage_seconds == (36.0, 72.0, 108.0, 144.0) and summary.seconds == 360.0
    assert summary.device_hours == pytest.approx(0.2)
    assert summary.parameters == records[-1].parameters and summary.tokens == 5 * 409600
    assert summary.flops == pytest.approx(sum(record.flops for record in records))
    assert summary.perplexity == records[-1].perplexity == pytest.approx(math.exp(summary.eval_loss))
    assert summary.finished and (summary.stages, summary.planned_stages) == (4, 4)
    first, second, third, fourth = (record.perplexity for record in records)
    # 72, 108 and 144 seconds on two devices are 0.04, 0.06 and 0.08 device hours.
    expected = (first - second) / 0.04 + (second - third) / 0.06 + (third - fourth) / 0.08
    assert summary.marginal_utility == pytest.approx(expected, rel=1e-12)


def test_marginal_utility_keeps_the_sign_and_is_not_the_total_ratio():
    assert compute_marginal_utility([30.0, 40.0], [2.0]) == -5.0
    assert compute_marginal_utility([40.0, 30.0, 40.0], [1.0, 10.0]) == 9.0


@pytest.mark.parametrize("perplexities, hours", [([40.0], []), ([40.0, 30.0], [1.0, 1.0]), ([40.0, 30.0], [0.0])])
def test_marginal_utility_rejects_shapes_and_times_without_one(perplexities, hours):
    with pytest.raises(RunError):
        compute_marginal_utility(perplexities, hours)


def test_from_scratch_has_no_sequence_and_no_utility(make_run):
    summary = summarise(make_run("scratch", SCRATCH))
    assert (summary.sequence, summary.delta_params, summary.marginal_utility) == ("", None, None)
    assert summary.initial == summary.target == HIDDEN


@pytest.mark.parametrize("changes", [{"perplexity": None}, {"perplexity": math.inf}, {"seconds": 0.0}])
def test_marginal_utility_is_none_if_it_is_undefined(make_run, changes):
    assert summarise(make_run(**{"seconds": 36.0, **changes})).marginal_utility is None


def test_unfinished_run_is_summarised_by_its_finished_stages(make_run):
    summary = summarise(make_run(stages=3))
    assert not summary.finished and (summary.stages, summary.planned_stages) == (3, 4)
    assert summary.target == HIDDEN and summary.parameters is None
    assert summary.tokens == 4 * 409600 and len(summary.stage_seconds) == 3
    assert summary.perplexity == pytest.approx(math.exp(summary.eval_loss))


def test_run_without_a_finished_stage_is_rejected(make_run):
    with pytest.raises(RunError, match=r"no finished stage.*stage-0-initial.*slop train"):
        summarise(make_run(stages=0))


def test_a_grown_run_is_compared_with_from_scratch_at_equal_flops(make_run):
    grown = replace(summarise(make_run()), name="slop", flops=8e12, eval_loss=4.349)
    scratch = replace(grown, name="scratch", sequence="", flops=8.01e12, eval_loss=5.031)
    [sentence] = describe_outcomes([grown, scratch])
    assert "grown 4.35 (slop), from scratch 5.03 (scratch) at equal FLOPs (8.00e+12)" in sentence
    for other in (
        replace(scratch, flops=9e12),
        replace(scratch, target=INITIAL),
        replace(scratch, finished=False),
        replace(scratch, eval_loss=None),
        grown,
    ):
        assert describe_outcomes([grown, other]) == []


def test_directory_without_a_run_is_rejected(tmp_path):
    with pytest.raises(RunError, match=r"is not a run.*schedule\.yaml"):
        summarise(RunDirectory(tmp_path))


def test_summary_as_json(make_run):
    data = json.loads(summarise(make_run()).to_json())
    assert data["target"]["hidden_size"] == 128 and data["stage_seconds"] == [36.0, 72.0, 108.0, 144.0]


def test_names_of_runs(tmp_path):
    paths = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/other")]
    assert name_runs([RunDirectory(path) for path in paths]) == ["a/x/run", "b/x/run", "other"]
    with pytest.raises(RunError, match="more than once"):
        name_runs([RunDirectory(paths[0]), RunDirectory(paths[0] / "." / ".." / "run")])


def test_run_has_the_structures_of_its_schedule(make_run):
    structures = [record.dims for record in make_run().records()]
    assert structures == [INITIAL, LAYER, FFN, HIDDEN] == list(GROWN.structures)
    config = {"model_type": "llama", "vocab_size": 512}
    assert count_parameters(HIDDEN, config) > count_parameters(INITIAL, config)


def test_report_needs_no_torch():
    unwanted = {"torch", "transformers", "matplotlib.pyplot"}
    code = f"import sys, slop_hf.report; sys.exit(bool({unwanted} & set(sys.modules)))"
    assert run_process([sys.executable, "-c", code]).returncode == 0
