"""Figures of runs: loss against training compute, and the path of structures."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from ..io.units import format_count
from ..runs.directory import RunDirectory
from ..runs.records import StageRecord
from ..runs.snapshot import RunSnapshot
from .drawing import (
    STYLE,
    WIDTH,
    DrawnRun,
    LegendEntry,
    Style,
    create_figure,
    darken,
    draw_grid,
    draw_legend,
    draw_run_legend,
    get_stage_label,
    label_flops_axis,
    read_runs,
    shorten_name,
    write_png,
)

#: Dimension in the legend, its config field, colour and marker.
_DIMENSIONS = (
    ("hidden", "hidden_size", "#0072B2", "o"),
    ("ffn", "intermediate_size", "#D55E00", "s"),
    ("layers", "num_hidden_layers", "#009E73", "^"),
    ("heads", "num_attention_heads", "#CC79A7", "D"),
)

_MARK: Style = {"linestyle": "none", "markeredgecolor": "white"}
#: The marks of a loss just before a growth, and just after it: up and filled, down and hollow.
GROWTH_MARK: Style = {**_MARK, "marker": "^", "markersize": 6.5, "markeredgewidth": 0.7}
GROWN_MARK: Style = {"linestyle": "none", "marker": "v", "markersize": 5.5, "markerfacecolor": "white"}
_HELD_OUT: Style = {**_MARK, "markersize": 5, "markeredgewidth": 0.6}
MAX_MARKERS = 40  # dots of held-out loss per run
LABEL_SIZE = 7.5  # points, of the names of stages
LABEL_GAP = 2.5 * LABEL_SIZE  # points between growths whose labels do not touch, at a slant of 30°
NUDGE = 4.0  # points between dimensions that grew alike


@dataclass(frozen=True)
class LossCurve:
    """Losses during training, as one line of a figure.

    Args:
        x: training so far at each point, such as FLOPs, shape [points].
        losses: loss at each point, in nats per token, shape [points].
        style: keyword arguments of `Axes.plot`, with a `color`.
        settled: losses that the axis has to show; the other ones may leave through the top.
        band: lowest and highest loss at each point, two sequences of shape [points]; None draws no band.
        growths: training so far and loss just before each growth.
        grown: training so far and loss just after each growth, if it is known.
    """

    x: Sequence[float]
    losses: Sequence[float]
    style: Style
    settled: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    growths: Sequence[tuple[float, float]] = ()
    grown: Sequence[tuple[float, float]] = ()


def draw_loss_curves(axes: Axes, curves: Sequence[LossCurve], *, most: float, log_x: bool = False) -> None:
    """Draw losses against training, with a triangle just before each growth, and a hollow one just after it.

    The axis of losses fits the settled losses of all curves, with room below for a label; unless it is logarithmic,
    the axis of training ends at `most`. Later curves are drawn over earlier ones.
    """
    for number, curve in enumerate(curves):
        colour = curve.style["color"]
        axes.plot(curve.x, curve.losses, **{"zorder": 2 + number / 100, **curve.style})
        if curve.band is not None:
            axes.fill_between(curve.x, *curve.band, color=colour, alpha=0.18, linewidth=0, zorder=1)
        if curve.growths:
            axes.plot(*zip(*curve.growths, strict=True), color=colour, zorder=4, **GROWTH_MARK)
        if curve.grown:
            axes.plot(*zip(*curve.grown, strict=True), color=colour, zorder=4, **GROWN_MARK)
    if settled := [loss for curve in curves for loss in curve.settled]:
        margin = 0.08 * (max(settled) - min(settled)) or 0.1
        axes.set_ylim(min(settled) - margin, max(settled) + 0.5 * margin)
    else:
        axes.text(0.5, 0.5, "no losses were logged", transform=axes.transAxes, ha="center", color="0.4")
    if log_x:
        axes.set_xscale("log")
    else:
        axes.set_xlim(-0.01 * (most or 1), 1.02 * (most or 1))
    draw_grid(axes, "y")


def draw_run_losses(runs: Sequence[RunDirectory | RunSnapshot], path: str | Path, *, log_x: bool = False) -> Path:
    """Draw loss against cumulative training FLOPs, all runs on the same axes.

    Thin lines are training loss, marks held-out loss; a filled triangle is the held-out loss just before a growth, a
    hollow one just after it. If a single run is drawn, bands show its stages, and an axis at the top says what grew;
    the legend of several runs gives their orders of growth. The first descent of the initial model leaves through the
    top.

    Args:
        runs: runs with at least one finished stage.
        path: the PNG file to write.
        log_x: whether the axis of FLOPs is logarithmic.

    Raises:
        RunError: if no run is given, a directory occurs twice or is not a run, or a run has no finished stage.
    """
    drawn_runs = read_runs(runs)
    most = max(run.records[-1].total_flops for run in drawn_runs)
    with rc_context(STYLE):
        figure = create_figure(WIDTH, 4.8)
        axes = figure.add_subplot()
        curves = [curve for number, run in enumerate(drawn_runs) for curve in _build_curves(run, number)]
        draw_loss_curves(axes, curves, most=most, log_x=log_x)
        if log_x:
            axes.set_xlabel("training FLOPs")
        else:
            label_flops_axis(axes, most)
        axes.set_ylabel("loss (nats/token)")
        axes.set_title("Loss against training compute")
        if len(drawn_runs) == 1:
            _label_growths(axes, drawn_runs[0])
        kinds: list[tuple[str, Style]] = [
            ("training loss", {"linewidth": 0.9}),
            ("held-out loss", {"marker": "o", **_HELD_OUT}),
        ]
        if any(curve.growths for curve in curves):
            kinds.append(("before growth", GROWTH_MARK))
        if any(curve.grown for curve in curves):
            kinds.append(("after growth", GROWN_MARK))
        extra: list[LegendEntry] = [(label, Line2D([], [], color="0.35", **style)) for label, style in kinds]
        draw_run_legend(figure, drawn_runs, extra)
        return write_png(figure, path)


def _build_curves(run: DrawnRun, number: int) -> list[LossCurve]:
    """Build the curves of a run's training losses and held-out losses."""
    style: Style = {"color": run.colour, "linewidth": 0.9, "alpha": 0.8}
    training = LossCurve(*run.losses("loss"), style, run.settled_losses)
    ends = [(record.total_flops, _find_loss_at_end(record, training)) for record in run.records[:-1]]
    growths = [(end, loss) for end, loss in ends if loss is not None]
    after = [(end, record.eval_loss_after_growth) for (end, _), record in zip(ends, run.records[1:], strict=True)]
    grown = [(end, loss) for end, loss in after if loss is not None and math.isfinite(loss)]
    # The losses around growths have their own marks.
    dots = [point for point in zip(*run.losses("eval_loss"), strict=True) if point[0] not in dict(ends)]
    flops, losses = [point[0] for point in dots], [point[1] for point in dots]
    every = max(1, math.ceil(len(dots) / MAX_MARKERS))
    shown = slice((len(dots) - 1) % every, None, every)
    style = {"color": run.colour, "marker": run.marker, "zorder": 3 + number / 100, "markevery": shown, **_HELD_OUT}
    return [training, LossCurve(flops, losses, style, [], growths=growths, grown=grown)]


def _find_loss_at_end(record: StageRecord, training: LossCurve) -> float | None:
    """Return the held-out loss at the end of a stage, else the last training loss."""
    if record.eval_loss is not None and math.isfinite(record.eval_loss):
        return record.eval_loss
    logged = bisect_right(training.x, record.total_flops)
    return training.losses[logged - 1] if logged else None


def _label_growths(axes: Axes, run: DrawnRun) -> None:
    """Shade every other stage, and name what grew on an axis at the top, leaving out names that would touch."""
    edges = [*(flops for flops, _ in run.growths), run.records[-1].total_flops]
    for begin, end in list(pairwise(edges))[::2]:
        axes.axvspan(begin, end, color="0.955", linewidth=0, zorder=0, gid="stage")
    labels: dict[float, str] = {}
    last = -math.inf
    for flops, label in run.growths:
        if flops > 0:
            axes.axvline(flops, color="0.75", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
            x = 72 * axes.transData.transform((flops, 0))[0] / axes.figure.dpi  # points
            if x >= last + LABEL_GAP:
                labels[flops], last = label, x
    top = axes.secondary_xaxis("top")
    slant: Style = {"rotation": 30, "rotation_mode": "anchor", "ha": "left"}
    top.set_xticks([*labels], labels.values(), fontsize=LABEL_SIZE, color=darken(run.colour), **slant)
    top.tick_params(axis="x", which="both", length=0)
    top.spines[:].set_visible(False)


def draw_run_paths(runs: Sequence[RunDirectory], path: str | Path) -> Path:
    """Draw the path of structures: parameters against compute, and each dimension relative to its initial size.

    Args:
        runs: runs with at least one finished stage.
        path: the PNG file to write.

    Raises:
        RunError: if no run is given, a directory occurs twice or is not a run, or a run has no finished stage.
    """
    drawn_runs = read_runs(runs)
    # Training from scratch has no path; if nothing grew, the figure shows single points.
    grown = [run for run in drawn_runs if run.growths] or drawn_runs
    columns = min(len(grown), 4)
    rows = math.ceil(len(grown) / columns)
    with rc_context(STYLE):
        if len(grown) == 1:
            figure = create_figure(WIDTH, 3.9)
            panels = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))
        else:
            heights = (3.7, 0.9 + 2.0 * rows)
            figure = create_figure(WIDTH, sum(heights))
            panels = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        first, second = panels.ravel()
        _draw_parameters(first, drawn_runs)
        _draw_dimensions(second, grown, rows, columns, has_titles=len(drawn_runs) > 1)
        return write_png(figure, path)


def _draw_parameters(panel: SubFigure, runs: Sequence[DrawnRun]) -> None:
    axes = panel.add_subplot()
    most = max(run.records[-1].total_flops for run in runs)
    for number, run in enumerate(runs):
        xs = [run.records[0].total_flops - run.records[0].flops, *(record.total_flops for record in run.records)]
        ys = [run.records[0].parameters, *(record.parameters for record in run.records)]
        # Runs often share structures: later lines are thinner, so that the earlier ones show on both sides.
        later = len(runs) - 1 - number
        width = 1.4 + later * min(1.2, 4 / len(runs))
        style: Style = {"color": run.colour, "linewidth": width, "solid_joinstyle": "miter"}
        axes.plot(xs, ys, drawstyle="steps-pre", zorder=2 + number / 100, **style)
        axes.plot(xs[-1:], ys[-1:], run.marker, color=run.colour, markersize=width + 3.6, clip_on=False, zorder=3)
    axes.set_xlim(0, most * 1.02 or 1)
    axes.set_ylim(0, max(record.parameters for run in runs for record in run.records) * 1.08)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    draw_grid(axes, "y")
    label_flops_axis(axes, most)
    axes.set_ylabel("parameters")
    panel.suptitle("(a) Parameters over training", x=0.01, ha="left")
    draw_run_legend(panel, runs)


def _draw_dimensions(panel: SubFigure, runs: Sequence[DrawnRun], rows: int, columns: int, *, has_titles: bool) -> None:
    grid = panel.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    highest = max(max(_compute_ratios(run, field)) for run in runs for _, field, _, _ in _DIMENSIONS)
    top = max(1.0, math.log2(highest))
    for axes, run in zip(grid, runs, strict=False):
        for number, (_, field, colour, marker) in enumerate(_DIMENSIONS):
            # Dimensions that grew alike would hide each other: each is drawn a few points off its true value.
            nudged = offset_copy(axes.transData, panel, y=NUDGE * (1.5 - number), units="points")
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
            axes.plot(_compute_ratios(run, field), transform=nudged, **style)
        axes.set_yscale("log", base=2)
        axes.set_ylim(2 ** (-0.2 * top), 2 ** (1.2 * top))
        sizes = [2**power for power in range(math.floor(top) + 1)]
        axes.set_yticks(sizes, [f"×{size}" for size in sizes])
        axes.minorticks_off()
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        _label_stages(axes, run, is_narrow=columns > 1)
        if has_titles:
            title = shorten_name(run.name, 84 // columns)
            axes.set_title(title, loc="center", color=darken(run.colour), parse_math=False, fontsize=8.5)
    for axes in grid[::columns]:
        axes.set_ylabel("relative size")
    for axes in grid[max(len(runs) - columns, 0) : len(runs)]:
        axes.set_xlabel("stage")
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    panel.align_xlabels()
    panel.suptitle("(b) Dimensions relative to the initial structure", x=0.01, ha="left")
    draw_legend(panel, [(name, line) for (name, *_), line in zip(_DIMENSIONS, grid[0].lines, strict=True)])


def _label_stages(axes: Axes, run: DrawnRun, *, is_narrow: bool) -> None:
    """Name the stages below the axis, or number them if the names do not fit."""
    labels = [get_stage_label(record).replace("-", "\n") for record in run.records]
    if len(labels) > (5 if is_narrow else 8):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    else:
        axes.set_xticks(range(len(labels)), labels, fontsize=LABEL_SIZE)
    axes.set_xlim(-0.3, len(labels) - 0.7)


def _compute_ratios(run: DrawnRun, field: str) -> list[float]:
    sizes = [getattr(record.dims, field) for record in run.records]
    return [size / sizes[0] for size in sizes]
