"""Weights and AdamW's state out of a directory, a parameter at a time; grown on the way where a plan says how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from ..architectures import get_architecture
from .adamw import check_names, grow_entry, find_parameters_without_gradient, read_state_headers
from .plan import GrowthPlan
from .safetensors_io import FLOATS, StoredTensor, read_checkpoint_headers, read_tensor
from .tensors import ThreadMemory, grow_parameter

WEIGHT = "weight"
#: Memory that a thread reads what is to grow into, one tensor after the other; larger ones have their own.
REUSED_BYTES = 2**26


class GrownStateReader:
    """What a directory holds of each parameter of a model, or what a growth makes of it.

    The values are those of `grow_model` and `grow_adamw_state`. Any number of threads, processes or machines may read,
    each what it needs: a read takes as much memory as one weight or moment, before and after growth.

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
        architecture = get_architecture(config)
        stored = read_checkpoint_headers(Path(directory))
        self._weights: dict[str, StoredTensor] = {architecture.live_name(name): one for name, one in stored.items()}
        self._moments = read_state_headers(directory) if moments else {}
        self._memory = ThreadMemory(REUSED_BYTES)
        self._plans = {} if plan is None else {parameter.name: parameter for parameter in plan.parameters()}
        self._idle = find_parameters_without_gradient(plan) if plan is not None else set()
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

    def room(self, name: str, key: str) -> torch.Tensor:
        """Memory for what `read` gives, of any content."""
        stored, plan = self._stored(name, key), self._plans.get(name)
        shape = stored.shape if plan is None else [axis.new_size for axis in plan.maps]
        return torch.empty(shape, dtype=FLOATS[stored.dtype])

    def read(self, name: str, key: str, out: torch.Tensor) -> torch.Tensor:
        """A parameter's `weight`, or `exp_avg` or `exp_avg_sq` where moments are wanted and there.

        Args:
            name: of the parameter.
            key: of what is wanted.
            out: where to put it, made by `room`. Threads do best with memory from one thread: allocators such as
                glibc's keep a store for each, and the kernel clears what comes fresh.

        Raises:
            GrowthError: where the file has ended early, or cannot be read.
        """
        plan, stored = self._plans.get(name), self._stored(name, key)
        if plan is None or (plan.changes_nothing and name not in self._idle):
            return read_tensor(stored, out)
        value = read_tensor(stored, self._memory.tensor("read", stored.shape, FLOATS[stored.dtype]))
        if key == WEIGHT:
            return grow_parameter(value, plan, out)
        return cast(torch.Tensor, grow_entry(key, value, plan, "keep", name in self._idle, out))

    def _stored(self, name: str, key: str) -> StoredTensor:
        plan = self._plans.get(name)
        source = name if plan is None else plan.source
        return self._weights[source] if key == WEIGHT else self._moments[source][key]
