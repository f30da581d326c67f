"""`CostModel`: how long hardware takes for a number of FLOPs, fitted from measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import PlanError
from ..io.files import write_text
from ..io.serialization import parse, read_yaml, to_yaml


@dataclass(frozen=True)
class Measurement:
    """Training that took so many device hours.

    Args:
        label: what was trained, such as a structure.
        flops_per_token: as `cost.flops_per_token` counts them.
        tokens: trained on.
        hours: device hours: wall time times the number of devices.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    label: str
    flops_per_token: float
    tokens: float
    hours: float

    def __post_init__(self) -> None:
        for name in ("flops_per_token", "tokens", "hours"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise PlanError(
                    f"measurement {self.label!r}: {name} must be a positive number, got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class CostModel:
    """Device hours of training: `hours_per_flop * FLOPs + hours_per_token * tokens`.

    The second term is what a token costs beside its arithmetic: reading data, norms, communication, launching kernels.

    Args:
        hours_per_flop, hours_per_token: the two prices.
        hardware: what they were measured on.
        measurements: what they were fitted to; empty where they were given.

    >>> cost = CostModel(hours_per_flop=1e-18, hours_per_token=1e-10)
    >>> round(cost.hours(6e9, 10e9), 3)
    61.0
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    hours_per_flop: float
    hours_per_token: float = 0.0
    hardware: str = ""
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.hours_per_flop) and self.hours_per_flop > 0):
            raise PlanError(f"hours_per_flop must be a positive number, got {self.hours_per_flop}")
        if not (math.isfinite(self.hours_per_token) and self.hours_per_token >= 0):
            raise PlanError(f"hours_per_token must be 0 or more, got {self.hours_per_token}")

    @classmethod
    def fit(cls, measurements: Sequence[Measurement], hardware: str = "") -> CostModel:
        """The prices with the least squares of relative errors; neither is negative.

        Raises:
            PlanError: for fewer than two measurements.
        """
        if len(measurements) < 2:
            raise PlanError(f"a cost model needs at least 2 measurements, got {len(measurements)}: measure more sizes")
        flops = np.array([one.flops_per_token * one.tokens / one.hours for one in measurements])
        tokens = np.array([one.tokens / one.hours for one in measurements])
        scales = np.array([flops.max(), tokens.max()])  # 1e18 beside 1e9: scaled, or the solver drops one
        columns = np.stack([flops, tokens], axis=1) / scales
        per_flop, per_token = np.linalg.lstsq(columns, np.ones(len(flops)), rcond=None)[0] / scales
        if per_token < 0:  # small models were no slower than their FLOPs
            per_flop, per_token = flops.sum() / (flops**2).sum(), 0.0
        elif per_flop <= 0:
            raise PlanError(
                "the hours do not rise with the FLOPs of the structures: measure sizes that differ by more, for longer"
            )
        return cls(float(per_flop), float(per_token), hardware, tuple(measurements))

    def hours(self, flops_per_token: Any, tokens: Any) -> Any:
        """Device hours of so many tokens; numbers or arrays."""
        return (self.hours_per_flop * flops_per_token + self.hours_per_token) * tokens

    @property
    def errors(self) -> tuple[float, ...]:
        """How far the prediction is from each measurement, as a share of it; above 0 is too long."""
        return tuple(self.hours(one.flops_per_token, one.tokens) / one.hours - 1 for one in self.measurements)

    @property
    def mean_error(self) -> float | None:
        """Mean absolute relative error over the measurements; None where there are none."""
        return sum(map(abs, self.errors)) / len(self.errors) if self.measurements else None

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The model as YAML text, also written to `path` if one is given."""
        text = to_yaml(self)
        if path is not None:
            write_text(path, text)
        return text

    @classmethod
    def from_yaml(cls, path: str | Path) -> CostModel:
        """Read a model.

        Raises:
            PlanError: in one line that names the file and the key.
        """
        return parse(cls, read_yaml(path, error=PlanError), where=str(path), error=PlanError)
