"""`GrowthLaw`: the loss of a run that grows in stages, under its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from ..errors import PlanError
from ..io.numbers import is_finite_number, is_positive_number
from ..io.record import Record
from ..io.serialization import describe_alternatives
from .least_squares import (
    Z80,
    compute_deviation,
    compute_intervals,
    draw_counts,
    fit_least_squares,
    round_constant,
)
from .staged_run import GROWN_DIMENSIONS, PARTS, RunTable, StagedRun

_Array = npt.NDArray[np.float64]

#: Fewest runs with a measured end that a law is fitted to, without another law as its prior and with one.
LEAST_RUNS, LEAST_RUNS_WITH_PRIOR = 6, 3
#: Spread of a constant around another law's, as a share of its spread without one.
_PRIOR_SHARE = 0.5
#: Expected error of a loss at the end of a finished run, and of one on the way there, in nats: ends count more.
END_ERROR, WAY_ERROR = 0.03, 0.12
#: Losses before this share of a stage are left out: warm-up and the first mixing are not modelled.
FIRST_SHARE = 0.3
#: Growth of the standard deviation outside the fitted scales, in nats per decade. Losses of language models fall by
#: about half a nat per decade of parameters (Hoffmann et al. 2022): a law may miss more than half of that.
WIDENING = 0.3
#: Least progress, in reference tokens: the power law is infinite at 0.
_LEAST_PROGRESS = 1e-4
_REFIT_ITERATIONS = 4


def _constant(prior: float, spread: float, *, is_positive: bool = True) -> Any:
    """Return the field of a constant with a lognormal prior, or a normal one if it may be negative."""
    return field(default=prior, metadata={"spread": spread, "is_positive": is_positive})


@dataclass(frozen=True)
class GrowthConstants(Record, error=PlanError):
    """Constants of a growth law; each default is the median of its prior.

    Sizes, tokens and rates are relative to the references of the law, so a gap is in nats per token at the reference.

    Args:
        irreducible: entropy of the text, in nats per token.
        size_gap: loss above it that a model of the reference size keeps however long it is trained, in nats.
        size_exponent, width_exponent: the size gap falls with parameters, and with the hidden size, to these powers.
        token_gap: loss that remains after the reference tokens at the reference rate, in nats.
        token_exponent: the token gap falls with progress to this power.
        sharpness: exponent with which the two gaps are added; 1 as in Hoffmann et al. 2022, above 1 the smaller gap
            counts less, as in Kaplan et al. 2020 (arXiv 2001.08361).
        rate_half: learning rate at which a token makes half of the progress that any rate could give it, in reference
            rates, for a model of the reference size.
        rate_size_exponent: that rate falls with parameters to this power.
        rate_noise: loss above the curve under the reference rate held constant, in nats.
        noise_memory: tokens until the noise follows the rate, in reference tokens.
        depth_forgets, inner_forgets, hidden_forgets: progress is divided by the growth factor of the dimension to this
            power.
        copies_forget: the same for hidden in addition, unless its new entries are random.
        carried_forgets: progress is divided by the ratio of parameters to this power if AdamW's state is carried.
        floor_forgets: progress is divided by the ratio of parameters to this power for each e-fold by which the loss
            above the entropy exceeds the token gap, that is, the closer the small model is to its floor.
        jump: loss above the curve right after growth, in nats per e-fold of parameters.
        mixing: tokens until the jump has fallen to 1/e, in reference tokens.
    """

    irreducible: float = _constant(1.5, 0.4)
    size_gap: float = _constant(1.0, 0.7)
    size_exponent: float = _constant(0.2, 0.5)
    width_exponent: float = _constant(0.2, 0.5)
    token_gap: float = _constant(2.0, 0.7)
    token_exponent: float = _constant(0.35, 0.3)
    sharpness: float = _constant(1.5, 0.5)
    rate_half: float = _constant(2.0, 1.0)
    rate_size_exponent: float = _constant(0.5, 0.3, is_positive=False)
    rate_noise: float = _constant(0.1, 0.7)
    noise_memory: float = _constant(0.1, 1.0)
    depth_forgets: float = _constant(0.3, 0.5, is_positive=False)
    inner_forgets: float = _constant(0.3, 0.5, is_positive=False)
    hidden_forgets: float = _constant(0.5, 0.5, is_positive=False)
    copies_forget: float = _constant(0.0, 0.5, is_positive=False)
    carried_forgets: float = _constant(0.0, 0.3, is_positive=False)
    floor_forgets: float = _constant(1.0, 1.5, is_positive=False)
    jump: float = _constant(0.3, 1.0)
    mixing: float = _constant(0.03, 1.0)

    def __post_init__(self) -> None:
        for constant in fields(self):
            value, is_positive = getattr(self, constant.name), constant.metadata["is_positive"]
            if not (is_positive_number(value) if is_positive else is_finite_number(value)):
                kind = "positive" if is_positive else "finite"
                raise PlanError(f"{constant.name} of a growth law must be a {kind} number, got {value!r}")


NAMES = tuple(constant.name for constant in fields(GrowthConstants))
_IS_POSITIVE = np.array([constant.metadata["is_positive"] for constant in fields(GrowthConstants)])
_SPREADS = np.array([constant.metadata["spread"] for constant in fields(GrowthConstants)])
#: Spread of the constant by which two texts differ, in nats.
_OFFSET_SPREAD = 1.0


class References(NamedTuple):
    """Parameters, hidden size, tokens and learning rate that the constants of a law refer to."""

    parameters: float
    width: float
    tokens: float
    rate: float


#: Quantities of a run that a law is marked with the range of.
SCALES = ("parameters", "tokens", "width")


class LossForecast(NamedTuple):
    """A predicted loss at the end of a run and its central 80% interval, in nats per token."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class GrowthLaw(Record, error=PlanError):
    """The loss of a run that grows in stages, under its learning-rate schedule.

    With N parameters, hidden size w, progress P and rate r, all relative to the references:

        loss = irreducible + (G^q + T^q)^(1/q) + rate_noise * r' + jump'
        G = size_gap * N^-size_exponent * w^-width_exponent,  T = token_gap * P^-token_exponent,  q = sharpness
        dP = dtokens * r (1 + rate_half) / (r + rate_half * N^-rate_size_exponent)

    r' is the rate averaged over the last tokens with the weight exp(-age / noise_memory), so that the loss falls as
    the rate does (annealing, as in Tissue et al. 2024, arXiv 2408.11029). A grown model enters its own curve at the
    loss, without r' and jump', that it was grown with, as in `ScalingLaw.staged_losses`; its progress there is divided
    by what growth forgets. jump' begins with `jump * ln(N new / N old)` and falls as exp(-tokens / mixing).

    The law ranks runs like those that it was fitted to, and predicts their losses; `fit` says how well. Outside the
    scales that it was fitted to, the standard deviation of a loss widens by `WIDENING` nats per decade, and the part
    of it that runs do not share by its own size per decade.

    Args:
        constants: constants of the law.
        references: what they refer to.
        deviation: standard deviation of its errors for runs of an experiment that it was not fitted to, in nats.
        replicates: constants fitted to resampled runs, one row per fit, in the order of `GrowthConstants`.
        offsets: loss of each text above that of the text with most runs, in nats.
        runs: number of runs that it was fitted to; 0 for a law that was given.
        scales: smallest and largest value, by name in `SCALES`, that it was fitted to; without a name, no limit.
        own_deviation: part of the deviation that runs of one experiment do not share, in nats: it decides between
            them; None for all of it.
        has_relative_rates: whether rates are shares of the peak that is usual for the compute of a run.
        most_kept: largest share of a model's progress that growth keeps; None for no limit.
        catch_up: tokens over which a grown model gains what it keeps beyond the small model's loss, as a share of the
            small model's progress; 0 if it has it at once.

    >>> from slop_hf.cost.staged_run import TrainedStage
    >>> law = GrowthLaw()
    >>> run = StagedRun((TrainedStage(1e6, 64, 1e7, (1e-3,)),))
    >>> law.predict(run).loss > law.constants.irreducible
    True
    """

    constants: GrowthConstants = GrowthConstants()
    references: tuple[float, float, float, float] = (1e6, 64.0, 1e7, 1e-3)
    deviation: float = 0.3
    replicates: tuple[tuple[float, ...], ...] = ()
    offsets: dict[str, float] = field(default_factory=dict)
    runs: int = 0
    scales: dict[str, tuple[float, float]] = field(default_factory=dict)
    own_deviation: float | None = None
    has_relative_rates: bool = False
    most_kept: float | None = None
    catch_up: float = 0.0

    def __post_init__(self) -> None:
        if not all(map(is_positive_number, self.references)):
            raise PlanError(f"references of a growth law must be positive numbers, got {self.references}")
        if not is_finite_number(self.deviation, least=0):
            raise PlanError(f"deviation of a growth law must be 0 or more, got {self.deviation!r}")
        if self.own_deviation is not None and not is_finite_number(self.own_deviation, least=0):
            raise PlanError(f"own_deviation of a growth law must be 0 or more, got {self.own_deviation!r}")
        if not is_finite_number(self.catch_up, least=0):
            raise PlanError(f"catch_up of a growth law must be 0 or more, got {self.catch_up!r}")
        if self.most_kept is not None and not is_positive_number(self.most_kept):
            raise PlanError(f"most_kept of a growth law must be a positive number, got {self.most_kept!r}")
        for name, scale in self.scales.items():
            if name not in SCALES:
                raise PlanError(f"unknown scale {name!r} of a growth law{describe_alternatives(name, SCALES)}")
            if not (all(map(is_positive_number, scale)) and scale[0] <= scale[1]):
                raise PlanError(
                    f"the scale {name} of a growth law must be two positive numbers, the smaller first, got {scale}"
                )
        for row in self.replicates:
            if len(row) != len(NAMES):
                raise PlanError(
                    f"a replicate of a growth law has {len(NAMES)} constants, got {len(row)}: fit the law again, or "
                    "leave its replicates out"
                )
            GrowthConstants(*row)

    @classmethod
    def fit(
        cls, runs: Sequence[StagedRun], *, prior: GrowthLaw | None = None, replicates: int = 12, seed: int = 0
    ) -> Self:
        """Fit the constants to measured runs, by least squares with the priors as further observations.

        Losses at the ends of finished runs count 16 times as much as those on the way (`END_ERROR`, `WAY_ERROR`).
        Replicates are fits to as many runs, drawn with replacement. The deviation comes from fits that leave out one
        experiment at a time; with a single experiment, from errors of the fit itself, which are too small for others.

        Args:
            runs: measured runs; losses in nats per token.
            prior: law whose constants, and references, the fit begins with, so that fewer runs suffice; its text is
                another one unless it has the same name. Default: the medians of `GrowthConstants`.
            replicates: number of fits to resampled runs, for intervals (the bootstrap of Efron 1979).
            seed: seed of the resampling.

        Raises:
            PlanError: for fewer finished runs with a loss at their end than `LEAST_RUNS`, or `LEAST_RUNS_WITH_PRIOR`.
        """
        measured = [run for run in runs if run.end_loss is not None]
        least = LEAST_RUNS if prior is None else LEAST_RUNS_WITH_PRIOR
        if len(measured) < least:
            raise PlanError(
                f"a growth law needs at least {least} finished runs with a loss at their end, got "
                f"{len(measured)} of {len(runs)}: add runs whose learning-rate schedule ends"
            )
        belief = _choose_belief(runs, prior)
        batch = _MeasuredBatch(runs, belief)
        best = batch.fit(np.ones(len(runs)), belief.medians)
        rows = [batch.fit(draw, best, _REFIT_ITERATIONS) for draw in draw_counts(len(runs), replicates, seed)]
        deviation, own_deviation = _measure_deviations(batch, best)
        return cls(
            constants=GrowthConstants(*map(round_constant, _decode(best))),
            references=belief.references,
            deviation=round_constant(deviation),
            replicates=tuple(tuple(map(round_constant, _decode(row))) for row in rows),
            offsets={
                text: round_constant(offset)
                for text, offset in zip(belief.texts, [0.0, *best[len(NAMES) :]], strict=True)
                if text or any(not run.text for run in runs)
            },
            runs=len(runs),
            scales=_find_scales(runs),
            own_deviation=round_constant(own_deviation),
        )

    def predict(self, run: StagedRun) -> LossForecast:
        """Return the loss at the end of a run, with its central 80% interval.

        Raises:
            PlanError: for a text that the law knows nothing about, if it knows others.
        """
        return self.predict_all([run])[0]

    def predict_all(self, runs: Sequence[StagedRun]) -> list[LossForecast]:
        """Return `predict` for several runs, in less time."""
        offsets = np.array([self._get_offset(run.text) for run in runs])
        table = RunTable.of(runs)
        losses = self.predict_ends(table) + offsets
        others = self.sample_ends(table)
        variance = np.var(others, axis=0, ddof=1) if len(others) > 1 else np.zeros(len(runs))
        widening = WIDENING * self.measure_distances(table)
        margins = Z80 * np.sqrt(variance + self.deviation**2 + widening**2)
        return [
            LossForecast(float(loss), float(loss - margin), float(loss + margin))
            for loss, margin in zip(losses, margins, strict=True)
        ]

    def predict_ends(self, table: RunTable) -> _Array:
        """Return the loss at the end of each run of a table, in nats per token, without the offset of a text."""
        return self._build_batch(table).predict_ends(_encode(self.constants))

    def sample_ends(self, table: RunTable) -> _Array:
        """Return `predict_ends` by each of the replicates, replicates × R.

        Errors that runs share are alike in one row, so that differences of runs vary less than losses do.
        """
        batch = self._build_batch(table)
        rows = [batch.predict_ends(_encode(GrowthConstants(*row))) for row in self.replicates]
        return np.array(rows).reshape(len(rows), len(table.stages))

    def measure_distances(self, table: RunTable) -> _Array:
        """Return how far each run is outside the scales of the law, in decades; 0 inside.

        Parameters and width are those of the stages, tokens those of the run. If several are outside, the distance is
        the root of the sum of squares.
        """
        smallest = {"parameters": table.parameters.min(axis=1), "width": table.widths.min(axis=1)}
        largest = {"parameters": table.parameters.max(axis=1), "width": table.widths.max(axis=1)}
        smallest["tokens"] = largest["tokens"] = table.tokens.sum(axis=1)
        squares = np.zeros(len(table.stages))
        for name, (low, high) in self.scales.items():
            excess = np.maximum(np.log10(largest[name] / high), np.log10(low / smallest[name]))
            squares += np.maximum(excess, 0.0) ** 2
        return np.sqrt(squares)

    def compute_own_deviations(self, table: RunTable) -> _Array:
        """Return the standard deviation of each run's error that other runs do not share, in nats."""
        own = self.deviation if self.own_deviation is None else self.own_deviation
        return own * (1 + self.measure_distances(table))

    def trace(self, run: StagedRun) -> _Array:
        """Return the predicted loss at the end of each part of each stage, stages × `PARTS`."""
        batch = self._build_batch(RunTable.of([run]))
        return batch.trace(_encode(self.constants))[0] + self._get_offset(run.text)

    def anchor(self, runs: Sequence[StagedRun]) -> Self:
        """Return the law for a text that it knows nothing about, from the ends of one or more finished runs of it.

        Raises:
            PlanError: if no run has an end, or the runs are of several texts.
        """
        texts = {run.text for run in runs}
        ends = [run.end_loss for run in runs if run.end_loss is not None]
        if len(texts) != 1 or len(ends) < len(runs):
            raise PlanError(
                f"a law is anchored at finished runs of one text, got {len(runs)} runs of {sorted(texts)}, "
                f"{len(ends)} of them finished: give those of one text only, each with the loss at its end"
            )
        (text,) = texts
        known = replace(self, offsets={**self.offsets, text: 0.0})
        offset = np.mean([end - forecast.loss for end, forecast in zip(ends, known.predict_all(runs), strict=True)])
        return replace(self, offsets={**self.offsets, text: round_constant(float(offset))})

    def compute_intervals(self) -> dict[str, tuple[float, float]]:
        """Return the central 80% of the replicates of each constant; empty without replicates."""
        return compute_intervals(NAMES, self.replicates)

    def _build_batch(self, table: RunTable) -> _Batch:
        return _Batch(table, self.references, self.most_kept, self.catch_up)

    def _get_offset(self, text: str) -> float:
        if not self.offsets:
            return 0.0
        if text not in self.offsets:
            raise PlanError(
                f"the law knows no run of the text {text!r} (known: {', '.join(map(repr, self.offsets))}): anchor it "
                "at a finished run of that text"
            )
        return self.offsets[text]


def _encode(constants: GrowthConstants) -> _Array:
    """Return the constants as the vector that is fitted: positive ones as logarithms."""
    values = np.array([getattr(constants, name) for name in NAMES])
    return np.where(_IS_POSITIVE, np.log(np.where(_IS_POSITIVE, values, 1.0)), values)


def _decode(vector: _Array) -> tuple[float, ...]:
    """Return the constants of a vector; entries behind them are offsets of texts."""
    vector = vector[: len(NAMES)]
    return tuple(map(float, np.where(_IS_POSITIVE, np.exp(np.where(_IS_POSITIVE, vector, 0.0)), vector)))


_PRIOR = _encode(GrowthConstants())


class _Belief(NamedTuple):
    """The priors of the constants and of the offsets of texts.

    Args:
        texts: the texts; the first one has no offset.
        medians, spreads: medians and spreads of the vector that is fitted.
    """

    references: References
    texts: list[str]
    medians: _Array
    spreads: _Array


def _choose_belief(runs: Sequence[StagedRun], law: GrowthLaw | None) -> _Belief:
    """Return the priors of `GrowthConstants`, or those around another law, for the texts of some runs."""
    references, texts, center, offsets, share = _choose_references(runs), _list_texts(runs), _PRIOR, {"": 0.0}, 1.0
    if law is not None:
        rate = references.rate if law.has_relative_rates else law.references[3]
        references, center, share = (
            References(*law.references)._replace(rate=rate),
            _encode(law.constants),
            _PRIOR_SHARE,
        )
        offsets = law.offsets or offsets
        texts = list(dict.fromkeys([next(iter(offsets)), *texts]))
    medians = np.concatenate([center, [offsets.get(text, 0.0) for text in texts[1:]]])
    spreads = np.concatenate([share * _SPREADS, np.full(len(texts) - 1, _OFFSET_SPREAD)])
    return _Belief(references, texts, medians, spreads)


def _choose_references(runs: Sequence[StagedRun]) -> References:
    """Return typical values of some runs, so that the constants depend little on one another."""
    stages = [stage for run in runs for stage in run.stages]
    return References(
        *(
            round_constant(math.exp(np.mean(np.log(values))))
            for values in (
                [stage.parameters for stage in stages],
                [stage.width for stage in stages],
                [sum(stage.tokens for stage in run.stages) for run in runs],
                [max(stage.rates) for stage in stages if max(stage.rates)],
            )
        )
    )


def _list_texts(runs: Sequence[StagedRun]) -> list[str]:
    """List the texts of some runs, the one with most runs first."""
    texts = [run.text for run in runs]
    return sorted(dict.fromkeys(texts), key=lambda text: -texts.count(text))


def _find_scales(runs: Sequence[StagedRun]) -> dict[str, tuple[float, float]]:
    """Return the smallest and largest parameters, tokens of a run, and width."""
    stages = [stage for run in runs for stage in run.stages]
    values = {
        "parameters": [stage.parameters for stage in stages],
        "tokens": [sum(stage.tokens for stage in run.stages) for run in runs],
        "width": [stage.width for stage in stages],
    }
    return {name: (min(values[name]), max(values[name])) for name in SCALES}


def _measure_deviations(batch: _MeasuredBatch, best: _Array) -> tuple[float, float]:
    """Return the standard deviation of errors at ends for an experiment that the law was not fitted to.

    With several experiments, each is left out of one fit, and the median over experiments counts. The second number is
    that of the errors less the mean error of their experiment.
    """
    experiments = np.array(batch.experiments)
    names = sorted(set(batch.experiments))
    deviations, own_deviations = [], []
    for name in names:
        left = batch.fit((experiments != name).astype(float), best, _REFIT_ITERATIONS) if len(names) > 1 else best
        is_of = batch.is_end & (experiments[batch.where[0]] == name)
        if is_of.any():
            errors = batch.compute_errors(left)[is_of]
            deviations.append(compute_deviation(errors))
            own_deviations.append(compute_deviation(errors - errors.mean()))
    return float(np.median(deviations)), float(np.median(own_deviations))


class _Batch:
    """Runs as arrays relative to the references of a law, to trace their losses: R runs, K stages, M parts."""

    def __init__(
        self, table: RunTable, references: Sequence[float], most_kept: float | None = None, catch_up: float = 0.0
    ) -> None:
        self.most_kept, self.catch_up = math.inf if most_kept is None else most_kept, catch_up
        relative = References(*references)
        self.log_size = np.log(table.parameters / relative.parameters)
        self.log_width = np.log(table.widths / relative.width)
        self.tokens = table.tokens / PARTS / relative.tokens
        self.rates = table.rates / relative.rate
        self.log_factors = np.log(table.factors)
        self.copied, self.carried = table.copied, table.carried
        self.log_growth = np.diff(self.log_size, axis=1, prepend=self.log_size[:, :1])
        self.last_stage = table.stages - 1

    def predict_ends(self, vector: _Array) -> _Array:
        """Return the loss at the end of each run."""
        return self.trace(vector)[np.arange(len(self.last_stage)), self.last_stage, -1]

    def trace(self, vector: _Array) -> _Array:
        """Return the loss at the end of each part, R × K × M, without offsets of texts."""
        c = GrowthConstants(*_decode(vector))
        gaps = c.size_gap * np.exp(-c.size_exponent * self.log_size - c.width_exponent * self.log_width)
        half = c.rate_half * np.exp(-c.rate_size_exponent * self.log_size)[..., None]
        steps = self.tokens[..., None] * self.rates * (1 + c.rate_half) / (self.rates + half)
        forgets = self._compute_forgetting(c)
        noise_kept, jump_kept = np.exp(-self.tokens / c.noise_memory), np.exp(-self.tokens / c.mixing)
        # Growth is followed stage by stage, all parts of a stage at once.
        ages = np.arange(1, PARTS + 1)
        losses: _Array = np.empty(self.rates.shape)
        noise, jump = np.zeros(len(losses)), np.zeros(len(losses))
        progress = np.full((len(losses), 1), _LEAST_PROGRESS)
        for k in range(losses.shape[1]):
            begin = before = progress[:, -1]
            trained = np.cumsum(steps[:, k], axis=1)
            if k:
                begin = self._grow(c, before, gaps[:, k - 1], gaps[:, k], forgets[:, k], k)
                jump = jump + c.jump * self.log_growth[:, k]
            progress = begin[:, None] + trained
            if k and self.catch_up:
                progress -= self._compute_lag(c, before, begin, gaps[:, k - 1 : k + 1], trained)
            losses[:, k] = c.irreducible + _add_gaps(c, gaps[:, k, None], progress)
            losses[:, k] += jump[:, None] * jump_kept[:, k, None] ** ages
            jump = jump * jump_kept[:, k] ** PARTS
            for m in range(PARTS):
                noise = noise * noise_kept[:, k] + (1 - noise_kept[:, k]) * self.rates[:, k, m]
                losses[:, k, m] += c.rate_noise * noise
        return losses

    def _compute_forgetting(self, c: GrowthConstants) -> _Array:
        """Return the logarithm by whose exponential growth divides progress, R × K, without that near a floor."""
        by_dimension = self.log_factors @ np.array([c.depth_forgets, c.inner_forgets, c.hidden_forgets])
        copies = c.copies_forget * self.copied * self.log_factors[..., GROWN_DIMENSIONS.index("hidden")]
        result: _Array = by_dimension + copies + c.carried_forgets * self.carried * self.log_growth
        return result

    def _grow(
        self, c: GrowthConstants, progress: _Array, gap: _Array, new_gap: _Array, forgets: _Array, k: int
    ) -> _Array:
        """Return the progress of the grown models; a model that does not grow keeps its own."""
        grown = compute_grown_progress(c, progress, gap, new_gap, self.log_growth[:, k], forgets)
        grown = np.minimum(np.maximum(grown, _LEAST_PROGRESS), self.most_kept * progress)
        return np.where(self.log_factors[:, k].any(axis=1), grown, progress)

    def _compute_lag(self, c: GrowthConstants, before: _Array, begin: _Array, gaps: _Array, trained: _Array) -> _Array:
        """Return the progress that grown models have not gained yet: what they keep beyond the small model's loss."""
        # without a growth of parameters, nothing is forgotten near the floor
        preserved = compute_grown_progress(c, before, gaps[:, 0], gaps[:, 1], np.zeros(len(before)), 0.0)
        beyond = np.where(begin == before, 0.0, np.maximum(begin - preserved, 0.0))
        lag: _Array = beyond[:, None] * np.exp(-trained / (self.catch_up * before[:, None]))
        return lag


def compute_grown_progress(
    c: GrowthConstants, progress: _Array, gap: _Array, new_gap: _Array, log_growth: _Array, forgets: _Array | float
) -> _Array:
    """Return the progress that grown models enter their own curves with.

    Args:
        c: constants.
        progress: progress before growth, in reference tokens.
        gap, new_gap: gap of size of the small and of the grown model, in nats.
        log_growth: logarithm of the ratio of parameters.
        forgets: logarithm by whose exponential growth divides progress, without that near a floor.
    """
    above, token_gap = _add_gaps(c, gap, progress), c.token_gap * progress**-c.token_exponent
    near_floor = c.floor_forgets * np.log(above / token_gap) * log_growth
    # Under constants far from the best ones the grown model's floor may be above the loss.
    entered = np.maximum(above**c.sharpness - new_gap**c.sharpness, 1e-9) ** (1 / c.sharpness)
    grown: _Array = (c.token_gap / entered) ** (1 / c.token_exponent) * np.exp(-forgets - near_floor)
    return grown


class _MeasuredBatch(_Batch):
    """Runs with measured losses, to fit a law to."""

    def __init__(self, runs: Sequence[StagedRun], belief: _Belief) -> None:
        super().__init__(RunTable.of(runs), belief.references)
        self.experiments, self._belief = [run.experiment for run in runs], belief
        self._collect_losses(runs, belief.texts)

    def _collect_losses(self, runs: Sequence[StagedRun], texts: Sequence[str]) -> None:
        rows = [
            (r, k, round(share * PARTS) - 1, loss, share == 1 and k == len(run.stages) - 1 and run.is_finished)
            for r, run in enumerate(runs)
            for k, stage in enumerate(run.stages)
            for share, loss in stage.losses
            if stage.tokens and share >= FIRST_SHARE
        ]
        r, k, part, losses, is_end = zip(*rows, strict=True) if rows else ((),) * 5
        self.where = tuple(np.array(index, dtype=int) for index in (r, k, part))
        self.losses, self.is_end = np.array(losses, dtype=float), np.array(is_end, dtype=bool)
        self.weights = 1 / np.where(self.is_end, END_ERROR, WAY_ERROR)
        #: One column per text but the first: whether the run is of it.
        self.texts = np.array([[run.text == text for text in texts[1:]] for run in runs], dtype=float)

    def fit(self, counts: _Array, start: _Array, iterations: int = 40) -> _Array:
        """Return the constants, and offsets of texts, that fit best if each run counts as often as given."""
        weights = self.weights * np.sqrt(counts[self.where[0]])
        medians, spreads = self._belief.medians, self._belief.spreads

        def compute_residuals(vector: _Array) -> _Array:
            return np.concatenate([self.compute_errors(vector) * weights, (vector - medians) / spreads])

        return fit_least_squares(compute_residuals, start, iterations=iterations)

    def compute_errors(self, vector: _Array) -> _Array:
        """Return predicted minus measured losses."""
        offsets = (self.texts @ vector[len(NAMES) :])[self.where[0]]
        errors: _Array = self.trace(vector)[self.where] + offsets - self.losses
        return errors


def _add_gaps(c: GrowthConstants, gap: _Array, progress: _Array) -> _Array:
    """Return the loss above the entropy: the gaps of size and of tokens together."""
    token_gap = c.token_gap * progress**-c.token_exponent
    total: _Array = (gap**c.sharpness + token_gap**c.sharpness) ** (1 / c.sharpness)
    return total
