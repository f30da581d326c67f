"""Peak memory of a rank under ZeRO-3 and FSDP2 on two ranks, compared with one process, in a run with one growth."""

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
from measuring import Context, Record, alternate, make_goal
from rich.table import Table
from training_launch import launch
from training_setup import (
    INITIAL,
    TARGETS,
    VOCAB,
    Phases,
    build_staged_trainer,
    describe_growth,
    list_operators,
    llama_config,
)

from slop_hf.io.units import format_bytes

BLOCK, BATCH, STEPS = 32, 2, 3  # short blocks: activations hardly count
OPERATOR = "hidden"  # grows every tensor
#: Settings of glibc's allocator. By default it keeps much freed memory for the process, which counts as occupied; a
#: fixed threshold returns every large tensor to the system.
ALLOCATORS = {"as it comes": {}, "gives back": {"MALLOC_MMAP_THRESHOLD_": "1048576"}}
REPETITIONS = {"full": 2, "tiny": 1}
STATES = 12  # bytes per parameter: weight and moments in float32
RANKS = 2
LIMIT = 0.75
EVERY = 0.02  # seconds between samples
ONE = "one process"
#: Strategy of each launch of several ranks.
SHARED = {f"ZeRO-3, {RANKS} ranks": "zero3", f"FSDP2, {RANKS} ranks": "fsdp2"}


def run(context: Context) -> Record:
    """Measure a growth with both settings of the allocator."""
    initial, vocab = INITIAL[context.scale], VOCAB[context.scale]
    target = TARGETS[context.scale][OPERATOR]
    growth = describe_growth(initial, target, llama_config(initial, vocab, BLOCK))
    require_space(context.workdir, STATES * (growth["source_parameters"] + growth["target_parameters"]))
    settings: Record = {
        "initial": [*initial.as_dict().values()],
        "target": [*target.as_dict().values()],
        "operators": list_operators(OPERATOR),
        "init": "preserving",
        "vocab_size": vocab,
        "block_size": BLOCK,
        "batch": BATCH,
        "steps": STEPS,
    }
    cases = []
    for allocator, environment in ALLOCATORS.items():
        contenders = {
            name: partial(measure_ranks, context.workdir, settings, environment, SHARED.get(name))
            for name in (ONE, *SHARED)
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
            make_goal(f"allocator {case['allocator']}, {name}: peak of a rank / peak of one process", ratio, LIMIT)
            for case in cases
            for name, ratio in case["ratio"].items()
        ],
    }


def measure_ranks(workdir: Path, settings: Record, environment: dict[str, str], strategy: str | None) -> list[Record]:
    """Train under a launch, and return the memory of each rank."""
    output = workdir / "run"
    try:
        settings = {**settings, "output": str(output)}
        ranks = 1 if strategy is None else RANKS
        task = "training_memory.train_and_watch"
        return launch(task, settings, ranks=ranks, strategy=strategy, environment=environment)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def compare(results: dict[str, list[list[Record]]]) -> Record:
    """Return the bytes of each run's largest rank, and by launch the ratio of the largest over all runs.

    Args:
        results: for each launch, result of `train_and_watch` on each rank, by repetition.
    """
    ratios: dict[str, dict[str, float]] = {name: {} for name in SHARED}
    byte_counts: dict[str, dict[str, list[int]]] = {}
    for kind in ("peak", "baseline", "above_baseline", "anonymous_peak"):
        byte_counts[kind] = {name: [max(rank[kind] for rank in run) for run in runs] for name, runs in results.items()}
        for name, by_kind in ratios.items() if kind != "baseline" else ():
            by_kind[kind] = max(byte_counts[kind][name]) / max(byte_counts[kind][ONE])
    return {
        "seconds": {name: [max(rank["seconds"] for rank in run) for run in runs] for name, runs in results.items()},
        **{f"{kind}_bytes": counts for kind, counts in byte_counts.items()},
        "phase_peak_bytes": {name: _find_phase_peaks(runs) for name, runs in results.items()},
        "ratios": ratios,
        "ratio": {name: by_kind["peak"] for name, by_kind in ratios.items()},
    }


def _find_phase_peaks(runs: Sequence[Sequence[Record]]) -> dict[str, Record]:
    """Return the largest memory of a rank in each phase: in all, and without mapped files."""
    names = dict.fromkeys(name for run in runs for rank in run for name in rank["phases"])
    return {
        name: {
            kind: statistics.median(max(rank["phases"].get(name, {}).get(kind, 0) for rank in run) for run in runs)
            for kind in ("resident", "anonymous")
        }
        for name in names
    }


def train_and_watch(output: str, **settings: Any) -> Record:
    """Train a run of two stages, and return the memory of this rank."""
    phases = MemoryPhases()
    began = time.perf_counter()
    trainer = build_staged_trainer(phases, output=output, **settings)
    trainer.train()
    by_phase = phases.end()
    peak = read_status("VmHWM")
    return {
        "seconds": time.perf_counter() - began,
        "baseline": phases.baseline,
        "peak": peak,
        "above_baseline": peak - phases.baseline,
        "anonymous_peak": max(memory["anonymous"] for memory in by_phase.values()),
        "phases": by_phase,
    }


class MemoryPhases(Phases):
    """Phases with their memory, which a thread samples all the time."""

    def __init__(self) -> None:
        super().__init__()
        self.baseline = 0
        self._by_phase: dict[str, Record] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def begin(self) -> None:
        self.baseline = read_status("VmRSS")
        self._thread.start()

    def end(self) -> dict[str, Record]:
        """Stop sampling, and return the largest memory of each phase."""
        self._done.set()
        self._thread.join()
        return self._by_phase

    def _sample(self) -> None:
        while not self._done.wait(EVERY):
            phase = "training" if self.current == "other" else self.current
            name = f"{phase}, stage {self.stage}"
            most = self._by_phase.setdefault(name, {"resident": 0, "anonymous": 0})
            for kind, line in (("resident", "VmRSS"), ("anonymous", "RssAnon")):
                most[kind] = max(most[kind], read_status(line))


def read_status(line: str) -> int:
    """Read a line of the kernel's status of this process, in bytes."""
    text = Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(next(entry for entry in text.splitlines() if entry.startswith(f"{line}:")).split()[1])


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    table = Table("allocator", "launch", "peak", "baseline", "above it", "anonymous", title="memory of a rank")
    phases = Table("allocator", "phase", ONE, *SHARED, title="peak of each phase")
    for case in record["cases"]:
        kinds = ("peak_bytes", "baseline_bytes", "above_baseline_bytes", "anonymous_peak_bytes")
        for name in (ONE, *SHARED):
            numbers = (format_bytes(max(case[kind][name])) for kind in kinds)
            table.add_row(case["allocator"], name, *numbers)
        names = dict.fromkeys(phase for phases in case["phase_peak_bytes"].values() for phase in phases)
        for phase in names:
            peaks = (case["phase_peak_bytes"][name].get(phase, {}).get("resident", 0) for name in (ONE, *SHARED))
            phases.add_row(case["allocator"], phase, *map(format_bytes, peaks))
        table.add_section()
        phases.add_section()
    return [table, phases]
