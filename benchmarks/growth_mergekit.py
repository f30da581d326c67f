"""Layers stacked beside mergekit's `passthrough`, which is installed into an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from checkpoints import VOCAB, differences, llama_config, write_checkpoint
from measuring import (
    Context,
    Measurement,
    Record,
    alternate,
    goal,
    last_lines,
    measured,
    median_peak,
    median_seconds,
    raw,
    run_command,
)
from rich.table import Table

from slop_hf import ModelDims
from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_yaml

SOURCES = {"full": ModelDims(1280, 3584, 20, 10), "tiny": ModelDims(64, 128, 2, 4)}
LAYERS = {"full": 45, "tiny": 5}
READY = "ready.json"  # says what is in the environment; written last
OURS = "slop grow"
#: mergekit as it comes (a layer that is used twice cannot be saved without the option), and at its fastest.
MERGEKIT: dict[str, tuple[str, ...]] = {
    "mergekit": ("--clone-tensors",),
    "mergekit --async-write": ("--clone-tensors", "--async-write"),
}


class MergekitError(RuntimeError):
    """mergekit, not this library, fails."""


def candidates() -> list[list[str]]:
    """What to try to install: the newest beside our transformers, then with those that it likes, then older ones."""
    return [
        ["mergekit", f"transformers=={version('transformers')}"],
        ["mergekit"],
        ["mergekit==0.1.5", "transformers==5.17.*", "pydantic==2.12.*"],
        ["mergekit==0.1.4"],
        ["mergekit==0.0.6", "pydantic==2.10.*"],
    ]


def run(context: Context) -> Record:
    """Stack layers with both programs, compare what they write, and measure them."""
    attempts, packages = prepare(context.environment, context.workdir)
    if not packages:
        return {"installed": False, "attempts": attempts, "goals": []}
    config = llama_config(SOURCES[context.scale], VOCAB[context.scale], torch.bfloat16)
    source, layers = context.workdir / "source", LAYERS[context.scale]
    measured(write_checkpoint, source, config)
    targets = {name: context.workdir / name.replace(" ", "") for name in (OURS, *MERGEKIT)}
    log = context.workdir / "log"
    contenders: dict[str, Callable[[], Measurement]] = {}
    recipe = write_recipe(context.workdir / "recipe.yaml", source, config.num_hidden_layers, layers)
    for name, options in MERGEKIT.items():
        command = merge_command(context.environment, recipe, targets[name], options)
        contenders[name] = partial(merge, targets[name], command, log)
    ours = [sys.executable, "-m", "slop_hf", "grow", str(source), "-o", str(targets[OURS])]
    ours += ["--num-hidden-layers", str(layers)]
    contenders[OURS] = partial(afresh, targets[OURS], ours, log, os.environ)
    try:
        results = alternate(contenders, context.repetitions)
    except MergekitError as caught:
        attempts.append({"install": ["what was installed"], "reason": _without_paths(str(caught), context)})
        return {"installed": True, "packages": packages, "ran": False, "attempts": attempts, "goals": []}
    unlike = {name: measured(differences, targets[OURS], targets[name]).value for name in MERGEKIT}
    seconds = {name: median_seconds(runs) for name, runs in results.items()}
    peaks = {name: median_peak(runs) for name, runs in results.items()}
    time_ratio = seconds[OURS] / min(seconds[name] for name in MERGEKIT)
    peak_ratio = peaks[OURS] / min(peaks[name] for name in MERGEKIT)
    return {
        "installed": True,
        "ran": True,
        "packages": packages,
        "attempts": attempts,
        "options": MERGEKIT,
        "dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "source_dims": SOURCES[context.scale].as_dict(),
        "target_layers": layers,
        **raw(results),
        "seconds_to_exit": {name: [one.value for one in runs] for name, runs in results.items()},
        "median_seconds": seconds,
        "median_peak_bytes": peaks,
        "differing_weights": unlike,
        "ratios": {"seconds_to_fastest": time_ratio, "peak_to_leanest": peak_ratio},
        "goals": [
            goal("weights that differ from mergekit's", sum(len(names) for names in unlike.values()), 0),
            goal("s / the faster of mergekit's", time_ratio, 1.0),
            goal("peak memory / the leaner of mergekit's", peak_ratio, 1.0),
        ],
    }


def afresh(target: Path, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Measurement:
    """Run a command that writes `target`, which the one before may have written too."""
    shutil.rmtree(target, ignore_errors=True)
    return run_command(command, log, environment)


def merge(target: Path, command: Sequence[str], log: Path) -> Measurement:
    """Run mergekit.

    Raises:
        MergekitError: where it fails, with the end of what it said; our own failures end the benchmark.
    """
    try:
        return afresh(target, command, log, clean_environment())
    except RuntimeError as caught:
        raise MergekitError(str(caught)) from caught


def write_recipe(path: Path, source: Path, old_layers: int, new_layers: int) -> Path:
    """mergekit's recipe for the old layers over and over."""
    slices = [
        {"sources": [{"model": str(source), "layer_range": [0, min(old_layers, new_layers - start)]}]}
        for start in range(0, new_layers, old_layers)
    ]
    return write_text(path, to_yaml({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))


def merge_command(environment: Path, recipe: Path, target: Path, options: Sequence[str]) -> list[str]:
    """mergekit's command line."""
    return [str(environment / "bin/mergekit-yaml"), str(recipe), str(target), "--no-copy-tokenizer", *options]


def clean_environment() -> dict[str, str]:
    """Environment variables that do not lead mergekit to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def prepare(environment: Path, workdir: Path) -> tuple[list[Record], dict[str, str]]:
    """An environment whose mergekit can stack a tiny model: what was tried, and the versions that are in it.

    The versions are empty where nothing works; the attempts say why.
    """
    ready = environment / READY
    if ready.is_file():
        known = json.loads(ready.read_text(encoding="utf-8"))
        if known["packages"]["torch"] == version("torch"):
            return known["attempts"], known["packages"]
    attempts: list[Record] = []
    for wanted in candidates():
        install = [f"torch=={version('torch')}", *wanted]
        print("mergekit: installing", *install, flush=True)
        try:
            packages = _install(environment, install)
            _self_test(environment, workdir)
        except (RuntimeError, OSError, subprocess.SubprocessError) as caught:
            reason = str(caught).replace(str(environment), "ENVIRONMENT").replace(str(Path.home()), "~")
            attempts.append({"install": install, "reason": reason})
            print("mergekit: that does not work:", reason, flush=True)
            continue
        attempts.append({"install": install, "reason": None})
        write_text(ready, json.dumps({"attempts": attempts, "packages": packages}, indent=2))
        return attempts, packages
    return attempts, {}


def _install(environment: Path, install: Sequence[str]) -> dict[str, str]:
    """Install into a fresh environment.

    Raises:
        RuntimeError: where pip fails, with the end of what it said.
    """
    venv.create(environment, clear=True, with_pip=True)
    python = str(environment / "bin/python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *install],
        capture_output=True,
        text=True,
        check=False,
        env=clean_environment(),
    )
    if done.returncode:
        raise RuntimeError(
            f"pip install failed: {last_lines(done.stderr)} (a torch without CUDA needs "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)"
        )
    names = ("mergekit", "torch", "transformers", "safetensors", "pydantic")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=clean_environment())
    return dict(json.loads(found.stdout))


def _self_test(environment: Path, workdir: Path) -> None:
    """Stack a tiny model with every set of options.

    Raises:
        RuntimeError: where mergekit fails, with the end of what it said.
    """
    here = workdir / "self-test"
    shutil.rmtree(here, ignore_errors=True)
    dims = SOURCES["tiny"]
    measured(write_checkpoint, here / "source", llama_config(dims, VOCAB["tiny"], torch.bfloat16))
    recipe = write_recipe(here / "recipe.yaml", here / "source", dims.num_hidden_layers, LAYERS["tiny"])
    for options in MERGEKIT.values():
        command = merge_command(environment, recipe, here / "target", options)
        merge(here / "target", command, here / "log")


def _without_paths(text: str, context: Context) -> str:
    for path, name in ((context.environment, "ENVIRONMENT"), (context.workdir, "WORKDIR"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text


def tables(record: Record) -> list[Table]:
    """The record to read."""
    table = Table("what", "median s", "peak GiB", "weights that differ", title="layers stacked, whole commands")
    for name, seconds in record.get("median_seconds", {}).items():
        peak = statistics.median(record["peak_bytes"][name]) / 2**30
        differ = len(record["differing_weights"][name]) if name in record["differing_weights"] else ""
        table.add_row(name, f"{seconds:.2f}", f"{peak:.2f}", str(differ))
    if not record.get("ran"):
        table.add_row(f"mergekit does not run: {record['attempts'][-1]['reason']}")
    return [table]
