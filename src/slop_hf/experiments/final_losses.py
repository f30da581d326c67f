"""Figures of dots: what arms end with, and what was predicted beside what was measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..errors import RunError
from ..report.drawing import (
    RUN_COLOURS,
    STYLE,
    WIDTH,
    dark,
    grid,
    legend_below,
    new_figure,
    place_labels,
    shorten,
    write_png,
)
from .loss_curves import GOAL
from .comparison import Comparison
from .results import Spread, find_baseline, find_full_budget, compute_rank_correlation
from .tables import format_spread

GROWN, NOT_GROWN = RUN_COLOURS[:2]


def draw_final_losses(comparison: Comparison, path: str | Path) -> Path | None:
    """Draw the held-out loss that each arm ends with, a row an arm in the order of the experiment.

    Dots are seeds, the bar is their mean; the vertical line is the mean of the arm that the others are set beside, and
    its band reaches from its lowest seed to its highest.

    Args:
        comparison: with finished runs.
        path: the PNG file to write, aside and renamed.

    Returns:
        the path; None where there are none.
    """
    ended = _ended(comparison)
    if not ended:
        return None
    with rc_context(STYLE):
        figure = new_figure(WIDTH, 1.3 + 0.3 * len(ended))
        axes = figure.add_subplot()
        beside = against if (against := find_baseline(comparison)) in ended else None
        if beside is not None:
            axes.axvspan(ended[beside].low, ended[beside].high, color="0.92", linewidth=0)
            axes.axvline(ended[beside].mean, zorder=1, **GOAL)
        colours = [GROWN if _grows(comparison, arm) else NOT_GROWN for arm in ended]
        for row, (spread, colour) in enumerate(zip(ended.values(), colours, strict=True)):
            _draw_row(axes, row, spread, colour)
        axes.set_yticks(range(len(ended)), [shorten(arm, 40) for arm in ended])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
        axes.set_ylim(len(ended) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("held-out loss (nats/token)")
        grid(axes, "x")
        axes.set_title("Held-out loss at the end", loc="left")
        seeds = max(len(spread.values) for spread in ended.values())
        legend_below(figure, _entries(colours, seeds, beside), letters=96)
        return write_png(figure, path, source=comparison.fingerprint)


def draw_scatter(
    names: Sequence[str],
    predicted: Sequence[float],
    measured: Sequence[float],
    path: str | Path,
    *,
    title: str,
    labels: tuple[str, str],
    log_x: bool = False,
    source: str = "",
) -> Path:
    """Draw measured values against predicted ones, each with its name, and Spearman's correlation in the title.

    Args:
        names: of the points.
        predicted: horizontal, shape [points].
        measured: vertical, shape [points].
        path: the PNG file to write, aside and renamed.
        title: what stands before the correlation.
        labels: of the two axes.
        source: the fingerprint of what it is drawn from, see `write_png`.
        log_x: a logarithmic axis of predictions, which then must be positive.

    Returns:
        the path.

    Raises:
        RunError: for sequences of different lengths, of fewer than two, or with values that cannot be drawn.
    """
    correlation = compute_rank_correlation(predicted, measured)
    if len(names) != len(predicted):
        raise RunError(f"{len(names)} names for {len(predicted)} points; give one for each")
    if not all(map(math.isfinite, (*predicted, *measured))) or (log_x and min(predicted) <= 0):
        raise RunError("cannot draw values that are not finite, nor on a logarithmic axis those that are not positive")
    with rc_context(STYLE):
        figure = new_figure(6.4, 4.8)
        axes = figure.add_subplot()
        axes.plot(predicted, measured, "o", color=GROWN, markersize=6, alpha=0.75, zorder=3)
        if log_x:
            axes.set_xscale("log")
        axes.margins(0.12)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        grid(axes, "y")
        rho = f"{correlation:.2f}" if math.isfinite(correlation) else "undefined"
        axes.set_title(f"{title}\nSpearman's ρ = {rho} over {len(names)} points", loc="left", parse_math=False)
        place_labels(axes, list(zip(predicted, measured, strict=True)), [shorten(name, 28) for name in names])
        return write_png(figure, path, source=source)


def _ended(comparison: Comparison) -> dict[str, Spread]:
    """The finite final losses of each arm at its full budget."""
    runs = {arm: comparison.of(arm, find_full_budget(comparison, arm)) for arm in comparison.arms}
    losses = {arm: [run.eval_loss for run in found if math.isfinite(run.eval_loss)] for arm, found in runs.items()}
    return {arm: Spread(tuple(values)) for arm, values in losses.items() if values}


def _grows(comparison: Comparison, arm: str) -> bool:
    return any(run.schedule.stages for run in comparison.runs if run.arm == arm)


def _draw_row(axes: Axes, row: int, spread: Spread, colour: str) -> None:
    axes.plot(spread.values, [row] * len(spread.values), "o", color=colour, markersize=5.5, alpha=0.6, zorder=3)
    axes.plot([spread.mean] * 2, [row - 0.32, row + 0.32], color=dark(colour), linewidth=2, zorder=4)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(format_spread(spread, 4), (1, row), (8, 0), va="center", fontsize=8, **where)


def _entries(drawn: Collection[str], seeds: int, beside: str | None) -> list[tuple[str, Line2D]]:
    """What the marks mean, of those that are drawn."""
    kinds = (("grown", GROWN), ("not grown", NOT_GROWN))
    entries = [(kind, Line2D([], [], color=at, marker="o", linestyle="none")) for kind, at in kinds if at in drawn]
    if seeds > 1:
        bar = Line2D([], [], color="0.3", marker="|", markersize=9, markeredgewidth=2, linestyle="none")
        entries.append(("mean of seeds", bar))
    return [*entries, (f"mean of {shorten(beside, 28)}", Line2D([], [], **GOAL))] if beside else entries
