"""`MixingReport`: κ and mixing time of growths to one target, as a JSON file, a table, sentences and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from rich.table import Table

from ..dims import ModelDims
from ..errors import RunError
from ..experiments.comparison import Cost
from ..experiments.results import Spread
from ..experiments.tables import build_terminal_table
from ..io.record import Record
from ..io.units import NOTHING, format_count, format_power, format_significant
from ..report.drawing import (
    RUN_COLOURS,
    STYLE,
    WIDTH,
    LegendEntry,
    create_figure,
    draw_grid,
    draw_legend,
    shorten_name,
    write_png,
)
from ..report.tables import TextTable
from .catch_up import LossTrack, MixingEstimate, Verdict

#: Sentences about a growth whose κ could not be determined.
_REASONS: dict[Verdict, str] = {
    "not settled": "{name}: κ(n) had not settled when the probe ended (mean of the last third {last}, {trend} within "
    "it); train the grown model for longer (lag)",
    "too noisy": "{name}: held-out losses fluctuate too much ({noise} nats) for a tolerance of {tolerance}; hold out "
    "more text, grow later (at), or raise the tolerance",
    "above the trunk": "{name}: the grown model had not come down to the first losses of the target from scratch; "
    "train it for longer (lag)",
    "below the trunk": "{name}: the grown model passed the last loss of the target from scratch, so κ is above "
    "{largest}, the most that this probe measures; raise largest_kappa",
}
_VIEW = -0.5  # lowest κ(n) that the figure shows if all settle above


@dataclass(frozen=True)
class MixingResult(Record, error=RunError):
    """The measurements of one growth, one estimate per seed.

    Args:
        name: dimension, factor, and init and moment if there are several.
        dimension, factor, small, init: as in `MixingGrowth`.
        small_tokens: tokens n_s of the small model before the growth, in whole optimizer steps.
        cost_ratio: training FLOPs of a token of the small model over those of a token of the target, r.
        tracks: held-out losses of the grown model by tokens since the growth, one track per seed.
        estimates: estimates, one per seed.
        flops: training FLOPs of one run, the small model's included.
    """

    name: str
    dimension: str
    factor: float
    small: ModelDims
    small_tokens: int
    cost_ratio: float
    tracks: tuple[LossTrack, ...]
    estimates: tuple[MixingEstimate, ...]
    flops: float
    init: str | None = None

    @property
    def verdict(self) -> Verdict:
        """`settled` if κ settled with every seed; else the verdict of the first other seed."""
        return next((one.verdict for one in self.estimates if one.verdict != "settled"), "settled")

    @property
    def kappa(self) -> Spread | None:
        """κ per seed, tokens of the target per token of the small model; None unless settled with every seed."""
        return Spread.collect([estimate.kappa for estimate in self.estimates])

    @property
    def kappa_interval(self) -> tuple[float, float] | None:
        """The range over seeds; for one seed, the interval of the noise of held-out losses."""
        ends = [(estimate.kappa_low, estimate.kappa_high) for estimate in self.estimates]
        return _find_interval(self.kappa, ends)

    @property
    def mixing_tokens(self) -> Spread | None:
        """Mixing time per seed, in tokens of the grown model; None unless settled with every seed."""
        return Spread.collect([estimate.mixing_tokens for estimate in self.estimates])

    @property
    def mixing_interval(self) -> tuple[float, float] | None:
        """Interval of the mixing time, as for κ; it ends with inf if the end lies beyond what could be judged."""
        ends = [(estimate.mixing_low, estimate.mixing_high) for estimate in self.estimates]
        return _find_interval(self.mixing_tokens, [(low, math.inf if high is None else high) for low, high in ends])

    def compute_cost(self, share: float) -> float:
        """Return the FLOPs of a grown run over those of the target from scratch with the same loss, 1 − x + x r / κ.

        Args:
            share: share x of the target's tokens that the small model replaces.

        Raises:
            RunError: if κ is not known or not positive.
        """
        if self.kappa is None or self.kappa.mean <= 0:
            fault = "is not known" if self.kappa is None else f"is {self.kappa.mean:.2f}"
            raise RunError(f"{self.name}: the cost of a grown run needs a positive κ, and κ {fault}")
        return 1 - share + share * self.cost_ratio / self.kappa.mean


@dataclass(frozen=True)
class MixingReport(Record, error=RunError, if_missing="`slop probe --mixing` writes one"):
    """The measurements of a mixing probe.

    Args:
        results: results by growth, in the order asked for.
        trunks: held-out losses of the target from scratch by tokens, one track per seed.
        target: structure of the target.
        tolerance: largest distance of κ(n) from its settled value after the mixing time.
        seeds: seeds.
        cost: cost of the probe, everything counted once; an entry for the ledger of a comparison. Evaluations are not
            in it.
        diverged: names of growths without a result, because one of their runs diverged.
        versions: versions of slop_hf, transformers and torch.
        device: hardware that the runs were trained on.
    """

    results: tuple[MixingResult, ...]
    trunks: tuple[LossTrack, ...]
    target: ModelDims
    tolerance: float
    seeds: tuple[int, ...]
    cost: Cost
    diverged: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""


def _find_interval(
    spread: Spread | None, ends: Sequence[tuple[float | None, float | None]]
) -> tuple[float, float] | None:
    if spread is None:
        return None
    if len(spread.values) > 1:
        return spread.low, spread.high
    low, high = ends[0]
    return None if low is None or high is None else (low, high)


def tabulate_mixing(report: MixingReport) -> TextTable:
    """Return a table with one row per growth: κ, r, the mixing time, each with its interval, and FLOPs."""
    columns = (("growth", False), ("κ", True), ("r", True), ("mixing time", True), ("FLOPs", True))
    rows = []
    for result in report.results:
        kappa, mixing = result.kappa, result.mixing_tokens
        rows.append(
            (
                result.name,
                _format_verdict(report, result)
                if kappa is None
                else _format_interval(kappa, result.kappa_interval, "{:.2f}".format),
                f"{result.cost_ratio:.2f}",
                NOTHING if mixing is None else _format_interval(mixing, result.mixing_interval, format_count),
                format_power(result.flops),
            )
        )
    return TextTable(columns, tuple(rows))


def _format_verdict(report: MixingReport, result: MixingResult) -> str:
    is_below = result.verdict == "below the trunk"
    return f"above {_compute_largest(report, result):.2f}" if is_below else result.verdict


def _compute_largest(report: MixingReport, result: MixingResult) -> float:
    """Return the largest κ that could be read off to the end of the grown model's training."""
    return (report.trunks[0].tokens[-1] - result.tracks[0].tokens[-1]) / result.small_tokens


def _format_interval(
    spread: Spread, interval: tuple[float, float] | None, format_number: Callable[[float], str]
) -> str:
    mean = format_number(spread.mean)
    if interval is None:
        return mean
    low, high = interval
    return f"{mean} ({format_number(low)} to {'more' if math.isinf(high) else format_number(high)})"


def build_mixing_table(report: MixingReport) -> Table:
    """Return `tabulate_mixing` for the terminal: `rich.print(build_mixing_table(report))`."""
    return build_terminal_table(tabulate_mixing(report), f"Growth to {report.target}: worth and cost of small tokens")


def describe_mixing(report: MixingReport) -> list[str]:
    """Return sentences about the figures, about those that could not be determined, and about the cost."""
    several = len(report.seeds) > 1
    interval = (
        f"ranges over {len(report.seeds)} seeds"
        if several
        else "95% of the noise of held-out losses within a run; seeds may differ by more"
    )
    sentences = [
        "κ: tokens of the target from scratch that a token of the small model is worth; r: what it costs, in tokens "
        "of the target. Growth pays only if κ is above r.",
        f"Mixing time: tokens after the growth until κ(n) stays within {report.tolerance:g} of κ. Intervals are "
        f"{interval}.",
    ]
    for result in report.results:
        estimate = next((one for one in result.estimates if one.verdict != "settled"), None)
        if estimate is not None:
            reason = _REASONS[estimate.verdict].format(
                name=result.name,
                last=format_significant(estimate.last),
                trend=NOTHING if estimate.trend is None else f"{estimate.trend:+.2f}",
                noise=format_significant(estimate.noise),
                tolerance=f"{report.tolerance:g}",
                largest=f"{_compute_largest(report, result):.2f}",
            )
            sentences.append(f"{reason}.")
        elif drifts := [one.trend for one in result.estimates if one.is_drifting and one.trend is not None]:
            sentences.append(
                f"{result.name}: κ(n) still changes by {fmean(drifts):+.2f} within the last third, which is within "
                "the tolerance but beyond the noise; a longer probe (lag) may settle further that way."
            )
    if report.diverged:
        sentences.append(f"Diverged, and therefore not measured: {', '.join(report.diverged)}.")
    cost, hours = report.cost, format_significant(report.cost.seconds / 3600)
    spent = f"{format_count(cost.tokens)} tokens, {format_power(cost.flops)} FLOPs and {hours} device hours"
    return [*sentences, f"The probe cost {spent}, evaluations not included."]


def draw_mixing(report: MixingReport, path: str | Path) -> Path:
    """Draw the held-out losses, and κ(n) of each growth against the tokens since it; return the path of the PNG file.

    A dot is the mixing time, a dashed line the settled κ, a dotted one the cost r. Lines of several seeds share a
    colour.
    """
    with rc_context(STYLE):
        figure = create_figure(WIDTH, 4.4)
        losses, kappas = figure.subplots(1, 2)
        for track in report.trunks:
            losses.plot(track.tokens, track.losses, color="0.35", linewidth=2)
        entries: list[LegendEntry] = [("target from scratch", Line2D([], [], color="0.35", linewidth=2.4))]
        for number, result in enumerate(report.results):
            colour = RUN_COLOURS[number % len(RUN_COLOURS)]
            for track in result.tracks:
                losses.plot(track.tokens, track.losses, color=colour, linewidth=1.4)
            _draw_kappas(kappas, result, colour)
            entries.append((shorten_name(result.name, 32), Line2D([], [], color=colour, linewidth=2.4)))
        losses.set_title("Held-out loss")
        losses.set_ylabel("nats/token")
        losses.set_xlabel("tokens; of a grown model, since the growth")
        settled = [loss for track in report.trunks for loss in track.losses[len(track.losses) // 8 :]]
        margin = 0.1 * (max(settled) - min(settled)) or 0.1  # the first descent leaves through the top
        losses.set_ylim(min(settled) - margin, max(settled) + 2 * margin)
        kappas.set_title("κ(n): target tokens per small token")
        kappas.set_xlabel("tokens since the growth")
        estimates = [estimate for result in report.results for estimate in result.estimates]
        settled = [estimate.last for estimate in estimates if estimate.last is not None]
        high = [value for estimate in estimates for value in estimate.kappas if value is not None]
        kappas.set_ylim(min([_VIEW, *(value - 0.2 for value in settled)]), max([1.0, *high]) + 0.2)
        for axes in (losses, kappas):
            draw_grid(axes, "y")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: format_count(tokens)))
        marks = (
            ("mixing time", {"marker": "o", "linestyle": "none"}),
            ("κ", {"linestyle": "--"}),
            ("r", {"linestyle": ":"}),
        )
        entries += [(label, Line2D([], [], color="0.35", **style)) for label, style in marks]
        draw_legend(figure, entries, letters=96)
        return write_png(figure, path)


def _draw_kappas(axes: Axes, result: MixingResult, colour: str) -> None:
    for estimate in result.estimates:
        values = [math.nan if value is None else value for value in estimate.kappas]
        axes.plot(estimate.tokens, values, color=colour, linewidth=1.6)
        if estimate.kappa is not None and estimate.mixing_tokens is not None:
            value = values[estimate.tokens.index(int(estimate.mixing_tokens))]
            axes.plot([estimate.mixing_tokens], [value], color=colour, marker="o", linestyle="none")
    if result.kappa is not None:
        axes.axhline(result.kappa.mean, color=colour, linewidth=0.9, linestyle="--")
    axes.axhline(result.cost_ratio, color=colour, linewidth=0.9, linestyle=":")
