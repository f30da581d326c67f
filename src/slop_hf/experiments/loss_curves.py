"""A comparison as figures: loss in the course of training, as in Fig. 2 of the SLOP paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from ..report.drawing import (
    DESCENT,
    RUN_COLOURS,
    STYLE,
    WIDTH,
    dark,
    grid,
    legend_below,
    new_figure,
    power_of_ten,
    shorten,
    write_png,
)
from .comparison import Comparison, RunResult
from .results import Spread, compute_cost_to_loss, find_full_budget

#: What training is measured by.
Against = Literal["flops", "seconds"]

_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))  # when the colours have been used up
_ENDS: dict[str, Any] = {
    "linestyle": (0, (1, 2)),
    "linewidth": 1.2,
    "marker": "s",
    "markersize": 5.5,
    "markerfacecolor": "white",
    "markeredgewidth": 1.4,
}
_GROWTH: dict[str, Any] = {
    "linestyle": "none",
    "marker": "^",
    "markersize": 6.5,
    "markeredgecolor": "white",
    "markeredgewidth": 0.7,
}
_REACHED: dict[str, Any] = {
    "linestyle": "none",
    "marker": "o",
    "markersize": 6,
    "markerfacecolor": "white",
    "markeredgewidth": 1.6,
}
GOAL: dict[str, Any] = {"color": "0.35", "linewidth": 1.0, "linestyle": (0, (6, 3))}


class _Point(NamedTuple):
    """Seeds at one moment of their runs."""

    x: float
    loss: Spread
    settled: bool  # past the descent that every stage begins with


@dataclass(frozen=True)
class _Arm:
    """An arm as it is drawn."""

    name: str
    style: dict[str, Any]
    runs: list[RunResult]  # at its full budget
    curve: list[_Point]
    ends: list[_Point]  # of its runs at each budget, where there are several


def draw_arm_curves(comparison: Comparison, path: str | Path, *, against: Against = "flops") -> Path | None:
    """Draw held-out loss in the course of training, all arms on the same axes, as in Fig. 2 of the SLOP paper.

    A line is the mean of an arm's seeds at its full budget, its band reaches from the lowest to the highest. Triangles
    are growths, squares the ends of runs of an arm at several budgets, each with its whole learning-rate schedule. The
    dashed line is the reference's final loss at budget 1; rings are where arms get to it, as in `results.iso_loss`
    the mean over seeds, of arms that get there with every seed. The first descent, and the jump at a growth where it
    is larger than the rest, leave through the top.

    Args:
        comparison: with finished runs.
        path: the PNG file to write, aside and renamed.
        against: training FLOPs, or seconds of training.

    Returns:
        the path; None where no run has held-out losses.
    """
    arms = [arm for arm in _arms(comparison, against) if arm.curve]
    if not arms:
        return None
    most = max(point.x for arm in arms for point in (*arm.curve, *arm.ends))
    scale, label = _axis(most, against)
    with rc_context(STYLE):
        figure = new_figure(WIDTH, 5.2)
        axes = figure.add_subplot()
        for number, arm in enumerate(arms):
            _draw_arm(axes, arm, scale, against, 2 + number / 100)
        _cut(axes, arms, most / scale)
        extra = _draw_goal(axes, comparison, arms, scale, against)
        axes.set_xlabel(label)
        axes.set_ylabel("held-out loss (nats/token)")
        grid(axes, "y")
        axes.set_title(f"Held-out loss against training {'compute' if against == 'flops' else 'time'}", loc="left")
        legend_below(figure, [*_arm_entries(arms), *_kind_entries(arms), *extra], letters=96)
        return write_png(figure, path, source=comparison.fingerprint)


def _arms(comparison: Comparison, against: Against) -> list[_Arm]:
    """The arms that have finished runs, each with a look of its own."""
    found = []
    for number, name in enumerate(comparison.arms):
        budgets = comparison.budgets(name)
        if not budgets:
            continue
        style = {
            "color": RUN_COLOURS[number % len(RUN_COLOURS)],
            "linestyle": _DASHES[number // len(RUN_COLOURS) % len(_DASHES)],
            "linewidth": 2.2 if name == comparison.reference else 1.6,
        }
        runs = comparison.of(name, find_full_budget(comparison, name))
        ends = [_end(comparison.of(name, budget), against) for budget in budgets] if len(budgets) > 1 else []
        found.append(_Arm(name, style, runs, _curve(runs, against), ends))
    return found


def _curve(runs: Sequence[RunResult], against: Against) -> list[_Point]:
    """The moments that all seeds have, by stage and FLOPs; at a growth there are two, before and after."""
    tracks = [_track(run, against) for run in runs]
    shared = [moment for moment in tracks[0] if all(moment in track for track in tracks)]
    return [
        _Point(
            fmean(track[moment][0] for track in tracks),
            Spread(tuple(track[moment][1] for track in tracks)),
            _is_settled(runs[0], *moment),
        )
        for moment in shared
    ]


def _track(run: RunResult, against: Against) -> dict[tuple[int, float], tuple[float, float]]:
    """Where each held-out loss of a run is drawn, and what it is, by its stage and FLOPs."""
    curve = run.curve
    places = zip(getattr(curve, against), curve.losses, strict=True)
    return dict(zip(zip(curve.stages, curve.flops, strict=True), places, strict=True))


def _is_settled(run: RunResult, stage: int, flops: float) -> bool:
    """Whether a run is past its first descent, and a stage past the one that follows a growth."""
    begun = sum(one.flops for one in run.stages[:stage])
    return flops >= begun + DESCENT * (run.stages[stage].flops if stage else run.flops)


def _end(runs: Sequence[RunResult], against: Against) -> _Point:
    return _Point(fmean(getattr(run, against) for run in runs), Spread(tuple(run.eval_loss for run in runs)), True)


def _growths(arm: _Arm, against: Against) -> list[tuple[float, float]]:
    """Where an arm's growths lie: what it had trained by then, and the loss before each."""
    found = []
    for number in range(1, len(arm.runs[0].stages)):
        before = [run.stages[:number] for run in arm.runs]
        x = fmean(sum(getattr(stage, against) for stage in stages) for stages in before)
        found.append((x, fmean(stages[-1].eval_loss for stages in before)))
    return found


def _takes(comparison: Comparison, arm: str, against: Against) -> float | None:
    """What an arm takes to the reference's final loss, as `results.iso_loss` has it, the mean over seeds."""
    goals = {run.seed: run.eval_loss for run in comparison.of(comparison.reference or "")}
    by_seed: dict[int, list[RunResult]] = {}
    for run in comparison.runs:
        if run.arm == arm and run.seed in goals:
            by_seed.setdefault(run.seed, []).append(run)
    costs = [compute_cost_to_loss(runs, goals[seed], against) for seed, runs in by_seed.items()]
    return fmean(costs) if costs and max(costs) < math.inf else None


def _draw_arm(axes: Axes, arm: _Arm, scale: float, against: Against, zorder: float) -> None:
    colour = arm.style["color"]
    xs = [point.x / scale for point in arm.curve]
    axes.plot(xs, [point.loss.mean for point in arm.curve], zorder=zorder, **arm.style)
    if len(arm.runs) > 1:
        lows, highs = [point.loss.low for point in arm.curve], [point.loss.high for point in arm.curve]
        axes.fill_between(xs, lows, highs, color=colour, alpha=0.18, linewidth=0, zorder=1)
    growths = [(x / scale, loss) for x, loss in _growths(arm, against)]
    if growths:
        axes.plot(*zip(*growths, strict=True), color=colour, zorder=4, **_GROWTH)
    if arm.ends:
        xs, spreads = [end.x / scale for end in arm.ends], [end.loss for end in arm.ends]
        axes.vlines(xs, [one.low for one in spreads], [one.high for one in spreads], color=colour, zorder=5)
        axes.plot(xs, [one.mean for one in spreads], color=colour, zorder=5, **_ENDS)


def _draw_goal(
    axes: Axes, comparison: Comparison, arms: Sequence[_Arm], scale: float, against: Against
) -> list[tuple[str, Line2D]]:
    """The reference's final loss, where arms get to it, and what the legend says of both."""
    reference = next((arm for arm in arms if arm.name == comparison.reference), None)
    if reference is None or not comparison.of(reference.name):
        return []
    end = _end(comparison.of(reference.name), against)
    axes.axhline(end.loss.mean, zorder=1.5, **GOAL)
    takes = [(_takes(comparison, arm.name, against), arm) for arm in arms if arm is not reference]
    there = [(x, arm) for x, arm in takes if x is not None]
    for x, arm in there:
        axes.plot([x / scale], [end.loss.mean], color=arm.style["color"], zorder=6, **_REACHED)
    entries = [(f"final loss of {shorten(reference.name, 28)}", Line2D([], [], **GOAL))]
    if there:
        entries.append(("reached by an arm", Line2D([], [], color="0.35", **_REACHED)))
        x, first = min(there, key=lambda pair: pair[0])
        _tell_saving(axes, first, x, end, scale, against)
    return entries


def _tell_saving(axes: Axes, arm: _Arm, x: float, end: _Point, scale: float, against: Against) -> None:
    """What the first arm to get to the reference's loss saves; the space before it and below the line is empty."""
    saved = 1 - x / end.x
    if saved > 0:
        text = f"{saved:.0%} less {'compute' if against == 'flops' else 'time'}"
        style: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 8, "fontweight": "bold", "zorder": 7}
        style |= {"color": dark(arm.style["color"]), "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
        axes.annotate(text, (x / scale, end.loss.mean), (-6, -5), textcoords="offset points", **style)


def _cut(axes: Axes, arms: Sequence[_Arm], most: float) -> None:
    """The axis of losses fits what is settled."""
    settled = [point for arm in arms for point in arm.curve if point.settled] or [p for arm in arms for p in arm.curve]
    spreads = [point.loss for point in (*settled, *(end for arm in arms for end in arm.ends))]
    low, high = min(spread.low for spread in spreads), max(spread.high for spread in spreads)
    margin = 0.08 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + 0.5 * margin)
    axes.set_xlim(-0.01 * most, 1.02 * most)


def _axis(most: float, against: Against) -> tuple[float, str]:
    """What an axis of FLOPs or seconds is counted in, and its label."""
    if against == "flops":
        scale, unit = power_of_ten(most)
        return scale, f"training FLOPs{unit}"
    units = ((7200, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))
    return next((float(scale), f"training time ({unit})") for least, scale, unit in units if most >= least)


def _arm_entries(arms: Sequence[_Arm]) -> list[tuple[str, Line2D]]:
    """The arms in the legend, with the order of their growth where that tells two of them apart."""
    sequences = [arm.runs[0].schedule.sequence for arm in arms]
    grown = [sequence for sequence in sequences if sequence]
    alike = len(grown) > 1 and len({*grown}) == 1
    entries = []
    for arm, sequence in zip(arms, sequences, strict=True):
        name = shorten(arm.name, 32)
        label = f"{name} ({sequence})" if sequence and sequence != arm.name and not alike else name
        entries.append((label, Line2D([], [], **{**arm.style, "linewidth": 2.4})))
    return entries


def _kind_entries(arms: Sequence[_Arm]) -> list[tuple[str, Line2D]]:
    """What the marks mean, of those that are drawn."""
    entries = []
    if any(arm.runs[0].schedule.stages for arm in arms):
        entries.append(("growth", Line2D([], [], color="0.35", **_GROWTH)))
    if any(arm.ends for arm in arms):
        entries.append(("ends at several budgets", Line2D([], [], color="0.35", **_ENDS)))
    return entries
