"""Stages of a two-rank launch are scored on the first rank, under DDP, ZeRO-3 and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slop_hf import RunDirectory

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCHERS = {
    "ddp": ("torch.distributed.run", "--nproc_per_node", "2", "--standalone"),
    **{
        kind: (
            *("accelerate.commands.launch", "--config_file", f"recipes/accelerate/cpu_{kind}.yaml"),
            *("--num_processes", "2", "--main_process_port", "0"),
        )
        for kind in ("zero3", "fsdp2")
    },
}
SHARED = ("torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "slop_hf")


def launch(*words):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"])
def test_stages_of_a_launch(kind, config, tmp_path, datasets_dir):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    script = HERE / "launched_stages.py"
    code, text = launch(*LAUNCHERS[kind], script, config, tmp_path / "run", datasets_dir)
    assert code == 0 and "was not evaluated" not in text, text[-4000:]
    run = RunDirectory(tmp_path / "run")
    for number, record in enumerate(run.records()):
        assert record.devices == 2
        metrics = {(one.task, one.when): one.metrics for one in run.evaluations(number)}
        assert metrics["perplexity", "end"]["loss"] == pytest.approx(record.eval_loss, rel=1e-5)
        assert 0 <= metrics["piqa", "end"]["acc"] <= 1
        if number:
            expected = pytest.approx(record.eval_loss_after_growth, rel=1e-5)
            assert metrics["perplexity", "after_growth"]["loss"] == expected and ("piqa", "after_growth") in metrics


def test_processes_share_perplexity_and_refuse_lm_eval_on_cpus(config, tmp_path, datasets_dir, output_of):
    output_of("train", config, "-o", tmp_path / "run")
    words = ("eval", tmp_path / "run", "--tasks", "perplexity", "--data", config, "--batch-size", 1)
    output_of(*words, "--cache-dir", tmp_path / "one")
    alone = [RunDirectory(tmp_path / "run").evaluations(number) for number in range(3)]
    code, text = launch(*SHARED, *words, "--cache-dir", tmp_path / "two", "--after-growth")
    assert code == 0, text[-4000:]
    for number, records in enumerate(alone):
        together = RunDirectory(tmp_path / "run").evaluations(number)[-1 if number == 0 else 0]
        assert together.metrics == pytest.approx(records[0].metrics, rel=1e-12)
    code, text = launch(*SHARED, "eval", tmp_path / "run", "--tasks", "piqa", "--datasets", datasets_dir)
    assert code and "only among several GPUs of one machine" in text, text[-4000:]
