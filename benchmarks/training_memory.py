"""Peak memory of a rank under ZeRO-3 on two ranks, beside one process: the same run with one growth."""

from __future__ import annotations

import os
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from checkpoints import require_space
from measuring import Record, alternate, goal
from rich.table import Table
from training_launch import launch
from training_setup import (
    INITIAL,
    TARGETS,
    VOCAB,
    Context,
    Phases,
    growth_record,
    llama_config,
    operators_of,
    staged_trainer,
)

BLOCK, BATCH, STEPS = 32, 2, 3  # short blocks: activations hardly count
OPERATOR = "hidden"  # on which all tensors are
#: How glibc deals with freed memory. By itself it keeps much of it, for this process to use again, and all that counts
#: as occupied; a fixed threshold gives every large tensor back to the system.
ALLOCATORS = {"as it comes": {}, "gives back": {"MALLOC_MMAP_THRESHOLD_": "1048576"}}
REPETITIONS = {"full": 2, "tiny": 1}
STATES = 12  # bytes a parameter: weight and moments in float32
RANKS = 2
LIMIT = 0.75
EVERY = 0.02  # seconds between samples
ONE, SHARED = "one process", f"ZeRO-3, {RANKS} ranks"


def run(context: Context) -> Record:
    """Measure a growth under both ways of the allocator."""
    initial, vocab = INITIAL[context.scale], VOCAB[context.scale]
    target = TARGETS[context.scale][OPERATOR]
    growth = growth_record(initial, target, llama_config(initial, vocab, BLOCK))
    require_space(context.workdir, STATES * (growth["source_parameters"] + growth["target_parameters"]))
    settings: Record = {
        "initial": [*initial.as_dict().values()],
        "target": [*target.as_dict().values()],
        "operators": operators_of(OPERATOR),
        "init": "preserving",
        "vocab_size": vocab,
        "block_size": BLOCK,
        "batch": BATCH,
        "steps": STEPS,
    }
    cases = []
    for allocator, environment in ALLOCATORS.items():
        contenders = {
            name: partial(occupied, context.workdir, settings, environment, shared=name == SHARED)
            for name in (ONE, SHARED)
        }
        results = alternate(contenders, context.repetitions)
        cases.append({"allocator": allocator, "environment": environment, **compare(results)})
    return {
        "operator": OPERATOR,
        "init": "preserving",
        **growth,
        "dtype": "float32",
        "vocab_size": vocab,
        "ranks": RANKS,
        "tokens_per_step": BATCH * BLOCK,
        "deepspeed": version("deepspeed"),
        "cases": cases,
        "goals": [
            goal(f"allocator {case['allocator']}: peak of a rank / peak of one process", case["ratio"], LIMIT)
            for case in cases
        ],
    }


def occupied(workdir: Path, settings: Record, environment: dict[str, str], *, shared: bool) -> list[Record]:
    """What each rank of a launch has come to occupy."""
    output = workdir / "run"
    try:
        settings = {**settings, "output": str(output)}
        ranks = RANKS if shared else 1
        return launch("training_memory.occupy", settings, ranks=ranks, zero3=shared, environment=environment)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def compare(results: dict[str, list[list[Record]]]) -> Record:
    """Bytes of every run's largest rank, and the ratio of the largest of all runs.

    Args:
        results: of each launch, by repetition, what `occupy` has returned on each rank.
    """
    ratios: dict[str, float] = {}
    byte_counts: dict[str, dict[str, list[int]]] = {}
    for kind in ("peak", "baseline", "above_baseline", "anonymous_peak"):
        byte_counts[kind] = {name: [max(rank[kind] for rank in run) for run in runs] for name, runs in results.items()}
        ratios[kind] = max(byte_counts[kind][SHARED]) / max(byte_counts[kind][ONE])
    del ratios["baseline"]
    return {
        "seconds": {name: [max(rank["seconds"] for rank in run) for run in runs] for name, runs in results.items()},
        **{f"{kind}_bytes": found for kind, found in byte_counts.items()},
        "phase_peak_bytes": {name: _phases(runs) for name, runs in results.items()},
        "ratios": ratios,
        "ratio": ratios["peak"],
    }


def _phases(runs: Sequence[Sequence[Record]]) -> dict[str, Record]:
    """Of each phase, the most that a rank was seen to occupy: as a whole, and without files that are mapped."""
    names = dict.fromkeys(name for run in runs for rank in run for name in rank["phases"])
    return {
        name: {
            kind: statistics.median(max(rank["phases"].get(name, {}).get(kind, 0) for rank in run) for run in runs)
            for kind in ("resident", "anonymous")
        }
        for name in names
    }


def occupy(output: str, **settings: Any) -> Record:
    """A run of two stages, and the memory of this rank."""
    phases = Watched()
    began = time.perf_counter()
    trainer = staged_trainer(phases, output=output, **settings)
    trainer.train()
    found = phases.end()
    peak = status("VmHWM")
    return {
        "seconds": time.perf_counter() - began,
        "baseline": phases.baseline,
        "peak": peak,
        "above_baseline": peak - phases.baseline,
        "anonymous_peak": max(one["anonymous"] for one in found.values()),
        "phases": found,
    }


class Watched(Phases):
    """Phases with their memory: a thread looks at it all the while."""

    def __init__(self) -> None:
        super().__init__()
        self.baseline = 0
        self._found: dict[str, Record] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def begin(self) -> None:
        self.baseline = status("VmRSS")
        self._thread.start()

    def end(self) -> dict[str, Record]:
        """Stop looking; of each phase, the most that was seen."""
        self._done.set()
        self._thread.join()
        return self._found

    def _look(self) -> None:
        while not self._done.wait(EVERY):
            phase = "training" if self.current == "other" else self.current
            name = f"{phase}, stage {self.stage}"
            most = self._found.setdefault(name, {"resident": 0, "anonymous": 0})
            for kind, line in (("resident", "VmRSS"), ("anonymous", "RssAnon")):
                most[kind] = max(most[kind], status(line))


def status(line: str) -> int:
    """What the kernel says of this process's memory, in bytes."""
    text = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(next(one for one in text.splitlines() if one.startswith(f"{line}:")).split()[1])


def tables(record: Record) -> list[Table]:
    """The record to read."""
    table = Table("allocator", "launch", "peak GiB", "baseline", "above it", "anonymous", title="memory of a rank")
    phases = Table("allocator", "phase", *[f"{name}, GiB" for name in (ONE, SHARED)], title="peak of each phase")
    for case in record["cases"]:
        kinds = ("peak_bytes", "baseline_bytes", "above_baseline_bytes", "anonymous_peak_bytes")
        for name in (ONE, SHARED):
            numbers = (f"{max(case[kind][name]) / 2**30:.2f}" for kind in kinds)
            table.add_row(case["allocator"], name, *numbers)
        names = dict.fromkeys(phase for found in case["phase_peak_bytes"].values() for phase in found)
        for phase in names:
            found = (case["phase_peak_bytes"][name].get(phase, {}).get("resident", 0) for name in (ONE, SHARED))
            phases.add_row(case["allocator"], phase, *(f"{number / 2**30:.2f}" for number in found))
        table.add_section()
        phases.add_section()
    return [table, phases]
