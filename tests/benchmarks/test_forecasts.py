"""The table of forecasts in docs/planning.md is that of the committed records."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from slop_hf.errors import RunError

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
    for path in (benchmark.RECORD, benchmark.PAGE):
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


@pytest.mark.slow
def test_the_forecasts_are_those_of_the_code(benchmark, comparisons):
    """A minute: eight laws are fitted again."""
    committed = benchmark.Forecasts.from_json(ROOT / benchmark.RECORD)
    again, _, _ = benchmark.forecast_records(comparisons)
    for old, new in zip(committed.records, again.records, strict=True):
        assert [arm.predicted for arm in new.arms] == [
            {name: pytest.approx(value, abs=0.01) for name, value in arm.predicted.items()} for arm in old.arms
        ]
