"""Many structures at once: `DimsArray`, and what they cost: `Structures`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import numpy as np

from ..cost.flops import DEFAULT_CONFIG, count_parameters, flops_per_token, paper_params
from ..cost.hours import CostModel
from ..cost.scaling_law import ScalingLaw
from ..dims import ModelDims
from ..errors import PlanError


@dataclass(frozen=True)
class DimsArray:
    """Many structures at once: `ModelDims` whose fields are integer arrays of one shape."""

    hidden_size: np.ndarray
    intermediate_size: np.ndarray
    num_hidden_layers: np.ndarray
    num_attention_heads: np.ndarray
    num_key_value_heads: np.ndarray
    head_dim: np.ndarray

    @classmethod
    def of(cls, structures: Sequence[ModelDims]) -> DimsArray:
        """The arrays of a list of structures, shape [structures]."""
        names = [item.name for item in fields(cls)]
        return cls(**{name: np.array([getattr(dims, name) for dims in structures], dtype=np.int64) for name in names})

    def at(self, index: Any) -> ModelDims:
        """The structure at one index."""
        return ModelDims(**{item.name: int(getattr(self, item.name)[index]) for item in fields(self)})

    def __getitem__(self, index: Any) -> DimsArray:
        """Some of the structures, or another shape of them, by numpy's rules."""
        return DimsArray(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def __len__(self) -> int:
        return len(self.hidden_size)

    @property
    def loadable(self) -> np.ndarray:
        """Where transformers would build the structure: heads divide hidden, key/value heads divide heads."""
        heads, kv_heads = np.maximum(self.num_attention_heads, 1), np.maximum(self.num_key_value_heads, 1)
        whole = (self.hidden_size % heads == 0) & (heads % kv_heads == 0) & (self.head_dim % 2 == 0)
        return whole & (self.num_attention_heads > 0)


@dataclass(frozen=True)
class Prices:
    """What the cost and the loss of a structure follow from.

    Args:
        config: what growth leaves alone (`ConfigSpace.config`).
        sequence_length: tokens of a training sequence.
        cost_model: hours of the hardware; None where no objective asks for them.
        law: predicts losses.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_CONFIG))
    sequence_length: int = 2048
    cost_model: CostModel | None = None
    law: ScalingLaw = field(default_factory=ScalingLaw)


class Structures:
    """Structures side by side, and what they cost: float64 arrays, each computed when it is first asked for.

    Args:
        dims: arrays of one shape.
        prices: see there.
    """

    def __init__(self, dims: DimsArray, prices: Prices) -> None:
        self.dims = dims
        self.prices = prices

    def __len__(self) -> int:
        return len(self.dims)

    def take(self, index: np.ndarray) -> Structures:
        """Some of them, in any order and as often as asked for; what has been computed here is not computed again."""
        return _Taken(self, index)

    @cached_property
    def paper_params(self) -> np.ndarray:
        """Parameters as the paper's objective counts them, `cost.paper_params`."""
        return self._figure("paper_params", lambda: paper_params(self.dims))

    @cached_property
    def parameters(self) -> np.ndarray:
        """All parameters."""
        return self._figure("parameters", lambda: count_parameters(self.dims, self.prices.config))

    @cached_property
    def flops_per_token(self) -> np.ndarray:
        """Training FLOPs of a token."""
        prices = self.prices
        return self._figure(
            "flops_per_token", lambda: flops_per_token(self.dims, prices.config, prices.sequence_length)
        )

    @cached_property
    def loss_floor(self) -> np.ndarray:
        """The loss after endless training."""
        return self._figure("loss_floor", lambda: self.prices.law.floor(self.parameters))

    @cached_property
    def hours_per_token(self) -> np.ndarray:
        """Device hours of a token.

        Raises:
            PlanError: without a cost model.
        """
        cost_model = self.prices.cost_model
        if cost_model is None:
            raise PlanError("hours need a cost model: give that of `slop calibrate`, or paper.cost_model()")
        return self._figure("hours_per_token", lambda: cost_model.hours(self.flops_per_token, 1.0))

    def _figure(self, name: str, compute: Callable[[], Any]) -> np.ndarray:
        return np.asarray(compute(), dtype=np.float64)


class _Taken(Structures):
    """Structures taken out of others."""

    def __init__(self, whole: Structures, index: np.ndarray) -> None:
        self.prices = whole.prices
        self._whole, self._index = whole, index

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def dims(self) -> DimsArray:  # type: ignore[override]
        return self._whole.dims[self._index]

    def _figure(self, name: str, compute: Callable[[], Any]) -> np.ndarray:
        return np.asarray(getattr(self._whole, name)[self._index])
