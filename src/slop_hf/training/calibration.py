"""`calibrate`: fit a `CostModel` to training steps on this hardware."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..cost.hours import CostModel, Measurement, check_calibration
from ..cost.memory import Precision
from ..dims import ModelDims
from ..errors import PlanError, RunError
from ..io.serialization import Json
from ..schedule import GrowthSchedule
from .arguments import SlopTrainingArguments
from .config import RunConfig
from .spans import StageSpan
from .trainer import SlopTrainer

if TYPE_CHECKING:
    from types import ModuleType

#: Disable checkpoints and logging while timing.
_QUIET = {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "report_to": "none"}

#: transformers 5.23 renamed it, and warns about the old name.
_NAMES = "activation_checkpointing", "gradient_checkpointing"
_CHECKPOINTING = next(name for name in _NAMES if name in SlopTrainingArguments.__dataclass_fields__)


@dataclass(frozen=True)
class StepTimes:
    """The times of a structure's training steps.

    Args:
        flops_per_token: training FLOPs per token, as `cost.flops.count_flops_per_token` counts them.
        tokens: tokens per step, over all devices.
        seconds: seconds of each step, without the warm-up.
        peak_bytes: most memory allocated on the (first) device; None if torch does not count it.

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
        """The median, which a short disturbance by another program does not move."""
        return median(self.seconds)

    @property
    def measurement(self) -> Measurement:
        """The tokens and device hours of one step."""
        hours = self.seconds_per_step * self.devices / 3600
        return Measurement(str(self.dims), self.flops_per_token, self.tokens, hours)


def calibrate(
    structures: Sequence[ModelDims],
    config: Mapping[str, Json] = DEFAULT_CONFIG,
    *,
    sequence_length: int = 256,
    batch_size: int = 4,
    steps: int = 10,
    warmup_steps: int = 3,
    precision: Precision = "fp32",
    checkpointing: bool = False,
    seed: int = 0,
    training: Mapping[str, Json] | None = None,
    progress: bool = False,
    observe: Callable[[StepTimes], None] | None = None,
) -> CostModel:
    """Train each structure for a few steps, and fit the cost model to their times.

    The steps are `SlopTrainer`'s, with random weights and random tokens: data, forward, backward, clipping and AdamW,
    on the device that `Trainer` chooses. The time of a step is the median of wall time multiplied by devices. The
    largest structure is timed first, so that one that does not fit in memory fails at once. No file remains.

    The hours hold for runs with the same batch, sequence length, precision and checkpointing. Hours of structures much
    larger than those measured are an extrapolation.

    Args:
        structures: structures to time, at least two with different FLOPs; with two, the fit is exact and says nothing
            about its error.
        config: settings that growth does not change: `model_type`, `vocab_size` and other fields of the family's
            config.
        sequence_length: tokens per sequence.
        batch_size: sequences per step on each device.
        steps: steps to time for each structure.
        warmup_steps: steps before those; the first ones allocate memory and choose kernels.
        precision: "fp32", or "bf16" for autocast over float32 weights (`bf16=True` of Trainer).
        checkpointing: whether activations are recomputed.
        seed: seed of weights and tokens.
        training: further fields of `SlopTrainingArguments`, such as `use_cpu` or `optim`.
        progress: whether to show a progress bar if the output is a terminal.
        observe: function to call with the times of each structure.

    Raises:
        PlanError: for settings that cannot be measured, or if the hours do not rise with the FLOPs.
        RunError: if a model cannot be built, or a structure does not fit in memory.

    >>> sizes = [ModelDims(256, 768, 4, 4), ModelDims(512, 1536, 8, 8), ModelDims(768, 2048, 8, 12)]
    >>> calibrate(sizes, steps=20).to_yaml("cost_model.yaml")  # doctest: +SKIP
    """
    config = {**DEFAULT_CONFIG, **config}
    check_calibration(
        structures,
        config,
        sequence_length=sequence_length,
        batch_size=batch_size,
        steps=steps,
        warmup_steps=warmup_steps,
        precision=precision,
        seed=seed,
    )
    arguments = {"per_device_train_batch_size": batch_size, "bf16": precision == "bf16", "seed": seed, **_QUIET}
    if checkpointing:
        arguments[_CHECKPOINTING] = True
    model = {"max_position_embeddings": sequence_length, **config}
    run = RunConfig(model=model, training={**(training or {}), **arguments})
    bench = _Bench(run, sequence_length, warmup_steps, steps)
    total = len(structures) * (warmup_steps + steps)
    times: dict[ModelDims, StepTimes] = {}
    with tqdm(total=total, unit="step", disable=None if progress else True) as bar:
        for dims in sorted(structures, key=lambda dims: -count_flops_per_token(dims, config, sequence_length)):
            bar.set_description(str(dims))
            times[dims] = bench.time(dims, bar.update)
            gc.collect()  # trainers are reference cycles: otherwise this model would stay in memory with the next one
            if observe is not None:
                observe(times[dims])
    return _fit([times[dims] for dims in structures])


def _fit(measured: Sequence[StepTimes]) -> CostModel:
    try:
        return CostModel.fit([times.measurement for times in measured], hardware=measured[0].hardware)
    except PlanError as caught:
        steps = ", ".join(f"{times.dims} {times.seconds_per_step:.2g} s" for times in measured)
        raise PlanError(f"{caught} (a step took: {steps})") from None


@dataclass(frozen=True)
class _Bench:
    """The setting in which structures are timed, one after the other."""

    run: RunConfig
    sequence_length: int
    warmup_steps: int
    steps: int

    def time(self, dims: ModelDims, tick: Callable[[], object]) -> StepTimes:
        """Return the times of a structure's steps; `tick` is called after each step."""
        with TemporaryDirectory(prefix="slop-calibrate-") as directory, self._explain_out_of_memory(dims):
            clock = _Clock(tick)
            trainer = self._build_trainer(dims, directory, clock)
            backend = _get_backend(trainer.args.device)
            if counts_memory := hasattr(backend, "reset_peak_memory_stats"):
                backend.reset_peak_memory_stats()
            trainer.train()
            span, model_config = trainer.spans[0], trainer.model.config
            return StepTimes(
                dims=dims,
                parameters=count_parameters(dims, model_config),
                flops_per_token=float(count_flops_per_token(dims, model_config, self.sequence_length)),
                tokens=span.tokens // span.steps,
                devices=_count_devices(trainer.args),
                seconds=tuple(clock.seconds[self.warmup_steps :]),
                hardware=_describe_hardware(trainer.args, self.sequence_length),
                peak_bytes=backend.max_memory_allocated() if counts_memory else None,
            )

    def _build_trainer(self, dims: ModelDims, directory: str, clock: _Clock) -> SlopTrainer:
        args = self.run.arguments(directory)
        model = self._build_model(dims, args.seed)
        blocks = (self.warmup_steps + self.steps) * args.train_batch_size * args.gradient_accumulation_steps
        data = _RandomTokens(blocks, self.sequence_length, model.config.vocab_size, args.seed)
        schedule = GrowthSchedule(dims, initial_tokens=blocks * self.sequence_length)
        trainer = _TimedTrainer(model, args, schedule=schedule, train_dataset=data, callbacks=[clock])
        trainer.remove_callback(PrinterCallback)  # it prints a summary of each stage to stdout
        return trainer

    def _build_model(self, dims: ModelDims, seed: int) -> PreTrainedModel:
        config = self.run.model_config(dims, self.run.model["vocab_size"])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, None)  # a family's defaults may lie outside of a small vocabulary
        set_seed(seed)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    @contextmanager
    def _explain_out_of_memory(self, dims: ModelDims) -> Iterator[None]:
        """Turn every way of running out of memory into one line."""
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


class _TimedTrainer(SlopTrainer):
    """Trains as `SlopTrainer` does, but writes no model at the end, which would take longer than the steps."""

    def _finish_stage(self, span: StageSpan) -> None:
        pass


class _Clock(TrainerCallback):
    """Seconds from the end of one step to the end of the next, which includes reading the data.

    A step has ended when the device has done its work. Like training, the clock does not wait for that: the device
    notes the time itself, in events between its other work, which are read when all steps are done.
    """

    def __init__(self, tick: Callable[[], object]) -> None:
        self._tick = tick
        self._device = torch.device("cpu")
        self._ends: list[Any] = []  # events of the device, or seconds

    @property
    def seconds(self) -> list[float]:
        """The seconds of each step; waits for the device."""
        if self._device.type == "cpu":
            return [end - begin for begin, end in pairwise(self._ends)]
        _get_backend(self._device).synchronize()
        return [begin.elapsed_time(end) / 1000 for begin, end in pairwise(self._ends)]

    def on_train_begin(self, args: SlopTrainingArguments, state: object, control: object, **kwargs: object) -> None:
        self._device = args.device
        self._note_time()

    def on_step_end(self, args: SlopTrainingArguments, state: object, control: object, **kwargs: object) -> None:
        self._note_time()
        self._tick()

    def _note_time(self) -> None:
        if self._device.type == "cpu":
            self._ends.append(time.perf_counter())
            return
        event = _get_backend(self._device).Event(enable_timing=True)
        event.record()
        self._ends.append(event)


@dataclass(frozen=True)
class _RandomTokens(Dataset[dict[str, torch.Tensor]]):
    """Blocks of random tokens, drawn when they are read."""

    blocks: int
    size: int
    vocab_size: int
    seed: int

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + index)
        return {"input_ids": torch.randint(self.vocab_size, (self.size,), generator=generator)}


def _get_backend(device: torch.device) -> ModuleType:
    """Return torch.cuda, torch.mps, torch.cpu, ...: all of them can synchronize and have events."""
    return cast("ModuleType", getattr(torch, device.type))


def _count_devices(args: SlopTrainingArguments) -> int:
    return int(args.world_size * max(1, args.n_gpu))  # one process may drive several devices (DataParallel)


def _describe_hardware(args: SlopTrainingArguments, sequence_length: int) -> str:
    """Return all that the times depend on apart from the structure, for readers of the file."""
    device, count = args.device, _count_devices(args)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"{_find_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    elif hasattr(_get_backend(device), "get_device_name"):
        name = (f"{count} × " if count > 1 else "") + _get_backend(device).get_device_name(device)
    else:
        name = f"{_find_processor()}, {device.type}"
    dtype, batch = "bfloat16" if args.bf16 else "float32", args.per_device_train_batch_size
    return f"{name}, torch {torch.__version__}, {dtype}, batches of {batch} × {sequence_length} tokens"


def _find_processor() -> str:
    try:  # Linux; platform.processor() is empty or an architecture there
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
