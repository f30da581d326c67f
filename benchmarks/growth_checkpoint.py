"""Growth of files, compared with reading the source and writing as many bytes as the target has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from checkpoints import VOCAB, llama_config, read_and_write, require_space, write_checkpoint
from measuring import (
    Context,
    Measurement,
    Record,
    alternate,
    compute_median_peak,
    compute_median_seconds,
    list_runs,
    make_goal,
    measure_in_process,
)
from rich.table import Table

from slop_hf import ModelDims, grow_checkpoint
from slop_hf.cost.flops import count_parameters
from slop_hf.growth import plan_growth
from slop_hf.io.units import format_bytes

BASELINE = "read + write"
SOURCES = {"full": ModelDims(3072, 8192, 26, 24), "tiny": ModelDims(64, 128, 2, 4)}
#: Growth by each operator to about twice the parameters.
TARGETS: dict[str, dict[str, dict[str, int]]] = {
    "full": {"layer": {"num_hidden_layers": 52}, "hidden": {"hidden_size": 4992, "num_attention_heads": 39}},
    "tiny": {"layer": {"num_hidden_layers": 4}, "hidden": {"hidden_size": 112, "num_attention_heads": 7}},
}
INITS = {"layer": ("stack", "preserving"), "hidden": ("random", "preserving", "copy")}
PEAK_LIMIT = 1.5 * 2**30
SECONDS_LIMIT = 1.2


def run(context: Context) -> Record:
    """Measure both operators with every init."""
    config = llama_config(SOURCES[context.scale], VOCAB[context.scale], torch.bfloat16)
    plans = {name: plan_growth(config, name, dims) for name, dims in TARGETS[context.scale].items()}
    source_bytes = 2 * count_parameters(SOURCES[context.scale], config)  # in bf16
    target_bytes = {name: 2 * count_parameters(plan.new, config) for name, plan in plans.items()}
    require_space(context.workdir, source_bytes + max(target_bytes.values()))
    source, target = context.workdir / "source", context.workdir / "target"
    measure_in_process(write_checkpoint, source, config)
    cases = []
    for operator, new_dims in TARGETS[context.scale].items():
        contenders: dict[str, Callable[[], Measurement]] = {
            BASELINE: partial(measure_on_disk, target, read_and_write, source, target, target_bytes[operator])
        }
        for init in INITS[operator]:
            contenders[init] = partial(measure_on_disk, target, grow, source, target, operator, new_dims, init)
        results = alternate(contenders, context.repetitions)
        seconds = {name: compute_median_seconds(runs) for name, runs in results.items()}
        case = {
            "operator": operator,
            "source_dims": plans[operator].old.as_dict(),
            "target_dims": plans[operator].new.as_dict(),
            "source_bytes": source_bytes,
            "target_bytes": target_bytes[operator],
            **list_runs(results),
            "median_seconds": seconds,
            "median_peak_bytes": {name: compute_median_peak(runs) for name, runs in results.items()},
            "ratios": {name: seconds[name] / seconds[BASELINE] for name in INITS[operator]},
        }
        cases.append(case)
    goals = [goal for case in cases for goal in _make_goals(case)]
    return {"dtype": "bfloat16", "vocab_size": config.vocab_size, "cases": cases, "goals": goals}


def measure_on_disk(target: Path, function: Callable[..., None], *arguments: object) -> Measurement:
    """Measure a function that writes `target`, and remove `target`."""
    try:
        return measure_in_process(function, *arguments, sync=True)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def grow(source: Path, target: Path, operator: str, new_dims: dict[str, int], init: str) -> None:
    grow_checkpoint(source, target, operator, new_dims, init=init, progress=False)


def _make_goals(case: Record) -> list[Record]:
    goals = []
    for init, ratio in case["ratios"].items():
        what = f"{case['operator']} {init}, grow_checkpoint"
        goals.append(make_goal(f"{what}: s / ({BASELINE})", ratio, SECONDS_LIMIT))
        goals.append(make_goal(f"{what}: peak bytes", max(case["peak_bytes"][init]), PEAK_LIMIT))
    return goals


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    table = Table("operator", "what", "median s", f"/ ({BASELINE})", "peak", title="files")
    for case in record["cases"]:
        for name, seconds in case["median_seconds"].items():
            ratio = f"{case['ratios'][name]:.2f}" if name in case["ratios"] else ""
            table.add_row(case["operator"], name, f"{seconds:.2f}", ratio, format_bytes(max(case["peak_bytes"][name])))
        table.add_section()
    return [table]
