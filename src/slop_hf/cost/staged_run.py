"""`StagedRun`: a run that grows in stages, in the numbers that its loss depends on. `RunTable`: many, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..dims import ModelDims
from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number
from ..io.record import Record

#: Dimensions of growth: layers; ffn, or heads under a residual stream that stays; the residual stream with its heads.
GROWN_DIMENSIONS = ("depth", "inner", "hidden")
#: Parts of a stage; the learning rate is taken to be constant within a part.
PARTS = 16


@dataclass(frozen=True)
class TrainedStage(Record, error=PlanError):
    """One stage of a run.

    Args:
        parameters: number of parameters of the model.
        width: hidden size of the model.
        tokens: tokens trained on.
        rates: learning rate in equal parts of the stage.
        factors: growth factor by dimension (`GROWN_DIMENSIONS`) at the beginning of the stage; empty without growth.
        is_copied: whether new entries of the residual stream come from old ones, as copies or with the function
            preserved, and are not random.
        is_carried: whether AdamW's state was grown with the weights, and not reset.
        losses: held-out losses: (share of the stage's tokens, loss in nats per token), the one at its end last.

    Raises:
        PlanError: for numbers out of range, or an unknown dimension.
    """

    parameters: float
    width: float
    tokens: float
    rates: tuple[float, ...]
    factors: dict[str, float] = field(default_factory=dict)
    is_copied: bool = False
    is_carried: bool = False
    losses: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("parameters", "width"):
            if not is_positive_number(getattr(self, name)):
                raise PlanError(f"{name} of a stage must be a positive number, got {getattr(self, name)!r}")
        if not is_finite_number(self.tokens, least=0):
            raise PlanError(f"tokens of a stage must be 0 or more, got {self.tokens!r}")
        if not self.rates or not all(is_finite_number(rate, least=0) for rate in self.rates):
            raise PlanError(f"rates of a stage must be one or more numbers of at least 0, got {self.rates!r}")
        if unknown := sorted(self.factors.keys() - set(GROWN_DIMENSIONS)):
            raise PlanError(f"unknown dimension {unknown[0]!r} of growth; known: {', '.join(GROWN_DIMENSIONS)}")
        if not all(is_finite_number(factor, least=1) for factor in self.factors.values()):
            raise PlanError(f"growth factors must be 1 or more, got {self.factors!r}")
        if not all(0 <= share <= 1 and is_positive_number(loss) for share, loss in self.losses):
            raise PlanError(
                f"losses must be pairs (share of the stage from 0 to 1, loss above 0), got {self.losses!r}"
            )


@dataclass(frozen=True)
class StagedRun(Record, error=PlanError):
    """A run in stages, to fit a growth law to or to predict.

    Args:
        stages: its stages, the initial model's first.
        experiment: name of the experiment that it belongs to.
        text: name of the corpus, the tokenizer and the held-out part; losses of different texts differ by a constant.
        is_finished: whether its learning-rate schedule has ended. Otherwise its last loss is not an end.

    Raises:
        PlanError: for a run without stages or tokens, or growth before the first stage.
    """

    stages: tuple[TrainedStage, ...]
    experiment: str = ""
    text: str = ""
    is_finished: bool = True

    def __post_init__(self) -> None:
        if not sum(stage.tokens for stage in self.stages):
            raise PlanError("a staged run needs at least one stage with tokens")
        if self.stages[0].factors:
            raise PlanError(f"the first stage of a run cannot grow, got the factors {self.stages[0].factors}")

    @property
    def end_loss(self) -> float | None:
        """Loss at the end of a finished run; None if it is not finished or was not measured."""
        share, loss = self.stages[-1].losses[-1] if self.stages[-1].losses else (0.0, 0.0)
        return loss if self.is_finished and share == 1 else None


class RunTable(NamedTuple):
    """Runs as arrays: R runs, K stages, M = `PARTS` parts per stage.

    A run with fewer stages than K is filled up with stages without tokens, in which nothing changes.

    Args:
        parameters, widths, tokens: size, hidden size and tokens of each stage, R × K.
        rates: mean learning rate in each part, R × K × M.
        factors: growth factors in the order of `GROWN_DIMENSIONS`, 1 without growth, R × K × 3.
        copied, carried: `TrainedStage.is_copied` and `is_carried`, R × K.
        stages: number of stages of each run, R.
    """

    parameters: npt.NDArray[np.float64]
    widths: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]
    rates: npt.NDArray[np.float64]
    factors: npt.NDArray[np.float64]
    copied: npt.NDArray[np.float64]
    carried: npt.NDArray[np.float64]
    stages: npt.NDArray[np.int64]

    @classmethod
    def of(cls, runs: Sequence[StagedRun]) -> RunTable:
        """Return the table of some runs.

        >>> table = RunTable.of([StagedRun((TrainedStage(1e6, 64, 1e7, (1e-3,)),))])
        >>> table.parameters.shape, table.rates.shape
        ((1, 1), (1, 1, 16))
        """
        shape = len(runs), max(len(run.stages) for run in runs)
        parameters, widths, tokens, copied, carried = (np.zeros(shape) for _ in range(5))
        rates, factors = np.zeros((*shape, PARTS)), np.ones((*shape, len(GROWN_DIMENSIONS)))
        for r, run in enumerate(runs):
            for k in range(shape[1]):
                stage = run.stages[min(k, len(run.stages) - 1)]
                parameters[r, k], widths[r, k] = stage.parameters, stage.width
                if k < len(run.stages):
                    tokens[r, k] = stage.tokens
                    rates[r, k] = average_rates(stage.rates)
                    factors[r, k] = [stage.factors.get(name, 1.0) for name in GROWN_DIMENSIONS]
                    copied[r, k], carried[r, k] = stage.is_copied, stage.is_carried
        stages = np.array([len(run.stages) for run in runs], dtype=np.int64)
        return cls(parameters, widths, tokens, rates, factors, copied, carried, stages)


def average_rates(rates: Sequence[float]) -> npt.NDArray[np.float64]:
    """Return the mean rate in each of `PARTS` equal parts of a stage.

    >>> average_rates([1.0, 0.0]).tolist() == [1.0] * 8 + [0.0] * 8
    True
    """
    sums = np.concatenate([[0.0], np.cumsum(rates)])
    at = np.linspace(0, len(rates), PARTS + 1)
    means: npt.NDArray[np.float64] = np.diff(np.interp(at, np.arange(len(sums)), sums)) * (PARTS / len(rates))
    return means


def compute_factors(old: ModelDims, new: ModelDims) -> dict[str, float]:
    """Return the growth factor of each dimension of a growth law that grows.

    Raises:
        PlanError: for growth from no layers, which has no factor.

    >>> compute_factors(ModelDims(64, 128, 2, 2), ModelDims(64, 256, 4, 2))
    {'depth': 2.0, 'inner': 2.0}
    """
    if not old.num_hidden_layers:
        raise PlanError(
            f"a growth law says nothing about growth from no layers, got {old}: give an initial structure with layers"
        )
    depth, hidden = new.num_hidden_layers / old.num_hidden_layers, new.hidden_size / old.hidden_size
    heads = new.num_attention_heads * (new.head_dim or 1) / (old.num_attention_heads * (old.head_dim or 1))
    inner = max(new.intermediate_size / old.intermediate_size, heads if hidden == 1 else 1.0)
    return {name: ratio for name, ratio in (("depth", depth), ("inner", inner), ("hidden", hidden)) if ratio > 1}
