"""The Slurm script, on a stand-in for a cluster made of a few lines of bash."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "accelerate" / "slurm.sh"

# A rank that handles SIGTERM like a training process; the launcher starts it.
RANK = """
import pathlib, signal, sys, time
log = pathlib.Path(sys.argv[1])
def save(*_):
    (log / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(log / "training").touch()
time.sleep(float(sys.argv[2]))
"""
PROGRAMS = {
    "srun": 'SLURM_NODEID=0 "$@" & echo $! > "$LOG/task"; wait $!',
    "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" > "$LOG/calls"; fi',
    "accelerate": 'printf "%s\\n" "$@" > "$LOG/arguments"; "$PYTHON" "$LOG/rank.py" "$LOG" "$LASTING"; exit $CODE',
    "python": "exit $UNFINISHED",
}


@pytest.fixture
def submit(tmp_path):
    """Start the script as Slurm does, and return the process; what it called is recorded in `tmp_path`."""
    (tmp_path / "rank.py").write_text(RANK)
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def start(*arguments, seconds=0, code=0, unfinished=0):
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "LOG": str(tmp_path),
            "LASTING": str(seconds),
            "CODE": str(code),
            "UNFINISHED": str(unfinished),
            "SLURM_JOB_ID": "41234",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "4",
        }
        return subprocess.Popen(["bash", SCRIPT, *arguments], env=environment, stderr=subprocess.PIPE, text=True)

    return start


def test_it_is_valid_bash():
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_launcher_gets_ranks_and_addresses(submit, tmp_path):
    job = submit("runs/a b", "--set", "model={pretrained: some/model}")
    assert job.wait(30) == 0
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == [
        *("launch", "--config_file", "recipes/accelerate/multi_node_zero3.yaml"),
        *("--num_machines", "2", "--num_processes", "8", "--machine_rank", "0"),
        *("--main_process_ip", "node1", "--main_process_port", "21234"),
        *("recipes/grow_1b.py", "--output-dir", "runs/a b", "--resume"),
        *("--set", "model={pretrained: some/model}"),
    ]
    assert not (tmp_path / "calls").exists()


def test_before_the_time_limit_it_saves_and_is_requeued(submit, tmp_path):
    """SIGTERM reaches the rank; the launcher, which would kill the rank, ignores it."""
    job = submit("runs/a", seconds=60, unfinished=1)
    deadline = time.monotonic() + 30
    while not (tmp_path / "training").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    task = int((tmp_path / "task").read_text())
    subprocess.run(["pkill", "-TERM", "-P", str(task)], check=True)
    os.kill(task, signal.SIGTERM)
    assert job.wait(30) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "calls").read_text() == "requeue 41234\n"


def test_a_failed_run_is_not_requeued(submit, tmp_path):
    assert submit("runs/a", code=3, unfinished=1).wait(30) == 3
    assert not (tmp_path / "calls").exists()


def test_the_run_directory_is_required(submit):
    job = submit()
    assert job.wait(30) != 0 and "missing the run directory" in job.stderr.read()
