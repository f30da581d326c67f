"""Figures of a comparison: every arm is drawn, marks are at the recorded values, and texts do not overlap."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from statistics import fmean

import matplotlib
import numpy as np
import pytest
from comparisons import FLOPS, comparison
from matplotlib.image import imread
from matplotlib.markers import CARETUPBASE
from PIL import Image

from slop_hf.errors import RunError
from slop_hf.experiments import final_losses as dots
from slop_hf.experiments import loss_curves as figures
from slop_hf.experiments import savings
from slop_hf.experiments.comparison import Curve
from slop_hf.experiments.final_losses import draw_final_losses, draw_scatter
from slop_hf.experiments.loss_curves import draw_arm_curves
from slop_hf.experiments.results import compute_flops_saved, compute_saving
from slop_hf.experiments.savings import draw_savings
from slop_hf.report import drawing


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, in order."""
    made = []
    new = drawing.create_figure
    monkeypatch.setattr(drawing, "DPI", 72)
    for module in (figures, dots, savings):
        monkeypatch.setattr(module, "create_figure", lambda *size: made.append(new(*size)) or made[-1])
    return made


def inked(path, colour: str) -> int:
    """How many pixels of a PNG have a colour, up to rounding."""
    image = imread(path)[..., :3]
    return int((np.abs(image - matplotlib.colors.to_rgb(colour)).max(axis=-1) < 0.02).sum())


def overlapping(figure) -> list[tuple[str, str]]:
    """Pairs of texts that touch: those of the axes, of the legend and of ticks."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
    legend = [text for legend in figure.legends for text in legend.get_texts()]
    texts = [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label, *legend, *ticks]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    inside = [(name, box) for name, box in boxes if figure.bbox.padded(50).contains(box.x0, box.y0)]
    return [(one, two) for (one, a), (two, b) in combinations(inside, 2) if a.overlaps(b)]


@pytest.mark.parametrize("against", ["flops", "seconds"])
@pytest.mark.parametrize(("arms", "seeds"), [(8, 3), (2, 1)])
def test_every_arm_is_drawn_and_named(tmp_path, drawn, arms, seeds, against):
    record = comparison(arms, seeds, budgets={"from-scratch": (0.25, 0.5, 1.0), "slop": (0.5, 1.0)})
    before = dict(matplotlib.rcParams)
    path = draw_arm_curves(record, tmp_path / "out" / "loss.png", against=against)
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]
    assert all(inked(path, colour) > 50 for colour in drawing.RUN_COLOURS[:arms])
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend[:2] == ["slop (l-f-h)", "from-scratch"] and len(legend) == arms + 4
    assert overlapping(drawn[0]) == []
    assert dict(matplotlib.rcParams) == before


def test_marks_are_at_the_values_of_the_record(tmp_path, drawn):
    record = comparison(2, budgets={"from-scratch": (0.5, 1.0), "slop": (0.5, 1.0)})
    draw_arm_curves(record, tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    marks = {line.get_marker(): line for line in axes.lines if line.get_marker() != "None"}
    runs = record.runs_of("slop")
    assert marks["^"].get_xdata() == pytest.approx([FLOPS * part / 4 for part in (1, 2, 3)], rel=1e-3)
    assert marks["^"].get_ydata()[2] == pytest.approx(fmean(run.stages[2].eval_loss for run in runs))
    ends = [fmean(run.eval_loss for run in record.runs_of("from-scratch", budget)) for budget in (0.5, 1.0)]
    assert list(marks["s"].get_ydata()) == pytest.approx(ends)
    goal = fmean(run.total_flops for run in record.runs_of("from-scratch"))
    assert marks["o"].get_xdata()[0] == pytest.approx((1 - compute_flops_saved(record, "slop").mean) * goal, rel=1e-3)
    assert list(marks["o"].get_ydata()) == [ends[-1]]
    assert [text.get_text() for text in axes.texts] == ["27% less compute"], "three seeds"


@pytest.mark.parametrize(
    ("budgets", "end_rate", "squares", "rings"),
    [((0.5, 1.0), 0.1, 2, 1), ((1.0,), 0.1, 0, 0), ((0.5, 1.0), 1.0, 0, 0)],
    ids=["two ends", "below the loss at the only budget", "a rate that is still high"],
)
def test_only_ends_are_marked_as_such(tmp_path, drawn, budgets, end_rate, squares, rings):
    record = comparison(2, budgets={"slop": budgets})
    runs = [replace(run, end_rate=end_rate) if run.arm == "slop" else run for run in record.runs]
    draw_arm_curves(replace(record, runs=tuple(runs)), tmp_path / "loss.png")
    marks = {line.get_marker(): len(line.get_xdata()) for line in drawn[0].axes[0].lines}
    assert (marks.get("s", 0), marks.get("o", 0)) == (squares, rings)


def test_savings_are_drawn_against_tokens_per_parameter(tmp_path, drawn):
    record = comparison(8, budgets={"from-scratch": (0.25, 0.5, 1.0), "slop": (0.5, 1.0), "not-grown": (0.5, 1.0)})
    path = draw_savings(record, tmp_path / "savings.png")
    axes = drawn[0].axes[0]
    parameters = record.runs_of("from-scratch")[0].parameters
    line = next(line for line in axes.lines if line.get_color() == drawing.RUN_COLOURS[0])
    budgets = (0.5, 1.0)
    assert list(line.get_xdata()) == [record.runs_of("slop", budget)[0].tokens / parameters for budget in budgets]
    expected = [compute_saving(record, "slop", budget) for budget in budgets]
    assert list(line.get_ydata()) == pytest.approx([saving.shares.mean for saving in expected])
    carets = [line for line in axes.lines if line.get_marker() == CARETUPBASE]
    assert expected[1].is_bound and expected[1].shares.mean in [y for caret in carets for y in caret.get_ydata()]
    assert overlapping(drawn[0]) == [] and inked(path, drawing.RUN_COLOURS[0]) > 50
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend[0] == "slop" and legend[-2:] == ["as many FLOPs as from-scratch", "lower bound"]


@pytest.mark.parametrize("budgets", [{}, {"from-scratch": (0.5, 1.0)}])
def test_savings_need_two_budgets_of_an_arm(tmp_path, budgets):
    assert draw_savings(comparison(2, budgets=budgets), tmp_path / "savings.png") is None


def test_ends_are_joined_in_the_order_of_their_time(tmp_path, drawn):
    """A longer budget on a faster machine can take less time than a shorter one."""
    record = comparison(2, 1, budgets={"slop": (0.5, 1.0)})
    slow = [
        replace(run, stages=tuple(replace(stage, seconds=9 * stage.seconds) for stage in run.stages))
        if (run.arm, run.budget) == ("slop", 0.5)
        else run
        for run in record.runs
    ]
    draw_arm_curves(replace(record, runs=tuple(slow)), tmp_path / "seconds.png", against="seconds")
    (ends,) = [line for line in drawn[0].axes[0].lines if line.get_marker() == "s"]
    assert list(ends.get_xdata()) == sorted(ends.get_xdata())
    assert ends.get_ydata()[0] < ends.get_ydata()[1], "the shorter budget comes last"


def test_the_curve_is_the_mean_of_seeds(tmp_path, drawn):
    record = comparison(2, 2)
    draw_arm_curves(record, tmp_path / "loss.png")
    curve = drawn[0].axes[0].lines[0]
    one, two = (run.curve for run in record.runs_of("slop"))
    assert list(curve.get_ydata()) == pytest.approx([fmean(pair) for pair in zip(one.losses, two.losses, strict=True)])


def test_seeds_with_different_evaluations_share_the_common_ones(tmp_path, drawn):
    record = comparison(2, 2)
    first = record.runs[0]
    columns = (first.curve.stages, first.curve.flops, first.curve.seconds, first.curve.losses)
    short = replace(first, curve=Curve(*(column[5:] for column in columns)))
    draw_arm_curves(replace(record, runs=(short, *record.runs[1:])), tmp_path / "loss.png")
    assert len(drawn[0].axes[0].lines[0].get_xdata()) == len(first.curve.flops) - 5


def test_the_axis_leaves_out_the_first_descent(tmp_path, drawn):
    draw_arm_curves(comparison(), tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert 3.0 < low < 3.2 and 3.9 < high < 4.5


def test_an_order_shared_by_all_arms_is_left_out_of_the_legend(tmp_path, drawn):
    draw_arm_curves(comparison(["slop", "msg", "from-scratch"], 1), tmp_path / "loss.png")
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend[:3] == ["slop", "from-scratch", "msg"]


def test_without_a_reference_there_is_no_goal(tmp_path, drawn):
    draw_arm_curves(comparison(2, reference=None), tmp_path / "loss.png")
    assert "final loss" not in " ".join(text.get_text() for text in drawn[0].legends[0].get_texts())
    assert not drawn[0].axes[0].texts


def test_an_arm_that_is_slower_claims_no_saving(tmp_path, drawn):
    draw_arm_curves(comparison(2, losses={"slop": 3.5}), tmp_path / "loss.png")
    assert not drawn[0].axes[0].texts


@pytest.mark.parametrize("seeds", [1, 3])
def test_final_losses_are_dots(tmp_path, drawn, seeds):
    record = comparison(8, seeds)
    path = draw_final_losses(record, tmp_path / "losses.png")
    axes = drawn[0].axes[0]
    rows = [line for line in axes.lines if line.get_marker() in "os"]
    grown = {run.arm for run in record.runs if run.schedule.stages}
    assert [line.get_marker() for line in rows] == ["o" if arm in grown else "s" for arm in record.arms]
    assert [sorted(line.get_xdata()) for line in rows] == [
        sorted(run.eval_loss for run in record.runs_of(arm)) for arm in record.arms
    ]
    assert [text.get_text() for text in axes.get_yticklabels()] == list(record.arms)
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["grown", "not grown", *(["mean of seeds"] if seeds > 1 else []), "mean of from-scratch"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first arm is on top"
    assert inked(path, drawing.RUN_COLOURS[1]) > 0 and overlapping(drawn[0]) == []


def test_nothing_to_draw(tmp_path):
    empty = comparison(2, 0)
    assert (
        draw_arm_curves(empty, tmp_path / "loss.png") is None
        and draw_final_losses(empty, tmp_path / "losses.png") is None
    )
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_arm_does_not_spoil_the_figures(tmp_path):
    record = comparison(2)
    worse = [
        replace(
            run,
            stages=(*run.stages[:-1], replace(run.stages[-1], eval_loss=float("nan"))),
            curve=Curve((), (), (), ()),
        )
        if run.arm == "slop"
        else run
        for run in record.runs
    ]
    assert draw_arm_curves(replace(record, runs=tuple(worse)), tmp_path / "loss.png")
    assert draw_final_losses(replace(record, runs=tuple(worse)), tmp_path / "losses.png")


def test_a_figure_names_its_source(tmp_path):
    record = comparison(2, 1)
    assert Image.open(draw_arm_curves(record, tmp_path / "loss.png")).info["Source"] == record.fingerprint
    assert replace(record, title="another").fingerprint != record.fingerprint


def test_scatter_names_its_points_in_a_legend(tmp_path, drawn):
    dice = np.random.default_rng(0)
    names = [f"l-f-h to {number}" for number in range(18)]
    predicted = 10 ** dice.uniform(24, 26, 18)
    measured = 3 + 0.1 * np.log10(predicted / 1e24) + dice.normal(0, 0.02, 18)
    labels = ("Π Δparams", "held-out loss")
    draw_scatter(names, predicted, measured, tmp_path / "a.png", title="Order", labels=labels)
    axes = drawn[0].axes[0]
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == [name for _, name in sorted(zip(measured, names, strict=True), reverse=True)]
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(names), "every point has its own look"
    assert overlapping(drawn[0]) == []
    assert "Spearman's ρ = 0." in axes.get_title(loc="left")


@pytest.mark.parametrize(
    ("names", "predicted", "measured"),
    [(["a", "b"], [1, 2], [1]), (["a"], [1, 2], [1, 2]), (["a", "b"], [np.inf, 2], [1, 2])],
)
def test_scatter_refuses_values_that_it_cannot_draw(tmp_path, names, predicted, measured):
    with pytest.raises(RunError):
        draw_scatter(names, predicted, measured, tmp_path / "a.png", title="", labels=("", ""))
