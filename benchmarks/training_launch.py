"""A measured function in fresh processes: one, or the ranks of a launch; also the program that these processes run.

Forks would not do here as they do for growth: ranks are launched, and OpenMP and CUDA do not outlive a fork.
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
ZERO3 = ROOT / "recipes/accelerate/cpu_zero3.yaml"  # as a user launches it
#: Left by an earlier launch, they would be taken for this one's.
_OF_LAUNCHES = ("ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_", "OMP_NUM_THREADS")

Record = dict[str, Any]


@dataclass
class Launched:
    """Processes at work on a task.

    Args:
        process: the one process, or the launcher.
        directory: where each rank leaves its result.
        log: what they say.
        ranks: how many there are.
    """

    process: subprocess.Popen[bytes]
    directory: tempfile.TemporaryDirectory[str]
    log: Path
    ranks: int

    def results(self, seconds: float = 540) -> list[Record]:
        """Wait for the end; what the task has returned on each rank.

        Raises:
            RuntimeError: where it fails or takes longer, with the end of what was said.
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
        """End the launcher and its ranks, whatever they are doing."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(
    task: str,
    settings: Mapping[str, Any],
    *,
    ranks: int = 1,
    zero3: bool = False,
    gpu: bool = False,
    environment: Mapping[str, str] | None = None,
) -> Launched:
    """Start a function in processes of its own.

    Args:
        task: `module.function` of this directory; it takes `settings` and returns what JSON can hold.
        settings: its arguments.
        ranks: processes, under ZeRO-3.
        zero3: launch with DeepSpeed ZeRO-3 on CPUs; otherwise there is one process.
        gpu: let it see the first GPU; otherwise it sees none.
        environment: further variables.
    """
    directory = tempfile.TemporaryDirectory(prefix="training-benchmark-")
    words = [sys.executable]
    if zero3:
        words += ["-m", "accelerate.commands.launch", "--config_file", str(ZERO3)]
        words += ["--num_processes", str(ranks), "--main_process_port", "0"]
    words += [str(Path(__file__)), task, json.dumps(settings), directory.name]
    log = Path(directory.name, "log.txt")
    surroundings = {**_environment(gpu), **(environment or {})}
    with log.open("wb") as said:
        process = subprocess.Popen(
            words, cwd=ROOT, env=surroundings, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    return Launched(process, directory, log, ranks)


def launch(task: str, settings: Mapping[str, Any], *, seconds: float = 540, **how: Any) -> list[Record]:
    """`start` with the same arguments, and its results, one for each rank."""
    return start(task, settings, **how).results(seconds)


def launch_together(begun: Sequence[Launched], seconds: float = 540) -> list[Record]:
    """What processes that wait for one another have returned; where one fails, the others are ended.

    Raises:
        RuntimeError: as `Launched.results`, of the one that has failed first.
    """
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and any(one.process.poll() is None for one in begun):
            if any(failed := [one for one in begun if one.process.poll()]):
                failed[0].results()
            time.sleep(0.1)
        return [one.results(0)[0] for one in begun]
    finally:
        for one in begun:
            one.kill()


def _environment(gpu: bool) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_LAUNCHES)}
    if gpu:  # Trainer would take all that one process sees
        devices = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    else:
        devices = ""
    # PASSIVE: threads that spin while they wait take a core from whoever else has work.
    return {
        "OMP_WAIT_POLICY": "PASSIVE",
        **kept,
        "CUDA_VISIBLE_DEVICES": devices,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def main(task: str, settings: str, directory: str) -> None:
    module, _, function = task.partition(".")
    found = getattr(importlib.import_module(module), function)(**json.loads(settings))
    path = Path(directory, f"{os.environ.get('RANK', '0')}.json")
    path.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
