"""`States`: weights and AdamW's state of the model in training, a parameter at a time, however they are shared out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..growth import WEIGHT
from .ranks import Ranks

#: AdamW's moments, as its state names them.
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"


class States(Protocol):
    """Weights and AdamW's state, whole on every rank or in parts on all.

    `whole` and `put` are called by all ranks in the same order. A parameter's whole tensor lies on one rank, its
    `owner`, so that no rank ever holds a whole model.
    """

    ranks: Ranks

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each parameter, in the model's order."""

    def dtype(self, name: str, key: str) -> torch.dtype:
        """Of a parameter's `weight` or moment, as it is kept at its most precise."""

    def has_moments(self) -> bool:
        """Whether AdamW has a state: not before its first step."""

    @property
    def step(self) -> float:
        """How many steps AdamW has counted."""

    def whole(self, name: str, key: str, owner: int) -> torch.Tensor | None:
        """A `weight` or a moment, on the CPU of its owner; None on other ranks."""

    def make_moments(self, step: float) -> None:
        """Give a fresh AdamW moments of 0 and a step, to `put` the true ones into."""

    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        """Replace a `weight` or a moment by the owner's."""

    def finish(self) -> None:
        """Make what has been put what the next forward pass sees."""


class WholeStates:
    """States of a model that every rank has whole: in one process, or under DistributedDataParallel.

    Args:
        model: in training.
        optimizer: its AdamW; None for the weights alone.
        ranks: of the run.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, ranks: Ranks) -> None:
        self.ranks = ranks
        self._parameters = dict(model.named_parameters())
        self._optimizer = optimizer

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def dtype(self, name: str, key: str) -> torch.dtype:
        return self._tensor(name, key).dtype

    def has_moments(self) -> bool:
        return self._optimizer is not None and any(MOMENTS[0] in state for state in self._optimizer.state.values())

    @property
    def step(self) -> float:
        assert self._optimizer is not None
        return max(float(state[STEP]) for state in self._optimizer.state.values() if state)

    def whole(self, name: str, key: str, owner: int) -> torch.Tensor | None:
        return self._tensor(name, key).detach().cpu() if self.ranks.rank == owner else None

    def make_moments(self, step: float) -> None:
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            # Where AdamW keeps its step itself: beside the parameter for kernels that read it there.
            beside = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:
                device = parameter.device if beside else torch.device("cpu")
                self._optimizer.state[parameter] = {
                    STEP: torch.tensor(step, dtype=torch.float32, device=device),
                    **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS},
                }

    @torch.no_grad()
    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        tensor = self._tensor(name, key)
        if self.ranks.count == 1:
            assert value is not None
            # The value itself: a copy into memory that has never been touched costs more than reading did.
            tensor.data = value.to(tensor)
            return
        # DistributedDataParallel has its own views of these tensors.
        if value is not None:
            tensor.copy_(value)
        dist.broadcast(tensor, src=owner)

    def finish(self) -> None:
        pass

    def _tensor(self, name: str, key: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if key == WEIGHT:
            return parameter
        assert self._optimizer is not None
        return self._optimizer.state[parameter][key]


class Setup(Protocol):
    """How a launch holds models."""

    def begin_stage(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """What is to be set before a stage's model is prepared."""

    def prepared(self, wrapped: Any) -> None:
        """Told of a stage's model, once it is wrapped for training."""

    def empty_model(self, model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
        """A model whose parameters hold nothing yet."""

    def states(self, trainer: Any) -> States:
        """Of the model that a trainer has prepared."""

    def release(self, wrapped: Any) -> None:
        """Let go of a wrapped model that training has ended with."""


class WholeSetup:
    """Every rank holds the whole model.

    Args:
        ranks: of the run.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def begin_stage(self, micro_batch_size: int, accumulation_steps: int) -> None:
        pass

    def prepared(self, wrapped: Any) -> None:
        pass

    def empty_model(self, model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
        with no_init_weights():
            model = cast(PreTrainedModel, model_class._from_config(config, dtype=dtype))
        model.tie_weights()
        return model

    def states(self, trainer: Any) -> WholeStates:
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        return WholeStates(trainer.model, optimizer, self._ranks)

    def release(self, wrapped: Any) -> None:
        pass
