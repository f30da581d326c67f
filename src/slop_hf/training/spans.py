"""`StageSpan`: the position of a stage on the run's axes of steps, blocks, tokens and FLOPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cost.flops import ADAMW_FLOPS, count_flops_per_token, count_muon_flops, count_parameters
from ..dims import ModelConfig, ModelDims
from ..errors import RunError
from ..schedule import GrowthSchedule, GrowthStage


@dataclass(frozen=True)
class StageSpan:
    """One stage of training, in whole optimizer steps.

    Args:
        number: number of the stage; 0 is the initial model.
        name: name of its directory.
        growth: growth at its beginning; None for stage 0.
        dims: its structure.
        parameters: its number of parameters.
        first_step, steps: optimizer steps before the stage, and in it.
        first_block, blocks: training blocks before the stage, and in it.
        first_token, tokens: tokens before the stage, and in it.
        first_flops, flops: training FLOPs before the stage, and in it.
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
        """Blocks per optimizer step, over all devices; 0 in a stage without steps."""
        return self.blocks // self.steps if self.steps else 0

    def count_optimizer_flops(self, global_step: int) -> float:
        """Return the FLOPs of AdamW's steps in the stage up to a global step."""
        return float(ADAMW_FLOPS * self.parameters * min(max(global_step - self.first_step, 0), self.steps))

    @property
    def end_step(self) -> int:
        return self.first_step + self.steps

    @property
    def end_token(self) -> int:
        return self.first_token + self.tokens

    def count_until(self, global_step: int) -> tuple[int, float]:
        """Return the tokens and the FLOPs of the run up to a global step within the stage."""
        done = (global_step - self.first_step) / self.steps if self.steps else 1.0
        return self.first_token + round(done * self.tokens), self.first_flops + done * self.flops


def compute_stage_spans(
    schedule: GrowthSchedule,
    config: ModelConfig,
    block_size: int,
    blocks_per_step: Sequence[int],
    *,
    newton_schulz_steps: int = 0,
) -> tuple[StageSpan, ...]:
    """Return the spans of all stages.

    The tokens of a stage are rounded to whole steps; a stage with tokens has at least one step.

    Args:
        config: config of the initial model.
        block_size: tokens per training block.
        blocks_per_step: blocks per optimizer step of each stage, over all devices and accumulation steps.
        newton_schulz_steps: iterations of Muon per optimizer step, whose FLOPs count too; 0 for other optimizers,
            whose work per parameter is not counted.
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
                flops=float(count_flops_per_token(dims, config, block_size)) * steps * tokens_per_step
                + (float(count_muon_flops(dims, config, newton_schulz_steps)) * steps if newton_schulz_steps else 0.0),
            )
        )
        step += steps
        block += spans[-1].blocks
        flops += spans[-1].flops
    return tuple(spans)
