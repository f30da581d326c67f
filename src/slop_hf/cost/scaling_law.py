"""`ScalingLaw`: the loss predicted for a model of a given size after a given number of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..architectures import read_setting
from ..dims import ModelConfig
from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number
from ..io.record import Record
from .flops import DEFAULT_CONFIG
from .least_squares import compute_deviation, compute_intervals, draw_counts, fit_least_squares, round_constant
from .staged_run import StagedRun

_Array = npt.NDArray[np.float64]
_Constants: TypeAlias = tuple[float, float, float, float, float]

#: Fewest runs that a law is fitted to.
LEAST_SCALING_RUNS = 4
#: Expected error of a loss at the end of a run, in nats per token.
_ERROR = 0.03
#: Medians and spreads of the lognormal priors of a fit: entropy, gap of size, its exponent, gap of tokens, its
#: exponent. Gaps are in nats at the typical size and tokens of the runs; exponents are those of published laws.
_PRIOR, _PRIOR_SPREADS = np.log([1.8, 0.5, 0.35, 1.0, 0.35]), np.array([0.5, 1.0, 0.3, 1.0, 0.3])
#: Parameters of the smallest and the largest model that both fits used.
FITTED_PARAMS = (44e6, 16e9)


@dataclass(frozen=True)
class ScalingLaw(Record, error=PlanError):
    """`loss = irreducible + A / N^alpha + B / D^beta` for N parameters and D tokens (Hoffmann et al. 2022, Eq. 10).

    The loss is a cross-entropy in nats per token. The defaults are from Besiroglu et al. 2024 (arXiv 2404.10102), who
    refitted the data of Hoffmann et al. and found that the printed constants did not follow from them. Both used
    models from 44M to 16B parameters, their own tokenizer and text: use the law to rank schedules, not to predict
    absolute losses.

    Args:
        irreducible: entropy of the text, in nats per token.
        params_scale, params_exponent: A and alpha.
        tokens_scale, tokens_exponent: B and beta.
        deviation: standard deviation of its errors, in nats; None if unknown.
        replicates: constants fitted to resampled runs, one row per fit, in the order above.
        runs: number of runs that it was fitted to; 0 for a law that was given.

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
    deviation: float | None = None
    replicates: tuple[tuple[float, ...], ...] = ()
    runs: int = 0

    def __post_init__(self) -> None:
        for name in SCALING_CONSTANTS:
            value = getattr(self, name)
            if not (is_positive_number(value) or (name == "irreducible" and value == 0)):
                raise PlanError(f"{name} of a scaling law must be a positive number, got {value}")
        if self.deviation is not None and not is_finite_number(self.deviation, least=0):
            raise PlanError(f"deviation of a scaling law must be 0 or more, got {self.deviation!r}")
        for row in self.replicates:
            if len(row) != len(SCALING_CONSTANTS):
                raise PlanError(
                    f"a replicate of a scaling law has {len(SCALING_CONSTANTS)} constants, got {len(row)}: fit the "
                    "law again, or leave its replicates out"
                )
            if not all(map(is_positive_number, row)):
                raise PlanError(f"replicates of a scaling law must be positive numbers, got {row}: fit the law again")

    @classmethod
    def fit(cls, runs: Sequence[StagedRun], *, replicates: int = 12, seed: int = 0) -> ScalingLaw:
        """Fit the constants to finished runs of one stage, by least squares with priors as further observations.

        Hoffmann et al. 2022, approach 3, with squared errors of the losses, and lognormal priors around the exponents
        of published laws, so that a few runs suffice. Runs that grow, that have no loss at their end, or whose
        learning-rate schedule does not end are left out. Learning rates are not modelled: give runs with peaks that
        are good at their size.

        Args:
            runs: measured runs of one text; losses in nats per token.
            replicates: number of fits to resampled runs, for intervals (the bootstrap of Efron 1979).
            seed: seed of the resampling.

        Raises:
            PlanError: for fewer than `LEAST_SCALING_RUNS` such runs, runs of several texts, or runs that are all of
                one size or all of one length.
        """
        used = [run for run in runs if run.end_loss is not None and len(run.stages) == 1]
        _check_runs(used, len(runs))
        ends = _Ends(used)
        everything = np.ones(len(used))
        best = ends.fit(everything, _PRIOR)
        rows = [ends.read_constants(ends.fit(counts, best)) for counts in draw_counts(len(used), replicates, seed)]
        left_out = [ends.compute_errors(ends.fit(everything - one, best)) @ one for one in np.eye(len(used))]
        deviation = round_constant(compute_deviation(np.array(left_out)))
        return cls(*ends.read_constants(best), deviation, tuple(rows), len(used))

    def compute_intervals(self) -> dict[str, tuple[float, float]]:
        """Return the central 80% of the replicates of each constant; empty without replicates."""
        return compute_intervals(SCALING_CONSTANTS, self.replicates)

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


def _check_runs(used: Sequence[StagedRun], total: int) -> None:
    """Refuse runs that do not say what a scaling law depends on."""
    if len(used) < LEAST_SCALING_RUNS:
        raise PlanError(
            f"a scaling law needs at least {LEAST_SCALING_RUNS} finished runs of one stage with a loss at their end, "
            f"got {len(used)} of {total}: add runs from scratch whose learning-rate schedule ends"
        )
    if len(texts := sorted({run.text for run in used})) > 1:
        raise PlanError(f"a scaling law is fitted to runs of one text, got {', '.join(texts)}: fit one law per text")
    for name, what in (("parameters", "size"), ("tokens", "length")):
        if len({getattr(run.stages[0], name) for run in used}) == 1:
            raise PlanError(
                f"all {len(used)} runs have {getattr(used[0].stages[0], name):,.0f} {name}, so that the effect of "
                f"{name} is unknown: add runs of another {what}"
            )


class _Ends:
    """Losses at the ends of runs of one stage; the vector that is fitted holds logarithms of positive numbers."""

    def __init__(self, runs: Sequence[StagedRun]) -> None:
        self._losses = np.array([run.end_loss for run in runs])
        log_sizes = np.log([run.stages[0].parameters for run in runs])
        log_tokens = np.log([run.stages[0].tokens for run in runs])
        # Gaps of typical runs, so that the fitted numbers depend little on one another.
        self._log_size, self._log_token = log_sizes.mean(), log_tokens.mean()
        self._sizes, self._tokens = log_sizes - self._log_size, log_tokens - self._log_token

    def compute_errors(self, vector: _Array) -> _Array:
        """Return predicted minus measured losses."""
        floor, size_gap, size_exponent, token_gap, token_exponent = np.exp(vector)
        by_size, by_tokens = np.exp(-size_exponent * self._sizes), np.exp(-token_exponent * self._tokens)
        errors: _Array = floor + size_gap * by_size + token_gap * by_tokens - self._losses
        return errors

    def fit(self, counts: _Array, start: _Array) -> _Array:
        """Return the vector that fits best if each run counts as often as given."""
        weights = np.sqrt(counts) / _ERROR

        def compute_residuals(vector: _Array) -> _Array:
            return np.concatenate([weights * self.compute_errors(vector), (vector - _PRIOR) / _PRIOR_SPREADS])

        return fit_least_squares(compute_residuals, start)

    def read_constants(self, vector: _Array) -> _Constants:
        """Return the constants of the law."""
        floor, size_gap, size_exponent, token_gap, token_exponent = np.exp(vector)
        params_scale = size_gap * math.exp(size_exponent * self._log_size)
        tokens_scale = token_gap * math.exp(token_exponent * self._log_token)
        return (
            round_constant(floor),
            round_constant(params_scale),
            round_constant(size_exponent),
            round_constant(tokens_scale),
            round_constant(token_exponent),
        )


def compute_chance_loss(config: ModelConfig = DEFAULT_CONFIG) -> float:
    """Return the loss of a model that has learnt nothing, ln(vocab_size): no model trains to more.

    >>> round(compute_chance_loss(), 2)
    10.37
    """
    return math.log(read_setting(config, "vocab_size"))


#: Names of the constants of a scaling law.
SCALING_CONSTANTS = ("irreducible", "params_scale", "params_exponent", "tokens_scale", "tokens_exponent")
#: The constants printed by Hoffmann et al. 2022.
HOFFMANN = ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28)
