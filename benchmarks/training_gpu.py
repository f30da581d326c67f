"""The paper's 1B target on one GPU: speed and MFU compared with plain Trainer, compiled or not, and a boundary."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from checkpoints import require_space
from measuring import Context, Record, alternate, make_goal
from rich.table import Table
from training_boundary import LIMIT, STATES, compare, measure_round
from training_launch import launch
from training_setup import describe_growth, llama_config
from training_steps import CONTENDERS, SPEED

from slop_hf import ModelDims
from slop_hf.cost.device_peaks import look_up_peak_flops
from slop_hf.cost.flops import count_flops_per_token, count_parameters

#: From the paper's Table 1: the structure before the last growth (by hidden), and the target.
SOURCE = {"full": ModelDims(768, 7680, 8, 6), "tiny": ModelDims(16, 48, 2, 2)}
TARGET = {"full": ModelDims(2816, 7680, 8, 22), "tiny": ModelDims(32, 48, 2, 4)}
VOCAB = {"full": 32000, "tiny": 64}
BLOCK = {"full": 2048, "tiny": 16}
BATCH = {"full": 8, "tiny": 2}
LOGGING_STEPS = {"full": 10, "tiny": 2}
STEPS = {"full": 80, "tiny": 8}
WARM_UP = {"full": 20, "tiny": 2}  # steps that do not count; the first one compiles
REPETITIONS = {"full": 3, "tiny": 1}
NO_GPU = (
    "gpu needs a CUDA device, and none is visible: run it where nvidia-smi shows one; "
    "the parts steps, boundary and memory need none"
)


def run(context: Context) -> Record:
    """Measure the first GPU.

    Raises:
        SystemExit: if there is none.
    """
    (gpu,) = launch("training_gpu.describe_device", {}, gpu=True)
    if gpu["name"] is None:
        print(NO_GPU, file=sys.stderr)
        raise SystemExit(2)
    peak = gpu["peak"] if context.peak_tflops is None else context.peak_tflops * 1e12
    return measure(context, gpu["name"], peak)


def describe_device() -> Record:
    """Return the first GPU's name, and its peak in bf16 if known; to be called in a new process."""
    if not torch.cuda.is_available():
        return {"name": None, "peak": None}
    name = torch.cuda.get_device_name(0)
    return {"name": name, "peak": look_up_peak_flops(name, "bf16")}


def measure(
    context: Context, name: str, peak: float | None, *, gpu: bool = True, compiled: Sequence[bool] = (False, True)
) -> Record:
    """Measure steps of both trainers, compiled and not, and a boundary.

    Args:
        context: settings of the part.
        name: name of the device.
        peak: peak of the device in FLOP/s; None leaves out the MFU.
        gpu: whether to use the GPU; False tries the part out on the CPU.
        compiled: values of `torch_compile` to measure.
    """
    scale, vocab, block = context.scale, VOCAB[context.scale], BLOCK[context.scale]
    config = llama_config(TARGET[scale], vocab, block, tied=False)
    settings: Record = {
        "dims": [*TARGET[scale].as_dict().values()],
        "vocab_size": vocab,
        "tied": False,
        "block_size": block,
        "batch": BATCH[scale],
        "steps": STEPS[scale],
    }
    changes = {"bf16": gpu, "logging_steps": LOGGING_STEPS[scale]}
    cases = []
    for is_compiled in compiled:
        contenders = {
            trainer: partial(
                train_alone,
                context,
                trainer,
                {**settings, "changes": {**changes, "torch_compile": is_compiled}},
                gpu=gpu,
            )
            for trainer in CONTENDERS
        }
        results = alternate(contenders, context.repetitions)
        speeds = {
            trainer: [compute_speed(run["logs"], BATCH[scale] * block, WARM_UP[scale]) for run in runs]
            for trainer, runs in results.items()
        }
        flops = float(count_flops_per_token(TARGET[scale], config, block))
        cases.append({"torch_compile": is_compiled, **compare_speeds(speeds, flops, peak)})
    crossing = measure_boundary(context, gpu=gpu)
    return {
        "device": name,
        "peak_flops": peak,
        "dtype": "bfloat16 (autocast), weights and AdamW in float32",
        "attention": "sdpa",
        "model": TARGET[scale].as_dict(),
        "parameters": count_parameters(TARGET[scale], config),
        "vocab_size": vocab,
        "block_size": block,
        "tokens_per_step": BATCH[scale] * block,
        "steps": STEPS[scale],
        "warm_up_steps": WARM_UP[scale],
        "cases": cases,
        "boundary": crossing,
        "goals": [*make_goals(cases), make_goal("boundary: s / (save + load)", crossing["ratio"], LIMIT)],
    }


def train_alone(context: Context, trainer: str, settings: Record, *, gpu: bool) -> Record:
    """Train in a new process."""
    changes = dict(settings["changes"])
    if trainer == "SlopTrainer" and context.peak_tflops is not None:
        changes["peak_tflops"] = context.peak_tflops
    output = context.workdir / "run"
    settings = {**settings, "changes": changes, "trainer": trainer, "output": str(output)}
    try:
        return launch("training_steps.train", settings, gpu=gpu)[0]
    finally:
        shutil.rmtree(output, ignore_errors=True)


def compute_speed(logs: Sequence[Mapping[str, Any]], tokens_per_step: int, warm_up: int) -> Record:
    """Return the median speed between two logs. A logged loss has been computed, so the GPU has no work left then.

    Args:
        logs: logs with `at`, in seconds, and `step`; those of SlopTrainer with `tokens_per_second` and perhaps `mfu`.
        tokens_per_step: tokens per step of either trainer.
        warm_up: number of first steps that do not count.

    Returns:
        `seconds` per step and `tokens_per_second`, by the same clock for both trainers; `logged`, the medians of what
        SlopTrainer has logged.
    """
    counted = [log for log in logs if log["step"] >= warm_up]
    seconds = statistics.median(
        (later["at"] - earlier["at"]) / (later["step"] - earlier["step"]) for earlier, later in pairwise(counted)
    )
    logged = {
        name: statistics.median(log[name] for log in counted[1:])
        for name in ("tokens_per_second", "mfu")
        if all(name in log for log in counted[1:])
    }
    return {"seconds": seconds, "tokens_per_second": tokens_per_step / seconds, "logged": logged}


def compare_speeds(speeds: Mapping[str, Sequence[Record]], flops: float, peak: float | None) -> Record:
    """Return the medians of both trainers, and the ratio of their speeds.

    Args:
        speeds: result of `compute_speed` for each repetition, by trainer.
        flops: FLOPs per token.
        peak: peak of the device in FLOP/s; None leaves out the MFU.
    """
    seconds = {trainer: [run["seconds"] for run in runs] for trainer, runs in speeds.items()}
    tokens = {trainer: statistics.median(run["tokens_per_second"] for run in runs) for trainer, runs in speeds.items()}
    logged = [run["logged"] for run in speeds["SlopTrainer"]]
    ratios = [theirs / ours for ours, theirs in zip(seconds["SlopTrainer"], seconds["Trainer"], strict=True)]
    return {
        "seconds": seconds,
        "tokens_per_second": tokens,
        "mfu": None if peak is None else {trainer: speed * flops / peak for trainer, speed in tokens.items()},
        "logged": {
            name: statistics.median(medians[name] for medians in logged)
            for name in ("tokens_per_second", "mfu")
            if all(name in medians for medians in logged)
        },
        "ratios": {"steps_per_second": ratios},
        "ratio": statistics.median(ratios),
    }


def measure_boundary(context: Context, *, gpu: bool) -> Record:
    """Measure the paper's last growth, compared with saving and loading the same states."""
    scale, vocab, block = context.scale, VOCAB[context.scale], BLOCK[context.scale]
    config = llama_config(SOURCE[scale], vocab, block, tied=False)
    growth = describe_growth(SOURCE[scale], TARGET[scale], config)
    require_space(context.workdir, STATES * (2 * growth["source_parameters"] + growth["target_parameters"]))
    settings: Record = {
        "initial": [*SOURCE[scale].as_dict().values()],
        "target": [*TARGET[scale].as_dict().values()],
        "operators": ["hidden", "mha"],
        "init": "random",
        "vocab_size": vocab,
        "tied": False,
        "block_size": block,
        "batch": BATCH[scale],
        "steps": 3,
        "changes": {"bf16": gpu},
    }
    rounds = [measure_round(context.workdir, settings, gpu=gpu) for _ in range(context.repetitions)]
    return {"operator": "hidden", "init": "random", **growth, **compare(rounds)}


def make_goals(cases: Sequence[Record]) -> list[Record]:
    """Return the same goals as without a GPU."""
    goals = []
    for case in cases:
        how = "compiled" if case["torch_compile"] else "eager"
        what = f"{how}: Trainer's steps per second / SlopTrainer's"
        goals.append(make_goal(what, 1 / case["ratio"], 1 / SPEED))
    return goals


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    table = Table("compiled", "trainer", "tokens / s", "MFU", "ratio", title=record["device"])
    for case in record["cases"]:
        for trainer, tokens in case["tokens_per_second"].items():
            mfu = "" if case["mfu"] is None else f"{case['mfu'][trainer]:.1%}"
            ratio = f"{case['ratio']:.3f}" if trainer == "SlopTrainer" else ""
            table.add_row(str(case["torch_compile"]), trainer, f"{tokens:,.0f}", mfu, ratio)
    crossing = Table("s", "save_file", "load_file", "ratio", title="boundary")
    medians = record["boundary"]["median_seconds"]
    numbers = (f"{medians[name]:.2f}" for name in ("boundary", "save_file", "load_file"))
    crossing.add_row(*numbers, f"{record['boundary']['ratio']:.2f}")
    return [table, crossing]
