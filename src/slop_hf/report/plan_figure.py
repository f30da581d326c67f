"""The figure of a plan: parameters in training against compute, and the dimensions along the best path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError
from ..io.files import write_file
from ..io.units import format_count
from ..schedule import GrowthSchedule
from .drawing import (
    POINTS_PER_INCH,
    STYLE,
    LegendEntry,
    Style,
    create_figure,
    draw_legend,
    label_flops_axis,
    shorten_name,
)

SUFFIXES = (".png", ".svg", ".pdf")
SIZE = (12.0, 5.0)  # inches

#: The palette of Okabe and Ito without yellow and without its blues, which mark the best schedule.
ARM_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
ARM_DASHES = ((5, 1.5), (2, 1.2), (7, 1.5, 2, 1.5), (1, 1), (4, 3))
ARM_LANE = 1.7  # points between arms that train the same structure
BEST_WIDTH = 3.2  # points
OTHER_WIDTH = 1.1

#: Label and config field of each axis on the right; the last two are shown only if they add information.
AXES = (
    ("hidden", "hidden_size"),
    ("ffn", "intermediate_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("kv heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
)

LOG_RATIO = 4  # largest / smallest parameter count from which the axis is logarithmic
MAX_LABELS = 8  # schedules labelled at their ends
MAX_STRUCTURES = 6  # stages whose letters are drawn, and whose structures the legend spells out
MAX_LETTERS = 56  # of a name in a legend
LABEL_SIZE = 8  # points
LABEL_GAP = 0.06  # of the height of the axes, between labels at the ends of lines


@dataclass(frozen=True)
class _Path:
    """A schedule as a step line."""

    schedule: GrowthSchedule
    edges: tuple[float, ...]  # x of the beginning of each stage and of the end of the last one, shape [stages + 1]
    parameters: tuple[int, ...]  # shape [stages]

    def points(self, stage: int) -> tuple[list[float], list[float]]:
        """Return the x and y of one stage: a riser from the stage before it, and a plateau."""
        start, end, size = self.edges[stage], self.edges[stage + 1], float(self.parameters[stage])
        return [start, start, end], [float(self.parameters[max(stage - 1, 0)]), size, size]

    @property
    def line(self) -> tuple[list[float], list[float]]:
        """The x and y of all stages."""
        parts = [self.points(stage) for stage in range(len(self.parameters))]
        return [x for xs, _ in parts for x in xs], [y for _, ys in parts for y in ys]

    @property
    def end(self) -> tuple[float, float]:
        """The x and y at the end of the last stage."""
        return self.edges[-1], float(self.parameters[-1])


def draw_plan(
    schedules: Sequence[GrowthSchedule],
    arms: Sequence[tuple[str, GrowthSchedule]] = (),
    *,
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    path: str | Path | None = None,
    title: str = "",
) -> Figure:
    """Draw the best schedules of a plan next to each other and next to control arms.

    The left panel shows the parameters of the model in training against cumulative training FLOPs, or against the
    stage if a schedule or an arm has no tokens. The best schedule is thick, with the letters of what grows at each
    growth; the others fade with their rank. Arms are dashed, and drawn a few points off their true size, so that arms
    of the same size do not hide each other. The right panel shows the dimensions in parallel coordinates, each axis
    from its smallest to its largest value: the structures along the best path, and the targets of the other schedules
    in grey.

    Args:
        schedules: schedules, best first, as returned by `SlopPlanner.plan`.
        arms: names and schedules of arms to compare with, see `baselines`.
        config: model config; supplies everything except the dimensions that grow, see `cost`.
        sequence_length: tokens per training sequence.
        path: the file to write: PNG, SVG or PDF by its suffix.
        title: title above both panels.

    Raises:
        PlanError: if there are no schedules, or the path has another suffix.

    >>> from slop_hf.schedule import GrowthStage
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> figure = draw_plan([GrowthSchedule(small, (GrowthStage(("layer",), large),))])
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['stage (0: the initial model)', '']
    """
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        suffix = f"ends in {Path(path).suffix!r}" if Path(path).suffix else "has no suffix"
        raise PlanError(f"cannot draw {path}: it {suffix}; give a path that ends in one of {', '.join(SUFFIXES)}")
    if not schedules:
        raise PlanError("no schedules to draw; give at least one, for example from `SlopPlanner.plan`")
    every_schedule = [*schedules, *(schedule for _, schedule in arms)]
    has_tokens = all(schedule.flops(config, sequence_length) for schedule in every_schedule)
    paths = [_build_path(schedule, config, sequence_length, has_tokens) for schedule in every_schedule]
    with rc_context(STYLE):
        figure = create_figure(*SIZE)
        left, right = figure.subfigures(1, 2, width_ratios=(1.12, 1))
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
        named_arms = [(name, arm) for (name, _), arm in zip(arms, paths[len(schedules) :], strict=True)]
        _draw_paths(left, paths[: len(schedules)], named_arms, has_tokens)
        _draw_structures(right, schedules)
        if path is not None:
            with write_file(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix[1:].lower())
    return figure


def _build_path(schedule: GrowthSchedule, config: ModelConfig, sequence_length: int, has_tokens: bool) -> _Path:
    edges = [0.0 if has_tokens else -0.5]
    for dims, tokens in zip(schedule.structures, schedule.tokens, strict=True):
        edges.append(edges[-1] + (count_flops_per_token(dims, config, sequence_length) * tokens if has_tokens else 1))
    return _Path(schedule, tuple(edges), tuple(count_parameters(dims, config) for dims in schedule.structures))


def _draw_paths(panel: SubFigure, plans: Sequence[_Path], arms: Sequence[tuple[str, _Path]], has_tokens: bool) -> None:
    axes = panel.add_subplot()
    for rank, plan in reversed(list(enumerate(plans[1:], start=2))):
        style: Style = {"color": _fade(rank, len(plans)), "zorder": 2 - rank / 1000}
        axes.plot(*plan.line, linewidth=OTHER_WIDTH, solid_joinstyle="miter", gid=f"plan-{rank}", **style)
        axes.plot(*plan.end, "o", markersize=3, clip_on=False, **style)
    for number, (_, arm) in enumerate(arms):
        # Above and below the best schedule in turn.
        offset = (BEST_WIDTH / 2 + ARM_LANE * (number // 2 + 0.6)) * (-1 if number % 2 else 1)
        lane = axes.transData + ScaledTranslation(0, offset / POINTS_PER_INCH, panel.dpi_scale_trans)
        axes.plot(*arm.line, transform=lane, gid=f"arm-{number + 1}", zorder=3, **_style_arm(number))
    _draw_best(axes, plans[0])
    every_path = [*plans, *(arm for _, arm in arms)]
    sizes = [size for path in every_path for size in path.parameters]
    low, high = min(sizes), max(sizes)
    if high >= LOG_RATIO * low:
        margin = (high / low) ** 0.07
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    start, stop = plans[0].edges[0], max(path.end[0] for path in every_path)
    margin = 0.015 * (stop - start)
    axes.set_xlim(start - margin, stop + margin)
    if has_tokens:
        label_flops_axis(axes, stop)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("stage (0: the initial model)")
    axes.set_ylabel("parameters in training")
    best = enumerate(plans[:MAX_LABELS], start=1)
    _label_ends(axes, [(*plan.end, _format_rank(rank, plan.schedule), rank) for rank, plan in best])
    panel.suptitle("(a) Parameters over training", x=0.01, ha="left", fontsize=10, fontweight="bold")
    handle = tuple(Line2D([], [], color=colour, linewidth=BEST_WIDTH) for colour in _shade_stages(3))
    entries: list[LegendEntry] = [("best, coloured as in (b)", handle)]
    if len(plans) > 1:
        entries.append(("other schedules", Line2D([], [], color=_fade(2, len(plans)), linewidth=OTHER_WIDTH)))
    entries += [
        (shorten_name(name, MAX_LETTERS), Line2D([], [], **_style_arm(number)))
        for number, (name, _) in enumerate(arms)
    ]
    draw_legend(panel, entries, letters=74, fontsize=LABEL_SIZE, handlelength=3)


def _draw_best(axes: Axes, plan: _Path) -> None:
    colours = _shade_stages(len(plan.parameters))
    line: Style = {"linewidth": BEST_WIDTH, "solid_joinstyle": "miter", "solid_capstyle": "projecting"}
    for stage, colour in enumerate(colours):
        axes.plot(*plan.points(stage), color=colour, zorder=4 + stage / 1000, gid=f"plan-1-stage-{stage}", **line)
    axes.plot(*plan.end, "o", color=colours[-1], markersize=7, clip_on=False, zorder=5)
    if len(colours) > MAX_STRUCTURES:
        return  # the letters would lie on top of each other; the legend of (b) has them
    for number, growth in enumerate(plan.schedule.stages, start=1):
        middle = plan.edges[number], math.sqrt(plan.parameters[number - 1] * plan.parameters[number])
        shape = "circle,pad=0.3" if len(growth.letters) == 1 else "round,pad=0.3,rounding_size=0.7"
        axes.text(
            *middle,
            growth.letters,
            ha="center",
            va="center",
            fontfamily="monospace",  # its l looks different from a stroke
            fontsize=LABEL_SIZE,
            fontweight="bold",
            color="white",
            bbox={"boxstyle": shape, "facecolor": colours[number], "edgecolor": "white"},
            gid="growth",
            zorder=6,
        )


def _draw_structures(panel: SubFigure, schedules: Sequence[GrowthSchedule]) -> None:
    axes = panel.add_subplot()
    best = schedules[0]
    ranges = _find_ranges([dims for schedule in schedules for dims in schedule.structures])
    positions = range(len(ranges))

    def heights(dims: ModelDims) -> list[float]:
        pairs = [(getattr(dims, field), limits) for field, limits in ranges.items()]
        return [(size - low) / (high - low) if high > low else 0.0 for size, (low, high) in pairs]

    for position, (field, (low, high)) in enumerate(ranges.items()):
        axes.plot([position, position], [0, 1], color="0.6", linewidth=0.9, zorder=1, gid=f"axis-{field}")
        text: Style = {"ha": "center", "fontsize": LABEL_SIZE, "color": "0.25", "textcoords": "offset points"}
        axes.annotate(f"{low:,}", (position, 0), (0, -7), va="top", **text)
        if high > low:
            axes.annotate(f"{high:,}", (position, 1), (0, 7), va="bottom", **text)
    targets: dict[ModelDims, list[int]] = {}
    for rank, schedule in enumerate(schedules, start=1):
        targets.setdefault(schedule.target, []).append(rank)
    for target, ranks in reversed(targets.items()):
        if target != best.target:
            colour, gid = _fade(ranks[0], len(schedules)), f"target-{ranks[0]}"
            axes.plot(positions, heights(target), color=colour, linewidth=OTHER_WIDTH, zorder=2, gid=gid)
    colours = _shade_stages(len(best.structures))
    for stage, (dims, colour) in enumerate(zip(best.structures, colours, strict=True)):
        # Stages share most of their sizes: later lines are thinner, so that the earlier ones show on both sides.
        width = 2.2 + 6.0 * (len(colours) - 1 - stage) / max(len(colours) - 1, 1)
        line: Style = {"solid_joinstyle": "round", "solid_capstyle": "round", "zorder": 3 + stage / 1000}
        axes.plot(positions, heights(dims), color=colour, linewidth=width, gid=f"stage-{stage}", **line)
    names = {field: name for name, field in AXES}
    axes.set_xticks(positions, [names[field] for field in ranges], fontsize=9, fontweight="bold")
    axes.tick_params(axis="x", length=0, pad=16)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.25, len(ranges) - 0.9)
    axes.set_ylim(-0.03, 1.03)
    if len(schedules) > 1:
        ends = [
            (positions[-1], heights(target)[-1], ", ".join(map(str, ranks)), ranks[0])
            for target, ranks in targets.items()
            if ranks[0] <= MAX_LABELS
        ]
        _label_ends(axes, ends)
    panel.suptitle("(b) Structures along the best path", x=0.01, ha="left", fontsize=10, fontweight="bold")
    is_long = len(best.structures) > MAX_STRUCTURES
    letters = ["initial", *(stage.letters if is_long else f"{stage.letters} →" for stage in best.stages)]
    entries: list[LegendEntry] = [
        (f"{number} {name}" if is_long else f"{name} {dims}", Line2D([], [], color=colour, linewidth=BEST_WIDTH))
        for number, (name, dims, colour) in enumerate(zip(letters, best.structures, colours, strict=True))
    ]
    if len(targets) > 1:
        entries.append(("other targets", Line2D([], [], color=_fade(2, len(schedules)), linewidth=OTHER_WIDTH)))
    draw_legend(panel, entries, letters=60, fontsize=LABEL_SIZE, handlelength=3)


def _find_ranges(structures: Sequence[ModelDims]) -> dict[str, tuple[int, int]]:
    """Return the smallest and largest value on each axis, by config field."""
    ranges = {}
    for _, field in AXES:
        sizes = [getattr(dims, field) for dims in structures]
        ranges[field] = (min(sizes), max(sizes))
    is_grouped = any(dims.num_key_value_heads != dims.num_attention_heads for dims in structures)
    for field, adds_information in (("num_key_value_heads", is_grouped), ("head_dim", True)):
        if not adds_information or ranges[field][0] == ranges[field][1]:
            del ranges[field]
    return ranges


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, int]]) -> None:
    """Label the ends (x, y, label, rank) of lines in an evenly spaced column right of the axes, near their heights."""
    to_axes = axes.transData + axes.transAxes.inverted()
    # From the top down; of ends at the same height, the best rank comes first.
    ends = sorted(ends, key=lambda end: (-end[1], end[3]))
    high, low = (to_axes.transform(end[:2])[1] for end in (ends[0], ends[-1]))
    extent = max(high - low, LABEL_GAP * (len(ends) - 1))
    middle = min(max((high + low) / 2, extent / 2), 1 - extent / 2)
    heights = np.linspace(middle + extent / 2, middle - extent / 2, len(ends))
    for (x, y, label, rank), height in zip(ends, heights, strict=True):
        is_best = rank == 1
        colour = _shade_stages(3)[-1] if is_best else "0.35"
        leader = {
            "arrowstyle": "-",
            "color": colour if is_best else "0.7",
            "linewidth": 0.7,
            "shrinkA": 2,
            "shrinkB": 3,
            "relpos": (0, 0.5),
        }
        axes.annotate(
            label,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=LABEL_SIZE,
            fontweight="bold" if is_best else "normal",
            color=colour,
            arrowprops=leader,
            annotation_clip=False,
            gid="end",
        )


def _format_rank(rank: int, schedule: GrowthSchedule) -> str:
    sequence = schedule.sequence or "no growth"
    return f"{rank}  " + (sequence if len(sequence) <= 14 else f"{sequence[:13]}…")


def _shade_stages(stages: int) -> list[str]:
    """Return blues from light to dark, the darkest for the target."""
    ramp = colormaps["Blues"]
    return [to_hex(ramp(0.46 + 0.52 * stage / (stages - 1))) for stage in range(stages)] if stages > 1 else ["#08488E"]


def _fade(rank: int, ranks: int) -> str:
    """Return the grey of a schedule, lighter for higher ranks, from the second on."""
    return str(round(0.4 + 0.35 * (rank - 2) / max(ranks - 2, 1), 3))


def _style_arm(number: int) -> Style:
    turn, position = divmod(number, len(ARM_COLOURS))
    colour, dashes = ARM_COLOURS[position], ARM_DASHES[(position + turn) % len(ARM_DASHES)]
    return {"color": colour, "linewidth": 1.5, "linestyle": (0, dashes), "dash_capstyle": "butt"}
