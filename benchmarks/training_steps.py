"""Steps of SlopTrainer beside steps of plain Trainer.

Both train at once, each in a process of its own, and take turns: one makes a step while the other waits. Whatever else
the machine does then hits both alike.
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

from measuring import Record, goal
from rich.table import Table
from training_launch import launch_together, start
from training_setup import Context, StepClock, arguments, build, llama_config, random_blocks
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
SPEED = 0.98  # of plain Trainer's steps per second, at least


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
        by_turns(CONTENDERS if number % 2 == 0 else CONTENDERS[::-1], settings, context.workdir)
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
    """Seconds of a step, and how many steps SlopTrainer makes in the time of one of Trainer's.

    Args:
        rounds: of each, the seconds of every step of both.
        warm_up: first steps that do not count.
    """
    seconds = {name: [statistics.median(one[name][warm_up:]) for one in rounds] for name in CONTENDERS}
    lowest = {name: [_tenth(one[name][warm_up:]) for one in rounds] for name in CONTENDERS}
    # Step beside step: what slows the machine down for a while is in both.
    ratios = [
        statistics.median(
            theirs / ours for ours, theirs in zip(*(one[name][warm_up:] for name in CONTENDERS), strict=True)
        )
        for one in rounds
    ]
    ratio = statistics.median(ratios)
    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(runs) for name, runs in seconds.items()},
        "lowest_tenth_seconds": lowest,
        "ratios": {"steps_per_second": ratios},
        "ratio": ratio,
        # Goals are upper limits: the ratio the other way round.
        "goals": [goal("steps: Trainer's steps per second / SlopTrainer's", 1 / ratio, 1 / SPEED)],
    }


def _tenth(values: Sequence[float]) -> float:
    """Below a tenth of the values: hardly anything else ran during such a step."""
    return sorted(values)[len(values) // 10]


def by_turns(names: Sequence[str], settings: Mapping[str, Any], workdir: Path) -> dict[str, list[float]]:
    """Seconds of every step of both, the first one of `names` ahead."""
    with tempfile.TemporaryDirectory(dir=workdir) as directory:
        batons = [Path(directory, "there"), Path(directory, "back")]
        for baton in batons:
            os.mkfifo(baton)
        paths = [str(baton) for baton in batons]
        begun = [
            start(
                "training_steps.train",
                {**settings, "trainer": name, "output": str(Path(directory, name)), "batons": paths, "ahead": ahead},
            )
            for name, ahead in zip(names, (True, False), strict=True)
        ]
        return {name: one["seconds"] for name, one in zip(names, launch_together(begun), strict=True)}


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
    """Train from random weights; the seconds of each step, and what was logged.

    Args:
        trainer: "SlopTrainer" or "Trainer".
        output: where SlopTrainer writes its stage after the last step.
        dims, vocab_size, tied: of the model.
        block_size, batch, steps: tokens of a block, blocks of a step, number of steps.
        batons: two pipes to take turns by with another process; without them it trains alone.
        ahead: whether it makes the first step.
        changes: to the arguments.
    """
    slop = trainer == "SlopTrainer"
    structure = ModelDims(*dims)
    clock = Turns(steps, [Path(one) for one in batons], ahead) if batons else StepClock()
    changes = {"per_device_train_batch_size": batch, **(changes or {}), **({} if slop else {"max_steps": steps})}
    args = arguments(output, slop=slop, **changes)
    model = build(llama_config(structure, vocab_size, block_size, tied=tied))
    data = random_blocks(steps * batch, block_size, vocab_size)
    common: Record = {"train_dataset": data, "data_collator": default_data_collator, "callbacks": [clock]}
    if slop:
        schedule = GrowthSchedule(structure, (), steps * batch * block_size)
        SlopTrainer(model, args, schedule=schedule, **common).train()
    else:
        Trainer(model, args, **common).train()
    seconds = clock.seconds if isinstance(clock, Turns) else [end - begin for begin, end in pairwise(clock.ends)]
    return {"seconds": seconds, "logs": clock.logs}


class Turns(StepClock):
    """Makes steps by turns with another process: at the end of a step, its partner makes one.

    A step lasts from the end of the wait to the next step's end: fetching its batch and all callbacks are in it.

    Args:
        steps: of both. Neither the first, which nobody waits for, nor the last counts, after which SlopTrainer writes.
        batons: pipes from the one ahead to the other, and back.
        ahead: whether this is the one.
    """

    def __init__(self, steps: int, batons: Sequence[Path], ahead: bool) -> None:
        super().__init__()
        there, back = batons
        # A pipe opens once both ends are: the same order on both sides, or they would wait for ever.
        if ahead:
            self._give, self._take = there.open("wb", buffering=0), back.open("rb", buffering=0)
        else:
            self._take, self._give = there.open("rb", buffering=0), back.open("wb", buffering=0)
        self._steps, self._ahead = steps, ahead
        self._began: list[float] = []

    @property
    def seconds(self) -> list[float]:
        """Of all steps but the first and the last."""
        return [end - began for began, end in zip(self._began, self.ends[1:], strict=False)][: self._steps - 2]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        done = len(self.ends)
        # The one behind has nothing to give after its first step, and the one ahead nobody to give to after its last.
        if (done > 1 or self._ahead) and not (done == self._steps and self._ahead):
            self._give.write(b".")
        if done < self._steps:
            if not self._take.read(1):
                raise RuntimeError("the other process has ended early")
            self._began.append(time.perf_counter())


def tables(record: Record) -> list[Table]:
    """The record to read."""
    table = Table("trainer", "median ms a step", "lowest tenth", "steps / s", title="steps")
    for name, seconds in record["median_seconds"].items():
        lowest = statistics.median(record["lowest_tenth_seconds"][name])
        table.add_row(name, f"{seconds * 1e3:.1f}", f"{lowest * 1e3:.1f}", f"{1 / seconds:.2f}")
    table.caption = f"SlopTrainer / Trainer, steps per second: {record['ratio']:.3f}"
    return [table]
