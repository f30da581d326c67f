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
from matplotlib.ticker import LogLocator, MaxNLocator
from matplotlib.transforms import Bbox, offset_copy

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError
from ..io.files import write_file
from ..io.units import format_count
from ..schedule import GrowthSchedule
from .drawing import STYLE, LegendEntry, Style, create_figure, draw_legend, label_flops_axis, shorten_name

SUFFIXES = (".png", ".svg", ".pdf")
SIZE = (12.0, 5.0)  # inches

#: The palette of Okabe and Ito without yellow and without its blues, which mark the best schedule.
ARM_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
ARM_DASHES = ((5, 1.5), (2, 1.2), (7, 1.5, 2, 1.5), (1, 1), (4, 3))
ARM_LANE = 1.7  # points between arms that train the same structure
BEST_WIDTH = 3.2  # points
OTHER_WIDTH = 1.1

#: Config field and label of each axis on the right; the last two are shown only if they add information.
AXES = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv heads",
    "head_dim": "head_dim",
}

_STEPS: Style = {"drawstyle": "steps-pre", "solid_joinstyle": "miter"}
LOG_RATIO = 4  # largest / smallest parameter count from which the axis is logarithmic
MAX_LABELS = 8  # schedules labelled at their ends
MAX_STRUCTURES = 6  # stages whose structures the legend spells out
MAX_LETTERS = 56  # of a name in a legend
FONT_SIZE = 8  # points
END_GAP = 0.06  # of the height of the axes, between labels at the ends of lines


@dataclass(frozen=True)
class _Path:
    """A schedule as a step line, which rises at the beginning of each stage."""

    schedule: GrowthSchedule
    edges: tuple[float, ...]  # x of the beginning, and of the end of each stage, shape [stages + 1]
    parameters: tuple[int, ...]  # at these edges, before any riser, shape [stages + 1]

    @property
    def end(self) -> tuple[float, int]:
        """The x and y at the end of the last stage."""
        return self.edges[-1], self.parameters[-1]


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
    if path is not None:
        check_suffix(path)
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
        _draw_paths(left, paths[: len(schedules)], paths[len(schedules) :], [name for name, _ in arms], has_tokens)
        _draw_structures(right, schedules)
        _lift_letters(figure)
        if path is not None:
            with write_file(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix[1:].lower())
    return figure


def check_suffix(path: str | Path) -> None:
    """Refuse a path that does not end in one of `SUFFIXES`."""
    if Path(path).suffix.lower() not in SUFFIXES:
        suffix = f"ends in {Path(path).suffix!r}" if Path(path).suffix else "has no suffix"
        raise PlanError(f"cannot draw {path}: it {suffix}; give a path that ends in one of {', '.join(SUFFIXES)}")


def _build_path(schedule: GrowthSchedule, config: ModelConfig, sequence_length: int, has_tokens: bool) -> _Path:
    edges = [0.0 if has_tokens else -0.5]
    for dims, tokens in zip(schedule.structures, schedule.tokens, strict=True):
        edges.append(edges[-1] + (count_flops_per_token(dims, config, sequence_length) * tokens if has_tokens else 1))
    sizes = [count_parameters(dims, config) for dims in schedule.structures]
    return _Path(schedule, tuple(edges), (sizes[0], *sizes))


def _draw_paths(
    panel: SubFigure, plans: Sequence[_Path], arms: Sequence[_Path], arm_names: Sequence[str], has_tokens: bool
) -> None:
    axes = panel.add_subplot()
    for rank, plan in reversed(list(enumerate(plans[1:], start=2))):
        style: Style = {"color": _fade(rank, len(plans)), "zorder": 2 - rank / 1000}
        axes.plot(plan.edges, plan.parameters, linewidth=OTHER_WIDTH, gid=f"plan-{rank}", **_STEPS, **style)
        axes.plot(*plan.end, "o", markersize=3, clip_on=False, **style)
    for number, arm in enumerate(arms):
        # Above and below the best schedule in turn.
        offset = (BEST_WIDTH / 2 + ARM_LANE * (number // 2 + 0.6)) * (-1 if number % 2 else 1)
        lane = offset_copy(axes.transData, panel, y=offset, units="points")
        style = {"transform": lane, "gid": f"arm-{number + 1}", "drawstyle": "steps-pre", "zorder": 3}
        axes.plot(arm.edges, arm.parameters, **style, **_style_arm(number))
    _draw_best(axes, plans[0])
    sizes = [size for path in (*plans, *arms) for size in path.parameters]
    low, high = min(sizes), max(sizes)
    if high >= LOG_RATIO * low:
        margin = (high / low) ** 0.07
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
    else:
        axes.set_ylim(0, high * 1.08)
    axes.yaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    start, stop = plans[0].edges[0], max(path.end[0] for path in (*plans, *arms))
    margin = 0.015 * (stop - start)
    axes.set_xlim(start - margin, stop + margin)
    if has_tokens:
        label_flops_axis(axes, stop)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("stage (0: the initial model)")
    axes.set_ylabel("parameters in training")
    sequences = [plan.schedule.sequence or "no growth" for plan in plans[:MAX_LABELS]]
    labels = [f"{name[:13]}…" if len(name) > 14 else name for name in sequences]
    best = enumerate(zip(plans, labels, strict=False), start=1)
    _label_ends(axes, [(*plan.end, f"{rank}  {label}", rank) for rank, (plan, label) in best])
    panel.suptitle("(a) Parameters over training", x=0.01, ha="left")
    handle = tuple(Line2D([], [], color=colour, linewidth=BEST_WIDTH) for colour in _shade_stages(3))
    entries: list[LegendEntry] = [("best, coloured as in (b)", handle)]
    if len(plans) > 1:
        entries.append(("other schedules", Line2D([], [], color=_fade(2, len(plans)), linewidth=OTHER_WIDTH)))
    names = [shorten_name(name, MAX_LETTERS) for name in arm_names]
    entries += [(name, Line2D([], [], **_style_arm(number))) for number, name in enumerate(names)]
    draw_legend(panel, entries, letters=74, fontsize=FONT_SIZE, handlelength=3)


def _draw_best(axes: Axes, plan: _Path) -> None:
    colours = _shade_stages(len(plan.parameters) - 1)
    for stage, colour in enumerate(colours):
        ends = slice(stage, stage + 2)
        line: Style = {"linewidth": BEST_WIDTH, "zorder": 4 + stage / 1000, "gid": f"plan-1-stage-{stage}", **_STEPS}
        axes.plot(plan.edges[ends], plan.parameters[ends], color=colour, solid_capstyle="projecting", **line)
    axes.plot(*plan.end, "o", color=colours[-1], markersize=7, clip_on=False, zorder=5)
    for number, growth in enumerate(plan.schedule.stages, start=1):
        middle = plan.edges[number], math.sqrt(plan.parameters[number] * plan.parameters[number + 1])
        shape = "circle,pad=0.3" if len(growth.letters) == 1 else "round,pad=0.3,rounding_size=0.7"
        box = {"boxstyle": shape, "facecolor": colours[number], "edgecolor": "white"}
        # The l of monospaced letters looks different from a stroke.
        font = {"fontfamily": "monospace", "fontsize": FONT_SIZE, "fontweight": "bold", "color": "white"}
        axes.text(*middle, growth.letters, ha="center", va="center", bbox=box, gid="growth", zorder=6, **font)


def _lift_letters(figure: Figure) -> None:
    """Move the letters of each growth up until they touch none of the growths before it."""
    figure.draw_without_rendering()  # decides the layout
    placed: list[Bbox] = []
    for letters in figure.axes[0].texts:
        patch = letters.get_bbox_patch()
        if letters.get_gid() != "growth" or patch is None:
            continue
        box, lift = patch.get_window_extent(), 0.0  # pixels
        for other in sorted(placed, key=lambda other: other.y0):
            if box.translated(0, lift).overlaps(other):
                lift = other.y1 + 1 - box.y0
        placed.append(box.translated(0, lift))
        letters.set_transform(offset_copy(letters.get_transform(), figure, y=lift / figure.dpi))


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
        text: Style = {"ha": "center", "fontsize": FONT_SIZE, "color": "0.25", "textcoords": "offset points"}
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
    axes.set_xticks(positions, [AXES[field] for field in ranges], fontsize=9, fontweight="bold")
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
    panel.suptitle("(b) Structures along the best path", x=0.01, ha="left")
    is_long = len(best.structures) > MAX_STRUCTURES
    letters = ["initial", *(stage.letters if is_long else f"{stage.letters} →" for stage in best.stages)]
    entries: list[LegendEntry] = [
        (f"{number} {name}" if is_long else f"{name} {dims}", Line2D([], [], color=colour, linewidth=BEST_WIDTH))
        for number, (name, dims, colour) in enumerate(zip(letters, best.structures, colours, strict=True))
    ]
    if len(targets) > 1:
        entries.append(("other targets", Line2D([], [], color=_fade(2, len(schedules)), linewidth=OTHER_WIDTH)))
    draw_legend(panel, entries, letters=60, fontsize=FONT_SIZE, handlelength=3)


def _find_ranges(structures: Sequence[ModelDims]) -> dict[str, tuple[int, int]]:
    """Return the smallest and largest value on each axis, by config field."""
    sizes = {field: [getattr(dims, field) for dims in structures] for field in AXES}
    if len(set(sizes["num_key_value_heads"])) == 1 or sizes["num_key_value_heads"] == sizes["num_attention_heads"]:
        del sizes["num_key_value_heads"]
    if len(set(sizes["head_dim"])) == 1:
        del sizes["head_dim"]
    return {field: (min(values), max(values)) for field, values in sizes.items()}


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, int]]) -> None:
    """Label the ends (x, y, label, rank) of lines in an evenly spaced column right of the axes, near their heights."""
    to_axes = axes.transData + axes.transAxes.inverted()
    # From the top down; of ends at the same height, the best rank comes first.
    ends = sorted(ends, key=lambda end: (-end[1], end[3]))
    high, low = (to_axes.transform(end[:2])[1] for end in (ends[0], ends[-1]))
    extent = max(high - low, END_GAP * (len(ends) - 1))
    middle = min(max((high + low) / 2, extent / 2), 1 - extent / 2)
    heights = np.linspace(middle + extent / 2, middle - extent / 2, len(ends))
    for (x, y, label, rank), height in zip(ends, heights, strict=True):
        best_colour = _shade_stages(3)[-1]
        colour, weight, grey = (best_colour, "bold", best_colour) if rank == 1 else ("0.35", "normal", "0.7")
        leader = {"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5), "color": grey}
        style: Style = {"va": "center", "fontsize": FONT_SIZE, "fontweight": weight, "color": colour, "gid": "end"}
        place: Style = {"xytext": (1.03, height), "textcoords": "axes fraction", "annotation_clip": False}
        axes.annotate(label, (x, y), arrowprops=leader, **place, **style)


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
