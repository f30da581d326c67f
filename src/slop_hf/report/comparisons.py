"""Figures that compare runs: benchmark scores, training times, numbers of attention heads.

Each function draws nothing and returns None if the runs lack the data for its figure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import RunError
from ..io.units import NOTHING
from ..runs.directory import RunDirectory
from .drawing import (
    RUN_COLOURS,
    STYLE,
    WIDTH,
    DrawnRun,
    create_figure,
    draw_grid,
    draw_run_legend,
    read_runs,
    shorten_name,
    write_png,
)
from .scores import ScoreKey, find_shared_keys, label_scores, select_headline_scores

#: Operators that change only attention heads.
HEAD_OPERATORS = frozenset(("mha", "head_dim"))

_DASHES = ("-", "--", ":")  # a further one when all colours are used
MIN_TASKS = 3  # two axes of a radar enclose no area
MIN_SCHEDULES = 3  # two have a single correlation, which needs no figure
MIN_STAGES = 3  # two stage times always lie on a line, with correlation 1


def draw_radar(runs: Sequence[RunDirectory], path: str | Path) -> Path | None:
    """Draw the targets' scores on downstream tasks, one axis per task, as in Fig. 4 of the SLOP paper.

    Every axis runs from 0 at the centre to the best score of these runs at the rim, printed next to the task. Finished
    runs whose last stage was evaluated are drawn. A task needs scores of all of them with the same number of few-shot
    examples, limit and metric; `mmlu_anatomy` counts as a part of `mmlu` if that is present. The paper says neither
    how its axes are scaled nor which metrics they show.

    Args:
        runs: runs with at least one finished stage.
        path: the PNG file to write.

    Returns:
        the path; None if there are fewer than two such runs or three shared tasks.

    Raises:
        RunError: if no run is given, a directory occurs twice or is not a run, or evaluations are malformed.
    """
    scored = _score_finished(read_runs(runs), runs)
    shared_tasks = find_shared_keys([scores for _, scores in scored])
    best = {task: top for task in shared_tasks if (top := max(scores[task] for _, scores in scored)) > 0}
    if len(scored) < 2 or len(best) < MIN_TASKS:
        return None
    angles = [2 * math.pi * number / len(best) for number in range(len(best))]
    with rc_context(STYLE):
        figure = create_figure(5.8, 5.2)
        axes = figure.add_subplot(projection="polar")
        for number, (run, scores) in enumerate(scored):
            lengths = [max(scores[task], 0) / top for task, top in best.items()]
            closed = [*angles, angles[0]], [*lengths, lengths[0]]
            axes.plot(*closed, "o-", color=run.colour, linewidth=1.6, markersize=4, zorder=3 - number / 100)
        names = label_scores(list(best))
        labels = [f"{name}\n{task.metric} {top:.3g}" for name, (task, top) in zip(names, best.items(), strict=True)]
        _format_radar(axes, angles, labels)
        figure.suptitle("Downstream tasks", x=0.01, ha="left")
        draw_run_legend(figure, [run for run, _ in scored], letters=48)
        return write_png(figure, path)


def draw_time_correlation(runs: Sequence[RunDirectory], path: str | Path) -> Path | None:
    """Draw the correlations of the schedules' training times, as a heatmap like Fig. 3 of the SLOP paper.

    A cell is `compute_time_correlation` of two finished runs. The paper correlates "the training times of various
    schedules" without naming the coefficient or the times. Pearson's correlation of the device hours per stage, the
    initial one first, reproduces the two phases that the paper sees in its Table 1. If all schedules have Π Δparams,
    they are sorted by it, since the paper claims that similar products have similar times.

    Args:
        runs: runs with at least one finished stage. Finished runs of the most frequent number of stages are drawn.
        path: the PNG file to write.

    Returns:
        the path; None if there are fewer than three runs with three stages or more.

    Raises:
        RunError: if no run is given, or a directory occurs twice or is not a run.
    """
    by_length: dict[int, list[tuple[DrawnRun, float | None]]] = defaultdict(list)
    for drawn_run, run in zip(read_runs(runs), runs, strict=True):
        if run.is_finished and len(drawn_run.records) >= MIN_STAGES:
            by_length[len(drawn_run.records)].append((drawn_run, run.schedule.scores.get("delta_params")))
    schedules = max(by_length.values(), key=len, default=[])
    if len(schedules) < MIN_SCHEDULES:
        return None
    if all(product is not None for _, product in schedules):
        schedules.sort(key=lambda schedule: schedule[1] or 0.0)
    hours = [[record.device_hours for record in run.records] for run, _ in schedules]
    with rc_context(STYLE):
        figure = _draw_heatmap([shorten_name(run.name, 24) for run, _ in schedules], compute_time_correlation(hours))
        return write_png(figure, path)


def compute_time_correlation(hours: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return Pearson's correlation between the stage times of schedules; NaN if all times of a schedule are equal.

    Args:
        hours: device hours, shape [schedules, stages].

    Returns:
        shape [schedules, schedules].

    Raises:
        RunError: if schedules differ in their number of stages, or have fewer than three.

    Source: Fig. 3 of the SLOP paper, see `draw_time_correlation`.

    >>> [[round(r, 2) for r in row] for row in compute_time_correlation([[1, 2, 4], [10, 20, 40], [3, 2, 1]])]
    [[1.0, 1.0, -0.98], [1.0, 1.0, -0.98], [-0.98, -0.98, 1.0]]
    """
    lengths = {len(times) for times in hours}
    if len(lengths) != 1 or min(lengths) < MIN_STAGES:
        raise RunError(
            f"cannot correlate schedules of {sorted(lengths)} stages: "
            f"give schedules of equal length, with at least {MIN_STAGES} stages"
        )
    times = np.array(hours, dtype=float)
    centred = times - times.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    # Equal times leave rounding errors, which would correlate with anything.
    scale = np.where(norms > 1e-9 * np.linalg.norm(times, axis=1), norms, np.nan)
    return [[float(r) for r in row] for row in np.clip(centred @ centred.T / np.outer(scale, scale), -1, 1)]


def draw_heads(runs: Sequence[RunDirectory], path: str | Path) -> Path | None:
    """Draw perplexity, and downstream scores if available, against the number of attention heads.

    A line connects finished runs with the same initial structure, the same order of growth of the other dimensions,
    and targets that differ only in heads (their number, key/value heads, head size): Table 9 (perplexity) and Fig. 6
    (downstream tasks) of the SLOP paper.

    Args:
        runs: runs with at least one finished stage.
        path: the PNG file to write.

    Returns:
        the path; None if no two runs differ only in heads.

    Raises:
        RunError: if no run is given, a directory occurs twice or is not a run, or evaluations are malformed.
    """
    drawn_runs = read_runs(runs)
    groups = _group_by_heads(drawn_runs, runs)
    if not groups:
        return None
    scores = {run.name: run_scores for run, run_scores in _score_finished(drawn_runs, runs)}
    largest = max(([run for run in group if run.name in scores] for group in groups), key=len)
    tasks = find_shared_keys([scores[run.name] for run in largest]) if len(largest) > 1 else []
    targets = [group[0].records[-1].dims for group in groups]
    labels = [f"{dims.hidden_size}, {dims.intermediate_size}, {dims.num_hidden_layers}" for dims in targets]
    perplexities = [[run.records[-1].perplexity or math.nan for run in group] for group in groups]
    with rc_context(STYLE):
        figure = create_figure(WIDTH if tasks else 6.4, 4.0)
        left, *right = figure.subplots(1, 2 if tasks else 1, squeeze=False).ravel()
        _draw_lines(left, labels, groups, perplexities)
        left.set(title="Perplexity of the target", ylabel="perplexity")
        if len(groups) > 1:
            left.legend(title="hidden, ffn, layers", handlelength=1.4, fontsize=8)
        for axes in right:
            names = zip(label_scores(tasks), tasks, strict=True)
            labels = [f"{shorten_name(name, 28)}, {task.metric}" for name, task in names]
            _draw_lines(
                axes, labels, [largest] * len(tasks), [[scores[run.name][task] for run in largest] for task in tasks]
            )
            axes.set(title="Downstream tasks", ylabel="score")
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8, borderaxespad=0)
        return write_png(figure, path)


def _score_finished(
    drawn_runs: Sequence[DrawnRun], runs: Sequence[RunDirectory]
) -> list[tuple[DrawnRun, dict[ScoreKey, float]]]:
    """Return the finished runs whose targets were evaluated, and these scores, headline metrics first."""
    finished = [pair for pair in zip(drawn_runs, runs, strict=True) if pair[1].is_finished]
    scored = [(drawn, select_headline_scores(run.evaluations(len(drawn.records) - 1))) for drawn, run in finished]
    return [(drawn, scores) for drawn, scores in scored if scores]


def _format_radar(axes: Axes, angles: Sequence[float], labels: Sequence[str]) -> None:
    """Turn polar axes into a radar: the first task at the top, the others clockwise, labels outside."""
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1.04)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.set_xticks(angles, labels, fontsize=8, parse_math=False)
    for angle, text in zip(angles, axes.get_xticklabels(), strict=True):
        side = math.sin(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.2 else "left" if side > 0 else "right")
    axes.grid(color="0.88", linewidth=0.8)
    axes.spines["polar"].set_visible(False)


def _draw_heatmap(names: Sequence[str], values: Sequence[Sequence[float]]) -> Figure:
    """Draw correlations as coloured cells with their values; undefined ones are grey."""
    side = 2.0 + 0.5 * max(len(names), 4)
    figure = create_figure(side + 1.2, side)
    axes = figure.add_subplot()
    finite = [value for row in values for value in row if math.isfinite(value)]
    # Training times mostly correlate well: the colours cover only the range of the values.
    low = math.floor(10 * min([0.9, *finite])) / 10
    axes.set_facecolor("0.9")
    image = axes.imshow(values, cmap="Blues", vmin=low, vmax=1)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            text = f"{value:.2f}" if math.isfinite(value) else NOTHING
            on_dark = math.isfinite(value) and value > low + 0.6 * (1 - low)
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if on_dark else "black")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, shrink=0.8, label="Pearson's r").outline.set_visible(False)
    axes.set_title("Correlation of training times")
    return figure


def _group_by_heads(drawn_runs: Sequence[DrawnRun], runs: Sequence[RunDirectory]) -> list[list[DrawnRun]]:
    """Return groups of finished runs that differ only in heads, sorted by heads; each has two numbers of heads."""
    groups: dict[tuple[object, ...], list[DrawnRun]] = defaultdict(list)
    for drawn_run, run in zip(drawn_runs, runs, strict=True):
        perplexity, target = drawn_run.records[-1].perplexity, run.schedule.target
        if run.is_finished and perplexity is not None and math.isfinite(perplexity):
            sizes = (target.hidden_size, target.intermediate_size, target.num_hidden_layers)
            other_operators = (frozenset(stage.operators) - HEAD_OPERATORS for stage in run.schedule.stages)
            # A run that keeps its heads has no stage for them.
            order = tuple(operators for operators in other_operators if operators)
            groups[run.schedule.initial, sizes, order].append(drawn_run)
    sorted_groups = [sorted(group, key=_count_heads) for group in groups.values()]
    return [group for group in sorted_groups if len({_count_heads(run) for run in group}) > 1]


def _count_heads(run: DrawnRun) -> int:
    return run.records[-1].dims.num_attention_heads


def _draw_lines(
    axes: Axes, labels: Sequence[str], groups: Sequence[Sequence[DrawnRun]], values: Sequence[Sequence[float]]
) -> None:
    """Draw values of runs against their attention heads, one line per group; shape of the values: [groups, runs]."""
    for number, (label, group, heights) in enumerate(zip(labels, groups, values, strict=True)):
        turn, position = divmod(number, len(RUN_COLOURS))
        style = {"color": RUN_COLOURS[position], "linestyle": _DASHES[turn % len(_DASHES)], "linewidth": 1.4}
        axes.plot([_count_heads(run) for run in group], heights, marker="o", markersize=5, label=label, **style)
    heads = sorted({_count_heads(run) for group in groups for run in group})
    draw_grid(axes, "y")
    axes.set_xscale("log", base=2)
    axes.set_xticks(heads, map(str, heads))
    axes.minorticks_off()
    axes.set_xlabel("attention heads")
