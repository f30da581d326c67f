"""Batches: how the blocks of an optimizer step are divided over devices and accumulation steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from ..errors import RunError
from ..io.serialization import Json

if TYPE_CHECKING:
    from .arguments import SlopTrainingArguments

Number = TypeVar("Number", int, float)

#: Training arguments with one number for all stages, or one number per stage.
PER_STAGE = ("batch_tokens", "stage_batch_sizes", "stage_learning_rates")


def find_largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of a number that does not exceed a limit.

    >>> find_largest_divisor(96, 20)
    16
    """
    return next(size for size in range(min(limit, number), 0, -1) if number % size == 0)


@dataclass(frozen=True)
class Batches:
    """The batch of one device in one stage.

    Args:
        micro_batch_size: blocks per forward and backward pass.
        accumulation_steps: passes per optimizer step.
    """

    micro_batch_size: int
    accumulation_steps: int

    @classmethod
    def share(cls, blocks: int, largest: int, devices: int) -> Batches:
        """Divide the blocks of a step over devices, in the largest micro-batches possible.

        Args:
            blocks: blocks per optimizer step, over all devices.
            largest: largest micro-batch that a device has memory for.

        >>> Batches.share(96, largest=20, devices=2)
        Batches(micro_batch_size=16, accumulation_steps=3)
        """
        per_device, rest = divmod(blocks, devices)
        if rest or not per_device:
            raise RunError(
                f"a step has {blocks} blocks, which {devices} devices cannot share equally; "
                f"take a number of devices that divides {blocks}, or begin a run with other batch_tokens"
            )
        micro_batch_size = find_largest_divisor(per_device, largest)
        return cls(micro_batch_size, per_device // micro_batch_size)


def resolve_per_stage(
    values: Number | Sequence[Number] | None, default: Number, stages: int, name: str
) -> tuple[Number, ...]:
    """Return one value per stage from an argument with no value (None), one value for all stages, or one per stage."""
    values = default if values is None else values
    values = [values] if isinstance(values, (int, float)) else list(values)
    if len(values) not in (1, stages):
        raise RunError(
            f"{name} has {len(values)} values, but the run has {stages} stages (including the initial one); "
            f"give one or {stages}"
        )
    return tuple(values * stages if len(values) == 1 else values)


def count_blocks_per_step(args: SlopTrainingArguments, block_size: int, devices: int, stages: int) -> tuple[int, ...]:
    """Return the blocks per optimizer step of each stage, over all devices.

    The number of devices matters only if `batch_tokens` is not set.
    """
    if args.batch_tokens is None:
        sizes = _resolve_batch_sizes(args, stages)
        return tuple(size * args.gradient_accumulation_steps * devices for size in sizes)
    if args.gradient_accumulation_steps != 1:
        raise RunError("gradient_accumulation_steps follows from batch_tokens; give one of the two")
    batch_tokens = resolve_per_stage(args.batch_tokens, 0, stages, "batch_tokens")
    for tokens in batch_tokens:
        if tokens % block_size:
            nearest = max(1, round(tokens / block_size)) * block_size
            raise RunError(f"batch_tokens {tokens} is not a multiple of the block size {block_size}; take {nearest}")
    return tuple(tokens // block_size for tokens in batch_tokens)


def keep_last_stage(args: SlopTrainingArguments) -> None:
    """Reduce arguments with one value per stage to the last stage's, for a run of the target alone."""
    for name in PER_STAGE:
        values = getattr(args, name)
        setattr(args, name, None if values is None else values[-1:])


def keep_first_stages(training: Mapping[str, Json], count: int) -> dict[str, Json]:
    """Return training arguments for the first `count` stages: lists with one value per stage are cut.

    >>> keep_first_stages({"stage_learning_rates": [3e-3, 2e-3, 1e-3], "batch_tokens": [64]}, 2)
    {'stage_learning_rates': [0.003, 0.002], 'batch_tokens': [64]}
    """
    per_stage = {name: training[name] for name in PER_STAGE if isinstance(training.get(name), (list, tuple))}
    return {**training, **{name: list(values[:count]) for name, values in per_stage.items()}}


def share_batches(args: SlopTrainingArguments, blocks: Sequence[int], devices: int) -> tuple[Batches, ...]:
    """Return the batch of one device in each stage, from each stage's blocks per optimizer step."""
    sizes = _resolve_batch_sizes(args, len(blocks))
    return tuple(Batches.share(number, size, devices) for number, size in zip(blocks, sizes, strict=True))


def _resolve_batch_sizes(args: SlopTrainingArguments, stages: int) -> tuple[int, ...]:
    return resolve_per_stage(args.stage_batch_sizes, args.per_device_train_batch_size, stages, "stage_batch_sizes")
