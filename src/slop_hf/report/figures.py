"""Figures: loss against compute, and the path of structures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from ..runs.directory import RunDirectory
from .drawing import (
    POINTS_PER_INCH,
    STYLE,
    WIDTH,
    DrawnRun,
    dark,
    lay_out,
    new_figure,
    power_of_ten,
    read_runs,
    run_legend,
    shorten,
    stage_label,
    write_png,
)
from .tables import count

#: Dimension in the legend, its config field, colour and marker.
DIMENSIONS = (
    ("hidden", "hidden_size", "#0072B2", "o"),
    ("ffn", "intermediate_size", "#D55E00", "s"),
    ("layers", "num_hidden_layers", "#009E73", "^"),
    ("heads", "num_attention_heads", "#CC79A7", "D"),
)

FLAG_SIZE = 7.5  # points of a stage label
FLAG_LANE = 10.5  # points from one row of stage labels to the next
MARKERS = 40  # held-out losses marked on a line at most
NUDGE = 4.0  # points between dimensions that have grown alike


def loss_figure(runs: Sequence[RunDirectory], path: str | Path, *, log_x: bool = False) -> Path:
    """Draw loss (nats a token) against cumulative training FLOPs, all runs on the same axes.

    Thin lines are training loss, markers held-out loss, dashed vertical lines the growths, labelled with what grew.
    The axis of losses fits what follows the initial model's first descent, which leaves through the top.

    Args:
        runs: runs with a finished stage each.
        path: the PNG file to write, aside and renamed.
        log_x: a logarithmic axis of FLOPs.

    Returns:
        the path.

    Raises:
        RunError: for no runs, one given twice, or a directory that is no run.
    """
    found = read_runs(runs)
    with rc_context(STYLE):
        figure = new_figure(WIDTH, 4.6)
        axes = figure.add_subplot()
        scale, unit = (1.0, "") if log_x else power_of_ten(max(run.records[-1].total_flops for run in found))
        for number, run in enumerate(found):
            flops, losses = run.losses("loss")
            axes.plot([x / scale for x in flops], losses, color=run.colour, linewidth=0.9, alpha=0.65)
            flops, losses = run.losses("eval_loss")
            every = max(1, math.ceil(len(flops) / MARKERS))
            axes.plot(
                [x / scale for x in flops],
                losses,
                linestyle="none",
                marker="o",
                markersize=5,
                markevery=slice((len(flops) - 1) % every, None, every),
                markerfacecolor=run.colour,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3 + number / 100,
            )
        settled = [loss for run in found for loss in run.settled_losses]
        if settled:
            margin = 0.05 * (max(settled) - min(settled)) or 0.1
            axes.set_ylim(min(settled) - margin, max(settled) + margin)
        else:
            axes.text(0.5, 0.5, "no losses were logged", transform=axes.transAxes, ha="center", color="0.4")
        if log_x:
            axes.set_xscale("log")
        else:
            most = max(run.records[-1].total_flops for run in found) / scale or 1
            axes.set_xlim(-0.01 * most, 1.02 * most)
        axes.set_xlabel(f"training FLOPs{unit}")
        axes.set_ylabel("loss (nats/token)")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        kinds: list[tuple[str, dict[str, Any]]] = [("training loss", {"linewidth": 0.9})]
        kinds.append(("held-out loss", {"linestyle": "none", "marker": "o", "markersize": 5}))
        if any(run.growths for run in found):
            kinds.append(("growth", {"linewidth": 0.9, "linestyle": (0, (4, 3))}))
        extra = [(label, Line2D([], [], color="0.35", **style)) for label, style in kinds]
        run_legend(figure, found, extra)
        flags = [
            (flops / scale, label, run.colour, number)
            for number, run in enumerate(found)
            for flops, label in run.growths
            if flops > 0 or not log_x
        ]
        lanes = _draw_flags(axes, flags, len(found))
        figure.set_figheight(figure.get_figheight() + lanes * FLAG_LANE / POINTS_PER_INCH)
        axes.set_title("Loss against training compute", loc="left", pad=8 + lanes * FLAG_LANE)
        return write_png(figure, path)


def path_figure(runs: Sequence[RunDirectory], path: str | Path) -> Path:
    """Draw the path of structures: parameters against compute, and each dimension relative to its initial size.

    Args:
        runs: runs with a finished stage each.
        path: the PNG file to write, aside and renamed.

    Returns:
        the path.

    Raises:
        RunError: for no runs, one given twice, or a directory that is no run.
    """
    found = read_runs(runs)
    # Training from scratch has no path; a report on nothing else shows its one point.
    grown = [run for run in found if run.growths] or found
    columns = min(len(grown), 4)
    rows = math.ceil(len(grown) / columns)
    with rc_context(STYLE):
        if len(grown) == 1:
            figure = new_figure(WIDTH, 3.9)
            panels = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))
        else:
            heights = (3.7, 0.9 + 2.0 * rows)
            figure = new_figure(WIDTH, sum(heights))
            panels = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        left, right = panels.ravel()
        _draw_parameters(left, found)
        _draw_dimensions(right, grown, rows, columns, titles=len(found) > 1)
        return write_png(figure, path)


def _draw_parameters(panel: SubFigure, runs: Sequence[DrawnRun]) -> None:
    axes = panel.add_subplot()
    scale, unit = power_of_ten(max(run.records[-1].total_flops for run in runs))
    for number, run in enumerate(runs):
        xs, ys = [], []
        for record in run.records:
            xs += [(record.total_flops - record.flops) / scale, record.total_flops / scale]
            ys += [record.parameters] * 2
        # Runs often share structures: later lines are thinner, so that the earlier ones show on both sides.
        later = len(runs) - 1 - number
        width = 1.4 + later * min(1.2, 4 / len(runs))
        axes.plot(xs, ys, color=run.colour, linewidth=width, solid_joinstyle="miter", zorder=2 + number / 100)
        axes.plot(xs[-1:], ys[-1:], "o", color=run.colour, markersize=width + 3.6, clip_on=False, zorder=3)
    axes.set_xlim(0, max(run.records[-1].total_flops for run in runs) / scale * 1.02 or 1)
    axes.set_ylim(0, max(record.parameters for run in runs for record in run.records) * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"training FLOPs{unit}")
    axes.set_ylabel("parameters")
    panel.suptitle("(a) Parameters over training", x=0.01, ha="left", fontsize=10, fontweight="bold")
    run_legend(panel, runs)


def _draw_dimensions(panel: SubFigure, runs: Sequence[DrawnRun], rows: int, columns: int, *, titles: bool) -> None:
    heading = "(b) Dimensions relative to the initial structure"
    grid = panel.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    highest = max(max(_ratios(run, field)) for run in runs for _, field, _, _ in DIMENSIONS)
    top = max(1.0, math.log2(highest))
    for axes, run in zip(grid, runs, strict=False):
        for number, (_, field, colour, marker) in enumerate(DIMENSIONS):
            # Dimensions that have grown alike would hide one another: each is drawn some points off its true value.
            nudge = ScaledTranslation(0, NUDGE * (1.5 - number) / POINTS_PER_INCH, panel.dpi_scale_trans)
            values = _ratios(run, field)
            axes.plot(
                range(len(values)),
                values,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                transform=axes.transData + nudge,
            )
        axes.set_yscale("log", base=2)
        axes.set_ylim(2 ** (-0.2 * top), 2 ** (1.2 * top))
        axes.yaxis.set_major_locator(FixedLocator([2**power for power in range(math.floor(top) + 1)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        _stage_ticks(axes, run, narrow=columns > 1)
        if titles:
            axes.set_title(shorten(run.name, 84 // columns), color=dark(run.colour), parse_math=False, fontsize=8.5)
    for axes in grid[::columns]:
        axes.set_ylabel("relative size")
    for axes in grid[max(len(runs) - columns, 0) : len(runs)]:
        axes.set_xlabel("stage")
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    panel.align_xlabels()
    panel.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        for label, _, colour, marker in DIMENSIONS
    ]
    panel.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _stage_ticks(axes: Axes, run: DrawnRun, *, narrow: bool) -> None:
    """Name the stages under the axis, or number them where the names have no room."""
    labels = [stage_label(record).replace("-", "\n") for record in run.records]
    if len(labels) > (5 if narrow else 8):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    else:
        axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_xlim(-0.3, len(labels) - 0.7)


def _draw_flags(axes: Axes, flags: Sequence[tuple[float, str, str, int]], runs: int) -> int:
    """Draw each growth as a dashed line with its label above the axes, and return how many rows the labels take.

    From right to left, each label hangs like a flag to the right of its mast, in the lowest row where it touches
    neither another label nor another mast.
    """
    if not flags:
        return 0
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    lay_out(figure)
    ends: list[float] = []  # where the free space of each row ends, in pixels
    for x, label, colour, number in sorted(flags, key=lambda flag: (flag[0], flag[3]), reverse=True):
        text = axes.annotate(
            label, (x, 1), (0, 0), ("data", "axes fraction"), "offset points", fontsize=FLAG_SIZE, color=dark(colour)
        )
        mast = axes.transData.transform((x, 0))[0]
        width = text.get_window_extent().width + 6 * figure.dpi / POINTS_PER_INCH
        lane = next((row for row, end in enumerate(ends) if mast + width <= end), len(ends))
        ends[: lane + 1] = [mast] * (lane + 1)
        text.set_position((2.5, 3 + lane * FLAG_LANE))
        # Masts of several runs may coincide: their dashes then take turns.
        style = (7 * number / runs, (4, 3))
        axes.axvline(x, color=colour, linewidth=0.9, linestyle=style, alpha=0.8, zorder=1)
        axes.annotate(
            "",
            (x, 1),
            (0, 3 + lane * FLAG_LANE + FLAG_SIZE),
            ("data", "axes fraction"),
            "offset points",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )
    return len(ends)


def _ratios(run: DrawnRun, field: str) -> list[float]:
    first = getattr(run.records[0].dims, field)
    return [getattr(record.dims, field) / first for record in run.records]
