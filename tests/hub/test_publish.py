"""Stages published to a Hub that sometimes fails: each arrives once, whole or not at all."""

import json
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import HfApi, ModelCard
from published_runs import QUICK, online
from safetensors.torch import load_file
from server import READ_TOKEN

from slop_hf import RunDirectory, plan_revision, publish_run, publish_stage
from slop_hf.errors import HubError, RunError
from slop_hf.runs.directory import EVAL_FILE

REPO = "tester/grown"
STAGES = ["stage-0-initial", "stage-1-layer", "stage-2-ffn"]
FILES = {
    ".gitattributes",
    "README.md",
    "config.json",
    "generation_config.json",
    "lineage.json",
    "loss.png",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def publish(run, api, **options):
    return list(publish_run(run, REPO, api=api, retries=QUICK, **options))


def test_every_stage_is_a_branch_and_the_last_is_main(finished, hub, api):
    run, _ = finished
    revisions = publish(run, api)
    repo = hub.repos[REPO]
    assert [str(one.address) for one in revisions] == [f"{REPO}@{name}" for name in [*STAGES, "main"]]
    assert all(one.is_new for one in revisions) and repo.private
    assert [branch for branch, _ in repo.messages] == [*STAGES, "main"]
    for name in STAGES:
        files = repo.files(name)
        assert files.keys() == FILES
        assert files["model.safetensors"] == (run / name / "model.safetensors").read_bytes()
        assert files["loss.png"].startswith(b"\x89PNG")
    assert repo.files("main") == repo.files(STAGES[-1])

    again = publish(run, api)
    assert not any(one.is_new for one in again) and len(repo.messages) == 4


def test_lineage_and_card_of_a_stage(finished, hub, api):
    run, _ = finished
    publish(run, api, base_model="somebody/seed")
    first, second, _ = (json.loads(hub.repos[REPO].files(name)["lineage.json"]) for name in STAGES)
    assert "parent" not in first and second["parent"] == {
        "revision": STAGES[0],
        "weights_hash": first["weights_hash"],
    }
    assert second["record"] == json.loads((run / STAGES[1] / "stage.json").read_text())
    assert second["record"]["operators"] == ["layer"] and second["record"]["init"] == {"layer": "stack"}
    assert [one["name"] for one in second["ancestors"]] == [STAGES[0]]

    card = ModelCard(hub.repos[REPO].files(STAGES[1])["README.md"].decode())
    assert card.data.base_model == "somebody/seed" and card.data.library_name == "transformers"
    assert {"slop-hf", "model-growth"} <= set(card.data.tags)
    assert [result.metric_type for result in card.data.eval_results] == ["perplexity"]
    for needed in (f'revision="{STAGES[1]}"', "AutoTokenizer", "loss.png", f"slop train RUN.yaml --from {REPO}@"):
        assert needed in card.text
    assert "by enlarging the number of layers" in card.text
    assert "This run enlarges the number of layers, then the feed-forward size." in card.text
    assert "Stage: intermediate; the run continues with stage-2-ffn" in card.text
    assert card.text.count("\n| 0 |") == card.text.count("\n| 1 |") == 1 and "\n| 2 |" not in card.text


def test_transient_failures_are_retried_and_nothing_is_sent_twice(finished, hub, api):
    run, _ = finished
    for pattern, how, times in [
        ("POST /api/repos/create", 500, 1),
        (r"POST .*/branch/stage-1", 429, 2),
        (r"POST .*/preupload/stage-0", "drop", 1),
        (r"PUT /lfs/", "drop", 1),
        (r"PUT /lfs/", 500, 1),
        (r"POST .*/commit/stage-2", 500, 1),
        (r"POST .*/commit/main", "drop", 2),
        (r"GET .*/tree/stage-1", 503, 1),
    ]:
        hub.fail(pattern, how, times)
    publish(run, api)
    assert not any(left for _, _, left in hub.failures)
    assert [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]
    assert all(hub.repos[REPO].files(name).keys() == FILES for name in STAGES)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(finished, hub, api, monkeypatch):
    run, _ = finished
    commit, lost = HfApi.create_commit, []

    def losing(self, *args, **kwargs):
        done = commit(self, *args, **kwargs)
        if not lost:
            lost.append(done)
            raise ConnectionResetError
        return done

    monkeypatch.setattr(HfApi, "create_commit", losing)
    publish(run, api)
    assert lost and [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]


def test_a_failure_before_the_commit_leaves_no_file(finished, hub, api):
    run, _ = finished
    hub.fail(r"POST .*/commit/stage-0", 500, 100)
    with pytest.raises(HubError, match="you can try again at any time"):
        publish(run, api)
    assert hub.repos[REPO].files(STAGES[0]).keys() == {".gitattributes"}
    hub.failures.clear()
    publish(run, api)
    assert hub.repos[REPO].files(STAGES[0]).keys() == FILES


@pytest.mark.slow
def test_a_publisher_that_is_killed_leaves_no_file(finished, hub, api):
    run, _ = finished
    code = (
        "import os; from huggingface_hub import HfApi; from slop_hf import publish_stage\n"
        "HfApi.preupload_lfs_files = lambda *args, **kwargs: os._exit(9)\n"
        f"publish_stage({str(run)!r}, 0, {REPO!r}, api=HfApi({hub.endpoint!r}, token={hub.token!r}))"
    )
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    assert python(code, environment).returncode == 9
    assert hub.repos[REPO].files(STAGES[0]).keys() == {".gitattributes"}
    assert publish_stage(run, 0, REPO, api=api, retries=QUICK)[0].is_new


def test_later_results_are_published_by_the_next_call(finished, hub, api, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    publish(run, api)
    scored = {"task": "arc_easy", "metrics": {"acc": 0.25}, "stderr": {"acc": 0.01}, "documents": 100}
    scored["harness"] = "lm-eval 0.4.13"
    (run / STAGES[1] / EVAL_FILE).write_text(json.dumps([scored]))
    revisions = publish(run, api)
    assert [one.is_new for one in revisions] == [False, True, False, False]
    card = ModelCard(hub.repos[REPO].files(STAGES[1])["README.md"].decode())
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_value, result.source_name) == ("arc_easy", 0.25, "lm-eval 0.4.13")
    assert "| arc_easy | acc | 0.250 | 0.0100 | – | 100 |" in card.text


@pytest.mark.slow
def test_stock_transformers_loads_the_same_bits(finished, hub, api, tmp_path):
    run, _ = finished
    publish(run, api)
    code = f"""
import sys
sys.modules["slop_hf"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in {STAGES}:
    model = AutoModelForCausalLM.from_pretrained({REPO!r}, revision=name, dtype="auto").state_dict()
    wanted = load_file({str(run)!r} + f"/{{name}}/model.safetensors")
    assert all(torch.equal(model[key], wanted[key]) for key in wanted), name
    AutoTokenizer.from_pretrained({REPO!r}, revision=name)
final = AutoModelForCausalLM.from_pretrained({REPO!r}, dtype="auto")
assert final.config.intermediate_size == 48
"""
    done = python(code, online(hub, tmp_path))
    assert done.returncode == 0, done.stderr


def test_failures_are_explained(finished, hub, api, tmp_path):
    run, _ = finished
    with pytest.raises(RunError, match="is not a run"):
        publish(tmp_path, api)
    with pytest.raises(RunError, match="no finished stage 7: choose one from 0 to 2"):
        publish(run, api, stages=[0, 7])
    empty = tmp_path / "empty"
    RunDirectory(run).schedule.to_yaml(empty / "schedule.yaml")
    with pytest.raises(RunError, match="has no finished stage yet"):
        publish(empty, api)
    with pytest.raises(HubError, match="is not a valid repository name"):
        list(publish_run(run, "a/b/c", api=api))
    assert not hub.repos

    with pytest.raises(HubError, match=r"no permission \(403\)"):
        list(publish_run(run, "somebody/grown", api=api))
    hub.make("somebody/grown")
    with pytest.raises(HubError, match=r"no permission \(403\)"):
        list(publish_run(run, "somebody/grown", api=api))
    with pytest.raises(HubError, match=r"\(401\); log in"):
        list(publish_run(run, REPO, api=HfApi(hub.endpoint, token="hf_wrong")))
    with pytest.raises(HubError, match=r"no permission \(403\)"):
        list(publish_run(run, REPO, api=HfApi(hub.endpoint, token=READ_TOKEN)))
    with pytest.raises(HubError, match="cannot be reached"):
        list(publish_run(run, REPO, api=HfApi("http://127.0.0.1:9", token=hub.token), retries=QUICK))


def test_repositories_of_others_are_not_overwritten(finished, hub, api, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    other = hub.make(REPO)
    other.commit("main", {"model.safetensors": b"mine"})
    with pytest.raises(HubError, match=r"holds something else \(model.safetensors\)"):
        publish(run, api)
    assert other.files("main") == {"model.safetensors": b"mine"}

    hub.repos.clear()
    publish(run, api)
    facts = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**facts, "run_id": "another"}))
    with pytest.raises(HubError, match="holds a stage of another run"):
        publish(run, api)


def test_a_corrupted_stage_is_not_published(finished, hub, api, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    weights = run / STAGES[1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(HubError, match=r"model.safetensors does not hold what was written"):
        publish_stage(run, 1, REPO, api=api)


def test_a_stage_that_was_trained_again_replaces_the_earlier_one(finished, hub, api, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    publish(run, api)
    repo = hub.repos[REPO]
    repo.commit(STAGES[1], {**repo.files(STAGES[1]), "model-00001-of-00002.safetensors": b"older"})
    growth = json.loads(repo.files(STAGES[1])["lineage.json"])
    repo.files(STAGES[1])["lineage.json"] = json.dumps({**growth, "weights_hash": "older"}).encode()
    assert [one.is_new for one in publish_stage(run, 1, REPO, api=api)] == [True]
    assert repo.files(STAGES[1]).keys() == FILES


def test_a_plan_lists_files_and_sizes_and_sends_nothing(finished, hub):
    run, _ = finished
    plan = plan_revision(run, 2, REPO)
    assert plan.branches == (STAGES[2], "main") and plan.sizes.keys() == FILES - {".gitattributes"}
    assert plan.sizes["model.safetensors"] == (run / STAGES[2] / "model.safetensors").stat().st_size
    assert len(load_file(plan.content["model.safetensors"])) and not hub.requests


def python(code, environment):
    import os

    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
