"""Growth on disk with damaged sources, full disks, errors and kills: clear errors, targets complete or absent."""

import _thread
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from saved_models import assert_same, change, in_the_open, load, save

from slop_hf import GrowthStage, ModelDims, grow_checkpoint, grow_model, plan_checkpoint_growth
from slop_hf.errors import ArchitectureError, GrowthError
from slop_hf.growth import checkpoint, safetensors_io


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda t: t.pop("model.norm.weight"), r"has no model.norm.weight, unlike the axis table"),
        (lambda t: t.update(extra=torch.ones(1)), "has a tensor extra, unlike the axis table"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(33)}),
            r"has shape \[33\], but config.json makes it \[32\]",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).int()}), "has dtype I32, expected one of F64, F32"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}), "has dtype F8_E4M3"),
    ],
)
def test_unexpected_tensors_are_refused(source, tmp_path, edit, fault):
    change(source, edit)
    with pytest.raises(GrowthError, match=fault):
        grow_checkpoint(source, tmp_path / "grown", "ffn", 64)
    assert in_the_open(tmp_path) == ["source"]


@pytest.mark.parametrize(
    ("file", "damage", "fault"),
    [
        ("model.safetensors.index.json", None, r"has shards but no model.safetensors.index.json"),
        ("model.safetensors.index.json", b"{", "is not an index"),
        ("model-00002-of-00005.safetensors", None, "has no model-00002-of-00005.safetensors, a shard"),
        ("model-00002-of-00005.safetensors", lambda old: old[:-100], "model-00002-of-00005.safetensors is truncated"),
        ("model-00002-of-00005.safetensors", lambda old: old[:4], "is truncated or corrupt: its header would take"),
        ("model-00002-of-00005.safetensors", lambda old: old[:8] + b"x" + old[9:], "header is not valid"),
        ("config.json", None, "is not a model directory: it has no config.json"),
        ("config.json", b"{", "is not a checkpoint that transformers can read"),
        (
            "config.json",
            b'{"model_type": "llama", "hidden_size": "wide"}',
            "is not a checkpoint that transformers can",
        ),
        ("config.json", b'{"model_type": "no-such-family"}', "is not a checkpoint that transformers can read"),
    ],
)
def test_damaged_sources_are_refused(sharded, tmp_path, file, damage, fault):
    path = sharded / file
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    with pytest.raises(GrowthError, match=fault) as caught:
        grow_checkpoint(sharded, tmp_path / "grown", "ffn", 64)
    assert len(str(caught.value).splitlines()) <= 2 and in_the_open(tmp_path) == ["source"]


def test_invalid_requests(source, tmp_path, monkeypatch):
    target = tmp_path / "grown"
    with pytest.raises(GrowthError, match="exists already"):
        grow_checkpoint(source, source, "ffn", 64)
    with pytest.raises(GrowthError, match="there is no such directory"):
        grow_checkpoint(tmp_path / "none", target, "ffn", 64)
    with pytest.raises(GrowthError, match="could be downloaded from the Hub"):  # tests are offline
        grow_checkpoint("nobody/no-such-model", target, "ffn", 64)
    for operator in ([], ["ffn"], None, 5):
        with pytest.raises(GrowthError, match="operator must be a name, a GrowthStage or several"):
            grow_checkpoint(source, target, operator, 64)
    with pytest.raises(GrowthError, match="brings its own dims"):
        grow_checkpoint(source, target, [GrowthStage(("ffn",), ModelDims(32, 80, 2, 4))], 64)
    with pytest.raises(GrowthError, match="max_shard_size must be"):
        grow_checkpoint(source, target, "ffn", 64, max_shard_size="large")
    (source / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(ArchitectureError, match="no axis table"):
        grow_checkpoint(source, target, "ffn", 64)
    assert in_the_open(tmp_path) == ["source"]


def test_a_full_disk(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_io, "allocate_space", full)
    with pytest.raises(GrowthError, match=r"model.safetensors: No space left on device; free some space"):
        grow_checkpoint(source, tmp_path / "grown", "ffn", 64)
    monkeypatch.setattr(checkpoint, "_count_free_bytes", lambda target: 1000)
    with pytest.raises(GrowthError, match=r"takes \S+ kB, but its disk has 1 kB free"):
        plan_checkpoint_growth(source, tmp_path / "grown", "ffn", 64)
    assert in_the_open(tmp_path) == ["source"]


@pytest.fixture
def small_disk(tmp_path):
    path = tmp_path / "disk"
    path.mkdir()
    if shutil.which("mount") is None or os.geteuid():
        pytest.skip("mounting a small disk takes root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.parametrize("reserves", [True, False])
def test_a_small_disk(source, small_disk, monkeypatch, reserves):
    with pytest.raises(GrowthError, match=r"takes [\d.]+ MB, but its disk has 8\.\d+ MB free"):
        grow_checkpoint(source, small_disk / "grown", "ffn", 30_000)
    monkeypatch.setattr(checkpoint, "_count_free_bytes", lambda target: 10**12)
    if not reserves:  # then the disk is full in the middle of the work
        monkeypatch.setattr(
            safetensors_io, "allocate_space", lambda descriptor, nbytes: os.truncate(descriptor, nbytes)
        )
    with pytest.raises(GrowthError, match="No space left on device; free some space"):
        grow_checkpoint(source, small_disk / "grown", "ffn", 30_000)
    assert in_the_open(small_disk) == []
    grow_checkpoint(source, small_disk / "grown", "ffn", 64)
    assert_same(small_disk / "grown", grow_model(load(source), "ffn", 64))


@pytest.mark.parametrize("fault", [RuntimeError("in a thread"), MemoryError()])
def test_an_error_in_a_thread_leaves_nothing(sharded, tmp_path, monkeypatch, fault):
    def fail(*arguments):
        raise fault

    monkeypatch.setattr(checkpoint, "grow_parameter", fail)
    with pytest.raises(type(fault)):
        grow_checkpoint(sharded, tmp_path / "grown", "ffn", 64)
    assert in_the_open(tmp_path) == ["source"]


def test_an_interrupt_leaves_nothing(sharded, tmp_path, monkeypatch):
    made = []

    def interrupt(tensor, plan, out):
        made.append(plan.name)
        _thread.interrupt_main()
        time.sleep(0.2)
        return out

    monkeypatch.setattr(checkpoint, "grow_parameter", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            grow_checkpoint(sharded, tmp_path / "grown", "ffn", 64, threads=2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert in_the_open(tmp_path) == ["source"] and len(made) < 10


KILLER = """
import os, random, signal, sys, time
import torch
from slop_hf import grow_checkpoint
from slop_hf.growth.checkpoint import grow_parameter

source, target, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
random.seed(int(sys.argv[4]))

def grow():
    grow_checkpoint(source, target, "layer", 24, init="preserving", max_shard_size="2MB", progress=False)

def attempt(limit):  # no thread runs in this process, so it can be forked
    began = time.perf_counter()
    if not (child := os.fork()):
        grow()
        os._exit(0)
    if limit is not None:
        time.sleep(limit)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.perf_counter() - began

seconds = attempt(None)
for number in range(kills):
    os.rename(target, f"{target}-{number}") if os.path.exists(target) else None
    attempt(random.uniform(0.05, 1.05) * seconds)
"""


@pytest.mark.slow
def test_a_killed_growth_is_complete_or_absent(tmp_path):
    source = save(tmp_path / "source", dims=ModelDims(128, 384, 4, 4), dtype=torch.bfloat16)
    target = tmp_path / "grown"
    subprocess.run([sys.executable, "-c", KILLER, source, target, "10", str(time.time_ns())], check=True)
    first = min(path.name for path in (tmp_path / "grown-0").glob("model-*"))
    complete = load_file(tmp_path / "grown-0" / first)
    for path in tmp_path.glob("grown*"):
        assert in_the_open(path) == in_the_open(tmp_path / "grown-0")
        again = load_file(path / first)
        assert all(torch.equal(again[name], complete[name]) for name in complete)
    (tmp_path / ".grown.writing").mkdir(exist_ok=True)
    (tmp_path / ".grown.writing" / "leftover").write_text("of a killed run")
    shutil.rmtree(target, ignore_errors=True)
    grow_checkpoint(source, target, "layer", 24, init="preserving", max_shard_size="2MB")
    assert not (tmp_path / ".grown.writing").exists() and not (target / "leftover").exists()
    assert_same(target, grow_model(load(source), "layer", 24, init="preserving"))
