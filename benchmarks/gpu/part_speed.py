"""It is fast: the paper's 1B target on one GPU, next to plain Trainer, the device's peak and the disk."""

from __future__ import annotations

import gc
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from checkpoints import require_space
from common import PartRecord, Settings, wait_for_device
from estimates import estimate_autocast_bytes, estimate_memory
from measuring import Record, make_goal, time_call
from safetensors.torch import load_file, save_file
from training_boundary import STATES, compare, cross
from training_setup import (
    StepClock,
    build_model,
    describe_growth,
    draw_blocks,
    llama_config,
    make_arguments,
)
from transformers import Trainer, default_data_collator

from slop_hf import GrowthSchedule, ModelDims, RunDirectory, SlopTrainer, calibrate
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.io.files import flush_to_disk

#: The target of the paper's Table 1, and structures of the same shape: to calibrate with, and to grow from.
TARGET = {"full": ModelDims(2816, 7680, 8, 22), "tiny": ModelDims(32, 96, 2, 4)}
CALIBRATED = {
    "full": (ModelDims(768, 7680, 8, 6), ModelDims(1408, 7680, 8, 11), ModelDims(2048, 7680, 8, 16)),
    "tiny": (ModelDims(16, 96, 2, 2), ModelDims(128, 512, 4, 4)),  # far apart: noise must not turn them around
}
HALF = {"full": ModelDims(1664, 7680, 8, 13), "tiny": ModelDims(16, 96, 2, 2)}
VOCAB = {"full": 32000, "tiny": 64}
BLOCK = {"full": 2048, "tiny": 16}
BATCH = {"full": 8, "tiny": 2}  # blocks on the device at a time
ACCUMULATION = {"full": 16, "tiny": 2}  # with it, the 262,144 tokens of the paper's steps
STEPS = {"full": 5, "tiny": 4}
WARM_UP = {"full": 2, "tiny": 2}  # steps before the first one that counts; the first one compiles
CALIBRATION_STEPS = {"full": 3, "tiny": 2}  # after one of warm-up
CONTENDERS = ("SlopTrainer", "Trainer")
#: Side of the square matrices whose product is the measured peak, and products timed.
MATRIX = {"full": 8192, "tiny": 64}
PRODUCTS = 20

MFU, SPEED, PREDICTION, MEMORY, BOUNDARY = 0.45, 0.99, 0.05, 0.05, 1.0


def run(settings: Settings) -> None:
    """Measure everything, the most important first, and write each result at once."""
    scale = settings.scale
    config = llama_config(TARGET[scale], VOCAB[scale], BLOCK[scale], tied=False)
    record = PartRecord.begin(settings, "speed")
    peak = record.content["device"]["peak_flops"]
    flops = float(count_flops_per_token(TARGET[scale], config, BLOCK[scale]))
    record.add(
        model=TARGET[scale].as_dict(),
        parameters=count_parameters(TARGET[scale], config),
        vocab_size=VOCAB[scale],
        block_size=BLOCK[scale],
        micro_batch=BATCH[scale],
        tokens_per_step=BATCH[scale] * ACCUMULATION[scale] * BLOCK[scale],
        steps=STEPS[scale],
        warm_up_steps=WARM_UP[scale],
        dtype="bfloat16 (autocast), weights and AdamW in float32",
        attention="sdpa",
        matrix_product_flops=measure_matrix_product(settings),
        cases=[],
    )
    memory: int | None = None
    for is_compiled in (True, False):
        case, allocated = measure_steps(settings, is_compiled=is_compiled, flops=flops, content=record.content)
        record.content["cases"].append(case)
        record.add(make_step_goals(case, peak))
        memory = allocated if not is_compiled else memory
    goals, calibration = measure_calibration(settings, record.content["cases"][-1])
    record.add(goals, calibration=calibration)
    goals, comparison = compare_memory(settings, memory)
    record.add(goals, memory=comparison)
    crossing = measure_boundary(settings)
    record.add([make_goal("boundary: s / (save + load)", crossing["ratio"], BOUNDARY)], boundary=crossing)


def measure_matrix_product(settings: Settings) -> float:
    """Return the FLOP/s of a large product in bf16: what the device reaches, next to its vendor's peak."""
    size = MATRIX[settings.scale]
    device = "cuda" if settings.is_gpu else "cpu"
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = left @ right  # chooses the kernel

    def multiply() -> None:
        for _ in range(PRODUCTS):
            torch.matmul(left, right, out=product)
        wait_for_device(settings)

    multiply()
    seconds = time_call(multiply)
    return 2 * size**3 * PRODUCTS / seconds


class WithoutFiles(SlopTrainer):
    """Trains as `SlopTrainer` does, but writes no stage, which would take longer than the steps."""

    def _finish_stage(self, span: Any) -> None:
        pass


def measure_steps(
    settings: Settings, *, is_compiled: bool, flops: float, content: Mapping[str, Any]
) -> tuple[Record, int | None]:
    """Train with both trainers in turns, in this process; return their speeds, and the peak memory of SlopTrainer.

    Args:
        is_compiled: whether `torch_compile` is on; a CPU does not compile.
        flops: FLOPs per token.
        content: record of the part, with the device's peaks.
    """
    speeds: dict[str, list[Record]] = {name: [] for name in CONTENDERS}
    allocated: int | None = None
    for name in CONTENDERS:
        free(settings)
        logs = train(settings, name, is_compiled=is_compiled)
        if settings.is_gpu and name == "SlopTrainer":
            allocated = torch.cuda.max_memory_allocated()
        speeds[name].append(compute_speed(logs, content["tokens_per_step"], WARM_UP[settings.scale]))
    free(settings)
    case = compare_speeds(speeds, flops, content["device"]["peak_flops"], content["matrix_product_flops"])
    return {"torch_compile": is_compiled, **case}, allocated


def train(settings: Settings, trainer: str, *, is_compiled: bool) -> list[Record]:
    """Train the target from random weights on random tokens; return the logs with their times."""
    scale = settings.scale
    clock, slop = StepClock(), trainer == "SlopTrainer"
    steps, blocks = STEPS[scale], STEPS[scale] * BATCH[scale] * ACCUMULATION[scale]
    changes: Record = {
        "per_device_train_batch_size": BATCH[scale],
        "gradient_accumulation_steps": ACCUMULATION[scale],
        "bf16": True,
        "logging_steps": 1,
        "use_cpu": not settings.is_gpu,
        "torch_compile": is_compiled and settings.is_gpu,
    }
    args = make_arguments(settings.workdir / "steps", slop=slop, **changes, **({} if slop else {"max_steps": steps}))
    model = build_model(llama_config(TARGET[scale], VOCAB[scale], BLOCK[scale], tied=False))
    data = draw_blocks(blocks, BLOCK[scale], VOCAB[scale])
    common: Record = {"train_dataset": data, "data_collator": default_data_collator, "callbacks": [clock]}
    if slop:
        schedule = GrowthSchedule(TARGET[scale], (), blocks * BLOCK[scale])
        WithoutFiles(model, args, schedule=schedule, **common).train()
    else:
        Trainer(model, args, **common).train()
    shutil.rmtree(settings.workdir / "steps", ignore_errors=True)
    return clock.logs


def free(settings: Settings) -> None:
    """Free the memory of the last trainer, and reset the peak."""
    gc.collect()  # trainers are reference cycles
    torch.compiler.reset()
    if settings.is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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


def compare_speeds(
    speeds: Mapping[str, Sequence[Record]], flops: float, peak: float | None, product: float | None = None
) -> Record:
    """Return the medians of both trainers, and the ratio of their speeds.

    Args:
        speeds: result of `compute_speed` for each repetition, by trainer.
        flops: FLOPs per token.
        peak: peak of the device in FLOP/s; None leaves out the MFU.
        product: measured FLOP/s of a matrix product; None leaves out the share of it.
    """
    seconds = {trainer: [run["seconds"] for run in runs] for trainer, runs in speeds.items()}
    tokens = {trainer: statistics.median(run["tokens_per_second"] for run in runs) for trainer, runs in speeds.items()}
    logged = [run["logged"] for run in speeds["SlopTrainer"]]
    ratios = [theirs / ours for ours, theirs in zip(seconds["SlopTrainer"], seconds["Trainer"], strict=True)]
    shares = {
        name: None if limit is None else {trainer: speed * flops / limit for trainer, speed in tokens.items()}
        for name, limit in (("mfu", peak), ("of_matrix_product", product))
    }
    return {
        "seconds": seconds,
        "tokens_per_second": tokens,
        **shares,
        "logged": {
            name: statistics.median(medians[name] for medians in logged)
            for name in ("tokens_per_second", "mfu")
            if all(name in medians for medians in logged)
        },
        "ratios": {"steps_per_second": ratios},
        "ratio": statistics.median(ratios),
    }


def make_step_goals(case: Record, peak: float | None) -> list[Record]:
    """Return the goals of both trainers' speeds; goals are upper limits, so shares are inverted."""
    how = "compiled" if case["torch_compile"] else "eager"
    goals = [make_goal(f"{how}: Trainer's steps per second / SlopTrainer's", 1 / case["ratio"], 1 / SPEED)]
    if peak is not None:
        goals.append(make_goal(f"{how}: 1 / MFU", 1 / case["mfu"]["SlopTrainer"], 1 / MFU))
    return goals


def measure_calibration(settings: Settings, case: Record) -> tuple[list[Record], Record]:
    """Predict the target's seconds per step from smaller structures, and compare with the measured, eager ones."""
    scale = settings.scale
    model = {"vocab_size": VOCAB[scale], "tie_word_embeddings": False}
    cost = calibrate(
        CALIBRATED[scale],
        model,
        sequence_length=BLOCK[scale],
        batch_size=BATCH[scale],
        steps=CALIBRATION_STEPS[scale],
        warmup_steps=1,
        precision="bf16",
        training={"use_cpu": not settings.is_gpu, "gradient_accumulation_steps": ACCUMULATION[scale]},
    )
    free(settings)
    config = llama_config(TARGET[scale], VOCAB[scale], BLOCK[scale], tied=False)
    flops = float(count_flops_per_token(TARGET[scale], config, BLOCK[scale]))
    tokens = BATCH[scale] * ACCUMULATION[scale] * BLOCK[scale]
    predicted, measured = 3600 * float(cost.hours(flops, tokens)), case["seconds"]["SlopTrainer"][0]
    error = predicted / measured - 1
    return [make_goal("calibrate: |predicted / measured seconds - 1|", abs(error), PREDICTION)], {
        "structures": [dims.as_dict() for dims in CALIBRATED[scale]],
        "cost_model": json.loads(cost.to_json()),
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "error": error,
    }


def compare_memory(settings: Settings, allocated: int | None) -> tuple[list[Record], Record]:
    """Compare the memory estimate with the most that was allocated."""
    scale = settings.scale
    dims, batch, block = TARGET[scale], BATCH[scale], BLOCK[scale]
    config = llama_config(dims, VOCAB[scale], block, tied=False).to_dict()
    total = estimate_memory(dims, config, block, batch)
    autocast = estimate_autocast_bytes(dims, config, batch * block)
    parts = {"estimated_bytes": total, "of_which_autocast_bytes": autocast, "allocated_bytes": allocated}
    if allocated is None:  # a CPU's memory is not counted
        return [], parts
    return [make_goal("memory: |estimated / allocated bytes - 1|", abs(total / allocated - 1), MEMORY)], parts


def measure_boundary(settings: Settings) -> Record:
    """Time a growth from half the size to the target, and saving and loading the same states of the device."""
    scale = settings.scale
    config = llama_config(HALF[scale], VOCAB[scale], BLOCK[scale], tied=False)
    growth = describe_growth(HALF[scale], TARGET[scale], config)
    output = settings.workdir / "boundary"
    require_space(settings.workdir, STATES * (2 * growth["source_parameters"] + growth["target_parameters"]))
    ours = cross(
        str(output),
        initial=[*HALF[scale].as_dict().values()],
        target=[*TARGET[scale].as_dict().values()],
        operators=["hidden", "mha"],
        init="random",
        vocab_size=VOCAB[scale],
        tied=False,
        block_size=BLOCK[scale],
        batch=BATCH[scale],
        steps=2,
        changes={"bf16": True, "use_cpu": not settings.is_gpu},
    )
    free(settings)
    peer = save_and_load(RunDirectory(output), settings)
    shutil.rmtree(output, ignore_errors=True)
    return {"operator": "hidden", "init": "random", **growth, **compare([{"ours": ours, "peer": peer}])}


def save_and_load(run: RunDirectory, settings: Settings) -> Record:
    """Save the states before a growth from the device, load those after it to the device; return the seconds."""
    device = "cuda" if settings.is_gpu else "cpu"
    before, after = (list_state_files(run.stage_dir(number)) for number in range(2))
    states = [load_file(path, device=device) for path in before]
    target = settings.workdir / "peer"
    target.mkdir()
    wait_for_device(settings)
    saving = time_call(partial(save, states, target))
    saved = sum(path.stat().st_size for path in target.iterdir())
    states.clear()
    shutil.rmtree(target)
    free(settings)

    def load() -> list[dict[str, torch.Tensor]]:
        # `load_file` only maps a file for a CPU.
        tensors = [load_file(path, device=device) for path in after]
        if not settings.is_gpu:
            tensors = [{name: tensor.clone() for name, tensor in part.items()} for part in tensors]
        wait_for_device(settings)
        return tensors

    loading = time_call(load)
    loaded = sum(path.stat().st_size for path in after)
    return {"save_file": saving, "load_file": loading, "saved_bytes": saved, "loaded_bytes": loaded}


def list_state_files(directory: Path) -> list[Path]:
    return sorted([*directory.glob("model*.safetensors"), *directory.glob("optimizer*.safetensors")])


def save(states: Sequence[dict[str, torch.Tensor]], target: Path) -> None:
    for number, tensors in enumerate(states):
        path = target / f"{number}.safetensors"
        save_file(tensors, path)
        flush_to_disk(path)
