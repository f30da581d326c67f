"""Stages published while a run trains: training neither waits for the Hub nor fails because of it."""

import json
import logging
import shutil
import threading
import time

import pytest
from huggingface_hub import HfApi
from published_runs import QUICK, write_config
from safetensors.torch import load_file

from slop_hf import PublishCallback, RunConfig, RunDirectory, build_trainer, publish_run
from slop_hf.errors import HubError, RunError
from slop_hf.io.units import format_significant
from slop_hf.training.callbacks import StageCallback

REPO = "tester/grown"
STAGES = ["stage-0-initial", "stage-1-layer", "stage-2-ffn"]


def trainer(config, output, publishing, **training):
    overrides = {f"training.{name}": value for name, value in {"push_to_hub": True, **training}.items()}
    return build_trainer(RunConfig.from_yaml(config, overrides), output, callbacks=[publishing])


def same_weights(one, other):
    for name in STAGES:
        a, b = (load_file(run / name / "model.safetensors") for run in (one, other))
        assert all(a[key].equal(b[key]) for key in a), name


def test_a_run_is_published_while_it_trains_over_a_failing_hub(finished, hub, tmp_path, output_of, caplog, capfd):
    run, config = finished
    for pattern, how, times in [
        ("POST /api/repos/create", 500, 1),
        (r"PUT /lfs/", "drop", 1),
        (r"POST .*/commit/stage-1", 429, 1),
        (r"GET .*/tree/stage-2", "drop", 1),
    ]:
        hub.fail(pattern, how, times)
    output = tmp_path / "run"
    asked = {"push_to_hub": "true", "hub_model_id": REPO, "hub_token": hub.token, "report_to": "tensorboard"}
    settings = [part for name, value in asked.items() for part in ("--set", f"training.{name}={value}")]
    with caplog.at_level(logging.DEBUG):
        printed = output_of("train", config, "-o", output, *settings)
    assert f"published to {REPO}: {', '.join(STAGES)}" in printed and "not published" not in printed
    assert not any(left for _, _, left in hub.failures)
    assert hub.repos[REPO].private
    assert [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]
    same_weights(run, output)

    said = printed + caplog.text + "".join(capfd.readouterr())
    files = [path.read_bytes() for path in output.rglob("*") if path.is_file()]
    sent = [content for one in hub.repos[REPO].commits.values() for content in one.values()]
    assert hub.token not in said and not any(hub.token.encode() in content for content in files + sent)


def test_scores_of_a_stage_are_published_with_it(finished, hub, tmp_path, output_of):
    _, config = finished
    asked = {
        "training.push_to_hub": "true",
        "training.hub_model_id": REPO,
        "evaluation.tasks": "perplexity",
        "evaluation.after_growth": "true",
    }
    changes = [part for name, value in asked.items() for part in ("--set", f"{name}={value}")]
    printed = output_of("train", config, "-o", tmp_path / "run", *changes)
    assert f"published to {REPO}: {', '.join(STAGES)}" in printed
    assert [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]
    for number, name in enumerate([*STAGES, "main"]):
        files = hub.repos[REPO].files(name)
        scored = json.loads(files["lineage.json"])["evaluations"]
        assert [(one["task"], one["when"]) for one in scored] == [
            ("perplexity", when) for when in (["after_growth", "end"] if number else ["end"])
        ]
        assert f"| perplexity | perplexity | {format_significant(scored[-1]['metrics']['perplexity'])} |" in (
            files["README.md"].decode()
        )


def test_publishing_callbacks_are_called_last(finished, tmp_path):
    calls = []

    class Listener(StageCallback):
        def __init__(self, publishes):
            self.publishes = publishes

        def on_stage_written(self, run, stage, ranks):
            calls.append((stage, self.publishes))

    run_config = RunConfig.from_yaml(finished[1])
    build_trainer(run_config, tmp_path / "run", callbacks=[Listener(True), Listener(False)]).train()
    assert calls == [(0, False), (0, True), (1, False), (1, True), (2, False), (2, True)]


def test_unsent_stages_are_kept_and_sent_later(finished, hub, api, tmp_path):
    run, config = finished
    hub.fail(r"POST .*/commit/stage-1", 403, 100)
    publishing = PublishCallback(REPO, api=api, retries=QUICK)
    trainer(config, tmp_path / "run", publishing).train()
    summary = publishing.finish()
    assert RunDirectory(tmp_path / "run").is_finished
    same_weights(run, tmp_path / "run")
    assert f"published to {REPO}: {STAGES[0]}, {STAGES[2]}" in summary
    assert f"not published: {STAGES[1]} (" in summary and "no permission (403)" in summary
    assert hub.repos[REPO].files(STAGES[1]).keys() == {".gitattributes"}

    hub.failures.clear()
    again = PublishCallback(REPO, api=api, retries=QUICK)
    with again:
        trainer(config, tmp_path / "run", again).train(resume_from_checkpoint=True)
    assert not again.failed and sorted(again.published) == [0, 1, 2]
    assert [branch for branch, _ in hub.repos[REPO].messages] == [STAGES[0], STAGES[2], "main", STAGES[1]]
    assert not any(one.is_new for one in publish_run(tmp_path / "run", REPO, api=api))


def test_training_does_not_wait_for_the_hub(finished, hub, api, tmp_path, monkeypatch):
    _, config = finished
    release, commit = threading.Event(), HfApi.create_commit
    monkeypatch.setattr(HfApi, "create_commit", lambda *args, **kwargs: (release.wait(60), commit(*args, **kwargs))[1])
    publishing = PublishCallback(REPO, api=api, retries=QUICK, patience=0.05)
    trainer(config, tmp_path / "run", publishing).train()
    assert RunDirectory(tmp_path / "run").is_finished and not hub.repos[REPO].messages
    assert f"not published: {STAGES[0]} (still being sent)" in publishing.finish()
    release.set()
    publishing.patience = 30
    assert "not published" not in publishing.finish()
    assert [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]


def test_an_unreachable_hub_stops_nothing(finished, tmp_path):
    run, config = finished
    publishing = PublishCallback(REPO, api=HfApi("http://127.0.0.1:9", token="hf_x"), retries=QUICK)
    trainer(config, tmp_path / "run", publishing).train()
    same_weights(run, tmp_path / "run")
    summary = publishing.finish()
    assert f"published to {REPO}: nothing" in summary and summary.count("cannot be reached") == 3


def test_stages_are_sent_once_when_the_hub_can_be_reached_again(finished, hub, api, tmp_path, monkeypatch):
    _, config = finished
    list_files, is_down = HfApi.list_repo_files, threading.Event()
    is_down.set()

    def list_if_up(*args, **kwargs):
        if is_down.is_set():
            raise ConnectionError("no route to the Hub")
        return list_files(*args, **kwargs)

    monkeypatch.setattr(HfApi, "list_repo_files", list_if_up)
    publishing = PublishCallback(REPO, api=api, retries=QUICK)
    trainer(config, tmp_path / "run", publishing).train()
    assert publishing.finish().count("cannot be reached") == 3 and sorted(publishing.failed) == [0, 1, 2]
    is_down.clear()
    assert "not published" not in publishing.finish() and not publishing.failed
    publishing.finish()
    assert [branch for branch, _ in hub.repos[REPO].messages] == [*STAGES, "main"]


def test_an_error_in_training_is_not_held_up(hub, api, tmp_path):
    publishing = PublishCallback(REPO, api=api, retries=QUICK)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), publishing:
        trainer(write_config(tmp_path), tmp_path / "run", publishing)
        raise ZeroDivisionError
    assert time.monotonic() - began < 30 and not hub.repos


def test_a_run_that_had_finished_is_published_at_the_end(finished, hub, api, tmp_path):
    run, config = shutil.copytree(finished[0], tmp_path / "run"), finished[1]
    publishing = PublishCallback(REPO, api=api, retries=QUICK, strategy="end")
    trainer(config, run, publishing).train(resume_from_checkpoint=True)
    assert not publishing.published
    publishing.finish()
    assert sorted(publishing.published) == [0, 1, 2]
    with pytest.raises(HubError, match="are published, no checkpoints; expected one of every_save, end"):
        PublishCallback.from_arguments({"hub_strategy": "checkpoint"})


def test_the_trainer_itself_pushes_nothing(finished, tmp_path):
    _, config = finished
    with pytest.raises(RunError, match=r"give callbacks=\[PublishCallback"):
        build_trainer(RunConfig.from_yaml(config, {"training.push_to_hub": True}), tmp_path / "run")
    with pytest.raises(RunError, match="the trainer pushes nothing itself"):
        build_trainer(RunConfig.from_yaml(config), tmp_path / "run").push_to_hub()
