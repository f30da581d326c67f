"""How an optimizer step's batch is shared out over devices and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import RunError
from .arguments import PER_STAGE

Number = TypeVar("Number", int, float)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is not above a limit.

    >>> largest_divisor(96, 20)
    16
    """
    return next(size for size in range(min(limit, number), 0, -1) if number % size == 0)


@dataclass(frozen=True)
class Batches:
    """One stage's share of an optimizer step on each device.

    Args:
        micro_batch_size: blocks that a device works on at a time.
        accumulation_steps: how often it does so in a step.
    """

    micro_batch_size: int
    accumulation_steps: int

    @classmethod
    def share(cls, blocks: int, largest: int, devices: int) -> Batches:
        """Share out the blocks of a step: micro-batches as large as can be.

        Args:
            blocks: of a step, over all devices.
            largest: micro-batch that a device has memory for.
            devices: that share the work.

        Raises:
            RunError: where they cannot be shared equally.

        >>> Batches.share(96, largest=20, devices=2)
        Batches(micro_batch_size=16, accumulation_steps=3)
        """
        each, rest = divmod(blocks, devices)
        if rest or not each:
            raise RunError(
                f"a step has {blocks} blocks, which {devices} devices cannot share equally; "
                f"take a number of devices that divides {blocks}, or begin a run with other batch_tokens"
            )
        micro = largest_divisor(each, largest)
        return cls(micro, each // micro)


def per_stage(values: Number | Sequence[Number] | None, default: Number, stages: int, name: str) -> tuple[Number, ...]:
    """One value for each stage from an argument that gives none, one for all, or one for each.

    Raises:
        RunError: for another number of values.
    """
    values = default if values is None else values
    values = [values] if isinstance(values, (int, float)) else list(values)
    if len(values) not in (1, stages):
        raise RunError(
            f"{name} has {len(values)} values, the run {stages} stages (the initial one counted); give one or {stages}"
        )
    return tuple(values * stages if len(values) == 1 else values)


def blocks_per_step(args: Any, block_size: int, devices: int, stages: int) -> tuple[int, ...]:
    """Blocks of an optimizer step over all devices, for each stage.

    Args:
        args: `SlopTrainingArguments`.
        block_size: tokens of a block.
        devices: that share the work; they count only where `batch_tokens` is not given.
        stages: how many, the initial one counted.

    Raises:
        RunError: for `batch_tokens` that are no whole number of blocks.
    """
    if args.batch_tokens is None:
        sizes = per_stage(args.stage_batch_sizes, args.per_device_train_batch_size, stages, "stage_batch_sizes")
        return tuple(size * args.gradient_accumulation_steps * devices for size in sizes)
    if args.gradient_accumulation_steps != 1:
        raise RunError("gradient_accumulation_steps follows from batch_tokens; give one of the two")
    tokens = per_stage(args.batch_tokens, 0, stages, "batch_tokens")
    for number in tokens:
        if number % block_size:
            near = max(1, round(number / block_size)) * block_size
            raise RunError(f"batch_tokens {number} is no whole number of blocks of {block_size} tokens; take {near}")
    return tuple(number // block_size for number in tokens)


def keep_last(args: Any) -> None:
    """Leave of values for each stage the last one's: for a run of the last stage's structure alone."""
    for name in PER_STAGE:
        values = getattr(args, name)
        setattr(args, name, None if values is None else values[-1:])


def stage_batches(args: Any, blocks: Sequence[int], devices: int) -> tuple[Batches, ...]:
    """Each stage's share on each device.

    Args:
        args: `SlopTrainingArguments`.
        blocks: of a step in each stage, as the run has begun.
        devices: of this launch.

    Raises:
        RunError: where they cannot be shared equally.
    """
    largest = per_stage(args.stage_batch_sizes, args.per_device_train_batch_size, len(blocks), "stage_batch_sizes")
    return tuple(Batches.share(number, size, devices) for number, size in zip(blocks, largest, strict=True))
