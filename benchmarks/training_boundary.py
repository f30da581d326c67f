"""The time between two stages, compared with saving and loading the same states.

Ours, from the last step of one stage to the first step of the next: writing the stage (weights and AdamW's moments,
with checksums), freeing its model, building the next model and its optimizer, reading the states and growing them. The
peer: `save_file` and fsync of the same weights and moments, then `load_file` of those after the growth, with a copy,
because it only maps the files.
"""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import require_space
from measuring import Context, Record, make_goal, time_call
from rich.table import Table
from safetensors.torch import load_file, save_file
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

from slop_hf import RunDirectory
from slop_hf.io.files import flush_to_disk

BLOCK, BATCH, STEPS = 64, 1, 2
REPETITIONS = {"full": 3, "tiny": 1}
#: Operators and inits. Stacked layers cost as much as preserving ones; ffn costs less than hidden.
GROWTHS = {
    "full": (("layer", "preserving"), ("hidden", "preserving"), ("hidden", "random")),
    "tiny": (("hidden", "preserving"),),
}
STATES = 12  # bytes per parameter: weight and moments in float32
LIMIT = 1.5
WHAT = {
    "ours": "end of AdamW's last step of stage 0 to beginning of the first step of stage 1, without evaluation: the "
    "stage's directory (weights, moments, checksums, record; fsync), release, the next model and optimizer, states "
    "read and grown",
    "save_file": "of the weights and of both moments before the growth, in two files, with fsync",
    "load_file": "of the weights and of both moments after the growth, and a copy of every tensor",
}


def run(context: Context) -> Record:
    """Measure the growths of this scale."""
    initial, vocab = INITIAL[context.scale], VOCAB[context.scale]
    config = llama_config(initial, vocab, BLOCK)
    cases = []
    for operator, init in GROWTHS[context.scale]:
        target = TARGETS[context.scale][operator]
        growth = describe_growth(initial, target, config)
        # The stages with their states, and the files of the peer.
        require_space(context.workdir, STATES * (2 * growth["source_parameters"] + growth["target_parameters"]))
        settings: Record = {
            "initial": [*initial.as_dict().values()],
            "target": [*target.as_dict().values()],
            "operators": list_operators(operator),
            "init": init,
            "vocab_size": vocab,
            "block_size": BLOCK,
            "batch": BATCH,
            "steps": STEPS,
        }
        rounds = [measure_round(context.workdir, settings) for _ in range(context.repetitions)]
        cases.append({"operator": operator, "init": init, **growth, **compare(rounds)})
    return {
        "dtype": "float32",
        "vocab_size": vocab,
        "timed": WHAT,
        "cases": cases,
        "goals": [
            make_goal(f"{case['operator']} {case['init']}: s / (save + load)", case["ratio"], LIMIT) for case in cases
        ],
    }


def measure_round(workdir: Path, settings: Record) -> Record:
    """Measure one boundary, then saving and loading the same states on the same disk."""
    output, scratch = workdir / "run", workdir / "peer"
    try:
        (ours,) = launch("training_boundary.cross", {**settings, "output": str(output)})
        (peer,) = launch("training_boundary.save_and_load", {"run": str(output), "scratch": str(scratch)})
        return {"ours": ours, "peer": peer}
    finally:
        for path in (output, scratch):
            shutil.rmtree(path, ignore_errors=True)


def compare(rounds: Sequence[Record]) -> Record:
    """Return the seconds of both, the seconds of the boundary's phases, and the ratio of the medians.

    Args:
        rounds: results of `cross` (key "ours") and `save_and_load` (key "peer") of each round.
    """
    seconds = {
        "boundary": [each["ours"]["seconds"] for each in rounds],
        "save_file": [each["peer"]["save_file"] for each in rounds],
        "load_file": [each["peer"]["load_file"] for each in rounds],
    }
    both = [saved + loaded for saved, loaded in zip(seconds["save_file"], seconds["load_file"], strict=True)]
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    names = dict.fromkeys(name for each in rounds for name in each["ours"]["phases"])
    return {
        "seconds": seconds,
        "median_seconds": {**medians, "save_file + load_file": statistics.median(both)},
        "median_phase_seconds": {
            name: statistics.median(each["ours"]["phases"].get(name, 0.0) for each in rounds) for name in names
        },
        "saved_bytes": rounds[-1]["peer"]["saved_bytes"],
        "loaded_bytes": rounds[-1]["peer"]["loaded_bytes"],
        "ratio": medians["boundary"] / statistics.median(both),
    }


def cross(output: str, **settings: Any) -> Record:
    """Train a run of two stages, and return the seconds of its boundary and of the boundary's phases."""
    phases = Phases()
    trainer = build_staged_trainer(phases, output=output, **settings)
    os.sync()
    trainer.train()
    assert phases.boundary is not None
    return phases.boundary


def save_and_load(run: str, scratch: str) -> Record:
    """Save the states of stage 0 and load those of stage 1 with safetensors alone, and return the seconds."""
    before, after = (RunDirectory(run).stage_dir(number) for number in range(2))
    target = Path(scratch)
    target.mkdir()
    states = [_read(before, stem) for stem in ("model", "optimizer")]
    os.sync()
    saving = time_call(partial(_save, states, target))
    saved = sum(path.stat().st_size for path in target.iterdir())
    states.clear()
    os.sync()
    loaded: list[int] = []
    loading = time_call(partial(_load, after, loaded))
    return {"save_file": saving, "load_file": loading, "saved_bytes": saved, "loaded_bytes": sum(loaded)}


def _save(states: Sequence[dict[str, torch.Tensor]], target: Path) -> None:
    for number, tensors in enumerate(states):
        path = target / f"{number}.safetensors"
        save_file(tensors, path)
        flush_to_disk(path)


def _load(directory: Path, loaded: list[int]) -> list[dict[str, torch.Tensor]]:
    states = [_read(directory, stem) for stem in ("model", "optimizer")]
    loaded.extend(tensor.nbytes for tensors in states for tensor in tensors.values())
    return states


def _read(directory: Path, stem: str) -> dict[str, torch.Tensor]:
    """Read all tensors of the files with this stem, copied into memory."""
    return {
        name: tensor.clone()
        for path in sorted(directory.glob(f"{stem}*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    table = Table("operator", "init", "s", "save_file", "load_file", "ratio", title="boundary")
    phases = Table("operator", "init", "phase", "s", title="phases of the boundary")
    for case in record["cases"]:
        medians = case["median_seconds"]
        numbers = (f"{medians[name]:.2f}" for name in ("boundary", "save_file", "load_file"))
        table.add_row(case["operator"], case["init"], *numbers, f"{case['ratio']:.2f}")
        for name, seconds in case["median_phase_seconds"].items():
            phases.add_row(case["operator"], case["init"], name, f"{seconds:.2f}")
        phases.add_section()
    return [table, phases]
