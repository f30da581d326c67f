"""From the last step of one stage to the first of the next, beside saving and loading the same states.

Ours: writing the stage (weights and AdamW's moments on the disk, with checksums), letting go of its model, building
the next one with its optimizer, reading the states and growing them. The peer: `save_file` and fsync of the same
weights and moments; `load_file` of as many as there are after the growth, copied, because it would only map them.
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
from measuring import Record, goal, timed
from rich.table import Table
from safetensors.torch import load_file, save_file
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

from slop_hf import RunDirectory

BLOCK, BATCH, STEPS = 64, 1, 2
REPETITIONS = {"full": 3, "tiny": 1}
#: Operators and inits; stacked layers cost what preserving ones do, ffn less than hidden, which all tensors are on.
GROWTHS = {
    "full": (("layer", "preserving"), ("hidden", "preserving"), ("hidden", "random")),
    "tiny": (("hidden", "preserving"),),
}
STATES = 12  # bytes a parameter: weight and moments in float32
LIMIT = 1.5
WHAT = {
    "ours": "end of AdamW's last step of stage 0 to beginning of the first step of stage 1, without evaluation: the "
    "stage's directory (weights, moments, checksums, record; fsync), release, the next model and optimizer, states "
    "read and grown",
    "save_file": "of the weights and of both moments before the growth, in two files, with fsync",
    "load_file": "of the weights and of both moments after the growth, and a copy of every tensor",
}


def run(context: Context) -> Record:
    """Measure every operator under two inits."""
    initial, vocab = INITIAL[context.scale], VOCAB[context.scale]
    config = llama_config(initial, vocab, BLOCK)
    cases = []
    for operator, init in GROWTHS[context.scale]:
        target = TARGETS[context.scale][operator]
        growth = growth_record(initial, target, config)
        # The stages with their states, and what the peer writes beside them.
        require_space(context.workdir, STATES * (2 * growth["source_parameters"] + growth["target_parameters"]))
        settings: Record = {
            "initial": [*initial.as_dict().values()],
            "target": [*target.as_dict().values()],
            "operators": operators_of(operator),
            "init": init,
            "vocab_size": vocab,
            "block_size": BLOCK,
            "batch": BATCH,
            "steps": STEPS,
        }
        rounds = [beside_safetensors(context.workdir, settings) for _ in range(context.repetitions)]
        cases.append({"operator": operator, "init": init, **growth, **compare(rounds)})
    return {
        "dtype": "float32",
        "vocab_size": vocab,
        "timed": WHAT,
        "cases": cases,
        "goals": [
            goal(f"{case['operator']} {case['init']}: s / (save + load)", case["ratio"], LIMIT) for case in cases
        ],
    }


def beside_safetensors(workdir: Path, settings: Record, *, gpu: bool = False) -> Record:
    """One boundary, and then the same states saved and loaded on the same disk."""
    output, scratch = workdir / "run", workdir / "peer"
    try:
        (ours,) = launch("training_boundary.cross", {**settings, "output": str(output)}, gpu=gpu)
        (peer,) = launch("training_boundary.same_states", {"run": str(output), "scratch": str(scratch)}, gpu=gpu)
        return {"ours": ours, "peer": peer}
    finally:
        for path in (output, scratch):
            shutil.rmtree(path, ignore_errors=True)


def compare(rounds: Sequence[Record]) -> Record:
    """Seconds of both, those of the boundary's phases, and the ratio of the medians.

    Args:
        rounds: of each, what `cross` and `same_states` have returned.
    """
    seconds = {
        "boundary": [one["ours"]["seconds"] for one in rounds],
        "save_file": [one["peer"]["save_file"] for one in rounds],
        "load_file": [one["peer"]["load_file"] for one in rounds],
    }
    both = [saved + loaded for saved, loaded in zip(seconds["save_file"], seconds["load_file"], strict=True)]
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    names = dict.fromkeys(name for one in rounds for name in one["ours"]["phases"])
    return {
        "seconds": seconds,
        "median_seconds": {**medians, "save_file + load_file": statistics.median(both)},
        "median_phase_seconds": {
            name: statistics.median(one["ours"]["phases"].get(name, 0.0) for one in rounds) for name in names
        },
        "saved_bytes": rounds[-1]["peer"]["saved_bytes"],
        "loaded_bytes": rounds[-1]["peer"]["loaded_bytes"],
        "ratio": medians["boundary"] / statistics.median(both),
    }


def cross(output: str, **settings: Any) -> Record:
    """A run of two stages; the seconds of its boundary and of what they went into."""
    phases = Phases()
    trainer = staged_trainer(phases, output=output, **settings)
    os.sync()
    trainer.train()
    assert phases.boundary is not None
    return phases.boundary


def same_states(run: str, scratch: str) -> Record:
    """Save what stage 0 has left, and load what stage 1 has, with safetensors alone."""
    before, after = (RunDirectory(run).stage_dir(number) for number in range(2))
    target = Path(scratch)
    target.mkdir()
    states = [_read(before, stem) for stem in ("model", "optimizer")]
    os.sync()
    saving = timed(partial(_save, states, target))
    saved = sum(path.stat().st_size for path in target.iterdir())
    states.clear()
    os.sync()
    loaded: list[int] = []
    loading = timed(partial(_load, after, loaded))
    return {"save_file": saving, "load_file": loading, "saved_bytes": saved, "loaded_bytes": sum(loaded)}


def _save(states: Sequence[dict[str, torch.Tensor]], target: Path) -> None:
    for number, tensors in enumerate(states):
        path = target / f"{number}.safetensors"
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _load(directory: Path, loaded: list[int]) -> list[dict[str, torch.Tensor]]:
    states = [_read(directory, stem) for stem in ("model", "optimizer")]
    loaded.extend(tensor.nbytes for tensors in states for tensor in tensors.values())
    return states


def _read(directory: Path, stem: str) -> dict[str, torch.Tensor]:
    """All tensors of some files, in memory of their own."""
    return {
        name: tensor.clone()
        for path in sorted(directory.glob(f"{stem}*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def tables(record: Record) -> list[Table]:
    """The record to read."""
    table = Table("operator", "init", "s", "save_file", "load_file", "ratio", title="boundary")
    phases = Table("operator", "init", "phase", "s", title="what the boundary's seconds go into")
    for case in record["cases"]:
        medians = case["median_seconds"]
        numbers = (f"{medians[name]:.2f}" for name in ("boundary", "save_file", "load_file"))
        table.add_row(case["operator"], case["init"], *numbers, f"{case['ratio']:.2f}")
        for name, seconds in case["median_phase_seconds"].items():
            phases.add_row(case["operator"], case["init"], name, f"{seconds:.2f}")
        phases.add_section()
    return [table, phases]
