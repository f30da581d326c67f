"""The publishing benchmark runs and leaves a record with right ratios; what it measures at this size means nothing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_it_leaves_a_record(tmp_path):
    output = tmp_path / "publishing.json"
    command = [sys.executable, BENCHMARKS / "publishing.py", "--scale", "tiny", "--repetitions", "1"]
    command += ["--output", output, "--workdir", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [output.name], "runs are removed"
    record = json.loads(output.read_text())
    for what in ("training_seconds", "run_seconds", "cpu_seconds"):
        assert all(len(runs) == 1 and runs[0] > 0 for runs in record[what].values()), what
    (thread,), (process,) = record["publishing_thread_cpu_seconds"], record["cpu_seconds"]["publishing"]
    assert 0 < thread < process
    assert all([ratio] == record["pair_ratios"][what] for what, ratio in record["ratios"].items())
    assert str(tmp_path) not in output.read_text()


def test_speeds_are_compared(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    publishing = importlib.import_module("publishing")
    training = {"publishing": [20.0, 10.0, 40.0], "alone": [19.0, 12.0, 19.4]}
    result = publishing.compare_speeds(
        {"training_seconds": training, "run_seconds": {"publishing": [2.0], "alone": [1.98]}}
    )
    assert result["pair_ratios"] == {"training_seconds": [0.95, 1.2, 0.485], "run_seconds": [0.99]}
    assert result["ratios"] == {"training_seconds": 0.95, "run_seconds": 0.99}
    assert [goal["met"] for goal in result["goals"]] == [False, True]
