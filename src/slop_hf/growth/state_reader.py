"""`GrownStateReader`: weights and AdamW state from a directory, one parameter at a time, grown if a plan is given."""

from __future__ import annotations

from pathlib import Path

import torch

from ..architectures import get_architecture
from ..dims import ModelConfig
from ..errors import GrowthError
from .adamw import (
    StepPolicy,
    check_state_names,
    find_parameters_without_gradient,
    grow_entry,
    is_counted_from_zero,
    read_state_headers,
)
from .plan import GrowthPlan
from .safetensors_io import FLOATS, StoredTensor, read_checkpoint_headers, read_tensor
from .stacks import StoredStack, find_parameters, read_parameter
from .tensors import ThreadMemory, grow_parameter

WEIGHT = "weight"
#: Memory of each thread for the tensors that it reads before growing them; larger tensors get memory of their own.
REUSED_BYTES = 2**26


class GrownStateReader:
    """Reads each parameter of a model and its AdamW state from a directory, and grows it if a plan is given.

    The values equal the results of `grow_model` and `grow_adamw_state`. Any number of threads, processes or machines
    may read, each the parameters that it needs. A read takes the memory of one weight or moment, before and after
    growth.

    Args:
        directory: directory with a model's safetensors, and AdamW's state if `moments` is set.
        config: config of the stored model.
        plan: growth of the model; None reads what is stored.
        moments: whether to read AdamW's state too.
        step: as for `grow_adamw_state`.

    Raises:
        GrowthError: if files are missing, corrupt or belong to another model.
    """

    def __init__(
        self,
        directory: str | Path,
        config: ModelConfig,
        plan: GrowthPlan | None = None,
        *,
        moments: bool = True,
        step: StepPolicy = "keep",
    ) -> None:
        self._step: StepPolicy = step
        architecture = get_architecture(config)
        stored = read_checkpoint_headers(Path(directory))
        self._weights = find_parameters(stored, architecture, config)
        self._moments = read_state_headers(directory) if moments else {}
        self._memory = ThreadMemory(REUSED_BYTES)
        self._plans = {} if plan is None else {parameter.name: parameter for parameter in plan.parameters()}
        self._without_gradient = set() if plan is None else find_parameters_without_gradient(plan)
        if plan is not None:
            if differing := sorted(set(self._weights) ^ {parameter.source for parameter in self._plans.values()}):
                raise GrowthError(
                    f"the weights in {directory} differ from the model being grown, as in {differing[0]}"
                )
            if moments:
                check_state_names(self._moments, plan, str(directory))

    @property
    def names(self) -> set[str]:
        return set(self._plans or self._weights)

    def read_steps(self) -> dict[str, float]:
        """Return the number of steps that AdamW has counted for each parameter with a state; frozen ones have none."""
        stored = self._moments.items()
        steps = {name: float(read_tensor(entries["step"])) for name, entries in stored if "step" in entries}
        if not self._plans:
            return steps
        return {
            name: 0.0 if is_counted_from_zero(plan, self._step) else steps[plan.source]
            for name, plan in self._plans.items()
            if plan.source in steps
        }

    def list_momentum(self) -> set[str]:
        """Return the parameters with Muon's momentum."""
        stored = {name for name, entries in self._moments.items() if "momentum_buffer" in entries}
        if not self._plans:
            return stored
        return {name for name, plan in self._plans.items() if plan.source in stored}

    def allocate(self, name: str, key: str, *, pin: bool = False) -> torch.Tensor:
        """Return an uninitialised tensor for the result of `read`.

        Args:
            pin: whether its pages are pinned, for a faster copy to a GPU, during which this process can go on.
        """
        stored, plan = self._locate(name, key), self._plans.get(name)
        shape = stored.shape if plan is None else plan.new_shape
        return torch.empty(shape, dtype=FLOATS[stored.dtype], pin_memory=pin)

    def read(self, name: str, key: str, out: torch.Tensor) -> torch.Tensor:
        """Read a parameter's `weight` or one of its moments, grow it if there is a plan, and return it.

        Args:
            out: result, made by `allocate`. It is best to allocate in one thread for all: allocators such as glibc's
                keep a store per thread, and the kernel clears memory that comes fresh.
        """
        plan, stored, has_no_gradient = self._plans.get(name), self._locate(name, key), name in self._without_gradient
        has_own_moments = plan is not None and (has_no_gradient or plan.is_added or plan.branch_share != 1)
        if plan is None or (plan.is_identity and (key == WEIGHT or not has_own_moments)):
            return read_parameter(stored, out)
        value = read_parameter(stored, self._memory.allocate("read", stored.shape, FLOATS[stored.dtype]))
        if key == WEIGHT:
            return grow_parameter(value, plan, out)
        return grow_entry(key, value, plan, self._step, has_no_gradient, out)

    def _locate(self, name: str, key: str) -> StoredTensor | StoredStack:
        source = self._plans[name].source if name in self._plans else name
        return self._weights[source] if key == WEIGHT else self._moments[source][key]
