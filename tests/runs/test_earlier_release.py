"""Runs, caches and files that an earlier release wrote are read, and a run that it began is resumed.

`earlier_release/` was written by version 0.1.0 before its modules moved into folders: `slop train run.yaml -o run`,
interrupted in stage 1; `grown/`, the receipt of `slop grow`; `published/`, the lineage of a published stage.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slop_hf import RunDirectory

WRITTEN = Path(__file__).parent / "earlier_release"
WRITTEN_AT_NS = 1_700_000_000_000_000_000


@pytest.fixture
def release(tmp_path, monkeypatch):
    """A copy of what the earlier release wrote, as the working directory."""
    shutil.copytree(WRITTEN, tmp_path / "release")
    for text in (tmp_path / "release" / "texts").iterdir():
        os.utime(text, ns=(WRITTEN_AT_NS, WRITTEN_AT_NS))  # a source's cache key counts them, and git keeps none
    monkeypatch.chdir(tmp_path / "release")
    return tmp_path / "release"


def test_a_run_of_an_earlier_release_is_resumed(release: Path, output_of) -> None:
    cached = sorted(path.relative_to(release) for path in (release / "cache").rglob("*.ds"))
    before = {path: (release / path).stat().st_mtime_ns for path in cached}
    run_id = json.loads((release / "run" / "run.json").read_text())["run_id"]

    output_of("train", "run.yaml", "-o", "run", "--resume")
    output_of("train", "run.yaml", "-o", "whole")

    resumed, whole = RunDirectory("run"), RunDirectory("whole")
    expected = json.loads((release / "expected.json").read_text())
    assert [record.name for record in resumed.records()] == list(expected["eval_losses"])
    for run in (resumed, whole):
        facts = json.loads((run.path / "run.json").read_text())
        assert (facts["data"], facts["vocabulary"]) == (expected["data"], expected["vocabulary"])
        for record in run.records():
            assert record.eval_loss == pytest.approx(expected["eval_losses"][record.name], abs=1e-5)
    assert json.loads((release / "run" / "run.json").read_text())["run_id"] == run_id
    ends = [load_file(run.path / "stage-3-hidden" / "model.safetensors") for run in (resumed, whole)]
    for name, weights in ends[0].items():
        assert weights.allclose(ends[1][name], atol=1e-5), name
    assert {path: (release / path).stat().st_mtime_ns for path in cached} == before, "the cache was not reused"
    assert sorted(path.relative_to(release) for path in (release / "cache").rglob("*.ds")) == cached
