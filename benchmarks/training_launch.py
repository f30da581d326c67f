"""Measured functions in new processes: one, or the ranks of a launch. This file is also the program that they run.

Unlike for growth, a fork is not enough here: ranks are launched, and OpenMP and CUDA do not survive a fork.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
#: The configurations that users launch, by strategy.
LAUNCHES = {name: ROOT / f"recipes/accelerate/cpu_{name}.yaml" for name in ("zero3", "fsdp2")}
#: Environment variables of an earlier launch that would affect this one.
_OF_LAUNCHES = ("ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMP_NUM_THREADS")

Record = dict[str, Any]


@dataclass
class Launched:
    """Running processes of a task.

    Args:
        process: the process, or the launcher of the ranks.
        directory: directory where each rank writes its result.
        log: file with the output.
        ranks: number of ranks.
    """

    process: subprocess.Popen[bytes]
    directory: tempfile.TemporaryDirectory[str]
    log: Path
    ranks: int

    def wait(self, seconds: float = 540) -> list[Record]:
        """Wait for the end, and return the result of each rank.

        Raises:
            RuntimeError: if the task fails or takes longer, with the end of its output.
        """
        try:
            with self.directory as directory:
                try:
                    code: int | str = self.process.wait(seconds)
                except subprocess.TimeoutExpired:
                    code = f"no end after {seconds:.0f} s"
                files = [Path(directory, f"{rank}.json") for rank in range(self.ranks)]
                if code or not all(file.exists() for file in files):
                    text = self.log.read_text(encoding="utf-8", errors="replace")
                    raise RuntimeError(f"a measured process failed ({code}):\n{text[-3000:]}")
                return [json.loads(file.read_text()) for file in files]
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the launcher and its ranks."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(
    task: str,
    settings: Mapping[str, Any],
    *,
    ranks: int = 1,
    strategy: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Launched:
    """Start a function in new processes.

    Args:
        task: `module.function` in this directory; it returns plain data.
        settings: arguments of the function.
        ranks: number of processes, if a strategy shards the model.
        strategy: key of `LAUNCHES`; None starts one process, without a launcher.
        environment: more environment variables.
    """
    directory = tempfile.TemporaryDirectory(prefix="training-benchmark-")
    words = [sys.executable]
    if strategy is not None:
        words += ["-m", "accelerate.commands.launch", "--config_file", str(LAUNCHES[strategy])]
        words += ["--num_processes", str(ranks), "--main_process_port", "0"]
    words += [str(Path(__file__)), task, json.dumps(settings), directory.name]
    log = Path(directory.name, "log.txt")
    variables = {**_build_environment(), **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Launched(process, directory, log, ranks)


def launch(task: str, settings: Mapping[str, Any], *, seconds: float = 540, **how: Any) -> list[Record]:
    """Start a function as `start` does, wait for it, and return the result of each rank."""
    return start(task, settings, **how).wait(seconds)


def wait_for_all(launches: Sequence[Launched], seconds: float = 540) -> list[Record]:
    """Wait for processes that depend on one another, and return their results. If one fails, the others are killed.

    Raises:
        RuntimeError: as in `Launched.wait`, for the first one that fails.
    """
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and any(each.process.poll() is None for each in launches):
            if failed := [each for each in launches if each.process.poll()]:
                failed[0].wait()
            time.sleep(0.1)
        return [each.wait(0)[0] for each in launches]
    finally:
        for each in launches:
            each.kill()


def _build_environment() -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHES)}
    # PASSIVE: threads that spin while they wait would take a core from other work.
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **inherited,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main(task: str, settings: str, directory: str) -> None:
    module, _, function = task.partition(".")
    result = getattr(importlib.import_module(module), function)(**json.loads(settings))
    path = Path(directory, f"{os.environ.get('RANK', '0')}.json")
    path.write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
