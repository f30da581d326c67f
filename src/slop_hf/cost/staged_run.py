"""`StagedRun`: a run that grows in stages, in the numbers that its loss depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number
from ..io.record import Record

#: Dimensions of growth: layers; ffn, or heads under a residual stream that stays; the residual stream with its heads.
GROWN_DIMENSIONS = ("depth", "inner", "hidden")


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
