"""The table of forecasts in docs/planning.md is that of the committed records."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import pytest

from slop_hf import Comparison, Experiment, GrowthLaw
from slop_hf.errors import RunError
from slop_hf.experiments.comparison import Curve, RunResult, StageResult
from slop_hf.experiments.jobs import build_jobs
from slop_hf.experiments.staged_runs import list_staged_runs
from slop_hf.io.serialization import to_plain

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))  # it imports its neighbours
        spec = importlib.util.spec_from_file_location("forecasts_benchmark", ROOT / "benchmarks" / "forecasts.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(__import__("sys").modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def root(tmp_path, benchmark):
    """The files that the table depends on."""
    early = [path.relative_to(ROOT) for path in (ROOT / benchmark.RECORD).parent.glob(f"*{benchmark.EARLY}")]
    for path in (benchmark.RECORD, benchmark.PAGE, *early):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    return tmp_path


@pytest.fixture(scope="module")
def comparisons(benchmark):
    return benchmark.read_comparisons(ROOT)


def test_the_page_shows_the_forecasts_of_the_committed_records(benchmark, comparisons):
    assert benchmark.find_outdated(ROOT, comparisons) == [], "run `python benchmarks/forecasts.py`"
    assert set(benchmark.CHOSEN_ON) < comparisons.keys()


def test_a_changed_page_and_another_record_are_noticed(benchmark, comparisons, root):
    page = root / benchmark.PAGE
    page.write_text(page.read_text().replace("| growth law |", "| our law |", 1))
    assert benchmark.find_outdated(root, comparisons) == [benchmark.PAGE]
    others = dict(list(comparisons.items())[1:])
    assert benchmark.find_outdated(root, others) == [benchmark.RECORD, benchmark.PAGE]


@pytest.mark.parametrize("text", ["# Planning\n", "<!-- forecasts -->\n", "<!-- end of forecasts -->\n"])
def test_a_page_without_a_place_for_the_table_is_refused(benchmark, text):
    with pytest.raises(RunError, match="put both where the table belongs"):
        benchmark.fill_page(text, "table")


def test_scores_by_hand(benchmark):
    """Six arms at one budget: the law has the order right but for the last two, which differ by 0.4."""
    measured = 3.0, 3.1, 3.2, 3.3, 3.4, 3.8
    predicted = 3.1, 3.2, 3.3, 3.4, 3.9, 3.5
    arms = tuple(
        benchmark.ArmForecast(str(number), 1.0, (loss, loss + 0.02), loss - 0.05, loss + 0.01, {"growth law": guess})
        for number, (loss, guess) in enumerate(zip(measured, predicted, strict=True))
    )
    record = benchmark.RecordForecast("x", "", 10, "", arms)
    deviation = benchmark.measure_deviation([record])
    assert deviation == pytest.approx(0.02 / 2**0.5)
    score = benchmark.score_record(record, "growth law", deviation)
    assert score.spearman == pytest.approx(1 - 6 * 2 / (6 * 35))
    assert score.error == pytest.approx((4 * 0.09 + 0.49 + 0.31) / 6)
    assert (score.pairs, score.right, score.inside) == (15, 14, 0.5)
    assert benchmark.score_record(record, "growth law", 0.36).pairs == 1, "smaller differences are those of seeds"
    assert benchmark.score_record(record, "total FLOPs", deviation).spearman is None


EXPERIMENT = """
title: Two arms
scales:
  tiny:
    run:
      model: {model_type: llama}
      data: {source: python-stdlib, vocab_size: 300, block_size: 32}
      training: {per_device_train_batch_size: 2}
    structures: {initial: "16,32,1,2", target: "16,32,2,2"}
    tokens: 1280
arms:
  scratch: {chain: [target], budgets: [0.5, 1.0]}
  grown: {chain: [initial, target], shares: [1, 1]}
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiment") / "two.yaml"
    path.write_text(EXPERIMENT)
    return Experiment.from_yaml(path)


def measure(experiment, names):
    """The comparison of the experiment with the named runs finished, each at a loss of 5."""
    results = []
    for job in build_jobs(experiment):
        if job.name in names:
            stages = tuple(
                StageResult(span.name, span.dims, span.parameters, span.tokens, span.flops, 1.0, 5.0)
                for span in job.preview.spans
            )
            curve = Curve((), (), (), ())
            results.append(RunResult(job.arm, job.budget, 0, job.schedule, stages, curve, end_rate=0.0))
    settings = {"run": to_plain(experiment.run)}
    arms = dict.fromkeys(experiment.arms, "")
    sizes = {"equal": "tokens", "budget": 1280}
    return Comparison("two", "tiny", "", **sizes, arms=arms, runs=tuple(results), ledger=(), settings=settings)


def test_an_experiment_is_forecast_from_its_anchor_and_compared_with_its_runs(benchmark, comparisons, experiment):
    law, anchor = GrowthLaw(offsets={"other": 0.0}, runs=7), measure(experiment, ["scratch ×0.5, seed 0"])
    early = benchmark.forecast_experiment(experiment, law, comparisons, anchor)
    assert (early.anchor, early.anchor_loss, early.fitted_runs) == ("scratch ×0.5, seed 0", 5.0, 7)
    assert [(arm.arm, arm.tokens) for arm in early.arms] == [("scratch", (1280,)), ("grown", (640, 640))]
    known = law.anchor(list_staged_runs(anchor))
    both = list_staged_runs(measure(experiment, ["scratch, seed 0", "grown, seed 0"]))
    for arm, run in zip(early.arms, both, strict=True):
        assert arm.predicted["growth law"] == pytest.approx(known.predict(run).loss, rel=1e-4)
    measured = measure(experiment, ["scratch, seed 0"])
    joined = benchmark.join_measurements("two_tiny", early, measured)
    rows = benchmark.tabulate_early_forecasts(early, joined).rows
    assert [row[-2] for row in rows] == ["5.000", "–"]
    assert "The law knew 7 runs of other experiments" in benchmark.describe_early_forecasts(early, joined, 0.01)
    other = dataclasses.replace(early, arms=(dataclasses.replace(early.arms[0], tokens=(1216,)),))
    with pytest.raises(RunError, match="scratch ×1 was run with other stages than forecast"):
        benchmark.join_measurements("two_tiny", other, measured)


def test_forecasts_that_would_know_their_runs_are_refused(benchmark, comparisons, experiment):
    law = GrowthLaw(offsets={"other": 0.0})
    with pytest.raises(RunError, match="two has a record already"):
        benchmark.forecast_experiment(experiment, law, {"x": measure(experiment, [])}, None)
    anchor = measure(experiment, ["scratch, seed 0", "grown, seed 0"])
    with pytest.raises(RunError, match="--anchor has 2 runs, expected one"):
        benchmark.forecast_experiment(experiment, law, comparisons, anchor)


@pytest.mark.slow
def test_the_forecasts_are_those_of_the_code(benchmark, comparisons):
    """A minute: eight laws are fitted again."""
    committed = benchmark.Forecasts.from_json(ROOT / benchmark.RECORD)
    again, _, _ = benchmark.forecast_records(comparisons)
    for old, new in zip(committed.records, again.records, strict=True):
        assert [arm.predicted for arm in new.arms] == [
            {name: pytest.approx(value, abs=0.01) for name, value in arm.predicted.items()} for arm in old.arms
        ]
