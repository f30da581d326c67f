"""Stacked layers, compared with mergekit's `passthrough`, which is installed into a separate environment."""

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
from checkpoints import VOCAB, find_differences, llama_config, write_checkpoint
from measuring import (
    Context,
    Measurement,
    Record,
    alternate,
    compute_median_peak,
    compute_median_seconds,
    get_last_lines,
    list_runs,
    make_goal,
    measure_in_process,
    run_command,
)
from rich.table import Table

from slop_hf import ModelDims
from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_yaml
from slop_hf.io.units import format_bytes

SOURCES = {"full": ModelDims(1280, 3584, 20, 10), "tiny": ModelDims(64, 128, 2, 4)}
LAYERS = {"full": 45, "tiny": 5}
READY = "ready.json"  # lists what the environment holds; written last
OURS = "slop grow"
#: mergekit with the options that it needs (else it cannot save a layer that is used twice), and at its fastest.
MERGEKIT: dict[str, tuple[str, ...]] = {
    "mergekit": ("--clone-tensors",),
    "mergekit --async-write": ("--clone-tensors", "--async-write"),
}


class MergekitError(RuntimeError):
    """A failure of mergekit, not of this library."""


def list_candidates() -> list[list[str]]:
    """Return what to try to install: the newest with our transformers, then with any version, then older ones."""
    return [
        ["mergekit", f"transformers=={version('transformers')}"],
        ["mergekit"],
        ["mergekit==0.1.5", "transformers==5.17.*", "pydantic==2.12.*"],
        ["mergekit==0.1.4"],
        ["mergekit==0.0.6", "pydantic==2.10.*"],
    ]


def run(context: Context) -> Record:
    """Stack layers with both programs, measure them, and compare the weights that they write."""
    attempts, packages = prepare(context.environment, context.workdir)
    if not packages:
        return {"installed": False, "attempts": attempts, "goals": []}
    config = llama_config(SOURCES[context.scale], VOCAB[context.scale], torch.bfloat16)
    source, layers = context.workdir / "source", LAYERS[context.scale]
    measure_in_process(write_checkpoint, source, config)
    targets = {name: context.workdir / name.replace(" ", "") for name in (OURS, *MERGEKIT)}
    log = context.workdir / "log"
    contenders: dict[str, Callable[[], Measurement]] = {}
    recipe = write_recipe(context.workdir / "recipe.yaml", source, config.num_hidden_layers, layers)
    for name, options in MERGEKIT.items():
        command = build_merge_command(context.environment, recipe, targets[name], options)
        contenders[name] = partial(merge, targets[name], command, log)
    ours = [sys.executable, "-m", "slop_hf", "grow", str(source), "-o", str(targets[OURS])]
    ours += ["--num-hidden-layers", str(layers)]
    contenders[OURS] = partial(run_from_scratch, targets[OURS], ours, log, os.environ)
    try:
        results = alternate(contenders, context.repetitions)
    except MergekitError as caught:
        attempts.append({"install": ["what was installed"], "reason": _without_paths(str(caught), context)})
        return {"installed": True, "packages": packages, "ran": False, "attempts": attempts, "goals": []}
    unlike = {name: measure_in_process(find_differences, targets[OURS], targets[name]).value for name in MERGEKIT}
    seconds = {name: compute_median_seconds(runs) for name, runs in results.items()}
    peaks = {name: compute_median_peak(runs) for name, runs in results.items()}
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
        **list_runs(results),
        "seconds_to_exit": {name: [run.value for run in runs] for name, runs in results.items()},
        "median_seconds": seconds,
        "median_peak_bytes": peaks,
        "differing_weights": unlike,
        "ratios": {"seconds_to_fastest": time_ratio, "peak_to_leanest": peak_ratio},
        "goals": [
            make_goal("weights that differ from mergekit's", sum(len(names) for names in unlike.values()), 0),
            make_goal("s / the faster of mergekit's", time_ratio, 1.0),
            make_goal("peak memory / the leaner of mergekit's", peak_ratio, 1.0),
        ],
    }


def run_from_scratch(target: Path, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Measurement:
    """Run a command that writes `target`, after removing what an earlier command left there."""
    shutil.rmtree(target, ignore_errors=True)
    return run_command(command, log, environment)


def merge(target: Path, command: Sequence[str], log: Path) -> Measurement:
    """Run mergekit.

    Raises:
        MergekitError: if it fails, with the end of its output; failures of this library end the benchmark.
    """
    try:
        return run_from_scratch(target, command, log, clear_environment())
    except RuntimeError as caught:
        raise MergekitError(str(caught)) from caught


def write_recipe(path: Path, source: Path, old_layers: int, new_layers: int) -> Path:
    """Write mergekit's recipe for repeating the old layers until there are enough."""
    slices = [
        {"sources": [{"model": str(source), "layer_range": [0, min(old_layers, new_layers - start)]}]}
        for start in range(0, new_layers, old_layers)
    ]
    return write_text(path, to_yaml({"slices": slices, "merge_method": "passthrough", "dtype": "bfloat16"}))


def build_merge_command(environment: Path, recipe: Path, target: Path, options: Sequence[str]) -> list[str]:
    """Return the command line of mergekit."""
    return [str(environment / "bin/mergekit-yaml"), str(recipe), str(target), "--no-copy-tokenizer", *options]


def clear_environment() -> dict[str, str]:
    """Return environment variables that do not lead mergekit to our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def prepare(environment: Path, workdir: Path) -> tuple[list[Record], dict[str, str]]:
    """Prepare an environment whose mergekit can stack a tiny model.

    Returns:
        The attempts, with the reasons of those that failed, and the versions of the packages; none if all failed.
    """
    ready = environment / READY
    if ready.is_file():
        installed = json.loads(ready.read_text(encoding="utf-8"))
        if installed["packages"]["torch"] == version("torch"):
            return installed["attempts"], installed["packages"]
    attempts: list[Record] = []
    for wanted in list_candidates():
        install = [f"torch=={version('torch')}", *wanted]
        print("mergekit: installing", *install, flush=True)
        try:
            packages = _install(environment, install)
            _self_test(environment, workdir)
        except (RuntimeError, OSError, subprocess.SubprocessError) as caught:
            reason = str(caught).replace(str(environment), "ENVIRONMENT").replace(str(Path.home()), "~")
            attempts.append({"install": install, "reason": reason})
            print("mergekit: failed:", reason, flush=True)
            continue
        attempts.append({"install": install, "reason": None})
        write_text(ready, json.dumps({"attempts": attempts, "packages": packages}, indent=2))
        return attempts, packages
    return attempts, {}


def _install(environment: Path, install: Sequence[str]) -> dict[str, str]:
    """Install packages into a new environment.

    Raises:
        RuntimeError: if pip fails, with the end of its output.
    """
    venv.create(environment, clear=True, with_pip=True)
    python = str(environment / "bin/python")
    done = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *install],
        capture_output=True,
        text=True,
        check=False,
        env=clear_environment(),
    )
    if done.returncode:
        raise RuntimeError(
            f"pip install failed: {get_last_lines(done.stderr)} (a torch without CUDA needs "
            "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu)"
        )
    names = ("mergekit", "torch", "transformers", "safetensors", "pydantic")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    listing = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=clear_environment())
    return dict(json.loads(listing.stdout))


def _self_test(environment: Path, workdir: Path) -> None:
    """Stack a tiny model with every set of options.

    Raises:
        RuntimeError: if mergekit fails, with the end of its output.
    """
    here = workdir / "self-test"
    shutil.rmtree(here, ignore_errors=True)
    dims = SOURCES["tiny"]
    measure_in_process(write_checkpoint, here / "source", llama_config(dims, VOCAB["tiny"], torch.bfloat16))
    recipe = write_recipe(here / "recipe.yaml", here / "source", dims.num_hidden_layers, LAYERS["tiny"])
    for options in MERGEKIT.values():
        command = build_merge_command(environment, recipe, here / "target", options)
        merge(here / "target", command, here / "log")


def _without_paths(text: str, context: Context) -> str:
    for path, name in ((context.environment, "ENVIRONMENT"), (context.workdir, "WORKDIR"), (Path.home(), "~")):
        text = text.replace(str(path), name)
    return text


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    table = Table("what", "median s", "peak", "weights that differ", title="layers stacked, whole commands")
    for name, seconds in record.get("median_seconds", {}).items():
        peak = format_bytes(statistics.median(record["peak_bytes"][name]))
        differ = len(record["differing_weights"][name]) if name in record["differing_weights"] else ""
        table.add_row(name, f"{seconds:.2f}", peak, str(differ))
    if not record.get("ran"):
        table.add_row(f"mergekit does not run: {record['attempts'][-1]['reason']}")
    return [table]
