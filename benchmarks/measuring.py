"""Clocks, memory, goals, records and options shared by the benchmarks.

Each measurement runs in a new process, so that it does not inherit the memory or the threads of another. The process
is forked from one that has imported everything and done no work; commands of other programs are started from scratch.
"""

from __future__ import annotations

import argparse
import gc
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from rich.table import Table

import slop_hf
from slop_hf.io.files import write_file, write_text
from slop_hf.io.serialization import to_json
from slop_hf.io.units import format_bytes

T = TypeVar("T")
Record = dict[str, Any]

ROOT = Path(__file__).parents[1]
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss

# A forked process inherits the peak memory of its parent even if it executes another program. So a launcher, an
# interpreter with nothing loaded, stands in between.
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
    """Settings of a benchmark's part.

    Args:
        scale: "full" or "tiny", a key of each part's sizes.
        repetitions: number of repetitions of each measurement; the median counts.
        workdir: empty directory for checkpoints and runs, on the disk to measure.
        environment: virtual environment of mergekit, created if it is missing.
        figure: path of the figure.
    """

    scale: str
    repetitions: int
    workdir: Path
    environment: Path = Path()
    figure: Path = Path()


@dataclass(frozen=True)
class Measurement:
    """One run: its seconds, its peak resident memory in bytes, and the value that it returned."""

    seconds: float
    peak_bytes: int
    value: Any = None


def measure_in_process(function: Callable[..., Any], *arguments: Any, sync: bool = False) -> Measurement:
    """Call a function in a new process, and measure its seconds and its peak memory above that of the idle process.

    Pages of libraries that only the work touches count as its memory. With `sync`, earlier writes are on the disk
    before the clock starts, and the function's writes are on the disk before it stops.

    Raises:
        RuntimeError: if the function fails or its process is killed.
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
    except BaseException:  # interrupted: nobody waits for the result any more
        process.kill()
        raise
    finally:
        process.join()
    if isinstance(outcome, str):
        raise RuntimeError(f"{getattr(function, '__name__', function)} failed: {outcome}")
    return Measurement(*outcome)


def _in_child(sender: Connection, function: Callable[..., Any], arguments: Sequence[Any], sync: bool) -> None:
    try:
        gc.freeze()  # later collections then skip what has been imported
        idle = read_peak_rss()
        if sync:
            os.sync()
        began = time.perf_counter()
        value = function(*arguments)
        if sync:
            os.sync()
        seconds = time.perf_counter() - began
        sender.send((seconds, read_peak_rss() - idle, value))
    except BaseException:
        sender.send(traceback.format_exc())


def read_peak_rss() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT


def time_call(function: Callable[[], Any]) -> float:
    """Return the seconds of a call, without the time to free its result."""
    began = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - began
    del result
    gc.collect()
    return seconds


def run_command(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Measurement:
    """Run a command, and measure it.

    Returns:
        `seconds` until its output is on the disk, the peak memory of the whole process, and as `value` the seconds
        until it exited.

    Raises:
        RuntimeError: if it fails, with the end of its output.
    """
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(log), *command]
    done = subprocess.run(launcher, capture_output=True, text=True, check=True, env=dict(environment))
    code, seconds, to_exit, maxrss = json.loads(done.stdout)
    if code:
        raise RuntimeError(get_last_lines(log.read_text(encoding="utf-8", errors="replace")))
    return Measurement(seconds, maxrss * MAXRSS_UNIT, to_exit)


def get_last_lines(text: str, count: int = 3) -> str:
    """Return the last non-empty lines of a program's output, which usually hold its error."""
    return " / ".join([line.strip() for line in text.splitlines() if line.strip()][-count:])


def alternate(contenders: Mapping[str, Callable[[], T]], repetitions: int) -> dict[str, list[T]]:
    """Run contenders in turns, so that noise affects all of them; each round begins with another one."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    names = list(contenders)
    for round_ in range(repetitions):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(contenders[name]())
    return results


def compute_median_seconds(measurements: Sequence[Measurement]) -> float:
    """Return the median of the seconds."""
    return statistics.median(run.seconds for run in measurements)


def compute_median_peak(measurements: Sequence[Measurement]) -> float:
    """Return the median of the peak memory, in bytes."""
    return statistics.median(run.peak_bytes for run in measurements)


def list_runs(results: Mapping[str, Sequence[Measurement]]) -> Record:
    """Return the seconds and the peak memory of every run, for the record."""
    return {
        "seconds": {name: [run.seconds for run in runs] for name, runs in results.items()},
        "peak_bytes": {name: [run.peak_bytes for run in runs] for name, runs in results.items()},
    }


def make_goal(text: str, value: float, limit: float) -> Record:
    """Return the record of a goal: its text, the measured value, its upper limit, and whether it is met."""
    return {"goal": text, "value": value, "limit": limit, "met": value <= limit}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically."""
    with write_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def make_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks share; see `read_options`."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="tiny: small sizes, to try it out")
    parser.add_argument("--repetitions", type=int, help="repetitions of each measurement; the median counts")
    parser.add_argument("--output", type=Path, help=f"record to write (full: benchmarks/results/{name}.json)")
    parser.add_argument("--workdir", type=Path, help="directory on the disk to measure (default: $TMPDIR)")
    return parser


def read_options(
    parser: argparse.ArgumentParser,
    name: str,
    arguments: Sequence[str] | None,
    *,
    repetitions: Mapping[str, int] | None = None,
    parts: Sequence[str] = (),
    default_parts: Sequence[str] = (),
) -> argparse.Namespace:
    """Parse a benchmark's command line, and fill in what was left out.

    Args:
        parser: parser from `make_parser`.
        name: name of the benchmark, such as `growth`.
        arguments: words of the command line; None takes those of the program.
        repetitions: default number of repetitions by scale; None leaves it to each part.
        parts: names of the benchmark's parts; an option `parts` of the parser selects some.
        default_parts: names of the parts that run if none is given, or if "all" is among them.
    """
    options = parser.parse_args(arguments)
    if options.repetitions is not None and options.repetitions < 1:
        parser.error(f"--repetitions must be 1 or more, got {options.repetitions}")
    if parts:
        if unknown := set(options.parts) - {*parts, "all"}:
            parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(parts)}, all")
        if not options.parts or "all" in options.parts:
            options.parts = [part for part in parts if part in {*default_parts, *options.parts}]
    if repetitions is not None:
        options.repetitions = options.repetitions or repetitions[options.scale]
    folder = ROOT / ("benchmarks/results" if options.scale == "full" else "runs/benchmarks")
    options.output = options.output or folder / f"{name}.json"
    return options


def save_part(path: Path, part: str, record: Record, parts: Iterable[str]) -> None:
    """Write the record of a part into a file with one record per part, in the order of `parts`; keep the others."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    records[part] = record
    write_text(path, to_json({name: records[name] for name in parts if name in records}))


def build_goals_table(record: Record) -> Table:
    """Return a table of the goals that says which ones are met."""
    table = Table("goal", "measured", "at most", "met", title="goals")
    for goal in record["goals"]:
        is_size = goal["limit"] > 2**20
        cells = [format_bytes(goal[key]) if is_size else f"{goal[key]:.3g}" for key in ("value", "limit")]
        table.add_row(goal["goal"], *cells, "[green]yes[/green]" if goal["met"] else "[red]no[/red]")
    return table


def describe_circumstances(scale: str, repetitions: int, command: str) -> Record:
    """Return when, how, with which versions and on which machine a record was made."""
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
