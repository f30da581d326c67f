"""The figure of a plan: parameters in training against compute, and the dimensions along the best path.

Drawn on matplotlib's objects like the figures of runs. Nothing here needs torch or a run: only schedules.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox, ScaledTranslation

from ..cost.flops import DEFAULT_CONFIG, count_parameters, flops_per_token
from ..dims import ModelDims
from ..errors import PlanError
from ..schedule import GrowthSchedule
from .drawing import DPI, POINTS_PER_INCH, STYLE, power_of_ten
from .tables import count

SUFFIXES = (".png", ".svg", ".pdf")
SIZE = (12.0, 5.0)  # inches

#: Okabe and Ito's palette without its blues, which are the best schedule's, and without yellow.
ARM_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
ARM_DASHES = ((5, 1.5), (2, 1.2), (7, 1.5, 2, 1.5), (1, 1), (4, 3))
ARM_LANE = 1.7  # points between arms that train the same structure
BEST_WIDTH = 3.2  # points
OTHER_WIDTH = 1.1

#: Label and config field of each axis on the right; the last two only where they tell something of their own.
AXES = (
    ("hidden", "hidden_size"),
    ("ffn", "intermediate_size"),
    ("layers", "num_hidden_layers"),
    ("heads", "num_attention_heads"),
    ("kv heads", "num_key_value_heads"),
    ("head_dim", "head_dim"),
)

LOG_FROM = 4  # a logarithmic axis of parameters where the largest is so many times the smallest
MAX_LABELS = 8  # schedules that are labelled at their ends
MAX_STRUCTURES = 6  # stages whose structures the legend spells out
MAX_LETTERS = 56  # of a name in a legend
LABEL_SIZE = 8  # points


#: A name and a line in the legend, or lines beside one another.
_Entry = tuple[str, Line2D | tuple[Line2D, ...]]


@dataclass(frozen=True)
class _Path:
    """A schedule as a step line."""

    schedule: GrowthSchedule
    edges: tuple[float, ...]  # where each stage begins on the x axis, and where the last one ends
    parameters: tuple[int, ...]  # in each stage

    def points(self, stage: int) -> tuple[list[float], list[float]]:
        """One stage: a riser from the stage before it, and a plateau."""
        start, end, size = self.edges[stage], self.edges[stage + 1], float(self.parameters[stage])
        return [start, start, end], [float(self.parameters[max(stage - 1, 0)]), size, size]

    @property
    def line(self) -> tuple[list[float], list[float]]:
        """All stages in one."""
        parts = [self.points(stage) for stage in range(len(self.parameters))]
        return [x for xs, _ in parts for x in xs], [y for _, ys in parts for y in ys]

    @property
    def end(self) -> tuple[float, float]:
        """Where the last stage ends."""
        return self.edges[-1], float(self.parameters[-1])


def plan_figure(
    schedules: Sequence[GrowthSchedule],
    arms: Sequence[tuple[str, GrowthSchedule]] = (),
    *,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    path: str | Path | None = None,
    title: str = "",
) -> Figure:
    """Draw the best schedules of a plan beside each other and beside control arms.

    Left, the parameters of the model in training against cumulative training FLOPs, or against the stage where a
    schedule or an arm has no tokens. The best schedule is thick, with the letters of what grows at each growth; the
    others fade with their rank; arms are dashed, and drawn some points off their true size, so that arms of the same
    size do not hide one another. Right, the dimensions in parallel coordinates, each axis from its smallest to its
    largest value: the structures along the best path, and the targets of the other schedules in grey.

    Args:
        schedules: best first, as `SlopPlanner.plan` returns them.
        arms: names and schedules to compare with, see `baselines`.
        config: what growth leaves alone, see `cost`.
        sequence_length: tokens of a training sequence.
        path: the file to write, aside and renamed: PNG, SVG or PDF by its suffix.
        title: above both panels.

    Raises:
        PlanError: for no schedules, or a path of another suffix.

    >>> from slop_hf.schedule import GrowthStage
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> figure = plan_figure([GrowthSchedule(small, (GrowthStage(("layer",), large),))])
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['stage (0: the initial model)', '']
    """
    if path is not None and Path(path).suffix.lower() not in SUFFIXES:
        found = f"ends in {Path(path).suffix!r}" if Path(path).suffix else "has no suffix"
        raise PlanError(f"cannot draw {path}: it {found}; give a path that ends in one of {', '.join(SUFFIXES)}")
    if not schedules:
        raise PlanError("no schedules to draw; give at least one, such as `SlopPlanner.plan` returns")
    everything = [*schedules, *(schedule for _, schedule in arms)]
    budgets = [schedule.flops(config, sequence_length) for schedule in everything]
    scale, unit = power_of_ten(max(budgets)) if all(budgets) else (None, None)
    paths = [_path(schedule, config, sequence_length, scale) for schedule in everything]
    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.1))
        FigureCanvasAgg(figure)
        left, right = figure.subfigures(1, 2, width_ratios=(1.12, 1))
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
        named = [(name, arm) for (name, _), arm in zip(arms, paths[len(schedules) :], strict=True)]
        _draw_paths(left, paths[: len(schedules)], named, unit)
        _draw_structures(right, schedules)
        _separate(figure)
        if path is not None:
            _write(figure, Path(path))
    return figure


def _path(schedule: GrowthSchedule, config: Any, sequence_length: int, scale: float | None) -> _Path:
    edges = [-0.5 if scale is None else 0.0]
    for dims, tokens in zip(schedule.structures, schedule.tokens, strict=True):
        flops = flops_per_token(dims, config, sequence_length) * tokens
        edges.append(edges[-1] + (1 if scale is None else flops / scale))
    return _Path(schedule, tuple(edges), tuple(count_parameters(dims, config) for dims in schedule.structures))


def _draw_paths(panel: SubFigure, plans: Sequence[_Path], arms: Sequence[tuple[str, _Path]], unit: str | None) -> None:
    axes = panel.add_subplot()
    for rank, plan in reversed(list(enumerate(plans[1:], start=2))):
        style = {"color": _grey(rank, len(plans)), "zorder": 2 - rank / 1000}
        axes.plot(*plan.line, linewidth=OTHER_WIDTH, solid_joinstyle="miter", gid=f"plan-{rank}", **style)
        axes.plot(*plan.end, "o", markersize=3, clip_on=False, **style)
    for number, (_, arm) in enumerate(arms):
        lane = ScaledTranslation(0, _lane(number) / POINTS_PER_INCH, panel.dpi_scale_trans)
        style = {**_arm_style(number), "gid": f"arm-{number + 1}", "zorder": 3}
        axes.plot(*arm.line, transform=axes.transData + lane, **style)
    _draw_best(axes, plans[0])
    every = [*plans, *(arm for _, arm in arms)]
    sizes = [size for one in every for size in one.parameters]
    low, high = min(sizes), max(sizes)
    if high >= LOG_FROM * low:
        margin = (high / low) ** 0.07
        axes.set_yscale("log")
        axes.set_ylim(low / margin, high * margin)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, high * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    start, stop = plans[0].edges[0], max(one.end[0] for one in every)
    margin = 0.015 * (stop - start)
    axes.set_xlim(start - margin, stop + margin)
    if unit is None:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("stage (0: the initial model)")
    else:
        axes.set_xlabel(f"training FLOPs{unit}")
    axes.set_ylabel("parameters in training")
    best = enumerate(plans[:MAX_LABELS], start=1)
    _label_ends(axes, [(*plan.end, _rank_label(rank, plan.schedule), rank) for rank, plan in best])
    panel.suptitle("(a) Parameters over training", x=0.01, ha="left", fontsize=10, fontweight="bold")
    handle = tuple(Line2D([], [], color=colour, linewidth=BEST_WIDTH) for colour in _stage_colours(3))
    entries: list[_Entry] = [("best, coloured as in (b)", handle)]
    if len(plans) > 1:
        entries.append(("other schedules", Line2D([], [], color=_grey(2, len(plans)), linewidth=OTHER_WIDTH)))
    entries += [(name, Line2D([], [], **_arm_style(number))) for number, (name, _) in enumerate(arms)]
    _legend(panel, entries, 92)


def _lane(number: int) -> float:
    """How many points above its true size an arm is drawn: in turn above and below the best schedule."""
    away = BEST_WIDTH / 2 + ARM_LANE * (number // 2 + 0.6)
    return away if number % 2 == 0 else -away


def _draw_best(axes: Axes, plan: _Path) -> None:
    colours = _stage_colours(len(plan.parameters))
    style: dict[str, Any] = {"linewidth": BEST_WIDTH, "solid_joinstyle": "miter", "solid_capstyle": "projecting"}
    for stage, colour in enumerate(colours):
        axes.plot(*plan.points(stage), color=colour, zorder=4 + stage / 1000, gid=f"plan-1-stage-{stage}", **style)
    axes.plot(*plan.end, "o", color=colours[-1], markersize=7, clip_on=False, zorder=5)
    for number, grown in enumerate(plan.schedule.stages, start=1):
        place = plan.edges[number], math.sqrt(plan.parameters[number - 1] * plan.parameters[number])
        shape = "circle,pad=0.3" if len(grown.letters) == 1 else "round,pad=0.3,rounding_size=0.7"
        box = {"boxstyle": shape, "facecolor": colours[number], "edgecolor": "white"}
        style = {"gid": "growth", "fontsize": LABEL_SIZE, "fontweight": "bold", "color": "white", "zorder": 6}
        style["fontfamily"] = "monospace"  # whose l is no mere stroke
        axes.annotate(
            grown.letters, place, (0, 0), textcoords="offset points", ha="center", va="center", bbox=box, **style
        )


def _draw_structures(panel: SubFigure, schedules: Sequence[GrowthSchedule]) -> None:
    axes = panel.add_subplot()
    best = schedules[0]
    spans = _spans([dims for schedule in schedules for dims in schedule.structures])
    places = range(len(spans))

    def heights(dims: ModelDims) -> list[float]:
        pairs = [(getattr(dims, field), span) for field, span in spans.items()]
        return [(size - low) / (high - low) if high > low else 0.0 for size, (low, high) in pairs]

    for place, (field, (low, high)) in enumerate(spans.items()):
        axes.plot([place, place], [0, 1], color="0.6", linewidth=0.9, zorder=1, gid=f"axis-{field}")
        style = {"ha": "center", "fontsize": LABEL_SIZE, "color": "0.25", "textcoords": "offset points"}
        axes.annotate(f"{low:,}", (place, 0), (0, -7), va="top", **style)
        if high > low:
            axes.annotate(f"{high:,}", (place, 1), (0, 7), va="bottom", **style)
    targets: dict[ModelDims, list[int]] = {}
    for rank, schedule in enumerate(schedules, start=1):
        targets.setdefault(schedule.target, []).append(rank)
    for target, ranks in reversed(targets.items()):
        if target != best.target:
            colour = _grey(ranks[0], len(schedules))
            axes.plot(places, heights(target), color=colour, linewidth=OTHER_WIDTH, zorder=2, gid=f"target-{ranks[0]}")
    colours = _stage_colours(len(best.structures))
    for stage, (dims, colour) in enumerate(zip(best.structures, colours, strict=True)):
        # Stages share most of their sizes: later lines are thinner, so that the earlier ones show on both sides.
        width = 2.2 + 6.0 * (len(colours) - 1 - stage) / max(len(colours) - 1, 1)
        style = {"solid_joinstyle": "round", "solid_capstyle": "round", "zorder": 3 + stage / 1000}
        axes.plot(places, heights(dims), color=colour, linewidth=width, gid=f"stage-{stage}", **style)
    names = {field: name for name, field in AXES}
    axes.set_xticks(places, [names[field] for field in spans], fontsize=9, fontweight="bold")
    axes.tick_params(axis="x", length=0, pad=16)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.25, len(spans) - 0.9)
    axes.set_ylim(-0.03, 1.03)
    ends = [
        (places[-1], heights(target)[-1], ", ".join(map(str, ranks)), ranks[0])
        for target, ranks in targets.items()
        if ranks[0] <= MAX_LABELS
    ]
    if len(schedules) > 1:
        _label_ends(axes, ends)
    panel.suptitle("(b) Structures along the best path", x=0.01, ha="left", fontsize=10, fontweight="bold")
    long = len(best.structures) > MAX_STRUCTURES
    letters = ["initial", *(stage.letters if long else f"{stage.letters} →" for stage in best.stages)]
    entries: list[_Entry] = [
        (f"{number} {name}" if long else f"{name} {dims}", Line2D([], [], color=colour, linewidth=BEST_WIDTH))
        for number, (name, dims, colour) in enumerate(zip(letters, best.structures, colours, strict=True))
    ]
    if len(targets) > 1:
        entries.append(("other targets", Line2D([], [], color=_grey(2, len(schedules)), linewidth=OTHER_WIDTH)))
    _legend(panel, entries, 76)


def _spans(structures: Sequence[ModelDims]) -> dict[str, tuple[int, int]]:
    """The smallest and largest value on each axis, by config field."""
    spans = {}
    for _, field in AXES:
        sizes = [getattr(dims, field) for dims in structures]
        spans[field] = (min(sizes), max(sizes))
    grouped = any(dims.num_key_value_heads != dims.num_attention_heads for dims in structures)
    for field, tells in (("num_key_value_heads", grouped), ("head_dim", True)):
        if not tells or spans[field][0] == spans[field][1]:
            del spans[field]
    return spans


def _label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, int]]) -> None:
    """Labels in the right margin for the ends (x, y, label, rank) of lines; `_separate` moves them apart."""
    for x, y, label, rank in reversed(ends):  # of labels at the same height the best is to come out on top
        first = rank == 1
        colour = _stage_colours(3)[-1] if first else "0.35"
        line = {"arrowstyle": "-", "color": colour if first else "0.7", "linewidth": 0.7, "shrinkA": 2, "shrinkB": 3}
        height = axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]
        style = {"gid": "end", "fontsize": LABEL_SIZE, "fontweight": "bold" if first else "normal", "color": colour}
        style |= {"arrowprops": {**line, "relpos": (0, 0.5)}, "annotation_clip": False}
        axes.annotate(label, (x, y), (1.03, height), textcoords="axes fraction", va="center", **style)


def _separate(figure: Figure) -> None:
    """Move labels apart that touch: letters of growths upwards, labels of ends up and down."""
    figure.draw_without_rendering()
    pixel = POINTS_PER_INCH / figure.dpi
    for axes in figure.axes:
        notes = [text for text in axes.texts if isinstance(text, Annotation)]
        placed: list[Bbox] = []
        for badge in (note for note in notes if note.get_gid() == "growth"):
            patch = badge.get_bbox_patch()
            assert patch is not None
            box = patch.get_window_extent()
            lift = 0.0
            for other in sorted(placed, key=lambda other: other.y0):
                if box.translated(0, lift).overlaps(other):
                    lift = other.y1 + 1 - box.y0
            badge.set_position((0, lift * pixel))
            placed.append(box.translated(0, lift))
        ends = sorted((note for note in notes if note.get_gid() == "end"), key=lambda note: note.get_position()[1])
        gap = 1.5 * LABEL_SIZE / pixel / axes.bbox.height
        heights = _spread([note.get_position()[1] for note in ends], gap)
        for note, height in zip(ends, heights, strict=True):
            note.set_position((note.get_position()[0], height))


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart and up to 1, near those wanted, which ascend."""
    heights: list[float] = []
    for height in wanted:
        heights.append(max(height, heights[-1] + gap) if heights else height)
    ceiling = 1.0
    for place in reversed(range(len(heights))):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - gap
    return heights


def _rank_label(rank: int, schedule: GrowthSchedule) -> str:
    sequence = schedule.sequence or "no growth"
    return f"{rank}  " + (sequence if len(sequence) <= 14 else f"{sequence[:13]}…")


def _stage_colours(stages: int) -> list[str]:
    """Blues from light to dark, the target's the darkest."""
    ramp = colormaps["Blues"]
    return [to_hex(ramp(0.46 + 0.52 * stage / (stages - 1))) for stage in range(stages)] if stages > 1 else ["#08488E"]


def _grey(rank: int, ranks: int) -> str:
    """Greys that fade with the rank, from the second on."""
    return str(round(0.4 + 0.35 * (rank - 2) / max(ranks - 2, 1), 3))


def _arm_style(number: int) -> dict[str, Any]:
    turn, place = divmod(number, len(ARM_COLOURS))
    colour, dashes = ARM_COLOURS[place], ARM_DASHES[(place + turn) % len(ARM_DASHES)]
    return {"color": colour, "linewidth": 1.5, "linestyle": (0, dashes), "dash_capstyle": "butt"}


def _legend(panel: SubFigure, entries: Sequence[_Entry], letters: int) -> None:
    names = [name if len(name) <= MAX_LETTERS else f"{name[: MAX_LETTERS - 1]}…" for name, _ in entries]
    columns = next((n for n in (5, 4, 3, 2) if (max(map(len, names)) + 6) * n <= letters), 1)
    columns = math.ceil(len(names) / math.ceil(len(names) / columns))
    legend = panel.legend(
        [handle for _, handle in entries],
        ["x"] * len(names),
        loc="outside lower center",
        ncols=columns,
        fontsize=LABEL_SIZE,
        handlelength=3,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards and without mathtext, since names may begin with `_` or hold `$`.
        text.set_parse_math(False)
        text.set_text(name)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=DPI)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(buffer.getvalue())
    aside.replace(path)
