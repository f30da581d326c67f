"""The small staged run as a program, for launches with several ranks: `python launched.py '{"output": ...}'`.

Settings, as JSON:
    output: run directory; an existing run is resumed
    arguments: fields of `SlopTrainingArguments`
    batch: per_device_train_batch_size
    schedule: schedule file, instead of `training_runs.SCHEDULE`
    dropout: attention dropout, default 0
    experts: sizes with which a dense model of the dims `initial` becomes the run's initial model
    frozen: parts of the names of parameters to freeze
    dump: a directory for the states that each stage begins with, and how many numbers of them each rank holds
    at: events after a step: {"6": "interrupt" | "nan" | "terminate" | "hang"}, on the rank `on` (default: all); also
        "ctrl-c", "raise" (an error of another kind in the next step) and "raise in save" (in the next save)
    record: a file for the reports of stages: a line with the stage, and whether the call is repeated
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from training_runs import SCHEDULE, freeze, small_model, trainer
from transformers import TrainerCallback

from slop_hf import GrowthSchedule, ModelDims, RunDirectory, grow_model
from slop_hf.errors import SlopError
from slop_hf.training import state_io
from slop_hf.training.callbacks import StageCallback
from slop_hf.training.launch import guard_exit


class Dump(TrainerCallback):
    """Writes weights and moments at the first step of each stage, and how many numbers this rank holds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trainer: Any = None
        self.done: set[int] = set()
        self.engines: list[weakref.ref[Any]] = []

    def on_step_begin(self, args, state, control, **kwargs):
        span = self.trainer._span
        if span.number in self.done:
            return
        self.done.add(span.number)
        states = self.trainer._strategy.get_states(self.trainer)
        steps = states.count_steps()
        entries = [(name, key) for name in states.shapes for key in ("weight", "exp_avg", "exp_avg_sq")]
        tensors = {
            f"{key}/{name}": states.gather(name, key, 0) for name, key in entries if key == "weight" or name in steps
        }
        groups = [
            {"lr": group["lr"], "weight_decay": group["weight_decay"], "numbers": numbers}
            for group, numbers in zip(
                self.trainer.optimizer.param_groups, numbers_of_groups(self.trainer), strict=True
            )
        ]
        self.engines.append(weakref.ref(self.trainer.model_wrapped))
        alive = sum(engine() is not None for engine in self.engines)
        facts = {
            "alive": alive,
            "step": max(steps.values(), default=None),
            "steps": steps,
            "groups": groups,
            "held": held(self.trainer),
            "is_compiled": is_compiled(self.trainer.model_wrapped),
        }
        (self.directory / f"{span.number}-rank-{args.process_index}.json").write_text(json.dumps(facts))
        if args.process_index == 0:
            save_file(
                {name: value.clone() for name, value in tensors.items()}, self.directory / f"{span.number}.safetensors"
            )


def is_compiled(wrapped: Any) -> bool:
    """Whether DeepSpeed or accelerate has compiled a model."""
    return bool(getattr(wrapped, "is_compiled", False)) or hasattr(wrapped, "_orig_mod")


def numbers_of_groups(trainer: Any) -> list[int]:
    """Count the numbers in each of the optimizer's groups."""
    groups = trainer.optimizer.param_groups
    if trainer.deepspeed is None:
        return [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    zero, counts = trainer.deepspeed.optimizer, [0] * len(groups)
    for number, parameters in enumerate(zero.fp16_groups):
        counts[zero.sub_group_to_group_id[number]] += sum(parameter.ds_numel for parameter in parameters)
    return counts


def held(trainer: Any) -> int:
    """Count the numbers of weights, float32 masters and moments on this rank; shared memory counts once."""
    if trainer.is_fsdp_enabled:
        optimizer = trainer.optimizer.optimizer
        moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
        return sum(tensor.to_local().numel() for tensor in [*trainer.model.parameters(), *moments])
    if trainer.deepspeed is None:
        return 3 * sum(parameter.numel() for parameter in trainer.model.parameters())
    zero = trainer.deepspeed.optimizer
    moments = [value for state in zero.optimizer.state.values() for name, value in state.items() if name != "step"]
    tensors = [*zero.fp16_partitioned_groups_flat, *zero.fp32_partitioned_groups_flat, *moments]
    return sum({tensor.data_ptr(): tensor.numel() for tensor in tensors}.values())


class Record(StageCallback):
    """Writes down its calls, and takes long enough to be killed in the middle of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_stage_written(self, run, stage, ranks):
        if ranks.is_first:
            with self.path.open("a") as file:
                file.write(f"{stage} {self.is_repeated}\n")
            time.sleep(0.05)


def raise_key_error(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("a key that is not there")


class At(TrainerCallback):
    """Triggers an event after a step, on one rank or all."""

    def __init__(self, events: dict[str, str], on: int | None) -> None:
        self.events, self.on = events, on
        self.trainer: Any = None

    def on_step_end(self, args, state, control, **kwargs):
        event = self.events.get(str(state.global_step))
        if event is None or self.on not in (None, args.process_index):
            return
        if event == "interrupt":
            os._exit(1)  # like a kill: nothing is cleaned up
        elif event == "hang":
            Path(args.output_dir, f"hanging-{args.process_index}").touch()
            time.sleep(600)
        elif event == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        elif event == "ctrl-c":
            os.kill(os.getpid(), signal.SIGINT)
        elif event == "raise":
            self.trainer.training_step = raise_key_error
        elif event == "raise in save":
            state_io.write_tensor = raise_key_error
        elif event == "nan":
            step = self.trainer.compute_loss
            self.trainer.compute_loss = lambda *args, **kwargs: step(*args, **kwargs) * float("nan")


def main(settings: dict[str, Any]) -> None:
    output = Path(settings["output"])
    schedule = SCHEDULE if "schedule" not in settings else GrowthSchedule.from_yaml(settings["schedule"])
    initial = ModelDims(**settings["initial"]) if "initial" in settings else schedule.initial
    model = small_model(initial, dropout=settings.get("dropout", 0.0))
    freeze(model, settings.get("frozen", []))
    if "experts" in settings:
        model = grow_model(model, "experts", settings["experts"])
    callbacks: list[Any] = [At(settings.get("at", {}), settings.get("on"))]
    if "dump" in settings:
        callbacks.append(Dump(Path(settings["dump"])))
    if "record" in settings:
        callbacks.append(Record(Path(settings["record"])))
    arguments = {"use_cpu": False, **settings.get("arguments", {})}  # as in recipes
    batch = settings.get("batch", 4)
    run = trainer(
        output, schedule=schedule, model=model, callbacks=callbacks, per_device_train_batch_size=batch, **arguments
    )
    del model  # FSDP2 wraps it in place
    for callback in callbacks:
        callback.trainer = run
    torch.manual_seed(0)
    run.train(resume_from_checkpoint=RunDirectory(output).exists)


def run_rank(
    environment: dict[str, str], main: Callable[[dict[str, Any]], None], settings: dict[str, Any], log: str
) -> None:
    """Run a program as one rank of a launch in this process, which has nothing else to do."""
    gc.enable()
    gc.freeze()  # each stage collects garbage; that takes a second if the imported modules are searched too
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in a shell's background
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    with guard_exit():
        main(settings)


if __name__ == "__main__":
    try:
        with guard_exit():
            main(json.loads(sys.argv[1]))
    except SlopError as caught:
        print(f"error: {caught}", file=sys.stderr)
        sys.exit(2)
