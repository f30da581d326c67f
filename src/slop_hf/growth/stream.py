"""Weights and AdamW's state out of a directory, a parameter at a time; grown on the way where a plan says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..architectures import architecture_of
from .adamw import check_names, grow_entry, idle_parameters, stored_state
from .plan import GrowthPlan
from .safetensors_io import StoredTensor, read_checkpoint, read_tensor
from .tensors import grow_parameter

WEIGHT = "weight"


class StateStream:
    """What a directory holds of each parameter of a model, or what a growth makes of it.

    The values are those of `grow_model` and `grow_adamw_state`. Any number of threads, processes or machines may read,
    each what it needs: a read takes as much memory as one parameter with its state, before and after growth.

    Args:
        directory: with a model's safetensors, and AdamW's state if it is to be read.
        config: of the model in it.
        plan: of the growth; None reads what is there.
        moments: whether AdamW's state is wanted.

    Raises:
        GrowthError: for files that are missing, corrupt or of another model.
    """

    def __init__(
        self, directory: str | Path, config: Any, plan: GrowthPlan | None = None, *, moments: bool = True
    ) -> None:
        architecture = architecture_of(config)
        stored = read_checkpoint(Path(directory))
        self._weights: dict[str, StoredTensor] = {architecture.live_name(name): one for name, one in stored.items()}
        self._moments = stored_state(directory) if moments else {}
        self._plans = {} if plan is None else {parameter.name: parameter for parameter in plan.parameters()}
        self._idle = idle_parameters(plan) if plan is not None else set()
        if plan is not None:
            check_names(self._weights, plan, str(directory))
            if moments:
                check_names(self._moments, plan, str(directory))

    @property
    def names(self) -> set[str]:
        """Of the parameters that can be read."""
        return set(self._plans or self._weights)

    @property
    def step(self) -> float | None:
        """How many steps AdamW has counted; None without a state of its."""
        steps = [entries["step"] for entries in self._moments.values() if "step" in entries]
        return float(read_tensor(steps[0])) if steps else None

    def read(self, name: str) -> dict[str, torch.Tensor]:
        """`weight` of a parameter, and `exp_avg`, `exp_avg_sq` and `step` where they are wanted and there.

        Raises:
            GrowthError: where the file has ended early, or cannot be read.
        """
        plan = self._plans.get(name)
        source = name if plan is None else plan.source
        entries = {key: read_tensor(one) for key, one in self._moments.get(source, {}).items()}
        weight = read_tensor(self._weights[source])
        if plan is None:
            return {WEIGHT: weight, **entries}
        idle = name in self._idle
        grown = {key: grow_entry(key, value, plan, "keep", idle) for key, value in entries.items()}
        return {WEIGHT: grow_parameter(weight, plan), **grown}
