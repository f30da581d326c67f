"""Parts that figures share: colours, fonts, legends, the axis of FLOPs, PNG files, and the data of a run.

Figures are drawn on matplotlib's objects: pyplot's global state stays as it is, and no display is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

from ..errors import RunError
from ..io.files import write_file
from ..io.serialization import Json
from ..runs.directory import RunDirectory
from ..runs.records import StageRecord
from ..runs.snapshot import RunSnapshot
from .summary import name_runs

#: The palette of Okabe and Ito without yellow, and grey: distinct on white, also for colour-blind readers.
RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#888888")

#: Marks of runs, so that they differ without colours too; triangles mark growths.
RUN_MARKERS = ("o", "s", "D", "P", "X", "*", "p", "h")

DPI = 150  # of PNG files
WIDTH = 9.0  # inches
STYLE: Mapping[str, object] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "legend.frameon": False,
    "text.usetex": False,
    "figure.facecolor": "white",
}
#: Share of the initial stage in which the loss of a new model falls from ln(vocabulary size); axes leave it out.
DESCENT_SHARE = 0.2

#: Keyword arguments of an artist, such as a line.
Style: TypeAlias = Mapping[str, object]
#: A name in a legend and the artist, or the artists side by side, that it explains.
LegendEntry: TypeAlias = tuple[str, Artist | tuple[Artist, ...]]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class DrawnRun:
    """The data of a run that figures show."""

    name: str
    colour: str
    marker: str
    sequence: str
    records: Sequence[StageRecord]
    history: Sequence[dict[str, Json]]

    def losses(self, key: str) -> tuple[list[float], list[float]]:
        """Return the FLOPs and the losses of log entries with a finite loss under `key`."""
        logged = [entry for entry in self.history if {"train_flops", key} <= entry.keys()]
        finite = [entry for entry in logged if math.isfinite(entry[key])]
        return [entry["train_flops"] for entry in finite], [entry[key] for entry in finite]

    @property
    def settled_losses(self) -> list[float]:
        """All logged losses after the initial model's first descent."""
        start = DESCENT_SHARE * self.records[0].total_flops
        pairs = [pair for key in ("loss", "eval_loss") for pair in zip(*self.losses(key), strict=True)]
        return [loss for flops, loss in pairs if flops >= start] or [loss for _, loss in pairs]

    @property
    def growths(self) -> list[tuple[float, str]]:
        """The training FLOPs before each growth, and the label of the stage after it."""
        pairs = zip(self.records, self.records[1:], strict=False)
        return [(before.total_flops, get_stage_label(after)) for before, after in pairs]


def read_runs(runs: Sequence[RunDirectory | RunSnapshot]) -> list[DrawnRun]:
    """Read the data of runs for a figure, and give each a unique name, a colour and a mark."""
    if not runs:
        raise RunError("no runs to draw; give at least one run directory")
    drawn_runs = []
    for number, (name, run) in enumerate(zip(name_runs(runs), runs, strict=True)):
        run = run if isinstance(run, RunSnapshot) else RunSnapshot.read(run)
        if not run.records:
            raise RunError(f"{run.path} has no finished stage to draw; let `slop train` finish its first stage")
        colour, marker = RUN_COLOURS[number % len(RUN_COLOURS)], RUN_MARKERS[number % len(RUN_MARKERS)]
        drawn_runs.append(DrawnRun(name, colour, marker, run.schedule.sequence, run.records, run.history))
    return drawn_runs


def get_stage_label(record: StageRecord) -> str:
    """Return the name of the stage's directory after its number: `initial`, `layer`, `layer-ffn`."""
    return record.name.split("-", 2)[-1]


def darken(colour: str) -> tuple[float, ...]:
    """Return a darker shade for small text, in which the light colours of the palette would be too pale."""
    return tuple(0.8 * part for part in to_rgb(colour))


def label_runs(names: Sequence[str], sequences: Sequence[str]) -> list[str]:
    """Return names for a legend, each with its order of growth unless all grown runs share the order.

    >>> label_runs(["slop", "msg", "scratch"], ["l-f-h", "f-h-l", ""])
    ['slop (l-f-h)', 'msg (f-h-l)', 'scratch']
    """
    grown = [sequence for sequence in sequences if sequence]
    is_shared = len(grown) > 1 and len({*grown}) == 1
    return [
        f"{name} ({sequence})" if sequence and sequence != name and not is_shared else name
        for name, sequence in zip(names, sequences, strict=True)
    ]


def draw_run_legend(
    panel: Figure | SubFigure, runs: Sequence[DrawnRun], extra: Sequence[LegendEntry] = (), *, letters: int = 84
) -> None:
    """Draw a legend of the runs below a figure, followed by other entries; for `letters` see `draw_legend`."""
    names = [shorten_name(run.name, min(letters, 48)) for run in runs]
    names = label_runs(names, [shorten_name(run.sequence, 20) for run in runs])
    lines = [Line2D([], [], color=run.colour, marker=run.marker, markersize=5, linewidth=2.4) for run in runs]
    draw_legend(panel, [*zip(names, lines, strict=True), *extra], letters=letters)


def draw_legend(
    panel: Figure | SubFigure, entries: Sequence[LegendEntry], *, letters: int = 84, **style: object
) -> None:
    """Draw a legend below a figure, in as many columns as fit if a row has room for so many letters of names."""
    columns = min(max(letters // max(len(name) for name, _ in entries), 1), 6)
    columns = math.ceil(len(entries) / math.ceil(len(entries) / columns))
    style = {"ncols": columns, "handler_map": {tuple: HandlerTuple(None, pad=0)}, **style}
    artists = [artist for _, artist in entries]
    legend = panel.legend(artists, ["x"] * len(artists), loc="outside lower center", **style)
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        # Set afterwards and without mathtext, since names may begin with `_` or contain `$`.
        text.set_parse_math(False)
        text.set_text(name)


def label_flops_axis(axes: Axes, most: float) -> None:
    """Label the horizontal axis as training FLOPs, counted in the power of ten of the largest value, `most`."""
    exponent = math.floor(math.log10(most)) if most > 0 else 0
    if exponent:
        axes.ticklabel_format(axis="x", style="sci", scilimits=(exponent, exponent))
        axes.xaxis.get_offset_text().set_visible(False)
    # In plain letters: matplotlib takes a tenth of a second to set up its parser of formulas.
    axes.set_xlabel("training FLOPs" + (f" (× 10{str(exponent).translate(_SUPERSCRIPT)})" if exponent else ""))


def shorten_name(name: str, length: int) -> str:
    """Return the name, without its middle if it is too long: names of runs tend to differ at the ends.

    >>> shorten_name("growth-of-llama-seed-1", 12)
    'growt…seed-1'
    """
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"


def draw_grid(axes: Axes, along: Literal["x", "y"]) -> None:
    """Draw pale lines across one axis, at round numbers."""
    getattr(axes, f"{along}axis").set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.grid(axis=along, color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def create_figure(width: float, height: float) -> Figure:
    """Create an empty figure; the size is in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(h_pad=0.05, w_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Figure, path: str | Path, *, source: str = "") -> Path:
    """Write a figure atomically and return its path.

    The file's metadata holds `source`, a fingerprint of the data that the figure shows.
    """
    with write_file(path) as temporary:
        # `savefig` would draw twice, the first time for the layout alone.
        figure.canvas.print_png(temporary, metadata={"Source": source} if source else None)
    return Path(path)


def read_source(path: str | Path) -> str:
    """Return the `source` that a PNG file was written with; empty without a file or a source."""
    if not Path(path).is_file():
        return ""
    with Image.open(path) as image:
        return str(image.info.get("Source", ""))
