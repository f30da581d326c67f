"""`ScalingLaw`: the loss predicted for a model of a given size after a given number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..io.numbers import is_positive_number

#: Parameters of the smallest and the largest model that both fits used.
FITTED_PARAMS = (44e6, 16e9)


@dataclass(frozen=True)
class ScalingLaw:
    """`loss = irreducible + A / N^alpha + B / D^beta` for N parameters and D tokens (Hoffmann et al. 2022, Eq. 10).

    The loss is a cross-entropy in nats per token. The defaults are from Besiroglu et al. 2024 (arXiv 2404.10102), who
    refitted the data of Hoffmann et al. and found that the printed constants did not follow from them. Both used
    models from 44M to 16B parameters, their own tokenizer and text: use the law to rank schedules, not to predict
    absolute losses.

    Args:
        irreducible: entropy of the text, in nats per token.
        params_scale, params_exponent: A and alpha.
        tokens_scale, tokens_exponent: B and beta.

    Raises:
        PlanError: if a constant is not a positive number (`irreducible` may be 0).

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
        for name, value in vars(self).items():
            if not (is_positive_number(value) or (name == "irreducible" and value == 0)):
                raise PlanError(f"{name} of a scaling law must be a positive number, got {value}")

    def floor(self, params: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Loss after infinite training, for a number of parameters or an array of them; they are positive."""
        sizes = np.asarray(params, dtype=np.float64)
        if not (sizes > 0).all():
            raise PlanError(f"params must be positive, got {params!r}: a loss is predicted for a number of parameters")
        return self.irreducible + self.params_scale / sizes**self.params_exponent

    def loss(self, params: npt.ArrayLike, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Loss after training from random weights; for numbers or arrays."""
        return self.floor(params) + self.above_floor(tokens)

    def above_floor(self, tokens: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Distance of the loss from its floor after training on 0 or more tokens; for a number or an array."""
        counts = np.asarray(tokens, dtype=np.float64)
        if not (counts >= 0).all():
            raise PlanError(f"tokens must be 0 or more, got {tokens!r}")
        with np.errstate(divide="ignore"):  # infinite without tokens
            return self.tokens_scale / counts**self.tokens_exponent

    def tokens_to(self, params: float, loss: float) -> float:
        """Tokens that training from random weights needs to reach a loss; infinite if it never does."""
        above = loss - self.floor(params)
        return float((self.tokens_scale / above) ** (1 / self.tokens_exponent)) if above > 0 else math.inf

    def staged_losses(self, params: Sequence[float], tokens: Sequence[float], seen: float = 0.0) -> tuple[float, ...]:
        """Loss at the end of each stage of a growth schedule.

        A grown model is assumed to enter its own curve at the loss that it was grown with, and to follow the curve
        from there: growth that preserves the function and the training dynamics (Shen et al. 2022, section 3). Other
        growth does worse, so the result is a lower bound.

        Args:
            params: parameters in each stage, the initial model first.
            tokens: tokens trained on in each stage.
            seen: tokens that the initial model was trained on before.

        Raises:
            PlanError: if there is not one number of tokens per model.
        """
        if len(params) != len(tokens):
            raise PlanError(f"{len(params)} models and {len(tokens)} numbers of tokens: give one for each")
        losses: list[float] = []
        before = seen
        for number, (size, budget) in enumerate(zip(params, tokens, strict=True)):
            if number:
                before = self.tokens_to(size, losses[-1]) if math.isfinite(losses[-1]) else 0.0
            losses.append(float(self.loss(size, before + budget)))
        return tuple(losses)

    def handover_loss(self, params: float, cost: float, larger_params: float, larger_cost: float) -> float:
        """Loss at which training the larger of two models becomes the better use of the next hour.

        Above it, the smaller model's loss falls faster per unit of cost; below it, the larger model's. At this loss
        their marginal utilities are equal. Costs are per token, both in hours or both in FLOPs.

        With `g = loss - floor`, the loss falls by `beta * B^(-1/beta) * g^(1 + 1/beta)` per token, so the utilities
        are equal if `g / g_larger = (cost / cost_larger)^(beta / (1 + beta))`.

        Args:
            params, cost: parameters and cost per token of the smaller model.
            larger_params, larger_cost: parameters and cost per token of the larger one.

        Returns:
            The loss in nats per token; infinite if a token costs the larger model no more.

        Raises:
            PlanError: if a cost is not positive.
        """
        if not (cost > 0 and larger_cost > 0):
            raise PlanError(f"costs per token must be positive, got {cost} and {larger_cost}")
        ratio = (cost / larger_cost) ** (self.tokens_exponent / (1 + self.tokens_exponent))
        if ratio >= 1:
            return math.inf
        return float((self.floor(params) - ratio * self.floor(larger_params)) / (1 - ratio))


#: The constants printed by Hoffmann et al. 2022.
HOFFMANN = ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28)
