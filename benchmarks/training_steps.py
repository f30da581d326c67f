"""Steps of SlopTrainer compared with steps of plain Trainer.

Both train at the same time, in two processes that take turns: one makes a step while the other waits. So other work of
the machine affects both equally.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from measuring import Context, Record, make_goal
from rich.table import Table
from training_launch import start, wait_for_all
from training_setup import StepClock, build_model, draw_blocks, llama_config, make_arguments
from transformers import Trainer, default_data_collator

from slop_hf import GrowthSchedule, ModelDims, SlopTrainer
from slop_hf.cost.flops import count_parameters

DIMS = {"full": ModelDims(256, 704, 4, 4), "tiny": ModelDims(16, 32, 2, 2)}
VOCAB = {"full": 4096, "tiny": 64}
BLOCK = {"full": 128, "tiny": 16}
BATCH = {"full": 2, "tiny": 2}
STEPS = {"full": 240, "tiny": 6}
WARM_UP = {"full": 20, "tiny": 2}
REPETITIONS = {"full": 3, "tiny": 1}
CONTENDERS = ("SlopTrainer", "Trainer")
SPEED = 0.98  # smallest speed relative to plain Trainer


def run(context: Context) -> Record:
    """Measure a model of a few million parameters."""
    scale = context.scale
    settings: Record = {
        "dims": [*DIMS[scale].as_dict().values()],
        "vocab_size": VOCAB[scale],
        "block_size": BLOCK[scale],
        "batch": BATCH[scale],
        "steps": STEPS[scale],
    }
    rounds = [
        train_in_turns(CONTENDERS if number % 2 == 0 else CONTENDERS[::-1], settings, context.workdir)
        for number in range(context.repetitions)
    ]
    config = llama_config(DIMS[scale], VOCAB[scale], BLOCK[scale])
    return {
        "model": DIMS[scale].as_dict(),
        "parameters": count_parameters(DIMS[scale], config),
        "dtype": "float32",
        "tokens_per_step": BATCH[scale] * BLOCK[scale],
        "steps": STEPS[scale],
        "warm_up_steps": WARM_UP[scale],
        **compare(rounds, WARM_UP[scale]),
    }


def compare(rounds: Sequence[Mapping[str, Sequence[float]]], warm_up: int) -> Record:
    """Return the seconds per step of both, and the speed of SlopTrainer relative to Trainer.

    Args:
        rounds: seconds of every step by trainer, for each round.
        warm_up: number of first steps that do not count.
    """
    seconds = {name: [statistics.median(each[name][warm_up:]) for each in rounds] for name in CONTENDERS}
    lowest = {name: [_tenth(each[name][warm_up:]) for each in rounds] for name in CONTENDERS}
    # Ratios of simultaneous steps: whatever slows the machine down for a while affects both.
    ratios = [
        statistics.median(
            theirs / ours for ours, theirs in zip(*(each[name][warm_up:] for name in CONTENDERS), strict=True)
        )
        for each in rounds
    ]
    ratio = statistics.median(ratios)
    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(runs) for name, runs in seconds.items()},
        "lowest_tenth_seconds": lowest,
        "ratios": {"steps_per_second": ratios},
        "ratio": ratio,
        # Goals are upper limits, so this one uses the inverse ratio.
        "goals": [make_goal("steps: Trainer's steps per second / SlopTrainer's", 1 / ratio, 1 / SPEED)],
    }


def _tenth(values: Sequence[float]) -> float:
    """Return the lowest decile: during such a step hardly anything else ran."""
    return sorted(values)[len(values) // 10]


def train_in_turns(names: Sequence[str], settings: Mapping[str, Any], workdir: Path) -> dict[str, list[float]]:
    """Train both in turns, beginning with the first of `names`, and return the seconds of their steps."""
    with tempfile.TemporaryDirectory(dir=workdir) as directory:
        batons = [Path(directory, "there"), Path(directory, "back")]
        for baton in batons:
            os.mkfifo(baton)
        paths = [str(baton) for baton in batons]
        launches = [
            start(
                "training_steps.train",
                {**settings, "trainer": name, "output": str(Path(directory, name)), "batons": paths, "ahead": ahead},
            )
            for name, ahead in zip(names, (True, False), strict=True)
        ]
        return {name: result["seconds"] for name, result in zip(names, wait_for_all(launches), strict=True)}


def train(
    trainer: str,
    output: str,
    dims: Sequence[int],
    vocab_size: int,
    block_size: int,
    batch: int,
    steps: int,
    *,
    tied: bool = True,
    batons: Sequence[str] = (),
    ahead: bool = False,
    changes: Mapping[str, Any] | None = None,
) -> Record:
    """Train from random weights, and return the seconds of each step and the logs.

    Args:
        trainer: "SlopTrainer" or "Trainer".
        output: directory where SlopTrainer writes its stage after the last step.
        dims, vocab_size, tied: structure, vocabulary size and tied embeddings of the model.
        block_size, batch, steps: tokens per block, blocks per step, number of steps.
        batons: two pipes for taking turns with another process; without them it trains alone.
        ahead: whether this process makes the first step.
        changes: changes to the training arguments.
    """
    slop = trainer == "SlopTrainer"
    structure = ModelDims(*dims)
    clock = Turns(steps, [Path(baton) for baton in batons], ahead) if batons else StepClock()
    changes = {"per_device_train_batch_size": batch, **(changes or {}), **({} if slop else {"max_steps": steps})}
    args = make_arguments(output, slop=slop, **changes)
    model = build_model(llama_config(structure, vocab_size, block_size, tied=tied))
    data = draw_blocks(steps * batch, block_size, vocab_size)
    common: Record = {"train_dataset": data, "data_collator": default_data_collator, "callbacks": [clock]}
    if slop:
        schedule = GrowthSchedule(structure, (), steps * batch * block_size)
        SlopTrainer(model, args, schedule=schedule, **common).train()
    else:
        Trainer(model, args, **common).train()
    seconds = clock.seconds if isinstance(clock, Turns) else [end - begin for begin, end in pairwise(clock.ends)]
    return {"seconds": seconds, "logs": clock.logs}


class Turns(StepClock):
    """Makes steps in turns with another process: after each step, the partner makes one.

    A step lasts from the end of the wait to the end of the step, and includes fetching its batch and all callbacks.

    Args:
        steps: number of steps of each process. The first one, without a wait before it, and the last one, after which
            SlopTrainer writes, do not count.
        batons: pipes from the process ahead to the other one, and back.
        ahead: whether this process is ahead.
    """

    def __init__(self, steps: int, batons: Sequence[Path], ahead: bool) -> None:
        super().__init__()
        there, back = batons
        # A pipe opens once both ends are opened, so both sides use the same order; otherwise they would deadlock.
        if ahead:
            self._give, self._take = there.open("wb", buffering=0), back.open("rb", buffering=0)
        else:
            self._take, self._give = there.open("rb", buffering=0), back.open("wb", buffering=0)
        self._steps, self._ahead = steps, ahead
        self._began: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Seconds of all steps but the first and the last."""
        return [end - began for began, end in zip(self._began, self.ends[1:], strict=False)][: self._steps - 2]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        done = len(self.ends)
        # The process behind has no baton after its first step, and the one ahead has no partner left after its last.
        if (done > 1 or self._ahead) and not (done == self._steps and self._ahead):
            self._give.write(b".")
        if done < self._steps:
            if not self._take.read(1):
                raise RuntimeError("the other process ended early")
            self._began.append(time.perf_counter())


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    table = Table("trainer", "median ms per step", "lowest tenth", "steps / s", title="steps")
    for name, seconds in record["median_seconds"].items():
        lowest = statistics.median(record["lowest_tenth_seconds"][name])
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{lowest * 1e3:.1f}", f"{1 / seconds:.2f}")
    table.caption = f"SlopTrainer / Trainer, steps per second: {record['ratio']:.3f}"
    return [table]
