"""The planner's benchmark runs and leaves a record; what it measures at this size means nothing."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planner.py"


def test_it_leaves_a_record(tmp_path):
    output = tmp_path / "planner.json"
    command = [sys.executable, SCRIPT, "--scale", "tiny", "--repetitions", "1", "--output", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert {case["mode"] for case in record["cases"]} == {"once", "repeated", "joint"}
    assert all(case["median_seconds"] > 0 for case in record["cases"])
    assert record["networkx"]["equal_answers"] == record["networkx"]["targets"] == 20
    assert (tmp_path / "planner_scaling.png").stat().st_size > 10_000
