"""The planner's benchmark runs and leaves a record; what it measures at this size means nothing."""

import importlib.util
import json
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_it_leaves_a_record(tmp_path, monkeypatch):
    output = tmp_path / "planner.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # it imports its neighbours
    spec = importlib.util.spec_from_file_location("planner_benchmark", BENCHMARKS / "planner.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    benchmark.main(["--scale", "tiny", "--repetitions", "1", "--output", str(output)])
    record = json.loads(output.read_text())
    assert {case["mode"] for case in record["cases"]} == {"once", "repeated", "joint"}
    assert all(case["median_seconds"] > 0 for case in record["cases"])
    assert record["networkx"]["equal_answers"] == record["networkx"]["targets"] == 20
    assert (tmp_path / "planner_scaling.png").stat().st_size > 10_000
