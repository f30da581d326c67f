"""Figures: valid, not blank, and their labels apart."""

from __future__ import annotations

import json
import math
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation
from report_runs import GROWN, OTHER_ORDER, SCRATCH

from slop_hf.errors import RunError
from slop_hf.report import drawing, figures, loss_figure, path_figure
from slop_hf.runs.directory import STATE_FILE


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, in order."""
    made = []
    new = figures.new_figure
    monkeypatch.setattr(drawing, "DPI", 72)
    monkeypatch.setattr(figures, "new_figure", lambda *size: made.append(new(*size)) or made[-1])
    return made


def inked(path, colour: str) -> int:
    """How many pixels of a PNG have a colour, up to rounding."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)[..., :3]
    assert min(image.shape[:2]) > 400 and image.std() > 0.02
    return int((np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02).sum())


@pytest.mark.parametrize("draw", [loss_figure, path_figure])
def test_figure_shows_every_run(make_run, tmp_path, draw):
    runs = [make_run("slop"), make_run("scratch", SCRATCH), make_run("other", OTHER_ORDER)]
    before = dict(matplotlib.rcParams)
    path = draw(runs, tmp_path / "out" / "figure.png")
    assert all(inked(path, colour) > 200 for colour in drawing.RUN_COLOURS[:3])
    assert inked(path, drawing.RUN_COLOURS[4]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    assert dict(matplotlib.rcParams) == before


def test_a_figure_is_drawn_once(make_run, tmp_path, monkeypatch):
    """Drawing holds Python's lock, and a run that publishes its stages trains meanwhile."""
    draw, drawn = Figure.draw, []
    monkeypatch.setattr(Figure, "draw", lambda figure, renderer: drawn.append(figure) or draw(figure, renderer))
    loss_figure([make_run()], tmp_path / "loss.png")
    assert len(drawn) == 1


def test_losses_stand_at_their_flops(make_run, tmp_path, drawn):
    run = make_run()
    loss_figure([run], tmp_path / "loss.png")
    training, held_out, *masts = drawn[0].axes[0].lines
    entries = run.history()
    assert list(training.get_ydata()) == [entry["loss"] for entry in entries if "loss" in entry]
    assert list(held_out.get_ydata()) == [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    records = run.records()
    scale = 10 ** math.floor(math.log10(records[-1].total_flops))
    assert training.get_xdata()[-1] * scale == pytest.approx(records[-1].total_flops)
    assert sorted(mast.get_xdata()[0] * scale for mast in masts) == pytest.approx(
        [record.total_flops for record in records[:-1]]
    )


@pytest.mark.parametrize("log_x", [False, True])
def test_stage_labels_do_not_touch(make_run, tmp_path, drawn, log_x):
    runs = [make_run(f"run{number}", (GROWN, OTHER_ORDER)[number % 2]) for number in range(4)]
    loss_figure(runs, tmp_path / "loss.png", log_x=log_x)
    axes = drawn[0].axes[0]
    labels = [text for text in axes.texts if isinstance(text, Annotation) and text.get_text()]
    assert sorted(text.get_text() for text in labels) == ["ffn"] * 4 + ["hidden"] * 4 + ["layer"] * 4
    boxes = [text.get_window_extent() for text in labels]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    # No label is crossed by another's mast, which rises from the axes to its own label.
    masts = [(axes.transData.transform((text.xy[0], 0))[0], box.y0) for text, box in zip(labels, boxes, strict=True)]
    assert not any(box.x0 < x < box.x1 and y >= box.y0 for box in boxes for x, y in masts)
    title = axes._left_title.get_window_extent()
    assert not any(title.overlaps(box) for box in boxes)


def test_first_descent_leaves_through_the_top(make_run, tmp_path, drawn):
    run = make_run()
    loss_figure([run], tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    losses = [(entry["stage"], entry["eval_loss"]) for entry in run.history() if "eval_loss" in entry]
    assert losses[0][1] > high
    assert all(low < loss < high for stage, loss in losses if stage)


def test_dimensions_are_relative_to_the_initial_ones(make_run, tmp_path, drawn):
    path_figure([make_run()], tmp_path / "path.png")
    parameters, dimensions = drawn[0].axes
    assert [list(line.get_ydata()) for line in dimensions.lines] == [
        [1, 1, 1, 2],
        [1, 1, 2, 2],
        [1, 2, 2, 2],
        [1, 1, 1, 2],
    ]
    assert [tick.get_text() for tick in dimensions.get_xticklabels()] == ["initial", "layer", "ffn", "hidden"]
    assert [tick.get_text() for tick in dimensions.get_yticklabels()] == ["×1", "×2"]
    steps = parameters.lines[0].get_ydata()
    assert len(steps) == 8 and list(steps[::2]) == list(steps[1::2]) and steps[0] < steps[2] < steps[4] < steps[6]


def test_odd_names_are_taken_literally(make_run, tmp_path, drawn):
    names = ["_under", "a$b$c", "long-" * 30 + "end"]
    loss_figure([make_run(name) for name in names], tmp_path / "loss.png")
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts[:2] == names[:2]
    assert len(texts[2]) == 48 and texts[2].endswith("-end")
    assert texts[3:] == ["training loss", "held-out loss", "growth"]


def test_run_without_losses_is_said_so(make_run, tmp_path, drawn):
    run = make_run("scratch", SCRATCH)
    history = [{"train_runtime": 1.0, "train_loss": 3.0}, {"loss": math.nan, "train_flops": 1.0}, {"eval_loss": 2.0}]
    (run.stage_dir(0) / STATE_FILE).write_text(json.dumps({"log_history": history}))
    loss_figure([run], tmp_path / "loss.png")
    path_figure([run], tmp_path / "path.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["no losses were logged"]


def test_nothing_to_draw_is_refused(make_run, tmp_path):
    with pytest.raises(RunError, match="no runs"):
        loss_figure([], tmp_path / "loss.png")
    with pytest.raises(RunError, match="no finished stage"):
        path_figure([make_run(stages=0)], tmp_path / "path.png")
    assert not list(tmp_path.glob("*.png"))
