"""Figures of runs: valid files, the right content, no overlapping labels."""

from __future__ import annotations

import json
import math
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from report_runs import INITIAL, OTHER_ORDER, SCRATCH, TOKENS_PER_STEP

from slop_hf.errors import RunError
from slop_hf.report import draw_run_losses, draw_run_paths, drawing, figures
from slop_hf.runs.directory import STATE_FILE
from slop_hf.schedule import GrowthSchedule, GrowthStage


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn by a test, in order."""
    made = []
    new = figures.create_figure
    monkeypatch.setattr(drawing, "DPI", 72)
    monkeypatch.setattr(figures, "create_figure", lambda *size: made.append(new(*size)) or made[-1])
    return made


def inked(path, colour: str) -> int:
    """Count the pixels of a PNG with a colour, up to rounding."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)[..., :3]
    assert min(image.shape[:2]) > 400 and image.std() > 0.02
    return int((np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02).sum())


@pytest.mark.parametrize("draw", [draw_run_losses, draw_run_paths])
def test_figure_shows_every_run(make_run, tmp_path, draw):
    runs = [make_run("slop"), make_run("scratch", SCRATCH), make_run("other", OTHER_ORDER)]
    before = dict(matplotlib.rcParams)
    path = draw(runs, tmp_path / "out" / "figure.png")
    assert all(inked(path, colour) > 200 for colour in drawing.RUN_COLOURS[:3])
    assert inked(path, drawing.RUN_COLOURS[4]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    assert dict(matplotlib.rcParams) == before


def test_a_figure_is_drawn_once(make_run, tmp_path, monkeypatch):
    """Drawing holds Python's lock, which would slow down a run that publishes its stages while it trains."""
    draw, drawn = Figure.draw, []
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: drawn.append(figure) or draw(figure, renderer))
    draw_run_losses([make_run()], tmp_path / "loss.png")
    assert len(drawn) == 1


def test_losses_are_drawn_at_their_flops(make_run, tmp_path, drawn):
    run = make_run()
    draw_run_losses([run], tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    training, held_out, growths, grown, *lines = axes.lines
    entries, records = run.history(), run.records()
    assert list(training.get_ydata()) == [entry["loss"] for entry in entries if "loss" in entry]
    ends = [record.total_flops for record in records[:-1]]
    dots = [entry["eval_loss"] for entry in entries if "eval_loss" in entry and entry["train_flops"] not in ends]
    assert list(held_out.get_ydata()) == dots, "the losses around growths have their own marks"
    assert training.get_xdata()[-1] == pytest.approx(records[-1].total_flops)
    before_growth = [(record.total_flops, record.eval_loss) for record in records[:-1]]
    assert list(zip(*growths.get_data(), strict=True)) == before_growth and growths.get_marker() == "^"
    after_growth = [(flops, record.eval_loss_after_growth) for flops, record in zip(ends, records[1:], strict=True)]
    assert list(zip(*grown.get_data(), strict=True)) == after_growth and grown.get_marker() == "v"
    bands = [(band.get_x(), band.get_x() + band.get_width()) for band in axes.patches]
    assert bands == [(ends[0], ends[1]), (ends[2], pytest.approx(records[-1].total_flops))], "every other stage"
    assert [line.get_xdata()[0] for line in lines] == [flops for flops, _ in before_growth]
    assert axes.get_xlabel() == "training FLOPs (× 10¹²)"
    assert [tick.get_text() for tick in axes.get_xticklabels()][1:3] == ["0", "1"]


def test_growth_without_held_out_loss_is_marked_at_the_last_training_loss(make_run, tmp_path, drawn):
    run = make_run(eval_loss=None)
    draw_run_losses([run], tmp_path / "loss.png")
    losses = {entry["train_flops"]: entry["loss"] for entry in run.history() if "loss" in entry}
    growths = drawn[0].axes[0].lines[2]
    assert list(growths.get_ydata()) == [losses[record.total_flops] for record in run.records()[:-1]]


def outline(label) -> Path:
    """The outline of a slanted label."""
    angle, anchor = label.get_rotation(), label.get_transform().transform(label.get_position())
    label.set_rotation(0)
    (left, bottom), (right, top) = label.get_window_extent().get_points()
    label.set_rotation(angle)
    corners = Path([(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)])
    return corners.transformed(Affine2D().rotate_deg_around(*anchor, angle))


@pytest.mark.parametrize("log_x, gap", [(False, None), (True, None), (False, 0)])
def test_names_of_growths_in_quick_succession_do_not_touch(make_run, tmp_path, drawn, monkeypatch, log_x, gap):
    if gap is not None:
        monkeypatch.setattr(figures, "LABEL_GAP", gap)
    stages, dims = [], INITIAL
    for steps in (1, 20, 2, 1, 1, 3, 1, 1, 9, 2, 1, 40):
        dims = dims.replace(num_hidden_layers=dims.num_hidden_layers + 1, intermediate_size=dims.intermediate_size + 8)
        stages.append(GrowthStage(("layer", "ffn"), dims, steps * TOKENS_PER_STEP))
    schedule = GrowthSchedule(INITIAL, tuple(stages), 100 * TOKENS_PER_STEP)
    draw_run_losses([make_run(schedule=schedule)], tmp_path / "loss.png", log_x=log_x)
    axes = drawn[0].axes[0]
    assert len(axes.lines[2].get_xdata()) == len(axes.lines[4:]) == 12, "every growth has its marks"
    labels = axes.child_axes[0].get_xticklabels()
    assert 3 <= len(labels) <= 12 and all(label.get_text() == "layer-ffn" for label in labels)
    touching = any(one.intersects_path(other) for one, other in combinations(map(outline, labels), 2))
    assert touching is (gap == 0)
    title = axes._left_title.get_window_extent()
    assert not any(outline(label).intersects_bbox(title) for label in labels)


@pytest.mark.parametrize("log_x", [False, True])
def test_growths_of_a_single_run_are_named_at_the_top(make_run, tmp_path, drawn, log_x):
    draw_run_losses([make_run()], tmp_path / "loss.png", log_x=log_x)
    axes = drawn[0].axes[0]
    (top,) = axes.child_axes
    labels = top.get_xticklabels()
    assert [label.get_text() for label in labels] == ["layer", "ffn", "hidden"]
    boxes = [label.get_window_extent() for label in labels] + [axes._left_title.get_window_extent()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def test_the_legend_of_several_runs_has_their_orders_of_growth(make_run, tmp_path, drawn):
    runs = [make_run("slop"), make_run("other", OTHER_ORDER), make_run("scratch", SCRATCH)]
    draw_run_losses(runs, tmp_path / "loss.png")
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == [
        "slop (l-f-h)",
        "other (h-f-l)",
        "scratch",
        "training loss",
        "held-out loss",
        "before growth",
        "after growth",
    ]
    triangles = [line for line in drawn[0].axes[0].lines if line.get_marker() == "^"]
    assert [len(line.get_xdata()) for line in triangles] == [3, 3]


def test_first_descent_leaves_through_the_top(make_run, tmp_path, drawn):
    run = make_run()
    draw_run_losses([run], tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    losses = [(entry["stage"], entry["eval_loss"]) for entry in run.history() if "eval_loss" in entry]
    assert losses[0][1] > high
    assert all(low < loss < high for stage, loss in losses if stage)


def test_dimensions_are_relative_to_the_initial_ones(make_run, tmp_path, drawn):
    draw_run_paths([make_run()], tmp_path / "path.png")
    parameters, dimensions = drawn[0].axes
    assert [list(line.get_ydata()) for line in dimensions.lines] == [
        [1, 1, 1, 2],
        [1, 1, 2, 2],
        [1, 2, 2, 2],
        [1, 1, 1, 2],
    ]
    assert [tick.get_text() for tick in dimensions.get_xticklabels()] == ["initial", "layer", "ffn", "hidden"]
    assert [tick.get_text() for tick in dimensions.get_yticklabels()] == ["×1", "×2"]
    start, *steps = parameters.lines[0].get_ydata()
    assert parameters.lines[0].get_drawstyle() == "steps-pre"
    assert len(steps) == 4 and start == steps[0] and steps == sorted(set(steps))


def test_odd_names_are_shown_literally(make_run, tmp_path, drawn):
    names = ["_under", "a$b$c", "long-" * 30 + "end"]
    draw_run_losses([make_run(name) for name in names], tmp_path / "loss.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[:2] == names[:2]
    assert len(texts[2]) == 48 and texts[2].endswith("-end")
    assert texts[3:] == ["training loss", "held-out loss", "before growth", "after growth"]


def test_figure_says_that_no_losses_were_logged(make_run, tmp_path, drawn):
    run = make_run("scratch", SCRATCH)
    history = [{"train_runtime": 1.0, "train_loss": 3.0}, {"loss": math.nan, "train_flops": 1.0}, {"eval_loss": 2.0}]
    (run.stage_dir(0) / STATE_FILE).write_text(json.dumps({"log_history": history}))
    draw_run_losses([run], tmp_path / "loss.png")
    draw_run_paths([run], tmp_path / "path.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["no losses were logged"]


def test_nothing_to_draw_is_rejected(make_run, tmp_path):
    with pytest.raises(RunError, match="no runs"):
        draw_run_losses([], tmp_path / "loss.png")
    with pytest.raises(RunError, match="no finished stage"):
        draw_run_paths([make_run(stages=0)], tmp_path / "path.png")
    assert not list(tmp_path.glob("*.png"))
