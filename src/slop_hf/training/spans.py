"""`StageSpan`: where each stage lies on the run's axes of steps, blocks, tokens and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..cost.flops import count_parameters, flops_per_token
from ..dims import ModelDims
from ..errors import RunError
from ..schedule import GrowthSchedule, GrowthStage


@dataclass(frozen=True)
class StageSpan:
    """One stage of training, in whole optimizer steps.

    Args:
        number: of the stage; 0 is the initial model.
        name: of its directory.
        growth: the growth at its beginning; None for stage 0.
        dims: its structure.
        parameters: the true number of parameters.
        first_step, steps: optimizer steps before it, and of it.
        first_block, blocks: training blocks before it, and of it.
        first_token, tokens: the same in tokens.
        first_flops, flops: the same in training FLOPs.
    """

    number: int
    name: str
    growth: GrowthStage | None
    dims: ModelDims
    parameters: int
    first_step: int
    steps: int
    first_block: int
    blocks: int
    first_token: int
    tokens: int
    first_flops: float
    flops: float

    @property
    def blocks_per_step(self) -> int:
        """Blocks of an optimizer step over all devices; 0 where there is none."""
        return self.blocks // self.steps if self.steps else 0

    @property
    def end_step(self) -> int:
        """The global step at which it ends."""
        return self.first_step + self.steps

    def at_step(self, global_step: int) -> tuple[int, float]:
        """Tokens and FLOPs of the run up to a global step within the stage."""
        done = (global_step - self.first_step) / self.steps if self.steps else 1.0
        return self.first_token + round(done * self.tokens), self.first_flops + done * self.flops


def stage_spans(
    schedule: GrowthSchedule, config: Any, block_size: int, blocks_per_step: Sequence[int]
) -> tuple[StageSpan, ...]:
    """The spans of all stages.

    Tokens are rounded to whole steps, to at least one step where any are asked for.

    Args:
        schedule: with tokens.
        config: the initial model's config, or its dict.
        block_size: tokens of a training block.
        blocks_per_step: blocks of an optimizer step of each stage, over all devices and accumulation.

    Raises:
        RunError: for a schedule without any tokens.
    """
    if not sum(schedule.tokens):
        raise RunError("the schedule has no tokens to train on; give tokens to its stages, or --tokens to `slop plan`")
    spans: list[StageSpan] = []
    step = block = 0
    flops = 0.0
    for number, (dims, tokens) in enumerate(zip(schedule.structures, schedule.tokens, strict=True)):
        tokens_per_step = block_size * blocks_per_step[number]
        steps = max(1, round(tokens / tokens_per_step)) if tokens else 0
        spans.append(
            StageSpan(
                number=number,
                name=schedule.stage_name(number),
                growth=schedule.stages[number - 1] if number else None,
                dims=dims,
                parameters=count_parameters(dims, config),
                first_step=step,
                steps=steps,
                first_block=block,
                blocks=steps * blocks_per_step[number],
                first_token=block * block_size,
                tokens=steps * tokens_per_step,
                first_flops=flops,
                flops=float(flops_per_token(dims, config, block_size)) * steps * tokens_per_step,
            )
        )
        step += steps
        block += spans[-1].blocks
        flops += spans[-1].flops
    return tuple(spans)
