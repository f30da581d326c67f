"""Launching `launched.py` with one rank or several, as a user launches a recipe."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import launched
import psutil
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCHED = HERE / "launched.py"
#: What ranks import sooner or later; `torch._inductor` and `networkx` are imported by ZeRO-3's first step.
PRELOADED = [
    "before_imports",
    "launched",
    "launched_evaluation",
    "slop_hf.training.zero3",
    "torch._inductor.compile_fx",
    "networkx",
]


@dataclass(frozen=True)
class Ended:
    """Exit code and output of a launch."""

    code: int
    text: str


def command(kind: str, ranks: int, script: Path = LAUNCHED) -> list[str]:
    """Return the command of a launch: "plain" in one process, "ddp", "zero3", or "fsdp2"."""
    python = [sys.executable, "-m"]
    if kind == "plain":
        return [sys.executable, str(script)]
    if kind == "ddp":
        return [*python, "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone", str(script)]
    config = ROOT / "recipes" / "accelerate" / f"cpu_{kind}.yaml"
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


def launch_forked(kind: str, ranks: int = 1, seconds: float = 300, **settings: Any) -> Ended:
    """Run a launch without a launcher to its end."""
    forked = ForkedLaunch(kind, ranks, **settings)
    return Ended(forked.wait(seconds), forked.text)


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


class ForkedLaunch:
    """A launch whose ranks are forked from a process that has imported everything: they begin in a tenth of the time.

    Like a launcher, `wait` stops the others if one rank fails.
    """

    _context = get_context("forkserver")
    _context.set_forkserver_preload(PRELOADED)

    def __init__(
        self, kind: str, ranks: int = 1, main: Callable[[dict[str, Any]], None] = launched.main, **settings: Any
    ) -> None:
        self._log = Path(f"{settings['output']}.log")
        words = json.loads(json.dumps(settings, default=str))
        self._processes = [
            self._context.Process(target=launched.run_rank, args=(one, main, words, str(self._log)))
            for one in _list_environments(kind, ranks)
        ]
        for process in self._processes:
            process.start()

    @property
    def is_alive(self) -> bool:
        """Whether all ranks live."""
        return all(process.is_alive() for process in self._processes)

    @property
    def is_killed(self) -> bool:
        """Whether a rank has been killed."""
        return any(process.exitcode == -signal.SIGKILL for process in self._processes)

    @property
    def text(self) -> str:
        """The end of what the ranks of all launches into this directory have printed."""
        return self._log.read_text()[-4000:]

    def kill(self) -> None:
        """SIGKILL to all ranks at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def wait(self, seconds: float = 120) -> int:
        """Return the exit code of the first rank that failed, or 0, when all have ended."""
        deadline = time.monotonic() + seconds
        waiting, code = list(self._processes), 0
        while waiting and time.monotonic() < deadline:
            wait([process.sentinel for process in waiting], timeout=1)
            codes = [abs(process.exitcode or 0) for process in self._processes]
            if code == 0 and any(codes):
                code = max(codes)
                for process in waiting:
                    process.terminate()
            waiting = [process for process in waiting if process.is_alive()]
        if waiting:
            self.kill()
            raise AssertionError(f"the launch hangs:\n{self.text}")
        return code


def _list_environments(kind: str, ranks: int) -> list[dict[str, str]]:
    """Return what a launcher sets for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if kind == "plain":
        return [{}]
    if kind == "zero3":
        shared |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_CONFIG_DS_FIELDS": "deepspeed_config_file,zero3_init_flag",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": ROOT / "recipes" / "accelerate" / "zero3.json",
        }
    if kind == "fsdp2":
        shared |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        }
    each = ({**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks))
    return [{name: str(value) for name, value in one.items()} for one in each]
