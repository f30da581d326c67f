"""`calibrate`: a `CostModel` of the hardware at hand, fitted to real training steps."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..cost.flops import DEFAULT_CONFIG, count_parameters, flops_per_token
from ..cost.hours import CostModel, Measurement
from ..cost.memory import STATE_BYTES, Precision
from ..dims import ModelDims
from ..errors import PlanError, RunError
from ..schedule import GrowthSchedule
from .arguments import SlopTrainingArguments
from .config import RunConfig
from .spans import StageSpan
from .trainer import SlopTrainer

#: Nothing but the steps: no files, no logs.
_QUIET = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}

_FIELDS = {item.name for item in fields(SlopTrainingArguments)}
#: transformers 5.23 gave it a new name, and warns of the old one.
_CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS)


@dataclass(frozen=True)
class StepTimes:
    """How long training steps of a structure took.

    Args:
        dims: the structure.
        parameters: the true number of parameters.
        flops_per_token: as `cost.flops_per_token` counts them.
        tokens: of a step, over all devices.
        devices: that shared the work.
        seconds: of each step, those to warm up left out.
        hardware: what they ran on.
        peak_bytes: the most memory that was allocated on the (first) device; None where torch does not count it.

    >>> times = StepTimes(ModelDims(64, 128, 2, 2), 4_000_000, 2.4e7, 1024, 2, (0.5, 0.4, 9.0), "2 × some GPU")
    >>> times.seconds_per_step, round(times.measurement.hours * 3600, 3)
    (0.5, 1.0)
    """

    dims: ModelDims
    parameters: int
    flops_per_token: float
    tokens: int
    devices: int
    seconds: tuple[float, ...]
    hardware: str
    peak_bytes: int | None = None

    @property
    def seconds_per_step(self) -> float:
        """The median: another program that takes the processor for a moment does not move it."""
        return median(self.seconds)

    @property
    def measurement(self) -> Measurement:
        """A step's tokens and device hours."""
        hours = self.seconds_per_step * self.devices / 3600
        return Measurement(str(self.dims), self.flops_per_token, self.tokens, hours)


def calibrate(
    structures: Sequence[ModelDims],
    config: Mapping[str, Any] = DEFAULT_CONFIG,
    *,
    sequence_length: int = 256,
    batch_size: int = 4,
    steps: int = 10,
    warmup_steps: int = 3,
    precision: Precision = "fp32",
    checkpointing: bool = False,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    progress: bool = False,
    observe: Callable[[StepTimes], None] | None = None,
) -> CostModel:
    """Train each structure for a few steps, and fit the hours of this hardware to their times.

    The steps are `SlopTrainer`'s, on random weights and random tokens: data, forward, backward, clipping, AdamW, on
    the device that it picks. A step counts with its median time, as wall time times devices. Structures run from
    the largest to the smallest, so that one that does not fit in memory shows at once. Nothing is left on disk.

    Hours hold for runs that train the same way: batch, sequence length, precision, checkpointing. Hours of structures
    far larger than those measured are a guess.

    Args:
        structures: at least two, of different FLOPs; with two the fit is exact and says nothing of its error.
        config: what growth leaves alone; `model_type`, `vocab_size`, and other fields of the family's config.
        sequence_length: tokens of a sequence.
        batch_size: sequences of a step on each device.
        steps: to time, for each structure.
        warmup_steps: before those; the first ones allocate memory and choose kernels.
        precision: "fp32", or "bf16" for autocast over float32 weights (`bf16=True` of Trainer).
        checkpointing: whether activations are recomputed.
        seed: of weights and tokens.
        training: more fields of `SlopTrainingArguments`, such as `use_cpu` or `optim`.
        progress: whether to show a bar, on a terminal.
        observe: called with the times of each structure once they are known.

    Raises:
        PlanError: for settings that cannot be measured, or hours that do not rise with the FLOPs.
        RunError: for a model that cannot be built, or a structure that does not fit in memory.

    >>> sizes = [ModelDims(256, 768, 4, 4), ModelDims(512, 1536, 8, 8), ModelDims(768, 2048, 8, 12)]
    >>> calibrate(sizes, steps=20).to_yaml("cost_model.yaml")  # doctest: +SKIP
    """
    setting = {**DEFAULT_CONFIG, **config}
    _check(structures, setting, sequence_length, batch_size, steps, warmup_steps, precision)
    arguments = {"per_device_train_batch_size": batch_size, "bf16": precision == "bf16", "seed": seed, **_QUIET}
    if checkpointing:
        arguments |= {_CHECKPOINTING: True}
    # Positions for the sequences, where the config says nothing of them.
    model = {"max_position_embeddings": sequence_length, **setting}
    run = RunConfig(model=model, training={**(training or {}), **arguments})
    bench = _Bench(run, sequence_length, warmup_steps, steps)
    largest_first = sorted(structures, key=lambda dims: -flops_per_token(dims, setting, sequence_length))
    total = len(structures) * (warmup_steps + steps)
    found: dict[ModelDims, StepTimes] = {}
    with tqdm(total=total, unit="step", disable=None if progress else True) as bar:
        for dims in largest_first:
            bar.set_description(str(dims))
            found[dims] = bench.time(dims, bar.update)
            gc.collect()  # trainers refer to themselves: without it, the next model would lie beside this one
            if observe is not None:
                observe(found[dims])
    return _fit([found[dims] for dims in structures])


def _check(
    structures: Sequence[ModelDims],
    config: Mapping[str, Any],
    sequence_length: int,
    batch_size: int,
    steps: int,
    warmup_steps: int,
    precision: str,
) -> None:
    """Refuse what cannot be measured, before anything is."""
    # A sequence of one token has nothing to predict.
    lengths = ("sequence_length", sequence_length, 2), ("vocab_size", config["vocab_size"], 2)
    counts = ("batch_size", batch_size, 1), ("steps", steps, 1), ("warmup_steps", warmup_steps, 0)
    for name, value, least in (*lengths, *counts):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PlanError(f"{name} must be a whole number, {least} or more, got {value!r}")
    if precision not in STATE_BYTES:
        raise PlanError(f"unknown precision {precision!r}; known: {', '.join(STATE_BYTES)}")
    if len({flops_per_token(dims, config, sequence_length) for dims in structures}) < 2:
        given = ", ".join(map(str, structures)) or "none"
        raise PlanError(f"calibration needs at least 2 structures of different FLOPs, got {given}: give more sizes")
    if twice := [str(dims) for dims in dict.fromkeys(structures) if structures.count(dims) > 1]:
        raise PlanError(f"structure {', '.join(twice)} is given twice: give each once, and more steps")


def _fit(found: Sequence[StepTimes]) -> CostModel:
    try:
        return CostModel.fit([times.measurement for times in found], hardware=found[0].hardware)
    except PlanError as caught:
        steps = ", ".join(f"{times.dims} {times.seconds_per_step:.2g} s" for times in found)
        raise PlanError(f"{caught} (a step took: {steps})") from None


@dataclass(frozen=True)
class _Bench:
    """Times structures, one after the other."""

    run: RunConfig
    sequence_length: int
    warmup_steps: int
    steps: int

    def time(self, dims: ModelDims, tick: Callable[[], object]) -> StepTimes:
        """The times of a structure's steps; `tick` is called after each."""
        with TemporaryDirectory(prefix="slop-calibrate-") as directory, self._explaining(dims):
            clock = _Clock(tick)
            trainer = self._trainer(dims, directory, clock)
            args = trainer.args
            backend = _backend(args.device)
            if counts_memory := hasattr(backend, "reset_peak_memory_stats"):
                backend.reset_peak_memory_stats()
            trainer.train()
            span, model_config = trainer.spans[0], trainer.model.config
            return StepTimes(
                dims=dims,
                parameters=count_parameters(dims, model_config),
                flops_per_token=float(flops_per_token(dims, model_config, self.sequence_length)),
                tokens=span.tokens // span.steps,
                devices=_devices(args),
                seconds=tuple(clock.seconds[self.warmup_steps :]),
                hardware=_hardware(args, self.sequence_length),
                peak_bytes=backend.max_memory_allocated() if counts_memory else None,
            )

    def _trainer(self, dims: ModelDims, directory: str, clock: _Clock) -> SlopTrainer:
        args = self.run.arguments(directory)
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # torch would warn that there is nothing to pin for
        model = self._model(dims, args.seed)
        blocks = (self.warmup_steps + self.steps) * args.train_batch_size * args.gradient_accumulation_steps
        data = _RandomTokens(blocks, self.sequence_length, model.config.vocab_size, args.seed)
        schedule = GrowthSchedule(dims, initial_tokens=blocks * self.sequence_length)
        trainer = _Unkept(model, args, schedule=schedule, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)  # it prints a summary of each stage to stdout
        return trainer

    def _model(self, dims: ModelDims, seed: int) -> PreTrainedModel:
        config = self.run.model_config(dims, self.run.model["vocab_size"])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, None)  # a family's own may lie outside of a small vocabulary
        set_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    @contextmanager
    def _explaining(self, dims: ModelDims) -> Iterator[None]:
        """Turns every way of running out of memory into one line."""
        try:
            yield
        except (MemoryError, RuntimeError) as caught:
            words = "out of memory", "can't allocate memory", "not enough memory"
            if not isinstance(caught, MemoryError) and not any(word in str(caught) for word in words):
                raise
            batch = self.run.training["per_device_train_batch_size"]
            raise RunError(
                f"{dims} does not fit in memory with {batch} sequences of {self.sequence_length} tokens: leave it "
                "out, or give a smaller --batch-size, a shorter --sequence-length or --checkpointing"
            ) from None


class _Unkept(SlopTrainer):
    """Trains as `SlopTrainer` does, and writes no model at the end: that would take longer than the steps."""

    def _finish(self, span: StageSpan) -> None:
        pass


class _Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, so that reading data is among them.

    A step has ended when the device has done its work. Waiting for it costs the trainer little: it looks at every
    step's loss, and waits for it, anyway (`logging_nan_inf_filter`).
    """

    def __init__(self, tick: Callable[[], object]) -> None:
        self.seconds: list[float] = []
        self._tick = tick
        self._last = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _backend(args.device).synchronize()
        self._last = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _backend(args.device).synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now
        self._tick()


class _RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """Blocks of random tokens, each drawn when it is read."""

    def __init__(self, blocks: int, size: int, vocab_size: int, seed: int) -> None:
        self.blocks = blocks
        self.size = size
        self.vocab_size = vocab_size
        self.seed = seed

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + index)
        return {"input_ids": torch.randint(self.vocab_size, (self.size,), generator=generator)}


def _backend(device: torch.device) -> Any:
    """torch.cuda, torch.mps, torch.cpu, ...: all of them can synchronize."""
    return getattr(torch, device.type)


def _devices(args: SlopTrainingArguments) -> int:
    """One process may drive several devices (DataParallel)."""
    return args.world_size * max(1, args.n_gpu)


def _hardware(args: SlopTrainingArguments, sequence_length: int) -> str:
    """What the times depend on besides the structure, for whoever reads the file later."""
    device, count = args.device, _devices(args)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    elif hasattr(_backend(device), "get_device_name"):
        name = (f"{count} × " if count > 1 else "") + _backend(device).get_device_name(device)
    else:
        name = f"{_processor()}, {device.type}"
    dtype = "bfloat16" if args.bf16 else "float32"
    batch = args.per_device_train_batch_size
    return f"{name}, torch {torch.__version__}, {dtype}, batches of {batch} × {sequence_length} tokens"


def _processor() -> str:
    try:  # Linux; platform.processor() is empty or an architecture there
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
