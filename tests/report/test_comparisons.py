"""Figures that compare runs: their content, and when nothing is drawn."""

from __future__ import annotations

import json
import math
from itertools import combinations

import numpy as np
import pytest
from report_runs import GROWN, INITIAL, OTHER_ORDER, SCRATCH, STEPS, TOKENS_PER_STEP, write_evaluations

from slop_hf.errors import RunError
from slop_hf.paper.tables import TABLE_1
from slop_hf.report import (
    comparisons,
    compute_time_correlation,
    draw_heads,
    draw_radar,
    draw_time_correlation,
    drawing,
)
from slop_hf.runs.directory import EVAL_FILE
from slop_hf.schedule import GrowthSchedule, GrowthStage

TASKS = {"piqa": 0.6, "boolq": 0.5, "arc": 0.3}
TOKENS = STEPS * TOKENS_PER_STEP


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn by a test, in order."""
    made = []
    new = comparisons.create_figure
    monkeypatch.setattr(drawing, "DPI", 72)
    monkeypatch.setattr(comparisons, "create_figure", lambda *size: made.append(new(*size)) or made[-1])
    return made


def with_heads(heads: int, *, width: int = 1) -> GrowthSchedule:
    """Layers, then ffn, from 2 heads of size 32; heads grow first if `heads` is above 2."""
    grown = INITIAL.replace(num_attention_heads=heads, num_key_value_heads=heads, head_dim=32)
    deep = grown.replace(num_hidden_layers=4)
    stages = (GrowthStage(("mha",), grown, TOKENS),) if heads != 2 else ()
    stages += (GrowthStage(("layer",), deep, TOKENS),)
    if width > 1:
        stages += (GrowthStage(("ffn",), deep.replace(intermediate_size=176 * width), TOKENS),)
    return GrowthSchedule(INITIAL, stages, initial_tokens=TOKENS)


def test_radar_has_one_axis_per_shared_task(make_run, tmp_path, drawn):
    one = write_evaluations(make_run("one"), {**TASKS, "mmlu": 0.9})
    two = write_evaluations(make_run("two", SCRATCH), {"piqa": 0.3, "boolq": 0.5, "arc": 0.6})
    bare = make_run("bare")
    path = draw_radar([one, bare, two], tmp_path / "radar.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = drawn[0].axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["arc\nacc_norm 0.66", "boolq\nacc_norm 0.55", "piqa\nacc_norm 0.66"]
    lengths = [list(line.get_ydata()) for line in axes.lines]
    assert lengths == [pytest.approx([0.5, 1, 1, 0.5]), pytest.approx([1, 1, 0.5, 1])]
    assert [line.get_color() for line in axes.lines] == [drawing.RUN_COLOURS[0], drawing.RUN_COLOURS[2]]


def test_parts_of_a_task_have_no_axis(make_run, tmp_path, drawn):
    tasks = {**TASKS, "mmlu": 0.3, "mmlu_anatomy": 0.4, "mmlu_law": 0.2, "arc_easy": 0.5}
    draw_radar([write_evaluations(make_run(name), tasks) for name in ("one", "two")], tmp_path / "radar.png")
    labels = [label.get_text().split("\n")[0] for label in drawn[0].axes[0].get_xticklabels()]
    assert labels == ["arc", "boolq", "mmlu", "piqa"]


def test_radar_labels_do_not_touch(make_run, tmp_path, drawn):
    tasks = {f"a_rather_long_task_{number}": 0.5 for number in range(8)}
    runs = [write_evaluations(make_run(f"a-rather-long-name-{number}"), tasks) for number in range(6)]
    draw_radar(runs, tmp_path / "radar.png")
    figure = drawn[0]
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    boxes += [figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize(
    "tasks, facts", [({"piqa": 0.6, "boolq": 0.5}, {}), (TASKS, {"num_fewshot": 5}), (TASKS, {"limit": 9})]
)
def test_radar_needs_three_tasks_with_the_same_settings(make_run, tmp_path, tasks, facts):
    runs = [write_evaluations(make_run("one"), TASKS), write_evaluations(make_run("two"), tasks, **facts)]
    assert draw_radar(runs, tmp_path / "radar.png") is None
    assert not (tmp_path / "radar.png").exists()


def test_radar_needs_two_finished_runs(make_run, tmp_path):
    runs = [write_evaluations(make_run("one"), TASKS), write_evaluations(make_run("two", stages=3), TASKS)]
    assert draw_radar(runs, tmp_path / "radar.png") is None


def test_radar_takes_final_scores_for_which_higher_is_better(make_run, tmp_path):
    runs = [write_evaluations(make_run(name), TASKS) for name in ("one", "two")]
    scores = [{"task": task, "metrics": {"ppl": 3.0}} for task in ("a", "b", "c")]
    scores += [{"task": task, "metrics": {"acc": 0.5}, "when": "after_growth"} for task in TASKS]
    (runs[1].stage_dir(3) / EVAL_FILE).write_text(json.dumps(scores))
    assert draw_radar(runs, tmp_path / "radar.png") is None


def test_correlation_of_the_papers_table_shows_two_phases():
    runs = sorted(TABLE_1.runs, key=lambda run: float(run.product))
    values = np.array(compute_time_correlation([(TABLE_1.initial_hours, *run.stage_hours) for run in runs]))
    assert np.allclose(values, values.T) and np.allclose(np.diag(values), 1)
    low, high = [0, 1, 2, 4], [3, 5, 6, 7, 8, 9]
    assert min(values[np.ix_(low, low)].min(), values[np.ix_(high, high)].min()) > 0.92
    assert values[np.ix_(low, high)].mean() < 0.87
    pairs = list(combinations(range(len(runs)), 2))
    apart = [abs(math.log10(float(runs[i].product) / float(runs[j].product))) for i, j in pairs]
    assert np.corrcoef(apart, [values[pair] for pair in pairs])[0, 1] < -0.5  # close products have close times


def test_correlation_figure_orders_by_product(make_run, tmp_path, drawn):
    runs = [make_run("late", OTHER_ORDER), make_run("a$b"), make_run("b", seconds=9), make_run("scratch", SCRATCH)]
    assert draw_time_correlation(runs, tmp_path / "correlation.png").is_file()
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a$b", "b", "late"]
    assert [text.get_text() for text in axes.texts] == ["1.00"] * 9


def test_correlation_needs_three_schedules_of_equal_length(make_run, tmp_path):
    runs = [make_run("one"), make_run("two"), make_run("half", stages=3), make_run("short", with_heads(4))]
    assert draw_time_correlation(runs, tmp_path / "correlation.png") is None


def test_equal_times_have_no_correlation(make_run, tmp_path, drawn):
    values = compute_time_correlation([[1, 1, 1], [1, 2, 3]])
    assert math.isnan(values[0][0]) and math.isnan(values[0][1]) and values[1][1] == pytest.approx(1)
    runs = [make_run(name) for name in ("one", "two", "three")]
    for run in runs:
        for record in run.records():
            path = run.stage_dir(record.stage) / "stage.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 5.0}))
    draw_time_correlation(runs, tmp_path / "correlation.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["–"] * 9


@pytest.mark.parametrize("hours", [[], [[1, 2]], [[1, 2, 3], [1, 2, 3, 4]]])
def test_times_without_a_correlation_are_rejected(hours):
    with pytest.raises(RunError, match="at least 3 stages"):
        compute_time_correlation(hours)


def test_heads_are_connected_if_all_else_is_equal(make_run, tmp_path, drawn):
    runs = [make_run(f"h{heads}", with_heads(heads)) for heads in (8, 2, 4)]
    others = [
        make_run("wide", with_heads(4, width=2)),
        make_run("grown", GROWN),
        make_run("half", with_heads(16), stages=2),
    ]
    assert draw_heads([*runs, *others], tmp_path / "heads.png").is_file()
    (axes,) = drawn[0].axes
    (line,) = axes.lines
    assert list(line.get_xdata()) == [2, 4, 8]
    by_heads = sorted((run.records()[-1].dims.num_attention_heads, run.records()[-1].perplexity) for run in runs)
    assert list(line.get_ydata()) == [perplexity for _, perplexity in by_heads]


def test_heads_show_downstream_scores(make_run, tmp_path, drawn):
    runs = [
        write_evaluations(make_run(f"h{heads}", with_heads(heads)), {"piqa": heads / 10, "arc": 0.2})
        for heads in (8, 2, 4)
    ]
    draw_heads(runs, tmp_path / "heads.png")
    _, scores = drawn[0].axes
    assert [line.get_label() for line in scores.lines] == ["arc, acc_norm", "piqa, acc_norm"]
    assert list(scores.lines[1].get_ydata()) == pytest.approx([0.22, 0.44, 0.88])


def test_one_line_per_group_of_heads(make_run, tmp_path, drawn):
    schedules = [with_heads(heads, width=width) for heads in (2, 4) for width in (1, 2)]
    draw_heads([make_run(f"run{n}", schedule) for n, schedule in enumerate(schedules)], tmp_path / "heads.png")
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["64, 176, 4", "64, 352, 4"]


@pytest.mark.parametrize(
    "heads, changes", [((4, 4), {}), ((2, 4), {"perplexity": None}), ((2, 4), {"perplexity": math.inf})]
)
def test_no_figure_without_two_numbers_of_heads(make_run, tmp_path, heads, changes):
    runs = [make_run(f"run{number}", with_heads(count), **changes) for number, count in enumerate(heads)]
    assert draw_heads(runs, tmp_path / "heads.png") is None
