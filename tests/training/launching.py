"""Launching `launched.py` with one rank or several, as a user launches a recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCHED = HERE / "launched.py"


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a launch."""

    code: int
    text: str


def command(kind: str, ranks: int, script: Path = LAUNCHED) -> list[str]:
    """Return the command of a launch: "plain" in one process, "ddp", or "zero3"."""
    python = [sys.executable, "-m"]
    if kind == "plain":
        return [sys.executable, str(script)]
    if kind == "ddp":
        return [*python, "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone", str(script)]
    config = ROOT / "recipes" / "accelerate" / "cpu_zero3.yaml"
    launch = [*python, "accelerate.commands.launch", "--config_file", str(config)]
    return [*launch, "--num_processes", str(ranks), "--main_process_port", "0", str(script)]


def environment() -> dict[str, str]:
    """Return the environment without variables of an earlier launch, or of a test in this process."""
    dropped = ("ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_")
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)}


def start(kind: str, ranks: int = 1, script: Path = LAUNCHED, **settings: Any) -> subprocess.Popen[str]:
    """Start a launch of a program with settings."""
    words = [*command(kind, ranks, script), json.dumps(settings, default=str)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(words, cwd=ROOT, env=environment(), text=True, **pipes)


def launch(kind: str, ranks: int = 1, seconds: float = 300, **settings: Any) -> Ended:
    """Run a launch to its end."""
    process = start(kind, ranks, **settings)
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        text, _ = process.communicate()
        raise AssertionError(f"the launch hangs:\n{text[-4000:]}") from None
    return Ended(process.returncode, text)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the ranks and their launcher at once; ranks have sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(process.pid)
        for member in [*launcher.children(recursive=True), launcher]:
            with suppress(psutil.NoSuchProcess):
                member.kill()


def weights(run: Path, stage: str) -> dict[str, Any]:
    """Return the weights of a stage, from one or several files."""
    tensors: dict[str, Any] = {}
    for path in sorted((run / stage).glob("model*.safetensors")):
        tensors |= load_file(path)
    return tensors


def largest_difference(one: Path, other: Path, stage: str = "stage-3-hidden") -> float:
    """Return the largest difference between the weights of the same stage of two runs."""
    a, b = weights(one, stage), weights(other, stage)
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).abs().max()) for name in a)
