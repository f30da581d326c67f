"""Seconds, memory and goals: what the parts of `growth.py` measure with.

Every measurement runs in a process of its own, so that none finds the memory or the threads of another. The process is
forked from one that has imported everything and done nothing; commands of other programs are started afresh.
"""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure

import slop_hf

T = TypeVar("T")
Record = dict[str, Any]

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss

# A process inherits the peak memory of the one that it was forked from when it executes another program: the launcher,
# an interpreter with nothing loaded, stands in between.
_LAUNCHER = """
import json, os, sys, time
log, *command = sys.argv[1:]
flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
actions = [(os.POSIX_SPAWN_OPEN, 1, log, flags, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)]
os.sync()
began = time.perf_counter()
pid = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
_, status, usage = os.wait4(pid, 0)
ended = time.perf_counter()
os.sync()
print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - began, ended - began, usage.ru_maxrss]))
"""


@dataclass(frozen=True)
class Context:
    """What a part is told.

    Args:
        scale: "full" or "tiny", a key of each part's sizes.
        repetitions: of every measurement; the median counts.
        workdir: an empty directory for checkpoints, on the disk to measure.
        environment: the virtual environment of mergekit, made where it is missing.
        figure: where the figure goes.
    """

    scale: str
    repetitions: int
    workdir: Path
    environment: Path
    figure: Path


@dataclass(frozen=True)
class Measurement:
    """One run: its seconds, the peak of its resident memory in bytes, and what it gave back."""

    seconds: float
    peak_bytes: int
    value: Any = None


def measured(function: Callable[..., Any], *arguments: Any, sync: bool = False) -> Measurement:
    """Call a function in a fresh process; its peak memory is over that of the idle process.

    Pages of libraries that only the work touches count as its memory. With `sync`, all that has been written before is
    on the disk before the clock starts, and all that the function writes before it stops.

    Raises:
        RuntimeError: where the function fails or its process is killed.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_in_child, args=(sender, function, arguments, sync))
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = "it was killed, perhaps for memory"
    except BaseException:  # interrupted: nobody waits for it any more
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(outcome, str):
        raise RuntimeError(f"{getattr(function, '__name__', function)} failed: {outcome}")
    return Measurement(*outcome)


def _in_child(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any], sync: bool) -> None:
    try:
        gc.freeze()  # collections then pass over what has been imported
        idle = peak_rss()
        if sync:
            os.sync()
        began = time.perf_counter()
        value = function(*arguments)
        if sync:
            os.sync()
        seconds = time.perf_counter() - began
        sender.send((seconds, peak_rss() - idle, value))
    except BaseException:
        sender.send(traceback.format_exc())


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call, without those of freeing what it gives back."""
    began = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - began
    del result
    gc.collect()
    return seconds


def run_command(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Measurement:
    """Run a command; seconds until what it wrote is on the disk, `value` until it ended, peak of the whole process.

    Raises:
        RuntimeError: where it fails, with the end of what it said.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(log), *command]
    done = subprocess.run(launcher, capture_output=True, text=True, check=True, env=dict(environment))
    code, seconds, to_exit, maxrss = json.loads(done.stdout)
    if code:
        raise RuntimeError(last_lines(log.read_text(encoding="utf-8", errors="replace")))
    return Measurement(seconds, maxrss * MAXRSS_UNIT, to_exit)


def last_lines(text: str, count: int = 3) -> str:
    """The last lines of a program's output that say something, where its error usually stands."""
    return " / ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])


def alternate(contenders: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Run contenders by turns, so that noise hits all of them; each round begins with another one."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_ in range(repetitions):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(contenders[name]())
    return results


def median_seconds(measurements: Sequence[Measurement]) -> float:
    """The median of their seconds."""
    return statistics.median(one.seconds for one in measurements)


def median_peak(measurements: Sequence[Measurement]) -> float:
    """The median of their peak memory, in bytes."""
    return statistics.median(one.peak_bytes for one in measurements)


def raw(results: Mapping[str, Sequence[Measurement]]) -> Record:
    """Seconds and peak memory of every run, for the record."""
    return {
        "seconds": {name: [one.seconds for one in runs] for name, runs in results.items()},
        "peak_bytes": {name: [one.peak_bytes for one in runs] for name, runs in results.items()},
    }


def goal(text: str, value: float, limit: float) -> Record:
    """A goal, the value to compare, the largest that meets it, and whether it does."""
    return {"goal": text, "value": value, "limit": limit, "met": value <= limit}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, aside and then renamed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(buffer.getvalue())
    aside.replace(path)


def circumstances(scale: str, repetitions: int, command: str) -> Record:
    """What else a record needs in order to be read: when, how, with what and on which machine."""
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "scale": scale,
        "repetitions": repetitions,
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": f"{platform.system()} {platform.machine()}",
            "load_average_before": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "slop-hf": slop_hf.__version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
