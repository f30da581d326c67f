"""`CostModel`: device hours of training, predicted from FLOPs and tokens by a fit to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..architectures import read_setting
from ..dims import LARGEST_SIZE, ModelConfig, ModelDims
from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number, require_whole_number
from ..io.record import Record
from .flops import count_flops_per_token
from .memory import BYTES_PER_PARAMETER

Amount = TypeVar("Amount", float, npt.NDArray[np.number])


@dataclass(frozen=True)
class Measurement(Record, error=PlanError):
    """One timed training run.

    Args:
        label: description of the model, such as its structure.
        flops_per_token: training FLOPs per token, as `cost.flops.count_flops_per_token` counts them.
        tokens: tokens trained on.
        hours: device hours: wall-clock time multiplied by the number of devices.
    """

    label: str
    flops_per_token: float
    tokens: float
    hours: float

    def __post_init__(self) -> None:
        for name in ("flops_per_token", "tokens", "hours"):
            value = getattr(self, name)
            if not is_positive_number(value):
                raise PlanError(f"measurement {self.label!r}: {name} must be a positive number, got {value}")


@dataclass(frozen=True)
class CostModel(Record, error=PlanError):
    """Device hours of training: `hours_per_flop * FLOPs + hours_per_token * tokens`.

    The second term covers what a token costs in addition to its FLOPs: reading data, norms, communication, kernel
    launches.

    Args:
        hours_per_flop, hours_per_token: the two coefficients.
        hardware: description of the measured hardware.
        measurements: measurements that the coefficients were fitted to; empty if they were given directly.

    Raises:
        PlanError: if a coefficient is not a positive number (`hours_per_token` may be 0).

    >>> cost = CostModel(hours_per_flop=1e-18, hours_per_token=1e-10)
    >>> round(cost.hours(6e9, 10e9), 3)
    61.0
    """

    hours_per_flop: float
    hours_per_token: float = 0.0
    hardware: str = ""
    measurements: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        if not is_positive_number(self.hours_per_flop):
            raise PlanError(f"hours_per_flop must be a positive number, got {self.hours_per_flop}")
        if not is_finite_number(self.hours_per_token, least=0):
            raise PlanError(f"hours_per_token must be 0 or more, got {self.hours_per_token}")

    @classmethod
    def fit(cls, measurements: Sequence[Measurement], hardware: str = "") -> CostModel:
        """Fit the coefficients by least squares of the relative errors, without negative ones.

        Raises:
            PlanError: for fewer than two measurements, or if the hours do not rise with the FLOPs.
        """
        if len(measurements) < 2:
            raise PlanError(f"a cost model needs at least 2 measurements, got {len(measurements)}: measure more sizes")
        flops = np.array([run.flops_per_token * run.tokens / run.hours for run in measurements])
        tokens = np.array([run.tokens / run.hours for run in measurements])
        scales = np.array([flops.max(), tokens.max()])  # 1e18 and 1e9: without scaling, the solver drops one
        columns = np.stack([flops, tokens], axis=1) / scales
        per_flop, per_token = np.linalg.lstsq(columns, np.ones(len(flops)), rcond=None)[0] / scales
        if per_token < 0:  # small models were no slower than their FLOPs
            per_flop, per_token = flops.sum() / (flops**2).sum(), 0.0
        elif per_flop <= 0:
            raise PlanError(
                "the hours do not rise with the FLOPs of the structures: measure sizes that differ by more, for longer"
            )
        return cls(float(per_flop), float(per_token), hardware, tuple(measurements))

    def hours(self, flops_per_token: Amount, tokens: Amount | float) -> Amount:
        """Device hours of training on `tokens` tokens; numbers, or arrays of one shape."""
        return (self.hours_per_flop * flops_per_token + self.hours_per_token) * tokens

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error of the prediction for each measurement; positive if it is too long."""
        return tuple(self.hours(run.flops_per_token, run.tokens) / run.hours - 1 for run in self.measurements)

    @property
    def mean_error(self) -> float | None:
        """Mean absolute relative error over the measurements; None without measurements."""
        return sum(map(abs, self.errors)) / len(self.errors) if self.measurements else None


def check_calibration(
    structures: Sequence[ModelDims],
    config: ModelConfig,
    *,
    sequence_length: int,
    batch_size: int,
    steps: int,
    warmup_steps: int,
    precision: str,
    seed: int = 0,
) -> None:
    """Refuse settings of `calibrate` that cannot be measured.

    Raises:
        PlanError: for numbers out of range, an unknown precision, or fewer than two structures of different FLOPs.
    """
    # A sequence of one token has nothing to predict.
    for name, value, least in (
        ("sequence_length", sequence_length, 2),
        ("vocab_size", read_setting(config, "vocab_size"), 2),
        ("batch_size", batch_size, 1),
        ("steps", steps, 1),
        ("warmup_steps", warmup_steps, 0),
        ("seed", seed, 0),
    ):
        require_whole_number(value, name, least=least, most=LARGEST_SIZE, error=PlanError)
    if precision not in BYTES_PER_PARAMETER:
        raise PlanError(f"precision must be one of {', '.join(BYTES_PER_PARAMETER)}, got {precision!r}")
    if len({count_flops_per_token(dims, config, sequence_length) for dims in structures}) < 2:
        names = ", ".join(map(str, structures)) or "none"
        raise PlanError(f"calibration needs at least 2 structures of different FLOPs, got {names}: give more sizes")
    if repeated := [str(dims) for dims in dict.fromkeys(structures) if list(structures).count(dims) > 1]:
        raise PlanError(f"structure {', '.join(repeated)} is given twice: give each once, and more steps")
