"""Figures of points: the final loss of each arm, and measured against predicted values."""

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
    LegendEntry,
    create_figure,
    darken,
    draw_grid,
    draw_legend,
    shorten_name,
    write_png,
)
from .comparison import Comparison
from .loss_curves import GOAL_LINE
from .results import Spread, compute_rank_correlation, find_baseline, select_main_runs
from .tables import format_spread

#: Colour and mark of an arm that grows, and of one that does not.
GROWN, NOT_GROWN = zip(RUN_COLOURS[:2], "os", strict=True)
_MARKERS = "os^Dv"  # five shapes and eight colours: 40 different points


def draw_final_losses(comparison: Comparison, path: str | Path) -> Path | None:
    """Draw the final held-out loss of each arm, one row per arm in the order of the experiment.

    Dots are seeds, the bar is their mean. The vertical line is the mean of the baseline, the arm that the others are
    compared with; its band reaches from the baseline's lowest seed to its highest.

    Returns:
        The path of the PNG file; None if no run has a finite final loss.
    """
    losses = _get_final_losses(comparison)
    if not losses:
        return None
    with rc_context(STYLE):
        figure = create_figure(WIDTH, 1.3 + 0.3 * len(losses))
        axes = figure.add_subplot()
        baseline = find_baseline(comparison) or ""
        if baseline in losses:
            axes.axvspan(losses[baseline].low, losses[baseline].high, color="0.92", linewidth=0)
            axes.axvline(losses[baseline].mean, zorder=1, **GOAL_LINE)
        grown = {run.arm for run in comparison.runs if run.schedule.stages}
        looks = [GROWN if arm in grown else NOT_GROWN for arm in losses]
        for row, (spread, look) in enumerate(zip(losses.values(), looks, strict=True)):
            _draw_row(axes, row, spread, *look)
        axes.set_yticks(range(len(losses)), [shorten_name(arm, 40) for arm in losses])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)
        axes.set_ylim(len(losses) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("held-out loss (nats/token)")
        draw_grid(axes, "x")
        axes.set_title("Held-out loss at the end", loc="left")
        entries = _list_entries(looks, max(len(spread.values) for spread in losses.values()))
        if baseline in losses:
            entries.append((f"mean of {shorten_name(baseline, 28)}", Line2D([], [], **GOAL_LINE)))
        draw_legend(figure, entries, letters=96)
        return write_png(figure, path, source=comparison.fingerprint)


def draw_scatter(
    names: Sequence[str],
    predicted: Sequence[float],
    measured: Sequence[float],
    path: str | Path,
    *,
    title: str,
    labels: tuple[str, str],
    source: str = "",
) -> Path:
    """Draw measured against predicted values, with Spearman's correlation in the title and names in the legend.

    Args:
        names, predicted, measured: names, horizontal and vertical values of the points.
        path: PNG file to write.
        title: title before the correlation.
        labels: labels of the two axes.
        source: fingerprint of the data, see `write_png`.
    """
    correlation = compute_rank_correlation(predicted, measured)
    if len(names) != len(predicted):
        raise RunError(f"{len(names)} names for {len(predicted)} points; give one per point")
    if not all(map(math.isfinite, (*predicted, *measured))):
        raise RunError("values to draw must be finite")
    with rc_context(STYLE):
        figure = create_figure(6.4, 5.2)
        axes = figure.add_subplot()
        entries: list[LegendEntry] = []
        # The legend names the points from the highest down.
        for number, (y, x, name) in enumerate(sorted(zip(measured, predicted, names, strict=True), reverse=True)):
            colour, marker = RUN_COLOURS[number % len(RUN_COLOURS)], _MARKERS[number % len(_MARKERS)]
            style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 6.5, "alpha": 0.8}
            axes.plot([x], [y], zorder=3, **style)
            entries.append((shorten_name(name, 28), Line2D([], [], **style)))
        axes.margins(0.08)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        draw_grid(axes, "y")
        rho = f"{correlation:.2f}" if math.isfinite(correlation) else "undefined"
        axes.set_title(f"{title}\nSpearman's ρ = {rho} over {len(names)} points", loc="left", parse_math=False)
        draw_legend(figure, entries, letters=60)
        return write_png(figure, path, source=source)


def _get_final_losses(comparison: Comparison) -> dict[str, Spread]:
    """Return the finite final losses of each arm at its main budget."""
    losses = {arm: [run.eval_loss for run in select_main_runs(comparison, arm)] for arm in comparison.arms}
    finite = {arm: tuple(filter(math.isfinite, values)) for arm, values in losses.items()}
    return {arm: Spread(values) for arm, values in finite.items() if values}


def _draw_row(axes: Axes, row: int, spread: Spread, colour: str, marker: str) -> None:
    axes.plot(spread.values, [row] * len(spread.values), marker, color=colour, markersize=5.5, alpha=0.6, zorder=3)
    axes.plot([spread.mean] * 2, [row - 0.32, row + 0.32], color=darken(colour), linewidth=2, zorder=4)
    position = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(format_spread(spread, 4), (1, row), (8, 0), va="center", fontsize=8, **position)


def _list_entries(looks: Collection[tuple[str, str]], seeds: int) -> list[LegendEntry]:
    """Return the legend's entries for the kinds of marks drawn."""
    entries: list[LegendEntry] = [
        (kind, Line2D([], [], color=look[0], marker=look[1], linestyle="none"))
        for kind, look in (("grown", GROWN), ("not grown", NOT_GROWN))
        if look in looks
    ]
    if seeds > 1:
        bar = Line2D([], [], color="0.3", marker="|", markersize=9, markeredgewidth=2, linestyle="none")
        entries.append(("mean of seeds", bar))
    return entries
