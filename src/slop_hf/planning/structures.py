"""Many structures at once: `DimsArray` holds their sizes, `DimsTable` adds what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..cost.flops import DEFAULT_CONFIG, count_experts, count_flops_per_token, count_paper_params, count_parameters
from ..cost.hours import CostModel
from ..cost.scaling_law import ScalingLaw
from ..dims import IntArray, ModelConfig, ModelDims
from ..errors import PlanError

BoolArray: TypeAlias = npt.NDArray[np.bool_]
FloatArray: TypeAlias = npt.NDArray[np.float64]
#: Whatever numpy accepts in square brackets.
Index: TypeAlias = Any


@dataclass(frozen=True)
class DimsArray:
    """Many structures: `ModelDims` whose fields are integer arrays of one shape."""

    hidden_size: IntArray
    intermediate_size: IntArray
    num_hidden_layers: IntArray
    num_attention_heads: IntArray
    num_key_value_heads: IntArray
    head_dim: IntArray

    @classmethod
    def of(cls, structures: Sequence[ModelDims]) -> DimsArray:
        """Build the arrays from a list of structures, shape [structures]."""
        rows = [[getattr(dims, item.name) for dims in structures] for item in fields(cls)]
        return cls(*np.array(rows, dtype=np.int64))

    def at(self, index: Index) -> ModelDims:
        """Return the structure at one index."""
        return ModelDims(**{item.name: int(getattr(self, item.name)[index]) for item in fields(self)})

    def __getitem__(self, index: Index) -> DimsArray:
        """Index or reshape, with numpy semantics."""
        return DimsArray(**{item.name: getattr(self, item.name)[index] for item in fields(self)})

    def __len__(self) -> int:
        return len(self.hidden_size)

    def to_floats(self) -> DimsArray:
        """Return the sizes as float64, in which costs of absurdly large structures do not overflow.

        Costs of structures that exist are exact: they are integers below 2^53.
        """
        return DimsArray(**{item.name: getattr(self, item.name).astype(np.float64) for item in fields(self)})

    @property
    def loadable(self) -> BoolArray:
        """Whether transformers would build each structure: heads divide hidden, key/value heads divide heads."""
        heads, kv_heads = np.maximum(self.num_attention_heads, 1), np.maximum(self.num_key_value_heads, 1)
        divisible = (self.hidden_size % heads == 0) & (heads % kv_heads == 0) & (self.head_dim % 2 == 0)
        return divisible & (self.num_attention_heads > 0)


@dataclass(frozen=True)
class CostInputs:
    """Inputs to the cost and the predicted loss of structures, apart from their sizes.

    Args:
        config: settings that growth does not change (`ConfigSpace.config`).
        cost_model: device hours of the hardware; None if no objective needs them.
    """

    config: ModelConfig = field(default_factory=lambda: DEFAULT_CONFIG)
    sequence_length: int = 2048
    cost_model: CostModel | None = None
    law: ScalingLaw = field(default_factory=ScalingLaw)


class DimsTable:
    """Structures and their costs: float64 arrays of one shape, each computed on first use."""

    def __init__(self, dims: DimsArray, inputs: CostInputs) -> None:
        self.dims = dims
        self.inputs = inputs

    def select(self, index: Index) -> DimsTable:
        """Index with numpy semantics. Costs are looked up in this table, so none is computed twice."""
        return _Selection(self, index)

    @cached_property
    def _sizes(self) -> DimsArray:
        return self.dims.to_floats()

    @cached_property
    def paper_params(self) -> FloatArray:
        """Parameters as the paper's objective counts them, see `count_paper_params`."""
        return self._column("paper_params", lambda: count_paper_params(self._sizes, count_experts(self.inputs.config)))

    @cached_property
    def parameters(self) -> FloatArray:
        """All parameters."""
        return self._column("parameters", lambda: count_parameters(self._sizes, self.inputs.config))

    @cached_property
    def flops_per_token(self) -> FloatArray:
        """Training FLOPs per token."""
        config, length = self.inputs.config, self.inputs.sequence_length
        return self._column("flops_per_token", lambda: count_flops_per_token(self._sizes, config, length))

    @cached_property
    def loss_floor(self) -> FloatArray:
        """Predicted loss after unlimited training."""
        return self._column("loss_floor", lambda: self.inputs.law.floor(self.parameters))

    @cached_property
    def hours_per_token(self) -> FloatArray:
        """Device hours per token."""
        cost_model = self.inputs.cost_model
        if cost_model is None:
            raise PlanError("hours need a cost model: measure one with `slop calibrate`, or use the paper's")
        return self._column("hours_per_token", lambda: cost_model.hours(self.flops_per_token, 1.0))

    def _column(self, name: str, compute: Callable[[], npt.ArrayLike]) -> FloatArray:
        return np.asarray(compute(), dtype=np.float64)


class _Selection(DimsTable):
    """Part of another table."""

    def __init__(self, table: DimsTable, index: Index) -> None:
        self.inputs = table.inputs
        self._table, self._index = table, index

    @cached_property
    def dims(self) -> DimsArray:  # type: ignore[override]
        return self._table.dims[self._index]

    def _column(self, name: str, compute: Callable[[], npt.ArrayLike]) -> FloatArray:
        return np.asarray(getattr(self._table, name)[self._index])
