"""A two-rank launch publishes each stage once, from its first rank."""

import subprocess
import sys
from pathlib import Path

import pytest
from published_runs import online, write_config

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from launching import ROOT, command, environment, weights

from slop_hf import RunDirectory, fetch_stage

REPO = "tester/grown"
STAGES = ["stage-0-initial", "stage-1-layer", "stage-2-ffn"]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_ranks_publish_each_stage_once(hub, api, tmp_path):
    pytest.importorskip("deepspeed")
    hub.fail(r"PUT /lfs/", "drop")
    output = tmp_path / "run"
    words = [*command("zero3", 2, ROOT / "recipes" / "grow_1b.py")]
    words += ["--config", str(write_config(tmp_path)), "--output-dir", str(output)]
    # DeepSpeed finds the CPU by itself.
    for change in ("use_cpu=false", "push_to_hub=true", f"hub_model_id={REPO}"):
        words += ["--set", f"training.{change}"]
    seen = {**environment(), **online(hub, tmp_path)}
    done = subprocess.run(words, cwd=ROOT, env=seen, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(f"published to {REPO}: {', '.join(STAGES)}") == 1 and "not published" not in done.stdout

    assert [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]
    # A second rank would have created the repository too, and read the lineage that it found there.
    assert hub.requests.count("POST /api/repos/create") == 1
    assert not any(request.endswith("lineage.json") for request in hub.requests)
    assert [record.devices for record in RunDirectory(output).records()] == [2, 2, 2]
    for name in STAGES:
        fetched = fetch_stage(f"{REPO}@{name}", api).path
        sent = weights(fetched.parent, fetched.name)
        assert all(value.equal(sent[key]) for key, value in weights(output, name).items())
