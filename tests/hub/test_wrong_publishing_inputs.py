"""Wrong names, odd answers and missing networks in Python: refused or outlasted, with the reason, never silently."""

from __future__ import annotations

import json
import logging
import re
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from published_runs import QUICK

from slop_hf import PublishCallback, fetch_stage, plan_revision, publish_run, publish_stage
from slop_hf.data import load_tokenizer
from slop_hf.errors import DataError, HubError, RunError
from slop_hf.io.hub_address import Address, check_repository, locate
from slop_hf.io.hub_client import LONGEST_CLIENT_WAIT
from slop_hf.io.retry import RetryPolicy

REPO = "tester/grown"
FFN = "stage-2-ffn"
NOBODY = "http://127.0.0.1:9"

# Names

NAMES = [
    "",
    "/",
    "me/",
    "/name",
    "me/x/y",
    "me/bad name",
    "me/ü",
    "me/a--b",
    "me/a..b",
    "me/-a",
    "me/a-",
    "me/.a",
    "me/a.",
    "me/a.git",
    "me/name@main",
    "https://huggingface.co/me/name",
    "me/" + "x" * 97,
    "../run",
    "me\\name",
    "me/a\n",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_name_of_a_repository_is_refused(name: str, tmp_path) -> None:
    for call in (
        lambda: check_repository(name),
        lambda: publish_run(tmp_path, name),
        lambda: publish_stage(tmp_path, 0, name),
        lambda: plan_revision(tmp_path, 0, name),
        lambda: PublishCallback(name),
    ):
        with pytest.raises(HubError, match="is not a valid repository name: expected user/name"):
            call()


@pytest.mark.parametrize("name", ["name", "me/name", "Me_1/n.a-m_e.v2", "0/1", "_a/b_", "me/" + "x" * 93])
def test_a_right_name_is_accepted(name: str) -> None:
    from huggingface_hub.utils import validate_repo_id

    assert check_repository(name) == name
    validate_repo_id(name)


@pytest.mark.parametrize("name", [*NAMES[1:16], "me"])
def test_a_dry_run_refuses_the_names_that_the_hub_would(name: str, tmp_path, error_of) -> None:
    assert "expected user/name" in error_of("publish", tmp_path, "--to", name, "--dry-run")


ADDRESSES = ["", " ", "a b", "user/name@", "@main", "a/b/c", "a/b@c d", "user/name@main@main", "./run", "/no/such/run"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_wrong_address_is_refused(address: str) -> None:
    with pytest.raises(HubError, match="is not an address on the Hub: expected user/name"):
        Address.parse(address)
    with pytest.raises(HubError):
        fetch_stage(address)
    assert locate(address) == {"pretrained_model_name_or_path": address}


def test_a_local_directory_is_no_published_stage(finished, hub, tmp_path, error_of, monkeypatch) -> None:
    run, config = finished
    monkeypatch.chdir(run.parent)
    for place in (run / FFN, f"{run.name}/{FFN}"):
        message = error_of("train", config, "--from", place, "-o", tmp_path / "more")
        assert "is a local path, not a published stage" in message and "set model.pretrained" in message
    assert not hub.requests


@pytest.mark.parametrize("number", [-1, 3, 7])
def test_a_stage_that_has_not_finished_is_refused(number: int, finished, hub) -> None:
    for publish in (publish_stage, lambda run, number, repo: publish_run(run, repo, stages=[number])):
        with pytest.raises(RunError, match="choose one from 0 to 2"):
            publish(finished[0], number, REPO)
    assert not hub.requests


# Answers


def answer_html(handler) -> None:
    handler.answer(200, b"<html>Log in to the hotel's network</html>", Content_Type="text/html")


def refuse_objects(handler) -> None:
    objects = json.loads(handler.body)["objects"]
    for number, one in enumerate(objects):
        one["error"] = {"code": 500, "message": f"storage node {number} is down"}
    handler.answer(200, {"transfer": "basic", "objects": objects})


ODD_ANSWERS = {
    "page instead of a repository": ("POST /api/repos/create", answer_html, "did not answer in JSON"),
    "page instead of a commit": (r"POST .*/commit/", answer_html, "did not answer in JSON"),
    "page instead of a batch": (r"POST .*/lfs/objects/batch", answer_html, "did not answer in JSON"),
    "page instead of files": (r"GET .*/tree/", answer_html, "did not answer in JSON"),
    "errors per object": (r"POST .*/lfs/objects/batch", refuse_objects, "storage node 0 is down"),
    "no objects": (r"POST .*/lfs/objects/batch", lambda handler: handler.answer(200, {}), "Malformed response"),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_odd_answer_is_outlasted(name: str, finished, hub, api) -> None:
    pattern, answer, _ = ODD_ANSWERS[name]
    hub.fail(pattern, answer, 2)
    (published,) = publish_stage(finished[0], 0, REPO, api=api, retries=QUICK)
    assert published.is_new and not any(left for _, _, left in hub.failures)


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_odd_answer_for_good_is_explained(name: str, finished, hub, api) -> None:
    pattern, answer, reason = ODD_ANSWERS[name]
    hub.fail(pattern, answer, 100)
    with pytest.raises(HubError, match=reason) as caught:
        publish_stage(finished[0], 0, REPO, api=api, retries=RetryPolicy(attempts=2, first_wait=0.0))
    assert len(str(caught.value).splitlines()) <= 2 and len(str(caught.value)) < 600


REASONS = [
    ({"error": ["first fault", "second fault"]}, ["first fault; second fault"]),
    ({"errors": [{"message": "no license"}, {"message": "no name"}]}, ["no license; no name"]),
    ({"error": "see https://s3/x?X-Amz-Signature=secret with Bearer secret"}, ["see https://s3/x with Bearer ..."]),
    ({"error": "hf_secretToken is not valid"}, ["hf_ ... is not valid"]),
    ({}, ["Bad request for commit endpoint"]),
    ({"error": "x" * 5000}, ["xxx …"]),
]


@pytest.mark.parametrize(("content", "shown"), REASONS)
def test_the_reason_of_a_refusal_is_kept(content, shown, finished, hub, api) -> None:
    hub.fail(r"POST .*/commit/", lambda handler: handler.answer(400, content), 100)
    with pytest.raises(HubError) as caught:
        publish_stage(finished[0], 0, REPO, api=api, retries=QUICK)
    message = str(caught.value)
    assert all(part in message for part in shown), message
    assert "secret" not in message and len(message) < 600 and len(message.splitlines()) <= 2


# Waits


@pytest.fixture
def waits(hub, monkeypatch) -> list[float]:
    """The waits of this process, which are not waited."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def count_lines_about_waits(caplog) -> int:
    return sum(bool(re.search(r"\bin [\d.]+ s$", message)) for message in caplog.messages)


@pytest.mark.parametrize("pattern", ["POST /api/repos/create", r"GET .*/tree/", r"POST .*/preupload/", r"PUT /lfs/"])
@pytest.mark.parametrize("asked", ["3600", "999999999"])
def test_every_wait_is_bounded_and_logged(pattern, asked, finished, hub, api, waits, caplog) -> None:
    hub.fail(pattern, lambda handler: handler.answer(429, {"error": "slow down"}, Retry_After=asked), 1000)
    with caplog.at_level(logging.WARNING), pytest.raises(HubError, match="slow down"):
        publish_stage(finished[0], 0, REPO, api=api, retries=RetryPolicy(attempts=3))
    files = 2  # sent at once, and the client repeats each up to five times
    assert waits and max(waits) <= 300.0 and sum(waits) <= 2 * 300 + 3 * files * 5 * LONGEST_CLIENT_WAIT
    assert count_lines_about_waits(caplog) == len(waits) == len(caplog.messages)
    assert not any(re.search(r"https?://\S*[?@]", message) for message in caplog.messages), (
        "URLs without what is secret"
    )


@pytest.mark.parametrize("what", ["publish", "fetch", "tokenizer"])
def test_without_a_network_the_reason_comes_at_once(what, finished, hub, waits, caplog, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOBODY)
    resolve = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", NOBODY + resolve)
    api = HfApi(NOBODY, token="hf_x")
    calls = {
        "publish": lambda: publish_run(finished[0], REPO, api=api),
        "fetch": lambda: fetch_stage(f"{REPO}@main", api),
        "tokenizer": lambda: load_tokenizer("tester/tokenizer"),
    }
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises((HubError, DataError), match=r"cannot be reached \(.*refused"),
    ):
        calls[what]()
    assert sum(waits) <= 10.0 and count_lines_about_waits(caplog) == len(waits)
    assert len(caplog.messages) <= 5


def test_offline_mode_is_not_waited_for(finished, hub, api, waits, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        publish_run(finished[0], REPO, api=api)
    assert not waits


def test_the_client_repeats_requests_again_after_a_read(hub) -> None:
    from huggingface_hub.utils import http_backoff

    with pytest.raises(DataError):
        load_tokenizer("tester/missing")
    assert http_backoff.__kwdefaults__["max_retries"] > 0


# Publishing and fetching


def test_publish_run_publishes_when_it_is_called(finished, hub, api) -> None:
    reported: list[str] = []
    published = publish_run(finished[0], REPO, api=api, report=lambda one: reported.append(str(one.address)))
    assert reported == [str(one.address) for one in published] and len(reported) == 4
    assert [branch for branch, _ in hub.repos[REPO].messages] == [one.address.revision for one in published]


def test_wrong_bytes_are_fetched_again_once(finished, hub, api, caplog) -> None:
    publish_run(finished[0], REPO, api=api)
    path = fetch_stage(f"{REPO}@{FFN}", api).path / "model.safetensors"
    right = path.read_bytes()
    path.resolve().write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    with caplog.at_level(logging.WARNING):
        assert (fetch_stage(f"{REPO}@{FFN}", api).path / "model.safetensors").read_bytes() == right
    assert "fetching them again" in caplog.text


def test_a_missing_token_is_reported_when_training_begins(hub, tmp_path, caplog) -> None:
    publishing = PublishCallback(REPO, api=HfApi(hub.endpoint, token=False), retries=QUICK)
    publishing.on_train_begin(SimpleNamespace(process_index=0, output_dir=str(tmp_path)), None, None)
    deadline = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "stages cannot be published yet" in caplog.text and "log in with" in caplog.text
