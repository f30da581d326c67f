"""Published stages: fetched, checked, planned from and continued."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard
from published_runs import QUICK
from server import READ_TOKEN

from slop_hf import GrowthSchedule, RunDirectory, fetch_stage, publish_run, publish_stage
from slop_hf.errors import HubError
from slop_hf.hub.lineage import Lineage

REPO = "tester/grown"
FFN = "stage-2-ffn"


@pytest.fixture
def published(finished, hub, api):
    list(publish_run(finished[0], REPO, api=api, retries=QUICK))
    return hub


def test_a_stage_comes_back_bit_for_bit(published, finished, api):
    run, _ = finished
    stage = fetch_stage(f"{REPO}@{FFN}", api)
    assert (stage.path / "model.safetensors").read_bytes() == (run / FFN / "model.safetensors").read_bytes()
    assert stage.lineage.record == RunDirectory(run).records()[2]
    assert stage.lineage.schedule == RunDirectory(run).schedule
    assert fetch_stage(REPO, api).lineage == stage.lineage


def publish_as_an_earlier_release(repo, branch):
    """Rename the branch's `lineage.json` to `growth.json`, as slop-hf 0.1.0 called it."""
    files = dict(repo.files(branch))
    files["growth.json"] = files.pop("lineage.json")
    repo.commit(branch, files)


def test_a_stage_published_by_an_earlier_release_is_fetched(published, hub, api, monkeypatch):
    current = fetch_stage(f"{REPO}@{FFN}", api).lineage
    publish_as_an_earlier_release(hub.repos[REPO], FFN)
    assert fetch_stage(f"{REPO}@{FFN}", api).lineage == current
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_stage(f"{REPO}@{FFN}", api).lineage == current


def test_a_stage_published_by_an_earlier_release_is_left_alone_until_it_changes(published, finished, hub, api):
    repo = hub.repos[REPO]
    publish_as_an_earlier_release(repo, "stage-1-layer")
    assert not publish_stage(finished[0], 1, REPO, api=api)[0].is_new
    older = {**json.loads(repo.files("stage-1-layer")["growth.json"]), "weights_hash": "older"}
    repo.files("stage-1-layer")["growth.json"] = json.dumps(older).encode()
    assert publish_stage(finished[0], 1, REPO, api=api)[0].is_new
    assert "lineage.json" in repo.files("stage-1-layer") and "growth.json" not in repo.files("stage-1-layer")


def test_a_lineage_written_by_an_earlier_release_is_read():
    written = Path(__file__).parents[1] / "runs" / "earlier_release" / "published" / "growth.json"
    lineage = Lineage.from_json(written)
    assert (lineage.revision, lineage.record.operators, lineage.parent.revision) == (FFN, ("ffn",), "stage-1-layer")
    assert [record.stage for record in lineage.ancestors] == [0, 1]
    assert lineage.remaining_schedule().sequence == "h"
    assert json.loads(lineage.to_json()) == json.loads(written.read_text())


def test_slop_train_starts_from_a_published_stage(published, finished, hub, api, tmp_path, output_of):
    run, config = finished
    middle, output = "stage-1-layer", tmp_path / "more"
    output_of("train", config, "--from", f"{REPO}@{middle}", "-o", output)
    more = RunDirectory(output)
    assert more.schedule.stages == RunDirectory(run).schedule.stages[1:] and more.schedule.initial_tokens == 0
    assert (more.stage_dir(0) / "model.safetensors").read_bytes() == (run / middle / "model.safetensors").read_bytes()
    assert (more.stage_dir(0) / "tokenizer.json").read_bytes() == (run / middle / "tokenizer.json").read_bytes()

    list(publish_run(output, "tester/more", api=api))
    begun, grown = (
        json.loads(hub.repos["tester/more"].files(name)["lineage.json"]) for name in more.schedule.stage_names
    )
    before = json.loads(hub.repos[REPO].files(middle)["lineage.json"])
    assert begun["parent"] == {"repo": REPO, "revision": middle, "weights_hash": before["weights_hash"]}
    assert begun["weights_hash"] == before["weights_hash"]
    assert [one["name"] for one in grown["ancestors"]] == ["stage-0-initial", middle, "stage-0-initial"]
    card = hub.repos["tester/more"].files("main")["README.md"].decode()
    assert f"base_model: {REPO}" in card and f"The first 2 rows belong to `{REPO}`, which this run continues." in card


def test_the_last_stage_needs_another_schedule(published, finished, tmp_path, output_of, error_of):
    run, config = finished
    asked = ("train", config, "--from", REPO, "-o", tmp_path / "more", "--dry-run", "--json")
    assert "last stage of its schedule" in error_of(*asked)
    target = RunDirectory(run).schedule.target
    stages = [{"operators": ["layer"], "dims": target.replace(num_hidden_layers=4).as_dict(), "tokens": 600}]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"initial": target.as_dict(), "stages": stages}))
    rows = json.loads(output_of(*asked, "--schedule", tmp_path / "more.yaml"))
    assert [row["stage"] for row in rows] == ["stage-0-initial", "stage-1-layer"]


def test_slop_plan_begins_with_a_published_structure(published, output_of, error_of):
    asked = ("--target", "16,48,6,2", "--ffn-multiple", "16", "--operators", "layer,ffn", "--json")
    answer = json.loads(output_of("plan", "--from", f"{REPO}@stage-1-layer", *asked))
    initial = answer["schedules"][0]["schedule"]["initial"] if "schedule" in answer["schedules"][0] else None
    assert (initial or answer["schedules"][0]["initial"])["num_hidden_layers"] == 3
    assert not any("safetensors" in request and "GET" in request for request in published.requests)
    assert "has no revision 'stage-9'; it has main, stage-0-initial" in error_of(
        "plan", "--from", f"{REPO}@stage-9", *asked
    )


def test_failures_are_explained(published, finished, hub, api, monkeypatch, tmp_path):
    with pytest.raises(HubError, match="has no revision 'stage-9'; it has main, stage-0-initial, stage-1-layer"):
        fetch_stage(f"{REPO}@stage-9", api)
    with pytest.raises(HubError, match="is not an address on the Hub: expected user/name"):
        fetch_stage("not an address", api)
    with pytest.raises(HubError, match="no such repository, or you may not see it"):
        fetch_stage("tester/missing", api)
    with pytest.raises(HubError, match="no such repository, or you may not see it"):
        fetch_stage(REPO, HfApi(hub.endpoint, token=READ_TOKEN))
    hub.make("tester/plain")
    with pytest.raises(HubError, match=r"reading lineage.json of tester/plain@main: there is no such file"):
        fetch_stage("tester/plain", api)
    hub.fail(f"{REPO}/resolve", 403, 10)
    with pytest.raises(HubError, match=r"no permission \(403\)"):
        fetch_stage(REPO, api)
    with pytest.raises(HubError, match="cannot be reached"):
        fetch_stage("tester/elsewhere", HfApi("http://127.0.0.1:9"))


def test_other_weights_than_published_are_refused(published, hub, api):
    repo = hub.repos[REPO]
    files = dict(repo.files(FFN))
    repo.commit(FFN, {**files, "model.safetensors": files["model.safetensors"][:-1] + b"x"})
    with pytest.raises(HubError, match=r"the weights in .* have the hash .* lineage.json says"):
        fetch_stage(f"{REPO}@{FFN}", api)
    repo.commit(FFN, {**files, "model.safetensors": files["model.safetensors"][:-100]})
    with pytest.raises(HubError, match="truncated or corrupt"):
        fetch_stage(f"{REPO}@{FFN}", api)
    repo.commit(FFN, {**files, "lineage.json": b"{}"})
    with pytest.raises(HubError, match=r"missing key 'revision'"):
        fetch_stage(f"{REPO}@{FFN}", api)


def test_a_stage_that_was_fetched_once_is_read_without_network(published, api, monkeypatch):
    fetch_stage(f"{REPO}@{FFN}", api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch_stage(f"{REPO}@{FFN}", api).lineage.revision == FFN


def test_slop_publish_plans_publishes_and_repeats(finished, hub, output_of, error_of, tmp_path):
    run, _ = finished
    plan = output_of("publish", run, "--to", REPO, "--dry-run", "--wide")
    assert f"{REPO}@main: would hold" in plan and "model.safetensors" in plan and not hub.requests
    plan = output_of("publish", run, "--to", REPO, "--dry-run", "--stage", "0")
    assert f"{REPO} would hold" in plan and "stage-0-initial" in plan and "lineage.json" in plan
    assert "model.safetensors" not in plan and not hub.requests
    assert f"{REPO}@{FFN}: " in output_of("publish", run, "--to", REPO, "--public")
    assert not hub.repos[REPO].private
    rows = json.loads(output_of("publish", run, "--to", REPO, "--stage", 2, "--json"))
    assert [(row["address"], row["is_new"]) for row in rows] == [(f"{REPO}@{FFN}", False), (f"{REPO}@main", False)]
    assert "is not a run" in error_of("publish", tmp_path, "--to", REPO)


def test_slop_publish_sends_later_scores(finished, hub, output_of, tmp_path):
    run, config = shutil.copytree(finished[0], tmp_path / "run"), finished[1]

    def sent():
        return [row["is_new"] for row in json.loads(output_of("publish", run, "--to", REPO, "--json"))]

    assert sent() == [True, True, True, True]
    output_of("eval", run, "--tasks", "perplexity", "--data", config, "--stage", 2, "--limit", 2)
    assert sent() == [False, False, True, True], "only the last stage and main, which hold the same"
    (scored,) = json.loads(hub.repos[REPO].files("main")["lineage.json"])["evaluations"]
    assert (scored["task"], scored["limit"]) == ("perplexity", 2)
    results = ModelCard(hub.repos[REPO].files("main")["README.md"].decode()).data.eval_results
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in results] == [
        ("held-out", metric, scored["metrics"][metric]) for metric in ("perplexity", "loss")
    ]
    assert sent() == [False, False, False, False]


def test_a_tag_and_a_commit_are_revisions_too(published, finished, hub, api, tmp_path, output_of, error_of):
    commit = hub.repos[REPO].branches["stage-1-layer"]
    api.create_tag(REPO, tag="v1", revision="stage-1-layer")
    publish_stage(finished[0], 1, REPO, api=api)  # a tag stays where it is, and disturbs nobody
    for revision in ("v1", commit):
        stage = fetch_stage(f"{REPO}@{revision}", api)
        assert (stage.lineage.revision, stage.origin.parent.revision) == ("stage-1-layer", revision)
    assert "it has main, stage-0-initial, stage-1-layer, stage-2-ffn, v1" in error_of(
        "train", finished[1], "--from", f"{REPO}@v2", "-o", tmp_path / "more"
    )


def test_a_revision_is_scored_grown_and_trained_on_by_its_address(published, finished, tmp_path, output_of, error_of):
    run, config = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    address, asked = f"{REPO}@stage-1-layer", ("--tasks", "perplexity", "--data", config, "--json", "--cache-dir")
    scored = json.loads(output_of("eval", address, *asked, tmp_path / "one"))
    of_run = json.loads(output_of("eval", run, "--stage", 1, *asked, tmp_path / "other"))
    assert scored["evaluations"] == of_run["stages"][0]["evaluations"]

    output_of("grow", address, "-o", tmp_path / "grown", "--intermediate-size", 48)
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["num_hidden_layers"] == 3

    rest = GrowthSchedule(RunDirectory(run).schedule.structures[1], RunDirectory(run).schedule.stages[1:])
    rest.to_yaml(tmp_path / "rest.yaml")
    given = {"data.tokenizer": address, "model.pretrained": address}
    published_as = {"training.push_to_hub": "true", "training.hub_model_id": "tester/more"}
    changes = [part for name, value in (given | published_as).items() for part in ("--set", f"{name}={value}")]
    output_of("train", config, "--schedule", tmp_path / "rest.yaml", "-o", tmp_path / "more", *changes)
    begun = tmp_path / "more/stage-0-initial/model.safetensors"
    assert begun.read_bytes() == (run / "stage-1-layer/model.safetensors").read_bytes()
    card = ModelCard(published.repos["tester/more"].files("main")["README.md"].decode())
    assert card.data.base_model == REPO

    message = error_of("eval", f"{REPO}@stage-9", *asked, tmp_path / "one")
    assert f"{REPO}@stage-9 is not a directory" in message and "from the Hub: Invalid rev id: stage-9" in message


def test_no_pickle_is_fetched_to_begin_with(finished, hub, tmp_path, error_of):
    config = (finished[0] / "stage-0-initial/config.json").read_bytes()
    hub.make("tester/old").commit("main", {"config.json": config, "pytorch_model.bin": b"a pickle"})
    message = error_of("train", finished[1], "-o", tmp_path / "run", "--set", "model={pretrained: tester/old}")
    assert "model.pretrained tester/old cannot be loaded" in message and "it must have safetensors" in message
    assert not any("pytorch_model.bin" in request for request in hub.requests) and not (tmp_path / "run").exists()


def test_a_moved_run_is_the_same_run(published, finished, api, tmp_path):
    moved = shutil.copytree(finished[0], tmp_path / "moved")
    assert not publish_stage(moved, 0, REPO, api=api)[0].is_new
