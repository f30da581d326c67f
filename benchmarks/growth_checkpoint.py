"""Growth from files to files, beside reading the source and writing as much as the target."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from checkpoints import VOCAB, llama_config, read_and_write, require_space, write_checkpoint
from measuring import Context, Measurement, Record, alternate, goal, measured, median_peak, median_seconds, raw
from rich.table import Table

from slop_hf import ModelDims, grow_checkpoint
from slop_hf.cost.flops import weight_bytes
from slop_hf.growth import plan_growth

BASELINE = "read + write"
SOURCES = {"full": ModelDims(3072, 8192, 26, 24), "tiny": ModelDims(64, 128, 2, 4)}
#: About twice the parameters by each operator.
TARGETS: dict[str, dict[str, dict[str, int]]] = {
    "full": {"layer": {"num_hidden_layers": 52}, "hidden": {"hidden_size": 4992, "num_attention_heads": 39}},
    "tiny": {"layer": {"num_hidden_layers": 4}, "hidden": {"hidden_size": 112, "num_attention_heads": 7}},
}
INITS = {"layer": ("stack", "preserving"), "hidden": ("random", "preserving", "copy")}
PEAK_LIMIT = 1.5 * 2**30
SECONDS_LIMIT = 1.5


def run(context: Context) -> Record:
    """Measure both operators under every init."""
    config = llama_config(SOURCES[context.scale], VOCAB[context.scale], torch.bfloat16)
    plans = {name: plan_growth(config, name, dims) for name, dims in TARGETS[context.scale].items()}
    source_bytes = weight_bytes(SOURCES[context.scale], config, 2)
    target_bytes = {name: weight_bytes(plan.new, config, 2) for name, plan in plans.items()}
    require_space(context.workdir, source_bytes + max(target_bytes.values()))
    source, target = context.workdir / "source", context.workdir / "target"
    measured(write_checkpoint, source, config)
    cases = []
    for operator, new_dims in TARGETS[context.scale].items():
        contenders: dict[str, Callable[[], Measurement]] = {
            BASELINE: partial(on_disk, target, read_and_write, source, target, target_bytes[operator])
        }
        for init in INITS[operator]:
            contenders[init] = partial(on_disk, target, grow, source, target, operator, new_dims, init)
        results = alternate(contenders, context.repetitions)
        seconds = {name: median_seconds(runs) for name, runs in results.items()}
        case = {
            "operator": operator,
            "source_dims": plans[operator].old.as_dict(),
            "target_dims": plans[operator].new.as_dict(),
            "source_bytes": source_bytes,
            "target_bytes": target_bytes[operator],
            **raw(results),
            "median_seconds": seconds,
            "median_peak_bytes": {name: median_peak(runs) for name, runs in results.items()},
            "ratios": {name: seconds[name] / seconds[BASELINE] for name in INITS[operator]},
        }
        cases.append(case)
    goals = [one for case in cases for one in _goals(case)]
    return {"dtype": "bfloat16", "vocab_size": config.vocab_size, "cases": cases, "goals": goals}


def on_disk(target: Path, function: Callable[..., None], *arguments: object) -> Measurement:
    """Measure a function that writes `target`, and remove it."""
    try:
        return measured(function, *arguments, sync=True)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def grow(source: Path, target: Path, operator: str, new_dims: dict[str, int], init: str) -> None:
    """What is measured."""
    grow_checkpoint(source, target, operator, new_dims, init=init, progress=False)


def _goals(case: Record) -> list[Record]:
    goals = []
    for init, ratio in case["ratios"].items():
        what = f"{case['operator']} {init}, grow_checkpoint"
        goals.append(goal(f"{what}: s / ({BASELINE})", ratio, SECONDS_LIMIT))
        goals.append(goal(f"{what}: peak bytes", max(case["peak_bytes"][init]), PEAK_LIMIT))
    return goals


def tables(record: Record) -> list[Table]:
    """The record to read."""
    table = Table("operator", "what", "median s", f"/ ({BASELINE})", "peak GiB", title="from files to files")
    for case in record["cases"]:
        for name, seconds in case["median_seconds"].items():
            ratio = f"{case['ratios'][name]:.2f}" if name in case["ratios"] else ""
            table.add_row(
                case["operator"], name, f"{seconds:.2f}", ratio, f"{max(case['peak_bytes'][name]) / 2**30:.2f}"
            )
        table.add_section()
    return [table]
