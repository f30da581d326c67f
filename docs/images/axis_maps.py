"""Draws `axis_maps.png` for docs/growth.md from the library's own axis maps; `make images` runs it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from slop_hf import ModelDims
from slop_hf.growth.axes import AxisMap, build_axis_maps

OLD, NEW, COPY, INK = "#9ecae1", "#fdd0a2", "#6baed6", "#333333"
TWO_HEADS, THREE_HEADS = ModelDims(6, 4, 1, 2, 2, 2), ModelDims(6, 4, 1, 3, 3, 2)
GROUPED, WIDER_GROUPS = ModelDims(12, 4, 1, 4, 2, 2), ModelDims(12, 4, 1, 6, 2, 2)
TITLE_SIZE, TEXT_SIZE = 9.5, 8
#: Title, dimensions before and after, and inits of each map.
MAPS = (
    ("2 → 3 heads, init random or preserving: the new head is new", TWO_HEADS, THREE_HEADS, {}),
    ("2 → 3 heads, init copy: the new head is a copy of head 0", TWO_HEADS, THREE_HEADS, {"mha": "copy"}),
    ("4 → 6 query heads with 2 key/value heads: each group grows at its end", GROUPED, WIDER_GROUPS, {}),
)


def draw(path: Path) -> None:
    """Draw three maps of the axis `query`, and a matrix with two growing axes."""
    figure = Figure(figsize=(10.6, 4.9), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(3, 2, width_ratios=(1.45, 1))
    for row, (title, old, new, inits) in enumerate(MAPS):
        draw_map(figure.add_subplot(grid[row, 0]), title, build_axis_maps(old, new, inits)["query"], old.head_dim)
    draw_matrix(figure.add_subplot(grid[:, 1]))
    figure.savefig(path, metadata={"Software": None})


def list_sources() -> str:
    """Return the sources of the slots in all maps, as text."""
    return str([build_axis_maps(old, new, inits)["query"].source for _, old, new, inits in MAPS])


def draw_map(axes: Axes, title: str, axis_map: AxisMap, head_dim: int) -> None:
    """Draw the old slots above the new ones, with an arrow from each old slot to the slots that come from it."""
    draw_slots(axes, 1.0, list(range(axis_map.old_size)), head_dim, [OLD] * axis_map.old_size)
    seen: set[int] = set()
    colours = []
    for slot, old in enumerate(axis_map.source):
        colours.append(NEW if old is None else COPY if old in seen else OLD)
        if old is not None:
            seen.add(old)
            start, end = (centre(old, head_dim), 1.0), (centre(slot, head_dim), 0.42)
            axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=7, color=INK, linewidth=0.7))
    draw_slots(axes, 0.0, axis_map.source, head_dim, colours)
    axes.set_title(title, fontsize=TITLE_SIZE, loc="left")
    axes.set(xlim=(-1.6, 14.6), ylim=(-0.1, 1.5))
    for height, text in ((1.2, "old slots"), (0.2, "source of\neach slot")):
        axes.text(-0.2, height, text, fontsize=TEXT_SIZE, ha="right", va="center")
    axes.axis("off")


def centre(slot: int, head_dim: int) -> float:
    """Return the horizontal centre of a slot; heads are separated by a gap."""
    return slot + 0.25 * (slot // head_dim) + 0.5


def draw_slots(axes: Axes, bottom: float, labels: list[int | None], head_dim: int, colours: list[str]) -> None:
    """Draw a row of slots with their labels."""
    for slot, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        left = centre(slot, head_dim) - 0.5
        axes.add_patch(Rectangle((left, bottom), 1, 0.4, facecolor=colour, edgecolor="white"))
        text = "new" if label is None else str(label)
        axes.text(left + 0.5, bottom + 0.2, text, fontsize=TEXT_SIZE, ha="center", va="center", color=INK)


def draw_matrix(axes: Axes) -> None:
    """Draw the four blocks of a matrix that is written along one growing axis and read along another."""
    blocks = (
        (0, 2, 3, 3, OLD, "old entries\n× factor"),
        (3, 2, 2, 3, NEW, "new columns:\nthe reader side\nof new slots"),
        (0, 0, 3, 2, NEW, "new rows:\nthe writer side of new slots"),
        (3, 0, 2, 2, NEW, "new in both"),
    )
    for left, bottom, width, height, colour, text in blocks:
        axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="white", linewidth=2))
        axes.text(left + width / 2, bottom + height / 2, text, fontsize=TEXT_SIZE, ha="center", va="center", color=INK)
    axes.set_title("a weight is assembled from blocks,\none segment per axis", fontsize=TITLE_SIZE, loc="left")
    axes.text(2.5, 5.15, "axis that is read", fontsize=TEXT_SIZE, ha="center")
    axes.text(-0.2, 2.5, "axis that is written", fontsize=TEXT_SIZE, va="center", rotation=90, ha="right")
    axes.set(xlim=(-0.7, 5.1), ylim=(-0.1, 5.6), aspect="equal")
    axes.axis("off")
