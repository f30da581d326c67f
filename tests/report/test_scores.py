"""The table of final scores of several runs."""

from __future__ import annotations

import pytest
from report_runs import SCRATCH, write_evaluations

from slop_hf.io.serialization import to_json
from slop_hf.report import summarise, write_report
from slop_hf.report.scores import tabulate_final_scores
from slop_hf.runs.directory import EVAL_FILE
from slop_hf.runs.records import EvalRecord


def cells_of(*runs):
    last = [run.evaluations(run.finished_stages - 1) for run in runs]
    return tabulate_final_scores([summarise(run) for run in runs], last)


def rescore(run, *records):
    """Replace the evaluations of the last stage."""
    (run.stage_dir(run.finished_stages - 1) / EVAL_FILE).write_text(to_json(list(records)))
    return run


def headings(cells):
    return [heading for heading, _ in cells.columns]


def test_one_row_per_run_and_one_column_per_task(make_run):
    slop = write_evaluations(make_run("slop"), {"piqa": 0.6, "arc": 0.3})
    scratch = write_evaluations(make_run("scratch", SCRATCH), {"piqa": 0.5, "boolq": 0.7})
    cells = cells_of(slop, make_run("bare"), scratch)
    assert headings(cells) == ["run", "arc, acc_norm", "boolq, acc_norm", "piqa, acc_norm"]
    assert cells.rows == (
        ("slop", "0.3300", "–", "0.6600"), ("bare", "–", "–", "–"), ("scratch", "–", "0.7700", "0.5500"),
    )  # fmt: skip


def test_a_task_is_shown_by_the_metric_that_most_runs_have(make_run):
    runs = [write_evaluations(make_run(name), {"piqa": 0.5}) for name in ("one", "two", "three")]
    for run, score in zip(runs[1:], (0.25, 0.125), strict=True):
        rescore(run, EvalRecord("piqa", {"acc": score}, {"acc": 0.01}))
    cells = cells_of(*runs)
    assert headings(cells) == ["run", "piqa, acc"]
    assert [row[1] for row in cells.rows] == ["0.5000 ± 0.0100", "0.2500 ± 0.0100", "0.1250 ± 0.0100"]


def test_settings_and_times_of_evaluation_are_not_mixed(make_run):
    few = EvalRecord("piqa", {"acc": 0.5}, num_fewshot=5)
    grown = EvalRecord("piqa", {"acc": 0.1}, num_fewshot=0, when="after_growth")
    one = rescore(make_run("one"), few, EvalRecord("piqa", {"acc": 0.4}, num_fewshot=0))
    two = rescore(make_run("two", stages=2), few, grown)
    cells = cells_of(one, two)
    assert headings(cells) == ["run", "piqa (0-shot), acc", "piqa (5-shot), acc"]
    assert cells.rows == (("one", "0.4000", "0.5000"), ("two (2 of 4 stages)", "–", "0.5000"))


def test_parts_of_a_task_and_perplexities_have_no_column(make_run):
    tasks = {"mmlu": 0.3, "mmlu_law": 0.2}
    cells = cells_of(*(write_evaluations(make_run(name), tasks) for name in ("one", "two")))
    assert headings(cells) == ["run", "mmlu, acc_norm"]


def test_one_run_with_scores_is_not_compared(make_run):
    assert cells_of(write_evaluations(make_run("one"), {"piqa": 0.5})) is None
    only_perplexity = write_evaluations(make_run("two"), {})
    assert cells_of(write_evaluations(make_run("three"), {"piqa": 0.5}), only_perplexity) is None


@pytest.mark.parametrize("count", [1, 2])
def test_the_report_of_several_runs_has_the_table(make_run, text_only, count):
    runs = [write_evaluations(make_run(f"run{number}"), {"piqa": 0.5, "arc": 0.3}) for number in range(count)]
    target = write_report(runs)
    text, page = ((target / name).read_text() for name in ("report.md", "report.html"))
    table = cells_of(*runs).markdown() if count > 1 else "| run | arc, acc_norm |"
    assert (table in text) is ('aria-label="Downstream scores of the runs"' in page) is (count > 1)
    assert ("piqa, acc_norm</th>" in page) is (count > 1) and "\n\n\n" not in text
