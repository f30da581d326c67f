"""Figures of held-out loss during training, all arms of a comparison on the same axes, as in Fig. 2 of the paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ..report.drawing import (
    DESCENT_SHARE,
    RUN_COLOURS,
    STYLE,
    WIDTH,
    LegendEntry,
    Style,
    create_figure,
    darken,
    draw_legend,
    label_flops_axis,
    label_runs,
    shorten_name,
    write_png,
)
from ..report.figures import GROWTH_MARK, LossCurve, draw_loss_curves
from .comparison import Comparison, RunResult
from .results import Spread, compute_costs_to_goal, is_saving_bound, select_main_runs

#: Measure of training on the horizontal axis.
Against = Literal["flops", "seconds"]

#: Lines of the arms in turn, so that they differ without colours too.
_DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)))
_ENDS: Style = {
    "linestyle": (0, (1, 2)),
    "linewidth": 1.2,
    "marker": "s",
    "markersize": 5.5,
    "markerfacecolor": "white",
    "markeredgewidth": 1.4,
}
_REACHED: Style = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgewidth": 1.6,
}
#: The line of the loss that arms are compared with.
GOAL_LINE: Style = {"color": "0.35", "linewidth": 1.0, "linestyle": (0, (6, 3))}
#: Units of the time axis: shortest training in seconds, seconds per unit, name.
_TIME_UNITS = ((7200.0, 3600.0, "hours"), (300.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


class _Point(NamedTuple):
    """The seeds of an arm at one point of their runs; `is_settled` is False in the steep descent of a new model."""

    x: float
    loss: Spread
    is_settled: bool = True


@dataclass(frozen=True)
class _Arm:
    """An arm to draw.

    Args:
        style: keyword arguments of its line.
        runs: its runs at the main budget.
        curve: held-out losses during these runs.
        ends: ends of its runs at each budget, if there are several.
        growths: training so far and loss before each growth.
        goal: training to the reference's final loss; None for the reference, if a seed does not reach the loss, and if
            only an upper bound is known.
    """

    name: str
    style: Style
    runs: list[RunResult]
    curve: list[_Point]
    ends: list[_Point]
    growths: list[tuple[float, float]]
    goal: float | None


def draw_arm_curves(comparison: Comparison, path: str | Path, *, against: Against = "flops") -> Path | None:
    """Draw held-out loss during training, as in Fig. 2 of the SLOP paper.

    A line is the mean over the seeds of an arm at its main budget, and its band reaches from the lowest seed to the
    highest. Triangles are growths. Squares are the ends of an arm's runs at several budgets, each with a complete
    learning-rate schedule. The dashed line is the reference's final loss at budget 1; a ring marks the mean over
    seeds of the training with which the ends of an arm's runs reach it (`compute_cost_to_loss`), if all its seeds do
    and the least is known. The first descent, and a jump at a growth that exceeds the other losses, leave through the
    top.

    Returns:
        The path of the PNG file; None if no run has held-out losses.
    """
    arms = [arm for arm in _build_arms(comparison, against) if arm.curve]
    if not arms:
        return None
    most = max(point.x for arm in arms for point in (*arm.curve, *arm.ends))
    scale, unit = next((size, name) for least, size, name in _TIME_UNITS if most >= least)
    scale = 1.0 if against == "flops" else scale
    with rc_context(STYLE):
        figure = create_figure(WIDTH, 5.2)
        axes = figure.add_subplot()
        draw_loss_curves(axes, [_build_curve(arm, scale) for arm in arms], most=most / scale)
        for arm in arms:
            _draw_ends(axes, arm, scale)
        goal_entries = _draw_goal(axes, comparison, arms, scale, against)
        if against == "flops":
            label_flops_axis(axes, most)
        else:
            axes.set_xlabel(f"training time ({unit})")
        axes.set_ylabel("held-out loss (nats/token)")
        axes.set_title(f"Held-out loss against training {'compute' if against == 'flops' else 'time'}", loc="left")
        draw_legend(figure, [*_list_entries(arms), *goal_entries], letters=96, handlelength=3.4)
        return write_png(figure, path, source=comparison.fingerprint)


def _build_arms(comparison: Comparison, against: Against) -> list[_Arm]:
    """Return the arms with finished runs, each with a distinct style."""
    arms = []
    for number, name in enumerate(comparison.arms):
        if not (budgets := comparison.budgets(name)):
            continue
        style = {
            "color": RUN_COLOURS[number % len(RUN_COLOURS)],
            "linestyle": _DASHES[number % len(_DASHES)],
            "linewidth": 2.2 if name == comparison.reference else 1.6,
        }
        runs = select_main_runs(comparison, name)
        settled = [comparison.runs_of(name, budget) for budget in budgets]
        ends = [_average_ends(runs, against) for runs in settled if all(run.is_finished for run in runs)]
        curve, growths = _average_curves(runs, against), _average_growths(runs, against)
        costs = [] if name == comparison.reference else [*compute_costs_to_goal(comparison, name, against).values()]
        is_reached = costs and max(costs) < math.inf and not is_saving_bound(comparison, name)
        goal = fmean(costs) if is_reached else None
        ends.sort(key=lambda end: end.x)  # a longer budget can have taken less time, on another machine
        arms.append(_Arm(name, style, runs, curve, ends if len(ends) > 1 else [], growths, goal))
    return arms


def _average_curves(runs: Sequence[RunResult], against: Against) -> list[_Point]:
    """Return the points that all seeds have, by stage and FLOPs; at a growth there are two, before and after it."""
    tracks = []
    for run in runs:
        curve = run.curve
        entries = zip(getattr(curve, against), curve.losses, strict=True)
        tracks.append(dict(zip(zip(curve.stages, curve.flops, strict=True), entries, strict=True)))
    return [
        _Point(
            fmean(track[key][0] for track in tracks),
            Spread(tuple(track[key][1] for track in tracks)),
            _is_settled(runs[0], *key),
        )
        for key in tracks[0]
        if all(key in track for track in tracks)
    ]


def _is_settled(run: RunResult, stage: int, flops: float) -> bool:
    """Whether a run is past its first descent, or a later stage past the descent after its growth."""
    begin = sum(earlier.flops for earlier in run.stages[:stage])
    return flops >= begin + DESCENT_SHARE * (run.stages[stage].flops if stage else run.flops)


def _average_ends(runs: Sequence[RunResult], against: Against) -> _Point:
    return _Point(fmean(getattr(run, against) for run in runs), Spread(tuple(run.eval_loss for run in runs)))


def _average_growths(runs: Sequence[RunResult], against: Against) -> list[tuple[float, float]]:
    growths = []
    for number in range(1, len(runs[0].stages)):
        before = [run.stages[:number] for run in runs]
        x = fmean(sum(getattr(stage, against) for stage in stages) for stages in before)
        growths.append((x, fmean(stages[-1].eval_loss for stages in before)))
    return growths


def _build_curve(arm: _Arm, scale: float) -> LossCurve:
    losses = [point.loss for point in arm.curve]
    settled = [point.loss for point in arm.curve if point.is_settled] or losses
    band = [loss.low for loss in losses], [loss.high for loss in losses]
    return LossCurve(
        x=[point.x / scale for point in arm.curve],
        losses=[loss.mean for loss in losses],
        style=arm.style,
        settled=[value for loss in (*settled, *(end.loss for end in arm.ends)) for value in (loss.low, loss.high)],
        band=band if len(arm.runs) > 1 else None,
        growths=[(x / scale, loss) for x, loss in arm.growths],
    )


def _draw_ends(axes: Axes, arm: _Arm, scale: float) -> None:
    """Draw the ends of an arm's runs at several budgets, each with its range over seeds."""
    xs, losses, colour = [end.x / scale for end in arm.ends], [end.loss for end in arm.ends], arm.style["color"]
    if arm.ends:
        axes.vlines(xs, [loss.low for loss in losses], [loss.high for loss in losses], color=colour, zorder=5)
        axes.plot(xs, [loss.mean for loss in losses], color=colour, zorder=5, **_ENDS)


def _draw_goal(
    axes: Axes, comparison: Comparison, arms: Sequence[_Arm], scale: float, against: Against
) -> list[LegendEntry]:
    """Draw the reference's final loss and where arms reach it; return the legend's entries for both."""
    runs = comparison.runs_of(comparison.reference or "")
    if not runs:
        return []
    end = _average_ends(runs, against)
    axes.axhline(end.loss.mean, zorder=1.5, **GOAL_LINE)
    entries: list[LegendEntry] = [(f"final loss of {shorten_name(runs[0].arm, 28)}", Line2D([], [], **GOAL_LINE))]
    reaching = [(arm.goal, arm) for arm in arms if arm.goal is not None]
    if not reaching:
        return entries
    for x, arm in reaching:
        axes.plot([x / scale], [end.loss.mean], color=arm.style["color"], zorder=6, **_REACHED)
    x, first = min(reaching, key=lambda pair: pair[0])
    if (saved := 1 - x / end.x) > 0:
        seeds = ", one seed" if len(runs) == 1 else ""
        axes.annotate(  # the space below the line and left of the ring is empty
            f"{saved:.0%} less {'compute' if against == 'flops' else 'time'}{seeds}",
            (x / scale, end.loss.mean),
            (-6, -5),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            fontweight="bold",
            color=darken(str(first.style["color"])),
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=7,
        )
    return [*entries, ("reached by an arm", Line2D([], [], color="0.35", **_REACHED))]


def _list_entries(arms: Sequence[_Arm]) -> list[LegendEntry]:
    """Return the legend's entries for the arms and for the kinds of marks drawn."""
    names = label_runs([shorten_name(arm.name, 32) for arm in arms], [arm.runs[0].schedule.sequence for arm in arms])
    lines = [Line2D([], [], **{**arm.style, "linewidth": 2.4}) for arm in arms]
    entries: list[LegendEntry] = list(zip(names, lines, strict=True))
    if any(arm.growths for arm in arms):
        entries.append(("growth", Line2D([], [], color="0.35", **GROWTH_MARK)))
    if any(arm.ends for arm in arms):
        entries.append(("ends at several budgets", Line2D([], [], color="0.35", **_ENDS)))
    return entries
