"""The figure of a plan: a bar per schedule with its stages, predicted losses, and the sizes on the best path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from ..dims import ModelConfig
from ..errors import PlanError
from ..io.files import write_file
from ..io.units import NOTHING, format_count
from ..schedule import GrowthSchedule
from .drawing import DPI, STYLE, WIDTH, LegendEntry, Style, create_figure, draw_legend, label_flops_axis, shorten_name

SUFFIXES = (".png", ".svg", ".pdf")
MAX_LETTERS = 34  # of a name next to its bar
FONT_SIZE = 8  # points
BAR_HEIGHT = 0.72  # of the distance between bars

#: Inches: height of a bar and of a row of the table, each with its gap, and of the titles and labels of (a) and (b).
_BAR, _ROW, _AROUND_BARS, _AROUND_TABLE = 0.27, 0.235, 1.25, 0.75
#: Margin left and right of a label inside its part of a bar, in points.
_PADDING = 1.5
#: Marks of predicted losses: schedules of the plan are filled, arms are hollow.
_PLAN_MARK: Style = {"marker": "o", "markersize": 6, "linestyle": "none", "color": "#08488E"}
_ARM_MARK: Style = {"marker": "s", "markersize": 5.5, "linestyle": "none", "color": "0.3", "markerfacecolor": "white"}

#: Config field and heading of each size in the table; the last two are shown only if they add information.
_SIZES = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv heads",
    "head_dim": "head_dim",
}


@dataclass(frozen=True)
class _Row:
    """A schedule as a bar.

    Args:
        label: its name.
        gid: name of its artists, for programs that read an SVG file.
        edges: x at the beginning of the first stage and at the end of each, shape [stages + 1].
        parameters: parameter count in each stage, shape [stages].
        letters: what grows at the beginning of each stage, "" for the first, shape [stages].
        loss: predicted final loss; None if unknown.
        is_arm: whether it is a control arm, and no schedule of the plan.
    """

    label: str
    gid: str
    edges: tuple[float, ...]
    parameters: tuple[int, ...]
    letters: tuple[str, ...]
    loss: float | None
    is_arm: bool


def draw_plan(
    schedules: Sequence[GrowthSchedule],
    arms: Sequence[tuple[str, GrowthSchedule]] = (),
    *,
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    path: str | Path | None = None,
    title: str = "",
    losses: Sequence[float | None] = (),
) -> Figure:
    """Draw the best schedules of a plan below each other, followed by control arms, and the path of the best one.

    Each schedule and each arm is a bar: its parts are the stages, as long as their training FLOPs, or all of the same
    length if a schedule or an arm has no tokens. A part is darker the larger the model, and is labelled with the
    letters of what grows and with the parameters, if they fit. Predicted losses are marked next to the bars. A
    table below has the sizes of the best schedule's structures; what grows is shaded.

    Args:
        schedules: schedules, best first, as returned by `SlopPlanner.plan`.
        arms: names and schedules of arms to compare with, see `baselines`.
        config: model config; supplies everything except the dimensions that grow, see `cost`.
        sequence_length: tokens per training sequence.
        path: the file to write: PNG, SVG or PDF by its suffix.
        title: title above both panels.
        losses: predicted final loss of each schedule and then of each arm, in nats per token, shape
            [schedules + arms], with None for an unknown one; empty for a figure without losses.

    Raises:
        PlanError: if there are no schedules, the number of losses is another one, or the path has another suffix.

    >>> from slop_hf import GrowthStage, ModelDims
    >>> small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    >>> figure = draw_plan([GrowthSchedule(small, (GrowthStage(("layer",), large),))])
    >>> figure.axes[0].get_xlabel()
    'stage (0: the initial model)'
    """
    if path is not None:
        check_suffix(path)
    if not schedules:
        raise PlanError("no schedules to draw; give at least one, for example from `SlopPlanner.plan`")
    if losses and len(losses) != len(schedules) + len(arms):
        expected = f"expected {len(schedules) + len(arms)}, one per schedule and one per arm"
        raise PlanError(f"{len(losses)} losses to draw: {expected}; give None for an unknown loss")
    rows = _build_rows(schedules, arms, config, sequence_length, losses)
    best = schedules[0]
    heights = [_AROUND_BARS + _BAR * len(rows), _AROUND_TABLE + _ROW * len(best.structures)]
    with rc_context(STYLE):
        figure = create_figure(WIDTH, sum(heights) + (0.3 if title else 0))
        top, bottom = figure.subfigures(2, 1, height_ratios=heights)
        if title:
            figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
        _draw_rows(top, rows, has_tokens=rows[0].edges[0] == 0.0)
        _draw_table(bottom, best, config)
        _fit_labels(figure)
        if path is not None:
            with write_file(path) as temporary:
                figure.savefig(temporary, format=Path(path).suffix[1:].lower(), dpi=DPI)
    return figure


def check_suffix(path: str | Path) -> None:
    """Refuse a path that does not end in one of `SUFFIXES`."""
    if Path(path).suffix.lower() not in SUFFIXES:
        suffix = f"ends in {Path(path).suffix!r}" if Path(path).suffix else "has no suffix"
        raise PlanError(f"cannot draw {path}: it {suffix}; give a path that ends in one of {', '.join(SUFFIXES)}")


def _build_rows(
    schedules: Sequence[GrowthSchedule],
    arms: Sequence[tuple[str, GrowthSchedule]],
    config: ModelConfig,
    sequence_length: int,
    losses: Sequence[float | None],
) -> list[_Row]:
    has_one_target = len({schedule.target for schedule in schedules}) == 1
    named = [
        (_label_schedule(rank, schedule, has_target=not has_one_target), f"plan-{rank}", schedule)
        for rank, schedule in enumerate(schedules, start=1)
    ]
    for number, (name, schedule) in enumerate(arms, start=1):
        named.append((shorten_name(name.replace("_", " "), MAX_LETTERS), f"arm-{number}", schedule))
    has_tokens = all(schedule.flops(config, sequence_length) for _, _, schedule in named)
    rows = []
    for number, (label, gid, schedule) in enumerate(named):
        edges = [0.0 if has_tokens else -0.5]
        for dims, tokens in zip(schedule.structures, schedule.tokens, strict=True):
            length = count_flops_per_token(dims, config, sequence_length) * tokens if has_tokens else 1
            edges.append(edges[-1] + length)
        sizes = tuple(count_parameters(dims, config) for dims in schedule.structures)
        letters = ("", *(stage.letters for stage in schedule.stages))
        loss = losses[number] if losses else None
        rows.append(_Row(label, gid, tuple(edges), sizes, letters, loss, is_arm=number >= len(schedules)))
    return rows


def _label_schedule(rank: int, schedule: GrowthSchedule, *, has_target: bool) -> str:
    sequence = shorten_name(schedule.sequence or "no growth", MAX_LETTERS // 2 if has_target else MAX_LETTERS)
    return f"{rank}  {sequence} → {schedule.target}" if has_target else f"{rank}  {sequence}"


def _draw_rows(panel: SubFigure, rows: Sequence[_Row], *, has_tokens: bool) -> None:
    has_losses = any(row.loss is not None for row in rows)
    if has_losses:
        axes, right = panel.subplots(1, 2, sharey=True, width_ratios=(3.6, 1))
        _draw_losses(right, rows)
    else:
        axes = panel.add_subplot()
    sizes = [size for row in rows for size in row.parameters]
    for height, row in enumerate(rows):
        _draw_bar(axes, height, row, min(sizes), max(sizes))
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=FONT_SIZE, parse_math=False)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _separate_arms(axes, rows)
    stop = max(row.edges[-1] for row in rows)
    axes.set_xlim(rows[0].edges[0], stop)
    if has_tokens:
        label_flops_axis(axes, stop)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("stage (0: the initial model)")
    axes.spines["left"].set_visible(False)
    panel.suptitle("(a) Stages of each schedule: what grows, and parameters; darker is larger", x=0.01, ha="left")


def _draw_bar(axes: Axes, height: int, row: _Row, least: int, most: int) -> None:
    """Draw the stages of a schedule as parts of a bar, each with a label that `_fit_labels` shortens."""
    stages = zip(pairwise(row.edges), row.parameters, row.letters, strict=True)
    for stage, ((start, stop), parameters, letters) in enumerate(stages):
        share = math.log(parameters / least) / math.log(most / least) if most > least else 1.0
        corner = start, height - BAR_HEIGHT / 2
        face = to_hex(colormaps["Blues"](0.15 + 0.8 * share))
        part = Rectangle(corner, stop - start, BAR_HEIGHT, facecolor=face, edgecolor="white", linewidth=1.2)
        part.set_gid(f"{row.gid}-stage-{stage}")
        axes.add_patch(part)
        label = f"{letters} {format_count(parameters)}".strip()
        # The l of monospaced letters looks different from a stroke.
        style: Style = {
            "fontfamily": "monospace",
            "fontsize": FONT_SIZE - 0.5,
            "ha": "center",
            "va": "center_baseline",
        }
        colour = "white" if share > 0.5 else "black"
        axes.text((start + stop) / 2, height, label, color=colour, gid=f"{row.gid}-label-{stage}", **style)


def _draw_losses(axes: Axes, rows: Sequence[_Row]) -> None:
    """Mark the predicted losses, with their values in a column at the right."""
    for height, row in enumerate(rows):
        if row.loss is not None:
            axes.plot([row.loss], [height], gid=f"{row.gid}-loss", **(_ARM_MARK if row.is_arm else _PLAN_MARK))
        text = NOTHING if row.loss is None else f"{row.loss:.3f}"
        position: Style = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        weight = "bold" if height == 0 else "normal"
        axes.annotate(text, (1, height), (5, 0), va="center", fontsize=FONT_SIZE, fontweight=weight, **position)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.grid(axis="x", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelleft=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("predicted loss\n(nats/token)")
    entries: list[LegendEntry] = [("schedules of the plan", Line2D([], [], **_PLAN_MARK))]
    if any(row.is_arm for row in rows):
        entries.append(("other ways", Line2D([], [], **_ARM_MARK)))
        _separate_arms(axes, rows)
        draw_legend(axes.figure, entries, letters=74, fontsize=FONT_SIZE)


def _separate_arms(axes: Axes, rows: Sequence[_Row]) -> None:
    """Draw a line between the schedules of the plan and the arms."""
    if rows[-1].is_arm:
        first = next(height for height, row in enumerate(rows) if row.is_arm)
        axes.axhline(first - 0.5, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)


def _draw_table(panel: SubFigure, best: GrowthSchedule, config: ModelConfig) -> None:
    """Write the sizes of each stage of the best schedule in rows, with those that grow shaded."""
    sizes = {field: [getattr(dims, field) for dims in best.structures] for field in _SIZES}
    if len({*sizes["num_key_value_heads"]}) == 1 or sizes["num_key_value_heads"] == sizes["num_attention_heads"]:
        del sizes["num_key_value_heads"]
    if len({*sizes["head_dim"]}) == 1:
        del sizes["head_dim"]
    parameters = [format_count(count_parameters(dims, config)) for dims in best.structures]
    names = ["0  initial", *(f"{number}  {stage.letters}" for number, stage in enumerate(best.stages, start=1))]
    columns = {_SIZES[field]: [f"{size:,}" for size in values] for field, values in sizes.items()}
    columns = {"stage": names, **columns, "parameters": parameters}
    if any(best.tokens):
        columns["tokens"] = [format_count(count) if count else NOTHING for count in best.tokens]
    grown = {_SIZES[field]: [old != new for old, new in pairwise(values)] for field, values in sizes.items()}
    axes = panel.add_subplot()
    for column, (heading, texts) in enumerate(columns.items()):
        right = column + 0.92 if column else 0.0
        style: Style = {"ha": "right" if column else "left", "va": "center", "fontsize": FONT_SIZE + 0.5}
        axes.text(right, 0, heading, color="0.35", fontweight="bold", gid="heading", **style)
        for stage, text in enumerate(texts):
            has_grown = stage > 0 and grown.get(heading, [False] * len(texts))[stage - 1]
            if has_grown:
                shade = Rectangle((column + 0.12, stage + 0.54), 0.88, 0.92, facecolor="#C6DBEF", edgecolor="none")
                axes.add_patch(shade)
            weight = "bold" if has_grown else "normal"
            axes.text(right, stage + 1, text, gid="cell", fontweight=weight, parse_math=False, **style)
    axes.axhline(0.5, color="0.6", linewidth=0.8)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(names) + 0.5, -0.5)
    axes.axis("off")
    panel.suptitle("(b) Path of schedule 1; what grows is shaded", x=0.01, ha="left")


def _fit_labels(figure: Figure) -> None:
    """Shorten the label of each part of a bar to what fits: letters and parameters, one of them, or nothing."""
    figure.draw_without_rendering()  # decides the layout
    axes = figure.axes[0]
    parts = {part.get_gid(): part for part in axes.patches}
    for label in axes.texts:
        room = parts[(label.get_gid() or "").replace("-label-", "-stage-")].get_window_extent().width
        room -= 2 * _PADDING * figure.dpi / 72
        for text in (label.get_text(), label.get_text().split(" ")[0], ""):
            label.set_text(text)
            if not text or label.get_window_extent().width <= room:
                break
