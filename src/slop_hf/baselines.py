"""Schedules to compare a growth schedule with, at equal training FLOPs."""

from __future__ import annotations

from typing import Any

from .cost import DEFAULT_CONFIG, flops_per_token
from .schedule import GrowthSchedule


def from_scratch(
    schedule: GrowthSchedule, config: Any = DEFAULT_CONFIG, sequence_length: int = 2048
) -> GrowthSchedule:
    """The target of `schedule` trained from random weights with the FLOPs of all its stages.

    The paper's Table 2 gives its from-scratch run equal tokens instead, and so 2.8 times the GPU hours.

    Args:
        schedule: a schedule with tokens.
        config: what growth leaves alone, see `cost`.
        sequence_length: tokens of a training sequence.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> grown = GrowthSchedule(small, (GrowthStage(("layer",), large, tokens=10**6),), initial_tokens=10**6)
    >>> scratch = from_scratch(grown)
    >>> 10**6 < scratch.initial_tokens < 2 * 10**6
    True
    """
    budget = schedule.flops(config, sequence_length)
    tokens = round(budget / flops_per_token(schedule.target, config, sequence_length))
    return GrowthSchedule(schedule.target, initial_tokens=tokens)
