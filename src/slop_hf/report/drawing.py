"""What the figures of runs share: colours, fonts, legends, files, and what they take from a run.

Drawn on matplotlib's objects, so that no state of pyplot is touched and no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxBase

from ..errors import RunError
from ..runs.directory import RunDirectory
from ..runs.records import StageRecord
from .summary import run_names

#: Okabe and Ito's palette without yellow, then grey: told apart by colour-blind readers, and on white.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")

DPI = 150  # of PNG files
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
}
_SIDES = 8  # of a point, on which its label may stand
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
DESCENT = 0.2  # share of the initial stage in which a new model falls from ln(vocabulary)


@dataclass(frozen=True)
class DrawnRun:
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
        return [(before.total_flops, stage_label(after)) for before, after in pairs]


def read_runs(runs: Sequence[RunDirectory]) -> list[DrawnRun]:
    """The runs as figures take them, each with a name and a colour of its own.

    Raises:
        RunError: for no runs, one given twice, a directory that is no run, or a run without a finished stage.
    """
    if not runs:
        raise RunError("no runs to draw; give at least one run directory")
    found = []
    for number, (name, run) in enumerate(zip(run_names(runs), runs, strict=True)):
        if not (records := run.records()):
            raise RunError(f"{run.path} has no finished stage to draw; let `slop train` finish its first stage")
        found.append(DrawnRun(name, RUN_COLOURS[number % len(RUN_COLOURS)], records, run.history()))
    return found


def stage_label(record: StageRecord) -> str:
    """What the stage's directory is called after its number: `initial`, `layer`, `layer-ffn`."""
    return record.name.split("-", 2)[-1]


def dark(colour: str) -> tuple[float, ...]:
    """The colour for small text, which the lighter ones of the palette are too pale for."""
    return tuple(0.8 * part for part in to_rgb(colour))


def run_legend(
    where: Figure | SubFigure, runs: Sequence[DrawnRun], extra: Sequence[tuple[str, Line2D]] = (), *, letters: int = 84
) -> None:
    """Name the runs below a figure, and whatever else there is to name."""
    named = [(shorten(run.name, min(letters, 48)), Line2D([], [], color=run.colour, linewidth=2.4)) for run in runs]
    legend_below(where, [*named, *extra], letters=letters)


def legend_below(where: Figure | SubFigure, entries: Sequence[tuple[str, Line2D]], *, letters: int = 84) -> None:
    """A legend below a figure, in as many columns as have room: `letters` of names in a row."""
    names, handles = [name for name, _ in entries], [handle for _, handle in entries]
    ncols = next((n for n in (6, 5, 4, 3, 2) if max(map(len, names)) * n <= letters), 1)
    ncols = math.ceil(len(names) / math.ceil(len(names) / ncols))
    legend = where.legend(handles, ["x"] * len(names), loc="outside lower center", ncols=ncols)
    for text, name in zip(legend.get_texts(), names, strict=True):
        # Set afterwards and without mathtext, since names may begin with `_` or hold `$`.
        text.set_parse_math(False)
        text.set_text(name)


def power_of_ten(most: float) -> tuple[float, str]:
    """The power of ten that an axis up to some number is counted in, and how its label says so.

    In plain letters: matplotlib takes a tenth of a second to learn how formulas are read.

    >>> power_of_ten(4.2e12), power_of_ten(0)
    ((1000000000000.0, ' (× 10¹²)'), (1.0, ''))
    """
    exponent = math.floor(math.log10(most)) if most > 0 else 0
    return 10.0**exponent, f" (× 10{str(exponent).translate(_SUPERSCRIPT)})" if exponent else ""


def shorten(name: str, length: int) -> str:
    """The name, its middle left out where it is too long: runs tend to differ at the ends."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"


def grid(axes: Axes, along: Literal["x", "y"]) -> None:
    """Pale lines across one axis, at round numbers."""
    getattr(axes, f"{along}axis").set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.grid(axis=along, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def place_labels(axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Name points where there is room, beside them or farther off on a thin line; call it when limits are set.

    A label touches neither another nor a point, where there is such a place at all.
    """
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    lay_out(figure)
    pixels = figure.dpi / POINTS_PER_INCH
    taken = [Bbox.from_extents(*(at - 4 * pixels), *(at + 4 * pixels)) for at in axes.transData.transform(points)]
    for point, name in zip(points, names, strict=True):
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=7.5, ha="center", va="center")
        text.set_parse_math(False)
        box = text.get_window_extent()
        places = [(dx * pixels, dy * pixels) for dx, dy in _label_offsets(box.width / pixels, box.height / pixels)]
        free = (at for at in places if _is_free(box.translated(*at), taken, axes.bbox))
        x, y = next(free, places[0])
        text.set_position((x / pixels, y / pixels))
        taken.append(box.translated(x, y))
        if (x, y) not in places[:_SIDES]:
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
            axes.annotate("", point, (x / pixels, y / pixels), textcoords="offset points", arrowprops=line, zorder=1)


def _label_offsets(width: float, height: float) -> Iterator[tuple[float, float]]:
    """Where the centre of a label may lie from its point, in points: on all sides, then on sides farther off."""
    for gap in range(5, 60, 9):
        across, along = width / 2 + gap, height / 2 + gap
        yield from ((across, 0), (-across, 0), (0, along), (0, -along))
        yield from ((across, along), (-across, along), (across, -along), (-across, -along))


def _is_free(box: Bbox, taken: Sequence[Bbox], room: BboxBase) -> bool:
    inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
    return inside and not any(box.overlaps(other) for other in taken)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def lay_out(figure: Figure) -> None:
    """Give everything its place, so that it can be asked where it will stand; nothing is drawn yet."""
    figure.get_layout_engine().execute(figure)


def write_png(figure: Figure, path: str | Path, *, source: str = "") -> Path:
    """Write a figure aside and rename it into place; `source`, what it was drawn from, goes into its metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    # `savefig` would draw twice, once for the layout alone; and a file is packed while other threads go on.
    figure.canvas.print_png(aside, metadata={"Source": source} if source else None)
    aside.replace(path)
    return path
