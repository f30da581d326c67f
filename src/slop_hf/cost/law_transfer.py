"""A growth law for another scale: the level of published scaling laws, and growth's effects of a fitted law.

`load_default_law` reads the default law, which `python benchmarks/default_law.py` makes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import PlanError
from ..io.numbers import is_positive_number
from .growth_law import NAMES, GrowthConstants, GrowthLaw, References, compute_grown_progress
from .least_squares import round_constant
from .rate_schedule import RateSchedule
from .scaling_law import FITTED_PARAMS, ScalingLaw
from .staged_run import GROWN_DIMENSIONS

_Array = npt.NDArray[np.float64]

#: File of the default law.
DEFAULT_LAW = Path(__file__).parent / "laws" / "default.yaml"
#: Tokens of the smallest and the largest run of Hoffmann et al. 2022.
FITTED_TOKENS = (5e9, 5e11)
#: Scale that a transferred law refers to; its rates are shares of the usual peak.
REAL_SCALE = References(1e9, 2048.0, 2e10, 1.0)
#: Tokens of an optimizer step that is usual there, and of one in the records of this repository.
REAL_STEP, RECORD_STEP = 1e6, 2048.0
#: Standard deviation of a loss at another text, and of what runs on one text do not share, in nats per token.
LEVEL_DEVIATION, OWN_DEVIATION = 0.15, 0.01
#: Share of the small model's tokens after which most of what growth keeps beyond its loss is there: a judgement after
#: a single run without a record, which caught up with one from scratch in a quarter of its tokens.
CATCH_UP = 0.1
#: Growths at which both laws agree: dimension, and the powers of its factor by which parameters and width grow.
_GROWTHS = (("depth", 1.0, 0.0), ("inner", 2 / 3, 0.0), ("hidden", 4 / 3, 1.0))
_FACTORS = (1.25, 1.5, 2.0, 3.0, 4.0)
#: Tokens per parameter of the small model at these growths; most growths of the records lie between them.
_TOKENS_PER_PARAMETER = (3.0, 10.0, 30.0)
#: An exponent of 0, for an effect that a published law does not have: it has to be positive.
_NO_EFFECT = 1e-6


def load_default_law() -> GrowthLaw:
    """Return the default law.

    Its losses of one stage are those of Besiroglu et al. 2024, its effects of growth those of the records of this
    repository, transferred by `transfer_growth`.

    >>> law = load_default_law()
    >>> law.has_relative_rates, law.scales["parameters"]
    (True, (44000000.0, 16000000000.0))
    """
    return GrowthLaw.from_yaml(DEFAULT_LAW)


def transfer_growth(law: GrowthLaw, levels: Sequence[ScalingLaw], *, step_tokens: float = RECORD_STEP) -> GrowthLaw:
    """Return a law for `REAL_SCALE`: published losses of one stage, and growth's effects of a fitted law.

    Both laws agree, by least squares, on how many tokens of the grown model a token of the small model counts for: at
    the same tokens per parameter (3 to 30), for factors of up to 4 per dimension. No token counts for more than one,
    and what growth keeps beyond the small model's loss comes with a tenth of its tokens. The mixing time is carried
    over in tokens per parameter, the memory of the learning rate in optimizer steps, its other effects relative to the
    peak.

    Replicates: those of the fitted law, with the level of each published law in turn. What growth forgets is farther
    from its best value there, by its own size per decade of parameters between the scales: modest by construction.

    Args:
        law: fitted law, with replicates.
        levels: published laws, the best one first.
        step_tokens: tokens of an optimizer step in the runs that the law was fitted to.

    Raises:
        PlanError: if the law has no replicates, there are no levels, or `step_tokens` is not a positive number.
    """
    if len(law.replicates) < 2 or not levels:
        raise PlanError(
            f"a transfer needs a law with at least 2 replicates and one level, got {len(law.replicates)} and "
            f"{len(levels)}: fit the law with replicates=12, and give a ScalingLaw"
        )
    if not is_positive_number(step_tokens):
        raise PlanError(f"step_tokens must be a positive number, got {step_tokens!r}: give tokens, such as 2048")
    spread = 1 + abs(math.log10(REAL_SCALE.parameters / law.references[0]))
    best, *others = [_convert(law.constants, law.references, level, step_tokens) for level in levels]
    rows = []
    for number, row in enumerate(law.replicates):
        turn = number % len(levels)
        converted = _convert(GrowthConstants(*row), law.references, levels[turn], step_tokens)
        rows.append(_widen(converted, [best, *others][turn], spread))
    return GrowthLaw(
        constants=GrowthConstants(*_round(best)),
        references=REAL_SCALE,
        deviation=LEVEL_DEVIATION,
        replicates=tuple(map(_round, rows)),
        runs=law.runs,
        scales={"parameters": FITTED_PARAMS, "tokens": FITTED_TOKENS},
        own_deviation=OWN_DEVIATION,
        has_relative_rates=True,
        most_kept=1.0,
        catch_up=CATCH_UP,
    )


def _convert(
    fitted: GrowthConstants, references: tuple[float, float, float, float], level: ScalingLaw, step_tokens: float
) -> GrowthConstants:
    """Return the constants at the new scale."""
    old, new = References(*references), REAL_SCALE
    efficiency = _compute_efficiency(fitted)
    without_growth = GrowthConstants(
        irreducible=level.irreducible,
        size_gap=level.params_scale / new.parameters**level.params_exponent,
        size_exponent=level.params_exponent,
        width_exponent=_NO_EFFECT,
        # a run whose schedule is `RateSchedule()` has the published loss
        token_gap=level.tokens_scale / (new.tokens / efficiency) ** level.tokens_exponent,
        token_exponent=level.tokens_exponent,
        sharpness=1.0,
        rate_half=fitted.rate_half,
        rate_size_exponent=0.0,
        rate_noise=fitted.rate_noise,
        noise_memory=fitted.noise_memory * (old.tokens / step_tokens) / (new.tokens / REAL_STEP),
        jump=fitted.jump,
        mixing=fitted.mixing * (old.tokens / old.parameters) / (new.tokens / new.parameters),
        copies_forget=fitted.copies_forget,
        carried_forgets=fitted.carried_forgets,
        floor_forgets=0.0,
    )
    forgets = _match_growth(fitted, old, without_growth, efficiency)
    return GrowthConstants(**{**vars(without_growth), **forgets})


def _compute_efficiency(constants: GrowthConstants) -> float:
    """Return the progress of a run under `RateSchedule()`, as a share of that under the peak held constant."""
    rates, half = RateSchedule().compute(np.ones((1, 1))), constants.rate_half
    return float(np.mean(rates * (1 + half) / (rates + half)))


def _match_growth(
    fitted: GrowthConstants, old: References, level: GrowthConstants, efficiency: float
) -> dict[str, float]:
    """Return what growth forgets at the new scale, so that a small token counts as much as in the fitted law."""
    rows, values = [], []
    for number, (dimension, size_power, width_power) in enumerate(_GROWTHS):
        for factor in _FACTORS:
            log_factor = math.log(factor)
            growth, width = size_power * log_factor, width_power * log_factor
            for tokens in _TOKENS_PER_PARAMETER:
                at_old = tokens * old.parameters / old.tokens
                at_new = efficiency * tokens * REAL_SCALE.parameters / REAL_SCALE.tokens
                forgets = getattr(fitted, f"{dimension}_forgets") * log_factor
                kept = _compute_kept(fitted, at_old, growth, width, forgets)
                entered = _compute_kept(level, at_new, growth, width, 0.0)
                gaps = level.size_gap / (level.token_gap * at_new**-level.token_exponent)
                by_dimension = [log_factor * (place == number) for place in range(len(GROWN_DIMENSIONS))]
                rows.append([*by_dimension, math.log1p(gaps) * growth])
                values.append(math.log(entered / kept))
    names = (*(f"{dimension}_forgets" for dimension in GROWN_DIMENSIONS), "floor_forgets")
    solution = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    return dict(zip(names, map(float, solution), strict=True))


def _compute_kept(c: GrowthConstants, progress: float, log_growth: float, log_width: float, forgets: float) -> float:
    """Return the share of a model's progress that is left after growth."""
    gap = np.array([c.size_gap])
    new_gap = gap * math.exp(-c.size_exponent * log_growth - c.width_exponent * log_width)
    before, ratio = np.array([progress]), np.array([log_growth])
    return float(compute_grown_progress(c, before, gap, new_gap, ratio, forgets)[0] / progress)


def _widen(constants: GrowthConstants, best: GrowthConstants, spread: float) -> GrowthConstants:
    """Return constants whose `*_forgets` are farther from their best values."""
    changes = {
        name: getattr(best, name) + spread * (getattr(constants, name) - getattr(best, name))
        for name in (*(f"{dimension}_forgets" for dimension in GROWN_DIMENSIONS), "floor_forgets")
    }
    return GrowthConstants(**{**vars(constants), **changes})


def _round(constants: GrowthConstants) -> tuple[float, ...]:
    """Return constants with six significant digits, as files hold them."""
    return tuple(round_constant(getattr(constants, name)) for name in NAMES)
