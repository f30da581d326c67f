"""Settings of the smallest experiments on one core, and the parts of the time of a step.

The models are those of `recipes/experiments/crossing.yaml`, with heads of several sizes. Contenders run in turns, each
in a process with one thread. Seconds are those of the processor, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import Context, Record, alternate, make_goal
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from training_launch import launch
from training_setup import build_model, draw_blocks, llama_config, make_arguments
from transformers import TrainerCallback

from slop_hf import GrowthSchedule, ModelDims, SlopTrainer
from slop_hf.cost.flops import count_flops_per_token

COMPILED = {"torch_compile": True, "compile_layers": True}
#: Contenders of each scale: structure, and changes of the training arguments. The first one is the baseline.
CASES: dict[str, dict[str, tuple[tuple[int, ...], Record]]] = {
    "pilot": {
        "heads of 8": ((48, 128, 8, 6), {}),
        "heads of 16": ((48, 128, 8, 3), {}),
        "heads of 16, compiled layers": ((48, 128, 8, 3), COMPILED),
        "heads of 24, compiled layers": ((48, 128, 8, 2), COMPILED),
    },
    "nano8": {
        "heads of 8": ((88, 240, 8, 11), {}),
        "heads of 22": ((88, 240, 8, 4), {}),
        "heads of 22, compiled layers": ((88, 240, 8, 4), COMPILED),
    },
}
#: Contender whose settings the recipe has, by scale.
CHOSEN = {"pilot": "heads of 16", "nano8": "heads of 22, compiled layers"}
SPEED = 2.5  # wanted speed relative to the baseline
VOCAB, BLOCK = 1024, 128
BLOCKS = {"full": 32, "tiny": 2}  # per step
STEPS = {"full": 6, "tiny": 5}
WARM_UP = 2
PROFILED = 2  # steps at the end, which do not count
REPETITIONS = {"full": 2, "tiny": 1}
PRODUCT = {"full": 1024, "tiny": 64}  # side of the matrices whose product shows the limit of the core
#: Words in the names of torch's operations, by group.
GROUPS = {
    "attention": ("scaled_dot_product",),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "loss": ("log_softmax", "nll_loss"),
    "clipping and optimizer": ("adamw", "foreach"),
}


def run(context: Context) -> Record:
    """Measure the contenders of both scales; at the scale `tiny`, the baseline and one other of the first."""
    cases = CASES
    if context.scale == "tiny":
        cases = {"pilot": {name: CASES["pilot"][name] for name in ("heads of 8", "heads of 16")}}
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(context.workdir / "compiled")}
    records = [_compare(scale, contenders, context, environment) for scale, contenders in cases.items()]
    goals = [
        make_goal(
            f"settings: {each['case']}, seconds per step, {CHOSEN[each['case']]} / heads of 8",
            1 / each["speed"][CHOSEN[each["case"]]],
            1 / SPEED,
        )
        for each in records
        if CHOSEN[each["case"]] in each["speed"]
    ]
    return {
        "tokens_per_step": BLOCKS[context.scale] * BLOCK,
        "steps": STEPS[context.scale],
        "threads": 1,
        "cases": records,
        "goals": goals,
    }


def _compare(
    case: str,
    contenders: Mapping[str, tuple[tuple[int, ...], Record]],
    context: Context,
    environment: Mapping[str, str],
) -> Record:
    """Train the contenders of one case in turns."""

    def measure(name: str) -> Record:
        dims, changes = contenders[name]
        settings = {"dims": dims, "scale": context.scale, "output": str(context.workdir / "run"), "changes": changes}
        (result,) = launch("training_settings.train", settings, environment=environment)
        return result

    runs = alternate({name: lambda name=name: measure(name) for name in contenders}, context.repetitions)
    seconds = {name: [each["seconds"] for each in results] for name, results in runs.items()}
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = next(iter(contenders))
    products = [each["product_flops_per_second"] for results in runs.values() for each in results]
    flops = {name: results[0]["step_flops"] for name, results in runs.items()}
    return {
        "case": case,
        "dims": {name: list(dims) for name, (dims, _) in contenders.items()},
        "changes": {name: changes for name, (_, changes) in contenders.items()},
        "seconds": seconds,
        "median_seconds": medians,
        "first_step_seconds": {name: [each["first_step"] for each in results] for name, results in runs.items()},
        "flops_per_second": {name: flops[name] / value for name, value in medians.items()},
        # Of the same round, so that whatever slows the machine down for a while affects both.
        "speed": {
            name: statistics.median(ours / theirs for ours, theirs in zip(seconds[baseline], values, strict=True))
            for name, values in seconds.items()
        },
        "shares": {name: results[-1]["shares"] for name, results in runs.items()},
        "product_flops_per_second": statistics.median(products),
    }


def train(dims: Sequence[int], scale: str, output: str, changes: Mapping[str, Any]) -> Record:
    """Train from random weights, and return the seconds per step and how they divide.

    Args:
        dims: structure of the model.
        scale: "full" or "tiny".
        output: directory where each run makes its own.
        changes: changes to the training arguments.
    """
    structure, blocks = ModelDims(*dims), BLOCKS[scale]
    steps = STEPS[scale] + PROFILED
    clock = _ProcessorClock(steps)
    settings = {"per_device_train_batch_size": blocks, "batch_tokens": [blocks * BLOCK], **changes}
    config = llama_config(structure, VOCAB, BLOCK)
    data = draw_blocks(steps * blocks, BLOCK, VOCAB)
    schedule = GrowthSchedule(structure, (), steps * blocks * BLOCK)
    args = make_arguments(Path(output, str(time.time_ns())), **settings)
    SlopTrainer(build_model(config), args, schedule=schedule, train_dataset=data, callbacks=[clock]).train()
    side = PRODUCT[scale]
    return {
        "seconds": statistics.median(clock.seconds[WARM_UP : STEPS[scale]]),
        "first_step": clock.seconds[0],
        "step_flops": count_flops_per_token(structure, config, BLOCK) * blocks * BLOCK,
        "shares": clock.shares,
        "product_flops_per_second": 2 * side**3 / _time_product(side),
    }


class _ProcessorClock(TrainerCallback):
    """Records the processor's seconds of each step, and how the last steps divide into groups of operations."""

    def __init__(self, steps: int) -> None:
        self.seconds: list[float] = []
        self.shares: dict[str, float] = {}
        self._steps = steps
        self._profile = profile(activities=[ProfilerActivity.CPU])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._steps - PROFILED:
            self._profile.start()
        self._began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self._began)
        if state.global_step == self._steps:
            self._profile.stop()
            times = {event.key: event.self_cpu_time_total for event in self._profile.key_averages()}
            self.shares = group_shares(times)


def group_shares(times: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each group of operations in the time of all.

    Args:
        times: time of each operation without the operations that it calls, in any unit.
    """
    total = sum(times.values())
    shares = {
        group: sum(time_ for name, time_ in times.items() if any(word in name for word in words)) / total
        for group, words in GROUPS.items()
    }
    return {**shares, "other": 1 - sum(shares.values())}


def _time_product(side: int) -> float:
    """Return the least seconds of the processor for a product of two square float32 matrices."""
    one, other = torch.randn(2, side, side)
    seconds = []
    for _ in range(5):
        began = time.process_time()
        _ = one @ other
        seconds.append(time.process_time() - began)
    return min(seconds)


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    return [table for case in record["cases"] for table in (_build_speed_table(case), _build_shares_table(case))]


def _build_speed_table(case: Record) -> Table:
    table = Table("settings", "ms per step", "first step, s", "GFLOP/s", "speed", title=f"settings: {case['case']}")
    for name, seconds in case["median_seconds"].items():
        first = " ".join(f"{value:.1f}" for value in case["first_step_seconds"][name])
        speed, flops = case["speed"][name], case["flops_per_second"][name]
        table.add_row(name, f"{seconds * 1e3:.0f}", first, f"{flops / 1e9:.1f}", f"{speed:.2f}")
    table.caption = f"a large product of float32 matrices: {case['product_flops_per_second'] / 1e9:.0f} GFLOP/s"
    return table


def _build_shares_table(case: Record) -> Table:
    groups = list(next(iter(case["shares"].values())))
    table = Table("settings", *groups, title=f"shares of a step: {case['case']}")
    for name, shares in case["shares"].items():
        table.add_row(name, *(f"{shares[group]:.0%}" for group in groups))
    return table
