"""`ScalingLaw`: the loss that a model of a size is predicted to have after a number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PlanError


@dataclass(frozen=True)
class ScalingLaw:
    """`loss = irreducible + A / N^alpha + B / D^beta` for N parameters and D tokens (Hoffmann et al. 2022, Eq. 10).

    The loss is a cross-entropy in nats per token. The defaults are those of Besiroglu et al. 2024 (arXiv 2404.10102),
    who fitted the data of Hoffmann et al. once more and found that the printed constants did not follow from them.
    Both were measured on models from 44M to 16B parameters, their tokenizer and their text: the law compares
    schedules, and does not foretell the loss of a run.

    Args:
        irreducible: the loss of the text itself.
        params_scale, params_exponent: A and alpha.
        tokens_scale, tokens_exponent: B and beta.

    >>> law = ScalingLaw()
    >>> round(float(law.loss(1e9, 20e9)), 3), round(law.tokens_to(1e9, 2.5) / 1e9, 1)
    (2.53, 25.5)
    """

    irreducible: float = 1.8172
    params_scale: float = 482.01
    params_exponent: float = 0.3478
    tokens_scale: float = 2085.43
    tokens_exponent: float = 0.3658

    def __post_init__(self) -> None:
        constants = vars(self)
        for name, value in constants.items():
            if not (math.isfinite(value) and value >= 0 and (value > 0 or name == "irreducible")):
                raise PlanError(f"{name} of a scaling law must be a positive number, got {value}")

    def floor(self, params: Any) -> Any:
        """The loss after endless training; of a number of parameters, or of an array of them."""
        return self.irreducible + self.params_scale / np.asarray(params, dtype=np.float64) ** self.params_exponent

    def loss(self, params: Any, tokens: Any) -> Any:
        """The loss after training from random weights; numbers or arrays."""
        return self.floor(params) + self.above_floor(tokens)

    def above_floor(self, tokens: Any) -> Any:
        """What the loss is above its floor after so many tokens; numbers or arrays."""
        with np.errstate(divide="ignore"):
            return self.tokens_scale / np.asarray(tokens, dtype=np.float64) ** self.tokens_exponent

    def tokens_to(self, params: float, loss: float) -> float:
        """The tokens that training from random weights takes to a loss; infinite where it is never reached."""
        above = loss - self.floor(params)
        return float((self.tokens_scale / above) ** (1 / self.tokens_exponent)) if above > 0 else math.inf

    def staged_losses(self, params: Sequence[float], tokens: Sequence[float], seen: float = 0.0) -> tuple[float, ...]:
        """The loss at the end of each stage of a growth schedule.

        A grown model enters its own curve at the loss that it was grown with, and goes on from there: growth that
        keeps the function and the training dynamics (Shen et al. 2022, section 3). Growth that does not does worse, so
        that this is the best that a schedule can hope for.

        Args:
            params: of each stage, the initial model first.
            tokens: trained on in each.
            seen: tokens that the initial model was trained on before.
        """
        losses: list[float] = []
        before = seen
        for number, (size, budget) in enumerate(zip(params, tokens, strict=True)):
            if number:
                before = self.tokens_to(size, losses[-1]) if math.isfinite(losses[-1]) else 0.0
            losses.append(float(self.loss(size, before + budget)))
        return tuple(losses)

    def handover_loss(self, params: float, cost: float, larger_params: float, larger_cost: float) -> float:
        """The loss at which training the larger of two models becomes the better use of the next hour.

        Above it the smaller one's loss falls faster for what it costs, below it the larger one's: there the marginal
        utilities are equal. Costs are of a token, in hours or FLOPs alike.

        With `g = loss - floor`, the loss falls by `beta * B^(-1/beta) * g^(1 + 1/beta)` a token, so that utilities are
        equal where `g / g_larger = (cost / cost_larger)^(beta / (1 + beta))`.
        """
        ratio = (cost / larger_cost) ** (self.tokens_exponent / (1 + self.tokens_exponent))
        if ratio >= 1:  # the larger one is no dearer
            return math.inf
        return float((self.floor(params) - ratio * self.floor(larger_params)) / (1 - ratio))


#: The constants as Hoffmann et al. 2022 print them.
HOFFMANN = ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28)
