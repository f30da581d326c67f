"""Figures that compare runs: downstream scores, training times, numbers of attention heads.

Each is drawn only where the runs carry what it shows; otherwise nothing is written and None is returned.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..errors import RunError
from ..runs.directory import RunDirectory
from .drawing import RUN_COLOURS, STYLE, WIDTH, DrawnRun, new_figure, read_runs, run_legend, shorten, write_png
from .scores import ScoreKey, headline_scores, labels_of, shared_keys

#: Operators that change the heads and nothing else.
HEAD_OPERATORS = frozenset(("mha", "head_dim"))

_LINE: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 1.4}
_DASHES = ("-", "--", ":")  # when the colours have been used up
LEAST_TASKS = 3  # two axes of a radar enclose nothing
LEAST_SCHEDULES = 3  # two have one correlation, which needs no figure
LEAST_STAGES = 3  # through two stage times there is always a line, and the correlation is 1


@dataclass(frozen=True)
class _Scored:
    """A finished run with what its target scored, headline metrics first."""

    run: DrawnRun
    scores: dict[ScoreKey, float]


def radar_figure(runs: Sequence[RunDirectory], path: str | Path) -> Path | None:
    """Draw what the targets scored on downstream tasks, an axis a task, as in Fig. 4 of the SLOP paper.

    Every axis runs from 0 at the centre to the best of these runs at the rim, printed beside it. Finished runs with
    evaluations of their last stage are drawn; a task counts where all of them have it, with as many examples shown
    and the same limit, and by one metric (`scores.HEADLINE_METRICS`); `mmlu_anatomy` counts as a part of `mmlu`, where
    that is there. The paper says neither how its axes are scaled nor which metrics they show.

    Args:
        runs: runs with a finished stage each.
        path: the PNG file to write, aside and renamed.

    Returns:
        the path; None for fewer than two such runs or three shared tasks.

    Raises:
        RunError: for no runs, one given twice, a directory that is no run, or a file that holds no evaluations.
    """
    scored = [one for one in _scored(read_runs(runs), runs) if one.scores]
    tasks = [key for key in shared_keys([one.scores for one in scored]) if max(one.scores[key] for one in scored) > 0]
    if len(scored) < 2 or len(tasks) < LEAST_TASKS:
        return None
    best = [max(one.scores[key] for one in scored) for key in tasks]
    angles = [2 * math.pi * number / len(tasks) for number in range(len(tasks))]
    with rc_context(STYLE):
        figure = new_figure(5.8, 5.2)
        axes = figure.add_subplot(projection="polar")
        for number, one in enumerate(scored):
            lengths = [max(one.scores[key], 0) / top for key, top in zip(tasks, best, strict=True)]
            closed = [*angles, angles[0]], [*lengths, lengths[0]]
            axes.plot(*closed, color=one.run.colour, linewidth=1.6, marker="o", markersize=4, zorder=3 - number / 100)
        rims = [f"{key.metric} {top:.3g}" for key, top in zip(tasks, best, strict=True)]
        _radar_axes(axes, angles, [f"{name}\n{rim}" for name, rim in zip(labels_of(tasks), rims, strict=True)])
        figure.suptitle("Downstream tasks", x=0.01, ha="left", fontsize=10, fontweight="bold")
        run_legend(figure, [one.run for one in scored], letters=48)
        return write_png(figure, path)


def correlation_figure(runs: Sequence[RunDirectory], path: str | Path) -> Path | None:
    """Draw how the training times of schedules correlate, as a heatmap like Fig. 3 of the SLOP paper.

    A cell is `time_correlation` of two finished runs. The paper correlates "the training times of various schedules",
    and leaves unsaid by which coefficient and which times; the device hours of each stage, the initial one first,
    reproduce the two phases that it sees when taken from its Table 1. Schedules stand in the order of Π Δparams where
    all have one, since the paper's claim is that close products have close times.

    Args:
        runs: runs with a finished stage each; finished ones of the most frequent number of stages are drawn.
        path: the PNG file to write, aside and renamed.

    Returns:
        the path; None for fewer than three runs of three stages or more.

    Raises:
        RunError: for no runs, one given twice, or a directory that is no run.
    """
    found = read_runs(runs)
    by_length: dict[int, list[tuple[DrawnRun, float | None]]] = defaultdict(list)
    for drawn, run in zip(found, runs, strict=True):
        if run.is_finished and len(drawn.records) >= LEAST_STAGES:
            by_length[len(drawn.records)].append((drawn, run.schedule.scores.get("delta_params")))
    chosen = max(by_length.values(), key=len, default=[])
    if len(chosen) < LEAST_SCHEDULES:
        return None
    scores = {id(run): score for run, score in chosen if score is not None}
    schedules = [run for run, _ in chosen]
    if len(scores) == len(schedules):
        schedules.sort(key=lambda run: scores[id(run)])
    hours = [[record.device_hours for record in run.records] for run in schedules]
    with rc_context(STYLE):
        names = [shorten(run.name, 24) for run in schedules]
        return _draw_heatmap(names, time_correlation(hours), path)


def time_correlation(hours: Sequence[Sequence[float]]) -> list[list[float]]:
    """Pearson's correlation between the stage times of schedules; NaN where the times of one are all alike.

    Args:
        hours: device hours, shape [schedules, stages].

    Returns:
        shape [schedules, schedules].

    Raises:
        RunError: where the schedules have different numbers of stages, or fewer than three.

    Source: Fig. 3 of the SLOP paper, see `correlation_figure`.

    >>> [[round(r, 2) for r in row] for row in time_correlation([[1, 2, 4], [10, 20, 40], [3, 2, 1]])]
    [[1.0, 1.0, -0.98], [1.0, 1.0, -0.98], [-0.98, -0.98, 1.0]]
    """
    lengths = {len(times) for times in hours}
    if len(lengths) != 1 or min(lengths) < LEAST_STAGES:
        raise RunError(
            f"stage times of {sorted(lengths)} stages: give schedules of one length, of {LEAST_STAGES} stages at least"
        )
    times = np.array(hours, dtype=float)
    centred = times - times.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    # Equal times leave rounding errors, which would correlate with anything.
    scale = np.where(norms > 1e-9 * np.linalg.norm(times, axis=1), norms, np.nan)
    return [[float(r) for r in row] for row in np.clip(centred @ centred.T / np.outer(scale, scale), -1, 1)]


def heads_figure(runs: Sequence[RunDirectory], path: str | Path) -> Path | None:
    """Draw perplexity, and downstream scores where there are any, against the number of attention heads.

    A line joins finished runs that begin with one structure, end with structures that differ in heads alone (number,
    key/value heads, their size), and grow the other dimensions in one order: Table 9 (perplexity) and Fig. 6
    (downstream tasks) of the SLOP paper.

    Args:
        runs: runs with a finished stage each.
        path: the PNG file to write, aside and renamed.

    Returns:
        the path; None where no two runs differ so.

    Raises:
        RunError: for no runs, one given twice, a directory that is no run, or a file that holds no evaluations.
    """
    found = read_runs(runs)
    groups = _by_heads(found, runs)
    if not groups:
        return None
    scored = {id(one.run): one for one in _scored(found, runs) if one.scores}
    families = [[scored[id(run)] for run in group if id(run) in scored] for group in groups]
    family = max(families, key=len)
    tasks = shared_keys([one.scores for one in family]) if len(family) > 1 else []
    with rc_context(STYLE):
        figure = new_figure(WIDTH if tasks else 6.4, 4.0)
        left, *right = figure.subplots(1, 2 if tasks else 1, squeeze=False).ravel()
        _draw_perplexities(left, groups)
        for axes in right:
            _draw_scores(axes, family, tasks)
        return write_png(figure, path)


def _scored(found: Iterable[DrawnRun], runs: Iterable[RunDirectory]) -> list[_Scored]:
    """Finished runs with the headline scores of their targets."""
    return [
        _Scored(drawn, headline_scores(run.evaluations(len(drawn.records) - 1)))
        for drawn, run in zip(found, runs, strict=True)
        if run.is_finished
    ]


def _radar_axes(axes: Axes, angles: Sequence[float], labels: Sequence[str]) -> None:
    """Turn polar axes into a radar: the first task at the top, the others clockwise, labels outside."""
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.set_xticks(angles, labels, fontsize=8)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        text.set_parse_math(False)
        side = math.sin(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.2 else "left" if side > 0 else "right")
    axes.grid(color="0.88", linewidth=0.8)
    axes.spines["polar"].set_visible(False)


def _draw_heatmap(names: Sequence[str], values: Sequence[Sequence[float]], path: str | Path) -> Path:
    """Draw the correlations, each printed in its cell; what has none is grey."""
    side = 2.0 + 0.5 * max(len(names), 4)
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    finite = [value for row in values for value in row if math.isfinite(value)]
    # Training times mostly correlate: the colours are spent on the range that is there.
    low = math.floor(10 * min([0.9, *finite])) / 10
    axes.set_facecolor("0.9")
    image = axes.imshow(values, cmap="Blues", vmin=low, vmax=1)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = f"{value:.2f}" if math.isfinite(value) else "–"
            on_dark = math.isfinite(value) and value > low + 0.6 * (1 - low)
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if on_dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="Pearson's r").outline.set_visible(False)
    axes.set_title("Correlation of training times", loc="left")
    return write_png(figure, path)


def _by_heads(found: Sequence[DrawnRun], runs: Sequence[RunDirectory]) -> list[list[DrawnRun]]:
    """Finished runs that differ in heads alone, in the order of their heads; those with two numbers at least."""
    groups: dict[tuple[object, ...], list[DrawnRun]] = defaultdict(list)
    for drawn, run in zip(found, runs, strict=True):
        perplexity, target = drawn.records[-1].perplexity, run.schedule.target
        if run.is_finished and perplexity is not None and math.isfinite(perplexity):
            sizes = (target.hidden_size, target.intermediate_size, target.num_hidden_layers)
            grown = ({*stage.operators} - HEAD_OPERATORS for stage in run.schedule.stages)
            # A run whose heads stay as they are has no stage for them.
            order = tuple(frozenset(others) for others in grown if others)
            groups[run.schedule.initial, sizes, order].append(drawn)
    ordered = [sorted(group, key=_heads) for group in groups.values()]
    return [group for group in ordered if len({_heads(run) for run in group}) > 1]


def _heads(run: DrawnRun) -> int:
    return run.records[-1].dims.num_attention_heads


def _draw_perplexities(axes: Axes, groups: Sequence[Sequence[DrawnRun]]) -> None:
    for number, group in enumerate(groups):
        last = [run.records[-1] for run in group]
        dims, colour = last[0].dims, RUN_COLOURS[number % len(RUN_COLOURS)]
        axes.plot(
            [_heads(run) for run in group],
            [record.perplexity for record in last],
            color=colour,
            label=f"{dims.hidden_size}, {dims.intermediate_size}, {dims.num_hidden_layers}",
            **_LINE,
        )
    _head_axes(axes, "Perplexity of the target", "perplexity", (_heads(run) for group in groups for run in group))
    if len(groups) > 1:
        axes.legend(title="hidden, ffn, layers", handlelength=1.4, fontsize=8)


def _draw_scores(axes: Axes, family: Sequence[_Scored], tasks: Sequence[ScoreKey]) -> None:
    heads = [_heads(one.run) for one in family]
    for number, (key, name) in enumerate(zip(tasks, labels_of(tasks), strict=True)):
        axes.plot(
            heads,
            [one.scores[key] for one in family],
            color=RUN_COLOURS[number % len(RUN_COLOURS)],
            linestyle=_DASHES[number // len(RUN_COLOURS) % len(_DASHES)],
            label=f"{shorten(name, 28)}, {key.metric}",
            **_LINE,
        )
    _head_axes(axes, "Downstream tasks", "score", heads)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, borderaxespad=0)


def _head_axes(axes: Axes, title: str, label: str, heads: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(heads))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("attention heads")
    axes.set_ylabel(label)
    axes.set_title(title, loc="left")
