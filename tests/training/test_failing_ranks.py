"""One rank of a launch fails or is stopped: the others end soon, and the reason is said once."""

import time

import pytest
import torch.distributed as dist
from launching import launch_forked
from training_runs import BATCH

from slop_hf import RunDirectory
from slop_hf.errors import OtherRankError, RunError
from slop_hf.training import ranks as ranks_module
from slop_hf.training.launch import guard_exit
from slop_hf.training.ranks import Ranks

REASON = "a key that is not there"


def test_an_error_of_any_kind_on_one_rank_ends_the_launch(tmp_path):
    """In the middle of a step, in which the other rank waits for gradients."""
    began = time.monotonic()
    ended = launch_forked("ddp", 2, output=tmp_path / "out", batch=BATCH // 2, at={2: "raise"}, on=1)
    assert ended.code == 1 and ended.text.count(f"KeyError: '{REASON}'") == 1, ended.text
    assert ended.text.count("Traceback") == 1, ended.text
    assert time.monotonic() - began < 180, "the other rank waits until the backend's own timeout"
    assert RunDirectory(tmp_path / "out").finished_stages == 0


def test_an_error_in_a_save_on_one_rank_ends_the_launch(tmp_path):
    """The other rank waits for the first one's answer."""
    began = time.monotonic()
    ended = launch_forked("ddp", 2, output=tmp_path / "out", batch=BATCH // 2, at={2: "raise in save"}, on=1)
    assert ended.code == 1 and ended.text.count(f"KeyError: '{REASON}'") == 1, ended.text
    assert ended.text.count("Traceback") == 1, ended.text
    assert time.monotonic() - began < 60
    assert RunDirectory(tmp_path / "out").finished_stages == 0
    assert not list(tmp_path.rglob("*.writing"))


def test_ctrl_c_on_one_rank_stops_all(tmp_path):
    ended = launch_forked("ddp", 2, output=tmp_path / "out", batch=BATCH // 2, at={2: "ctrl-c"}, on=1)
    assert ended.text.count("stopped at step 3 of 32, in stage-0-initial, with its state saved") == 1, ended.text
    assert ended.code == 130 and "Traceback" not in ended.text, ended.text
    run = RunDirectory(tmp_path / "out")
    assert (run.running_dir(0) / "checkpoint-3").is_dir()


class Gathered(Ranks):
    """The second of two ranks; the first one has an error, or none."""

    def gather_all(self, value):
        return ["DataError: no such file", value]


def test_errors_of_ranks(capsys, monkeypatch):
    """The failing rank raises its own error, whatever it is; the others end in silence if they share its machine."""
    ranks = Gathered(1, 2)
    with pytest.raises(ZeroDivisionError), ranks.raise_on_all():
        raise ZeroDivisionError
    with pytest.raises(OtherRankError, match="rank 0 failed: DataError: no such file"), ranks.raise_on_all():
        pass


@pytest.mark.parametrize(
    ("caught", "launched", "code", "said"),
    [
        (KeyboardInterrupt(), False, 130, ""),
        (KeyboardInterrupt(), True, 130, ""),
        (RunError("no space"), False, None, ""),
        (RunError("no space"), True, 2, "error: no space"),
        (OtherRankError(0, "RunError: no space"), True, 2, ""),
        (OtherRankError(8, "RunError: no space"), True, 2, "error: rank 8 failed: RunError: no space"),
        (RuntimeError("[pair.cc:1] Connection closed by peer [::1]"), True, 1, "rank 0 lost its connection"),
        (KeyError("x"), True, None, ""),
    ],
)
def test_ends_of_a_program(monkeypatch, capsys, caught, launched, code, said):
    limits = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *_, **settings: limits.append(settings))
    if launched:
        for name, value in {"WORLD_SIZE": 16, "LOCAL_WORLD_SIZE": 8, "RANK": 0, "LOCAL_RANK": 0}.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(SystemExit if code else type(caught)) as ended, guard_exit():
        raise caught
    assert code is None or ended.value.code == code
    assert said in capsys.readouterr().err and len(limits) == launched


def test_ranks_wait_longer_than_a_collective_would(monkeypatch, caplog):
    """And say once a minute what for."""
    store, clock = dist.HashStore(), iter(range(0, 10_000, 50))
    monkeypatch.setattr(ranks_module, "_get_default_store", lambda: store)
    monkeypatch.setattr(ranks_module, "_waits", iter([7]))
    monkeypatch.setattr(ranks_module.time, "monotonic", lambda: next(clock))
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 4:
            store.add("slop-hf/wait-7", 1)  # the first rank arrives

    monkeypatch.setattr(ranks_module.time, "sleep", sleep)
    Ranks(1, 2).wait_without_timeout("to prepare the data")
    assert len(pauses) == 4
    assert "rank 1 waits for others to prepare the data: 1 of 2 are ready (1 min so far)" in caplog.text


def test_only_the_first_rank_prepares_data_that_cannot_be_read(monkeypatch):
    """The others hear of it, and do not try."""
    from slop_hf.training import config as module

    prepared = []
    monkeypatch.setattr(module, "prepare_data", prepared.append)
    monkeypatch.setattr(Ranks, "wait_without_timeout", lambda *_: None)
    with pytest.raises(OtherRankError, match="rank 0 failed: DataError"):
        module._prepare_data_in_turn("data", Gathered(1, 2))
    assert not prepared
