"""The data benchmark runs and leaves a record; what it measures at this size means nothing."""

import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_it_leaves_a_record(tmp_path, monkeypatch):
    output = tmp_path / "data.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("data_benchmark", BENCHMARKS / "data.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--scale", "tiny", "--repetitions", "1", "--output", str(output)])
    record = json.loads(output.read_text())
    assert record["tokenizing"]["documents"] == 100 and record["tokenizing"]["rate_ratio"] > 0
    assert [case["block_size"] for case in record["reading"]["cases"]] == [128, 2048]
    assert all(rate > 0 for case in record["reading"]["cases"] for rate in case["tokens_per_second"].values())
    workers = record["workers"]
    assert workers["bytes"] > 300_000 and workers["tokens"] > workers["documents"]
    assert set(workers["seconds"]) == {"1 worker", f"{workers['workers']} workers"} and workers["rate_ratio"] > 0
    goals = [goal for part in record.values() for goal in part["goals"]]
    assert len(goals) == 6 and all(goal["value"] > 0 for goal in goals)
