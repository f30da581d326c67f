"""`ConfigSpace`: which target structures a planner may choose from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from .cost import DEFAULT_CONFIG, count_parameters, paper_params
from .dims import ModelDims
from .errors import PlanError


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

    def row(self) -> DimsArray:
        """The same structures as one path, shape [1, structures]."""
        return DimsArray(**{item.name: getattr(self, item.name)[None] for item in fields(self)})

    @property
    def loadable(self) -> np.ndarray:
        """Where transformers would build the structure: heads divide hidden, key/value heads divide heads."""
        heads_fit = self.hidden_size % self.num_attention_heads == 0
        return heads_fit & (self.num_attention_heads % self.num_key_value_heads == 0)


@dataclass(frozen=True)
class ConfigSpace:
    """The targets: given, or every structure of about `target_params` parameters that meets the constraints.

    The constraints are those of Section 4.1 of the paper, with bounds on depth and shape: over all structures
    of a size, the paper's objective is smallest at the deepest or the shallowest ones, so it needs them.

    Args:
        targets: the structures to choose from; excludes `target_params`.
        target_params: number of parameters N of a target.
        tolerance: how far a target's parameters may be from N, as a share of it.
        count: "model" counts every parameter with `config`'s vocabulary, "paper" counts `l * (6h^2 + 3hf)`.
        config: what growth leaves alone: `model_type`, `vocab_size`, `tie_word_embeddings`; a config or a dict.
        sequence_length: tokens of a training sequence, for FLOPs.
        hidden_multiple: hidden sizes are multiples of it.
        ffn_ratios: ffn sizes as multiples of the hidden size, each rounded up to `ffn_multiple`.
        ffn_multiple: see there.
        min_layers, max_layers: bounds on depth.
        min_aspect, max_aspect: bounds on hidden size / layers.

    >>> space = ConfigSpace(target_params=1e9)
    >>> str(space.structures(ModelDims(768, 2048, 6, 6))[0])
    '(1152, 4608, 42, 9)'
    """

    targets: tuple[ModelDims, ...] = ()
    target_params: float | None = None
    tolerance: float = 0.05
    count: Literal["model", "paper"] = "model"
    config: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_CONFIG))
    sequence_length: int = 2048
    hidden_multiple: int = 128
    ffn_ratios: tuple[Fraction, ...] = (Fraction(8, 3), Fraction(4))
    ffn_multiple: int = 256
    min_layers: int = 1
    max_layers: int = 64
    min_aspect: float = 24
    max_aspect: float = 384

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if bool(self.targets) == (self.target_params is not None):
            raise PlanError("give either targets or target_params, not both and not neither")
        if self.target_params is not None and not (self.target_params > 0 and math.isfinite(self.target_params)):
            raise PlanError(f"target_params must be a positive number, got {self.target_params}")
        if not 0 <= self.tolerance < 1:
            raise PlanError(f"tolerance must be a share from 0 up to 1, got {self.tolerance}")
        if self.count not in ("model", "paper"):
            raise PlanError(f"count must be 'model' or 'paper', got {self.count!r}")
        for name in ("hidden_multiple", "ffn_multiple", "min_layers", "max_layers", "sequence_length"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.min_layers > self.max_layers or not 0 < self.min_aspect <= self.max_aspect:
            raise PlanError(
                f"bounds contradict: layers {self.min_layers} to {self.max_layers}, "
                f"hidden / layers {self.min_aspect:g} to {self.max_aspect:g}"
            )

    def structures(self, initial: ModelDims) -> list[ModelDims]:
        """The targets that can be grown from `initial`, in the order of hidden size, ffn and depth.

        Heads keep the initial model's head_dim and its number of query heads per key/value head.

        Raises:
            PlanError: where none is left; it names the nearest.
        """
        if self.targets:
            return list(self.targets)
        candidates = self._candidates(initial)
        counts = count_parameters(candidates, self.config) if self.count == "model" else paper_params(candidates)
        assert self.target_params is not None
        off = np.abs(counts / self.target_params - 1)
        chosen = np.flatnonzero(off <= self.tolerance)
        if not len(chosen):
            nearest = ""
            if len(off):
                best = int(np.argmin(off))
                nearest = f"; the nearest is {candidates.at(best)} with {counts[best]:.4g}"
            raise PlanError(
                f"no structure grown from {initial} has {self.target_params:.4g} parameters within "
                f"{self.tolerance:.1%}{nearest}; raise the tolerance or loosen the bounds on layers and shape"
            )
        return [candidates.at(index) for index in chosen]

    def _candidates(self, initial: ModelDims) -> DimsArray:
        rows = []
        group = initial.num_attention_heads // initial.num_key_value_heads
        hidden = math.ceil(initial.hidden_size / self.hidden_multiple) * self.hidden_multiple
        while hidden <= self.max_aspect * self.max_layers:
            heads, remainder = divmod(hidden * initial.num_attention_heads, initial.hidden_size)
            low = max(self.min_layers, initial.num_hidden_layers, math.ceil(hidden / self.max_aspect))
            high = min(self.max_layers, math.floor(hidden / self.min_aspect))
            for ratio in self.ffn_ratios if not remainder and heads % group == 0 else ():
                ffn = math.ceil(ratio * hidden / self.ffn_multiple) * self.ffn_multiple
                if ffn >= initial.intermediate_size:
                    rows += [(hidden, ffn, layers, heads, heads // group) for layers in range(low, high + 1)]
            hidden += self.hidden_multiple
        table = np.array(sorted(set(rows)), dtype=np.int64).reshape(-1, 5)
        sizes = dict(zip((item.name for item in fields(DimsArray)), table.T, strict=False))
        return DimsArray(**sizes, head_dim=np.full(len(table), initial.head_dim, dtype=np.int64))
