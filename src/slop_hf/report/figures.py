"""Figures: loss against compute, and the path of structures.

Drawn on matplotlib's objects, so that no state of pyplot is touched and no display is needed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from ..errors import RunError
from ..records import RunDirectory, StageRecord
from .summary import run_names
from .tables import count

#: Okabe and Ito's palette without yellow, then grey: told apart by colour-blind readers, and on white.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")

#: Dimension in the legend, its config field, colour and marker.
DIMENSIONS = (
    ("hidden", "hidden_size", "#0072B2", "o"),
    ("ffn", "intermediate_size", "#D55E00", "s"),
    ("layers", "num_hidden_layers", "#009E73", "^"),
    ("heads", "num_attention_heads", "#CC79A7", "D"),
)

DPI = 150
POINTS_PER_INCH = 72
WIDTH = 9.0  # inches
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "text.usetex": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
FLAG_SIZE = 7.5  # points of a stage label
FLAG_LANE = 10.5  # points from one row of stage labels to the next
MARKERS = 40  # held-out losses marked on a line at most
NUDGE = 4.0  # points between dimensions that have grown alike
DESCENT = 0.2  # share of the initial stage in which a new model falls from ln(vocabulary)


@dataclass(frozen=True)
class _Run:
    """What the figures take from a run."""

    name: str
    colour: str
    records: list[StageRecord]
    history: list[dict[str, Any]]

    def losses(self, key: str) -> tuple[list[float], list[float]]:
        """FLOPs and finite losses of the log entries that have both."""
        logged = [entry for entry in self.history if {"train_flops", key} <= entry.keys()]
        finite = [entry for entry in logged if math.isfinite(entry[key])]
        return [entry["train_flops"] for entry in finite], [entry[key] for entry in finite]

    @property
    def settled_losses(self) -> list[float]:
        """All losses, the initial model's first descent left out."""
        start = DESCENT * self.records[0].total_flops
        pairs = [pair for key in ("loss", "eval_loss") for pair in zip(*self.losses(key), strict=True)]
        return [loss for flops, loss in pairs if flops >= start] or [loss for _, loss in pairs]

    @property
    def growths(self) -> list[tuple[float, str]]:
        """FLOPs at which each growth happened, and its label."""
        pairs = zip(self.records, self.records[1:], strict=False)
        return [(before.total_flops, _label(after)) for before, after in pairs]


def loss_figure(runs: Sequence[RunDirectory], path: str | Path, *, log_x: bool = False) -> Path:
    """Draw loss (nats a token) against cumulative training FLOPs, all runs on the same axes.

    Thin lines are training loss, markers held-out loss, dashed vertical lines the growths, labelled with what grew.
    The axis of losses fits what follows the initial model's first descent, which leaves through the top.

    Args:
        runs: runs with a finished stage each.
        path: the PNG file to write, aside and renamed.
        log_x: a logarithmic axis of FLOPs.

    Returns:
        the path.

    Raises:
        RunError: for no runs, one given twice, or a directory that is no run.
    """
    found = _read(runs)
    with rc_context(STYLE):
        figure = _figure(WIDTH, 4.6)
        axes = figure.add_subplot()
        scale, unit = (1.0, "") if log_x else _flops_scale(found)
        for number, run in enumerate(found):
            flops, losses = run.losses("loss")
            axes.plot([x / scale for x in flops], losses, color=run.colour, linewidth=0.9, alpha=0.65)
            flops, losses = run.losses("eval_loss")
            every = max(1, math.ceil(len(flops) / MARKERS))
            axes.plot(
                [x / scale for x in flops],
                losses,
                linestyle="none",
                marker="o",
                markersize=5,
                markevery=slice((len(flops) - 1) % every, None, every),
                markerfacecolor=run.colour,
                markeredgecolor="white",
                markeredgewidth=0.6,
                zorder=3 + number / 100,
            )
        settled = [loss for run in found for loss in run.settled_losses]
        if settled:
            margin = 0.05 * (max(settled) - min(settled)) or 0.1
            axes.set_ylim(min(settled) - margin, max(settled) + margin)
        else:
            axes.text(0.5, 0.5, "no losses were logged", transform=axes.transAxes, ha="center", color="0.4")
        if log_x:
            axes.set_xscale("log")
        else:
            most = max(run.records[-1].total_flops for run in found) / scale or 1
            axes.set_xlim(-0.01 * most, 1.02 * most)
        axes.set_xlabel(f"training FLOPs{unit}")
        axes.set_ylabel("loss (nats/token)")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        axes.set_axisbelow(True)
        kinds: list[tuple[str, dict[str, Any]]] = [("training loss", {"linewidth": 0.9})]
        kinds.append(("held-out loss", {"linestyle": "none", "marker": "o", "markersize": 5}))
        if any(run.growths for run in found):
            kinds.append(("growth", {"linewidth": 0.9, "linestyle": (0, (4, 3))}))
        extra = [(label, Line2D([], [], color="0.35", **style)) for label, style in kinds]
        _legend(figure, found, extra)
        flags = [
            (flops / scale, label, run.colour, number)
            for number, run in enumerate(found)
            for flops, label in run.growths
            if flops > 0 or not log_x
        ]
        lanes = _draw_flags(axes, flags, len(found))
        figure.set_figheight(figure.get_figheight() + lanes * FLAG_LANE / POINTS_PER_INCH)
        axes.set_title("Loss against training compute", loc="left", pad=8 + lanes * FLAG_LANE)
        return _write_png(figure, path)


def path_figure(runs: Sequence[RunDirectory], path: str | Path) -> Path:
    """Draw the path of structures: parameters against compute, and each dimension relative to its initial size.

    Args:
        runs: runs with a finished stage each.
        path: the PNG file to write, aside and renamed.

    Returns:
        the path.

    Raises:
        RunError: for no runs, one given twice, or a directory that is no run.
    """
    found = _read(runs)
    # Training from scratch has no path; a report on nothing else shows its one point.
    grown = [run for run in found if run.growths] or found
    columns = min(len(grown), 4)
    rows = math.ceil(len(grown) / columns)
    with rc_context(STYLE):
        if len(grown) == 1:
            figure = _figure(WIDTH, 3.9)
            panels = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))
        else:
            heights = (3.7, 0.9 + 2.0 * rows)
            figure = _figure(WIDTH, sum(heights))
            panels = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)
        left, right = panels.ravel()
        _draw_parameters(left, found)
        _draw_dimensions(right, grown, rows, columns, titles=len(found) > 1)
        return _write_png(figure, path)


def _draw_parameters(panel: SubFigure, runs: Sequence[_Run]) -> None:
    axes = panel.add_subplot()
    scale, unit = _flops_scale(runs)
    for number, run in enumerate(runs):
        xs, ys = [], []
        for record in run.records:
            xs += [(record.total_flops - record.flops) / scale, record.total_flops / scale]
            ys += [record.parameters] * 2
        # Runs often share structures: later lines are thinner, so that the earlier ones show on both sides.
        later = len(runs) - 1 - number
        width = 1.4 + later * min(1.2, 4 / len(runs))
        axes.plot(xs, ys, color=run.colour, linewidth=width, solid_joinstyle="miter", zorder=2 + number / 100)
        axes.plot(xs[-1:], ys[-1:], "o", color=run.colour, markersize=width + 3.6, clip_on=False, zorder=3)
    axes.set_xlim(0, max(run.records[-1].total_flops for run in runs) / scale * 1.02 or 1)
    axes.set_ylim(0, max(record.parameters for run in runs for record in run.records) * 1.08)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.grid(axis="y", color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(f"training FLOPs{unit}")
    axes.set_ylabel("parameters")
    panel.suptitle("(a) Parameters over training", x=0.01, ha="left", fontsize=10, fontweight="bold")
    _legend(panel, runs)


def _draw_dimensions(panel: SubFigure, runs: Sequence[_Run], rows: int, columns: int, *, titles: bool) -> None:
    heading = "(b) Dimensions relative to the initial structure"
    grid = panel.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    highest = max(max(_ratios(run, field)) for run in runs for _, field, _, _ in DIMENSIONS)
    top = max(1.0, math.log2(highest))
    for axes, run in zip(grid, runs, strict=False):
        for number, (_, field, colour, marker) in enumerate(DIMENSIONS):
            # Dimensions that have grown alike would hide one another: each is drawn some points off its true value.
            nudge = ScaledTranslation(0, NUDGE * (1.5 - number) / POINTS_PER_INCH, panel.dpi_scale_trans)
            values = _ratios(run, field)
            axes.plot(
                range(len(values)),
                values,
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1.4,
                transform=axes.transData + nudge,
            )
        axes.set_yscale("log", base=2)
        axes.set_ylim(2 ** (-0.2 * top), 2 ** (1.2 * top))
        axes.yaxis.set_major_locator(FixedLocator([2**power for power in range(math.floor(top) + 1)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
        axes.grid(axis="y", color="0.92", linewidth=0.8)
        _stage_ticks(axes, run, narrow=columns > 1)
        if titles:
            axes.set_title(_shorten(run.name, 84 // columns), color=_dark(run.colour), parse_math=False, fontsize=8.5)
    for axes in grid[::columns]:
        axes.set_ylabel("relative size")
    for axes in grid[max(len(runs) - columns, 0) : len(runs)]:
        axes.set_xlabel("stage")
    for axes in grid[len(runs) :]:
        axes.set_visible(False)
    panel.align_xlabels()
    panel.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.4, label=label)
        for label, _, colour, marker in DIMENSIONS
    ]
    panel.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _stage_ticks(axes: Axes, run: _Run, *, narrow: bool) -> None:
    """Name the stages under the axis, or number them where the names have no room."""
    labels = [_label(record).replace("-", "\n") for record in run.records]
    if len(labels) > (5 if narrow else 8):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    else:
        axes.set_xticks(range(len(labels)), labels, fontsize=7.5)
    axes.set_xlim(-0.3, len(labels) - 0.7)


def _draw_flags(axes: Axes, flags: Sequence[tuple[float, str, str, int]], runs: int) -> int:
    """Draw each growth as a dashed line with its label above the axes, and return how many rows the labels take.

    From right to left, each label hangs like a flag to the right of its mast, in the lowest row where it touches
    neither another label nor another mast.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    ends: list[float] = []  # where the free space of each row ends, in pixels
    for x, label, colour, number in sorted(flags, key=lambda flag: (flag[0], flag[3]), reverse=True):
        text = axes.annotate(
            label, (x, 1), (0, 0), ("data", "axes fraction"), "offset points", fontsize=FLAG_SIZE, color=_dark(colour)
        )
        mast = axes.transData.transform((x, 0))[0]
        width = text.get_window_extent().width + 6 * figure.dpi / POINTS_PER_INCH
        lane = next((row for row, end in enumerate(ends) if mast + width <= end), len(ends))
        ends[: lane + 1] = [mast] * (lane + 1)
        text.set_position((2.5, 3 + lane * FLAG_LANE))
        # Masts of several runs may coincide: their dashes then take turns.
        style = (7 * number / runs, (4, 3))
        axes.axvline(x, color=colour, linewidth=0.9, linestyle=style, alpha=0.8, zorder=1)
        axes.annotate(
            "",
            (x, 1),
            (0, 3 + lane * FLAG_LANE + FLAG_SIZE),
            ("data", "axes fraction"),
            "offset points",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0},
        )
    return len(ends)


def _read(runs: Sequence[RunDirectory]) -> list[_Run]:
    if not runs:
        raise RunError("no runs to draw; give at least one run directory")
    found = []
    for number, (name, run) in enumerate(zip(run_names(runs), runs, strict=True)):
        if not (records := run.records()):
            raise RunError(f"{run.path} has no finished stage to draw; let `slop train` finish its first stage")
        found.append(_Run(name, RUN_COLOURS[number % len(RUN_COLOURS)], records, run.history()))
    return found


def _ratios(run: _Run, field: str) -> list[float]:
    first = getattr(run.records[0].dims, field)
    return [getattr(record.dims, field) / first for record in run.records]


def _label(record: StageRecord) -> str:
    """What the stage's directory is called after its number: `initial`, `layer`, `layer-ffn`."""
    return record.name.split("-", 2)[-1]


def _dark(colour: str) -> tuple[float, ...]:
    """The colour for small text, which the lighter ones of the palette are too pale for."""
    return tuple(0.8 * part for part in to_rgb(colour))


def _flops_scale(runs: Sequence[_Run]) -> tuple[float, str]:
    """The power of ten that the axis of FLOPs is counted in, and how its label says so."""
    most = max(run.records[-1].total_flops for run in runs)
    exponent = math.floor(math.log10(most)) if most > 0 else 0
    return 10.0**exponent, rf" ($\times 10^{{{exponent}}}$)" if exponent else ""


def _legend(
    where: Figure | SubFigure, runs: Sequence[_Run], extra: Sequence[tuple[str, Line2D]] = (), *, letters: int = 84
) -> None:
    """Name the runs below a figure, in as many columns as have room: `letters` of names in a row."""
    names = [*(_shorten(run.name, min(letters, 48)) for run in runs), *(label for label, _ in extra)]
    handles = [*(Line2D([], [], color=run.colour, linewidth=2.4) for run in runs), *(handle for _, handle in extra)]
    ncols = next((n for n in (6, 5, 4, 3, 2) if max(map(len, names)) * n <= letters), 1)
    ncols = math.ceil(len(names) / math.ceil(len(names) / ncols))
    legend = where.legend(handles, ["x"] * len(names), loc="outside lower center", ncols=ncols)
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards and without mathtext, since names may begin with `_` or hold `$`.
        text.set_parse_math(False)
        text.set_text(name)


def _shorten(name: str, length: int) -> str:
    """The name, its middle left out where it is too long: runs tend to differ at the ends."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _write_png(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    aside = path.with_name(f".{path.name}.writing")
    aside.write_bytes(buffer.getvalue())
    aside.replace(path)
    return path
