"""Models, data and arguments of the training benchmarks, and the clocks that watch them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from measuring import Record
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, SlopTrainer, SlopTrainingArguments
from slop_hf.cost.flops import count_parameters
from slop_hf.training import saving
from slop_hf.training import trainer as trainer_module

#: Initial structure, and targets with about twice its parameters by operator; embeddings are tied.
INITIAL = {"full": ModelDims(768, 3072, 8, 12), "tiny": ModelDims(32, 64, 2, 4)}
TARGETS = {
    "full": {
        "layer": ModelDims(768, 3072, 19, 12),
        "hidden": ModelDims(1344, 3072, 8, 21),
    },
    "tiny": {
        "layer": ModelDims(32, 64, 5, 4),
        "hidden": ModelDims(64, 64, 2, 8),
    },
}
VOCAB = {"full": 32000, "tiny": 128}


def llama_config(dims: ModelDims, vocab_size: int, block_size: int, *, tied: bool = True) -> LlamaConfig:
    """Return the config of a Llama in float32."""
    base = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, max_position_embeddings=block_size)
    return dims.to_config(base)


def build_model(config: LlamaConfig) -> PreTrainedModel:
    """Build a model with random weights; under ZeRO-3 it is sharded if the training arguments exist already."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def draw_blocks(count: int, block_size: int, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Return blocks of random tokens, the same for every contender."""
    rows = torch.randint(0, vocab_size, (count, block_size), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def make_arguments(output: str | Path, *, slop: bool = True, **changes: Any) -> TrainingArguments:
    """Return the defaults of `SlopTrainingArguments`, written out so that plain `TrainingArguments` get them, too."""
    settings: Record = {
        "output_dir": str(output),
        "learning_rate": 3e-4,
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": 0.05,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # SlopTrainer checks losses itself
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **changes,
    }
    if slop:
        settings["carry_optimizer_state"] = True  # as much state as possible crosses the boundary
    logging.set_verbosity_error()
    return (SlopTrainingArguments if slop else TrainingArguments)(**settings)


def build_staged_trainer(
    phases: Phases,
    *,
    output: str,
    initial: Sequence[int],
    target: Sequence[int],
    operators: Sequence[str],
    init: str,
    vocab_size: int,
    block_size: int,
    batch: int,
    steps: int,
    tied: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> SlopTrainer:
    """Build the trainer of a run of two stages, timed by `phases`.

    Args:
        phases: clock of the run's phases.
        output: run directory.
        initial, target: dims before and after the growth.
        operators, init: operators and init of the growth.
        vocab_size, tied: vocabulary size and tied embeddings of the model.
        block_size: tokens per block.
        batch: blocks per step over all ranks.
        steps: steps per stage.
        changes: changes to the training arguments.
    """
    tokens = steps * batch * block_size
    stage = GrowthStage(tuple(operators), ModelDims(*target), tokens, init)
    schedule = GrowthSchedule(ModelDims(*initial), (stage,), tokens)
    # AdamW's state is kept with the weights, so that `save_and_load` can write and read the same states.
    settings = {"batch_tokens": [batch * block_size], "keep_optimizer_states": True, **(changes or {})}
    args = make_arguments(output, per_device_train_batch_size=batch, **settings)
    phases.begin()
    with phases.within("building the model"):
        model = build_model(llama_config(schedule.initial, vocab_size, block_size, tied=tied))
    with phases.within("making the trainer"):
        blocks = draw_blocks(2 * steps * batch, block_size, vocab_size)
        trainer = SlopTrainer(model, args, schedule=schedule, train_dataset=blocks)
    phases.watch(trainer, boundary=steps)
    return trainer


class Phases:
    """A clock of the phases of a run of two stages and of the boundary between them.

    A boundary lasts from the end of AdamW's last step in one stage to the beginning of the first step in the next. The
    seconds of a phase exclude those of nested phases; `other` is the time outside of all phases.
    """

    #: Functions to time: the owner, the name, and the phase.
    WRAPPED = (
        (SlopTrainer, "_finish_stage", "rest of the stage's directory"),
        (saving, "save_states", "writing states"),
        (saving, "write_checksums", "checksums"),
        (SlopTrainer, "_release_model", "releasing"),
        (SlopTrainer, "_change_model", "building"),
        (SlopTrainer, "_prepare_for_training", "preparing model and optimizer"),
        (trainer_module, "load_states", "reading and growing"),
    )

    def __init__(self) -> None:
        self.boundary: Record | None = None  # seconds in all and by phase
        self.stage = 0  # changes when the next model is about to be built
        self._seconds: dict[str, float] = {}
        self._open = ["other"]
        self._since = time.perf_counter()
        for owner, name, phase in self.WRAPPED:
            setattr(owner, name, self._wrapped(getattr(owner, name), phase))

    def begin(self) -> None:
        """Do nothing; called when the arguments exist and the model does not."""

    @property
    def current(self) -> str:
        """The innermost phase."""
        return self._open[-1]

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Time the block as a phase."""
        self._turn()
        self._open.append(phase)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, trainer: SlopTrainer, boundary: int) -> None:
        """Time the boundary at a step."""
        trainer.add_callback(_AtSteps(self, boundary))

    def _turn(self) -> None:
        now = time.perf_counter()
        self._seconds[self.current] = self._seconds.get(self.current, 0.0) + now - self._since
        self._since = now

    def _wrapped(self, function: Any, phase: str) -> Any:
        @wraps(function)
        def wrapped(*arguments: Any, **settings: Any) -> Any:
            if phase == "building":
                self.stage += 1
            with self.within(phase):
                return function(*arguments, **settings)

        return wrapped

    def leave_stage(self) -> None:
        """Start the boundary's clock: the last step so far has ended."""
        self._turn()
        self._seconds = {}

    def enter_stage(self) -> None:
        """Stop the boundary's clock: the first step of the second stage begins."""
        self._turn()
        self.boundary = {"seconds": sum(self._seconds.values()), "phases": dict(self._seconds)}


class _AtSteps(TrainerCallback):
    def __init__(self, phases: Phases, boundary: int) -> None:
        self.phases, self.boundary = phases, boundary

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phases.boundary is None:
            _wait_for_gpu()
            self.phases.leave_stage()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.phases.boundary is None and state.global_step == self.boundary:
            _wait_for_gpu()
            self.phases.enter_stage()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class StepClock(TrainerCallback):
    """Records when each step ended, and the logs with their times."""

    ends: list[float] = field(default_factory=list)
    logs: list[Record] = field(default_factory=list)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Record | None = None, **kwargs: Any) -> None:
        # A logged loss has been computed: on a GPU, the steps before it have really ended.
        if logs and "loss" in logs:
            self.logs.append({"at": time.perf_counter(), "step": state.global_step, **logs})


def list_operators(name: str) -> list[str]:
    """Return the operators of a growth: heads follow hidden."""
    return ["hidden", "mha"] if name == "hidden" else [name]


def describe_growth(initial: ModelDims, target: ModelDims, config: LlamaConfig) -> Record:
    """Return the record of both structures and their parameters."""
    return {
        "source_dims": initial.as_dict(),
        "target_dims": target.as_dict(),
        "source_parameters": count_parameters(initial, config),
        "target_parameters": count_parameters(target, config),
    }
