"""`States`: weights and AdamW's state, one parameter at a time. `Strategy`: how the ranks hold the model.

This file is for one process and for DistributedDataParallel, under which every rank holds the whole model; `zero3.py`
is for DeepSpeed ZeRO-3, `fsdp2.py` for FSDP2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..growth import WEIGHT
from .muon import ALGORITHM, MOMENTUM, MUON
from .ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, Trainer

#: Names of AdamW's two moments in its state.
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class States(Protocol):
    """Weights and AdamW's state, replicated on every rank or sharded over all.

    A `key` is `weight`, one of `MOMENT_KEYS`, or Muon's `MOMENTUM`. All ranks call `gather` and `put` in the same
    order. The whole tensor of a parameter is on one rank, its `owner`, so that no rank ever holds a whole sharded
    model.
    """

    ranks: Ranks

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter, in the model's order."""

    def get_dtype(self, name: str, key: str) -> torch.dtype:
        """Return the dtype of a weight or a moment, as it is kept at its most precise."""

    def count_steps(self) -> dict[str, float]:
        """Return the number of steps that AdamW has counted for each parameter with a state.

        A parameter has none if it is frozen, or has had no gradient yet.
        """

    def gather(self, name: str, key: str, owner: int, numbers: range | None = None) -> torch.Tensor | None:
        """Return a weight or a moment on the owner's device; None on other ranks.

        Args:
            numbers: positions in the flat tensor, one after another, to return alone, flat; None returns all.
        """

    def list_momentum(self) -> Collection[str]:
        """Return the parameters with Muon's momentum."""

    def make_moments(self, steps: Mapping[str, float], momentum: Collection[str] = ()) -> None:
        """Give a fresh optimizer moments of 0, and AdamW's steps by parameter; `put` fills the moments in.

        Frozen parameters get nothing, nor do those that this optimizer updates by the other algorithm.

        Args:
            momentum: parameters with Muon's momentum.
        """

    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        """Replace a weight or a moment by the owner's value."""

    def finish(self) -> None:
        """Make the new values visible to the next forward pass."""


class ReplicatedStates:
    """States of a model that every rank holds whole; without an optimizer, the weights alone."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> None:
        self.ranks = ranks
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def get_dtype(self, name: str, key: str) -> torch.dtype:
        return self._get_tensor(name, key).dtype

    def count_steps(self) -> dict[str, float]:
        state = {} if self._optimizer is None else self._optimizer.state
        entries = {name: state[parameter] for name, parameter in self._parameters.items() if parameter in state}
        return {name: float(entry[STEP]) for name, entry in entries.items() if {STEP, *MOMENT_KEYS} <= entry.keys()}

    def list_momentum(self) -> Collection[str]:
        state = {} if self._optimizer is None else self._optimizer.state
        return {name for name, parameter in self._parameters.items() if MOMENTUM in state.get(parameter, {})}

    def gather(self, name: str, key: str, owner: int, numbers: range | None = None) -> torch.Tensor | None:
        if self.ranks.rank != owner:
            return None
        tensor = self._get_tensor(name, key).detach()
        return tensor if numbers is None else tensor.flatten()[numbers.start : numbers.stop]

    def make_moments(self, steps: Mapping[str, float], momentum: Collection[str] = ()) -> None:
        assert self._optimizer is not None
        groups = {parameter: group for group in self._optimizer.param_groups for parameter in group["params"]}
        for name in momentum:
            parameter = self._parameters[name]
            if groups.get(parameter, {}).get(ALGORITHM) == MUON:
                self._optimizer.state[parameter] = {
                    MOMENTUM: torch.zeros_like(parameter, memory_format=torch.preserve_format)
                }
        for name, step in steps.items():
            parameter = self._parameters[name]
            if (group := groups.get(parameter)) is None or group.get(ALGORITHM) == MUON:
                continue
            # AdamW keeps its step on the parameter's device for kernels that read it there, else on the CPU.
            on_device = group.get("fused") or group.get("capturable")
            device = parameter.device if on_device else torch.device("cpu")
            self._optimizer.state[parameter] = {
                STEP: torch.tensor(step, dtype=torch.float32, device=device),
                **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENT_KEYS},
            }

    @torch.no_grad()
    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        tensor = self._get_tensor(name, key)
        if self.ranks.count == 1:
            assert value is not None
            # The value itself: copying into untouched memory costs more than reading did.
            tensor.data = value.to(tensor, non_blocking=True)  # while the next one is read
            return
        # DistributedDataParallel has its own views of these tensors.
        if value is not None:
            tensor.copy_(value, non_blocking=True)
        dist.broadcast(tensor, src=owner)

    def finish(self) -> None:
        pass

    def _get_tensor(self, name: str, key: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if key == WEIGHT:
            return parameter
        assert self._optimizer is not None
        return cast(torch.Tensor, self._optimizer.state[parameter][key])


class Strategy:
    """How the ranks of a launch hold a model; by default every rank holds it whole."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def begin_stage(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """Make the settings that a stage needs before its model is prepared."""

    def keep_groups(self, optimizer: torch.optim.Optimizer) -> None:
        """Note a stage's optimizer before accelerate prepares it."""

    def finish_preparation(self, wrapped: torch.nn.Module) -> None:
        """Adjust a stage's model after it was wrapped for training."""

    def build_empty_model(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
    ) -> PreTrainedModel:
        """Return a model with uninitialised parameters."""
        with no_init_weights():
            model = model_class._from_config(config, dtype=dtype)
        model.tie_weights()
        return model

    def get_states(self, trainer: Trainer) -> States:
        """Return the states of the model that a trainer has prepared."""
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        return ReplicatedStates(trainer.model, optimizer, self._ranks)

    def release(self, wrapped: torch.nn.Module) -> None:
        """Free a wrapped model after its stage."""
