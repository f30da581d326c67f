"""The figure of savings: FLOPs saved against tokens per parameter, one line per arm with runs at several budgets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.markers import CARETUPBASE
from matplotlib.ticker import NullLocator, PercentFormatter

from ..report.drawing import (
    RUN_COLOURS,
    STYLE,
    WIDTH,
    LegendEntry,
    Style,
    create_figure,
    draw_grid,
    draw_legend,
    shorten_name,
    write_png,
)
from .comparison import Comparison
from .loss_curves import GOAL_LINE
from .results import Saving, compute_saving

_MARKERS = "osD^vP*X"
#: Least saving that is drawn; an arm that needs more FLOPs than this leaves through the bottom.
_LEAST = -1.0
#: Factor of the space left and right of the points.
_MARGIN = 1.12
_BOUND: Style = {"marker": CARETUPBASE, "markersize": 9, "linestyle": "none"}


@dataclass(frozen=True)
class _Line:
    """The savings of an arm, by tokens per parameter of the reference."""

    arm: str
    style: Style
    points: list[tuple[float, Saving]]


def draw_savings(comparison: Comparison, path: str | Path) -> Path | None:
    """Draw the FLOPs that arms save at their own final losses, against tokens per parameter of the reference.

    A line is the mean over the seeds of an arm, its bars reach from the lowest seed to the highest. Arms without
    growth are dashed. A caret on a point makes it a lower bound: the reference's longest run ends above that loss
    (`compute_saving`).

    Returns:
        The path of the PNG file; None unless some arm has savings at two budgets.
    """
    lines = _build_lines(comparison)
    if not any(len(line.points) > 1 for line in lines):
        return None
    with rc_context(STYLE):
        figure = create_figure(WIDTH, 4.8)
        axes = figure.add_subplot()
        axes.axhline(0, zorder=1.5, **GOAL_LINE)
        for line in lines:
            _draw_line(axes, line)
        _label_axes(axes, lines, comparison)
        draw_legend(figure, _list_entries(lines, comparison.reference or ""), letters=96)
        return write_png(figure, path, source=comparison.fingerprint)


def _build_lines(comparison: Comparison) -> list[_Line]:
    reference = comparison.runs_of(comparison.reference or "")
    grown = {run.arm for run in comparison.runs if run.schedule.stages}
    lines = []
    for number, arm in enumerate(comparison.arms):
        savings = [
            (comparison.runs_of(arm, budget)[0].tokens / reference[0].parameters, saving)
            for budget in comparison.budgets(arm)
            if reference and (saving := compute_saving(comparison, arm, budget)) is not None
        ]
        style = {
            "color": RUN_COLOURS[number % len(RUN_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": "-" if arm in grown else (0, (4, 1.5)),
            "linewidth": 1.8,
            "markersize": 5.5,
        }
        if savings:
            lines.append(_Line(arm, style, savings))
    return lines


def _draw_line(axes: Axes, line: _Line) -> None:
    xs, savings = zip(*line.points, strict=True)
    spreads = [saving.shares for saving in savings]
    axes.vlines(xs, [shares.low for shares in spreads], [shares.high for shares in spreads], color=line.style["color"])
    axes.plot(xs, [shares.mean for shares in spreads], zorder=3, **line.style)
    bounds = [(x, saving.shares.mean) for x, saving in line.points if saving.is_bound]
    if bounds:
        axes.plot(*zip(*bounds, strict=True), color=str(line.style["color"]), zorder=3, **_BOUND)


def _label_axes(axes: Axes, lines: list[_Line], comparison: Comparison) -> None:
    reference = comparison.reference or ""
    ladder = [comparison.runs_of(reference, budget)[0] for budget in comparison.budgets(reference)]
    ratios = [run.tokens_per_parameter for run in ladder]
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ratios, [f"{ratio:.2g}" for ratio in ratios])
    shown = [*ratios, *(x for line in lines for x, _ in line.points)]
    axes.set_xlim(min(shown) / _MARGIN, max(shown) * _MARGIN)
    shares = [share for line in lines for _, saving in line.points for share in saving.shares.values]
    axes.set_ylim(max(min(*shares, 0.0), _LEAST) - 0.05, max(*shares, 0.0) + 0.1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"tokens per parameter of {shorten_name(reference, 40)}", parse_math=False)
    axes.set_ylabel("FLOPs saved at the arm's own loss")
    axes.set_title("FLOPs saved against tokens per parameter", loc="left")
    draw_grid(axes, "y")


def _list_entries(lines: list[_Line], reference: str) -> list[LegendEntry]:
    entries: list[LegendEntry] = [(shorten_name(line.arm, 32), Line2D([], [], **line.style)) for line in lines]
    entries.append((f"as many FLOPs as {shorten_name(reference, 28)}", Line2D([], [], **GOAL_LINE)))
    if any(saving.is_bound for line in lines for _, saving in line.points):
        entries.append(("lower bound", Line2D([], [], color="0.35", **_BOUND)))
    return entries
