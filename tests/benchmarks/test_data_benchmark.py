"""The data benchmark runs and leaves a record; what it measures at this size means nothing."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data.py"


def test_it_leaves_a_record(tmp_path):
    output = tmp_path / "data.json"
    command = [sys.executable, SCRIPT, "--scale", "tiny", "--repetitions", "1", "--output", output]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["tokenizing"]["documents"] == 100 and record["tokenizing"]["rate_ratio"] > 0
    assert [case["block_size"] for case in record["reading"]["cases"]] == [128, 2048]
    assert all(rate > 0 for case in record["reading"]["cases"] for rate in case["tokens_per_second"].values())
    assert len(record["goals"]) == 5 and all(goal["value"] > 0 for goal in record["goals"])
