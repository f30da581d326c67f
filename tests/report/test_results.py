"""Tables of scores, losses and data by stage."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from report_runs import write_evaluations, write_sources

from slop_hf.report.results import tabulate_data, tabulate_held_out_losses, tabulate_stage_scores
from slop_hf.runs.directory import EVAL_FILE
from slop_hf.runs.records import EvalRecord


@pytest.fixture
def records(make_run):
    return write_sources(make_run(), {"web": 0.75, "code": 0.25}).records()


def test_scores_are_listed_by_stage(make_run):
    run = write_evaluations(make_run(), {"piqa": 0.6}, num_fewshot=5, limit=100)
    records = run.records()
    cells = tabulate_stage_scores(records, [run.evaluations(record.stage) for record in records])
    assert [heading for heading, _ in cells.columns] == [
        "task", "metric", "0 initial", "1 layer", "2 ffn", "3 hidden", "setting",
    ]  # fmt: skip
    assert cells.rows[0] == (
        "piqa", "acc", "0.4800 ± 0.0100", "0.5200 ± 0.0100", "0.5600 ± 0.0100", "0.6000 ± 0.0100", "5-shot, limit 100",
    )  # fmt: skip
    assert cells.rows[1][:2] == ("piqa", "acc_norm") and cells.rows[1][5] == "0.6600"
    assert cells.rows[2] == ("perplexity", "perplexity", *(f"{record.perplexity:.2f}" for record in records), "–")


def test_scores_after_growth_have_their_own_column(records):
    before = EvalRecord("piqa", {"acc": 0.5}, when="after_growth")
    scored = [[], [before, replace(before, metrics={"acc": 0.6}, when="end")], [], [EvalRecord("boolq", {"acc": 0.7})]]
    cells = tabulate_stage_scores(records, scored)
    assert [heading for heading, _ in cells.columns][2:-1] == ["1 layer after growth", "1 layer", "3 hidden"]
    assert [row[2:-1] for row in cells.rows] == [("0.5000", "0.6000", "–"), ("–", "–", "0.7000")]


def test_losses_by_source(records):
    cells = tabulate_held_out_losses(records)
    assert [row[0] for row in cells.rows] == ["web", "code"]
    assert cells.rows[1][1:] == tuple(f"{record.eval_losses['code']:.4f}" for record in records)


def test_tokens_and_passes_by_source(records):
    cells = tabulate_data(records)
    assert [heading for heading, _ in cells.columns][-3:] == ["total", "available", "passes"]
    total = records[-1].total_tokens * 0.75
    assert cells.rows[0][:3] == ("web", "75.0%", "614k")
    assert cells.rows[0][-2:] == ("1M", f"{total / 1e6:.2f}") and total > 1e6
    assert cells.rows[1][-1] == "0.51"


def test_a_source_added_later_has_dashes_before(records):
    first = replace(records[0], data=records[0].data[:1], eval_losses={"web": 3.0})
    assert tabulate_data([first, *records[1:]]).rows[1][2] == "–"
    assert tabulate_held_out_losses([first, *records[1:]]).rows[1][1] == "–"


def test_no_table_without_data(make_run):
    run = make_run()
    records = run.records()
    (run.stage_dir(0) / EVAL_FILE).write_text(json.dumps([]))
    assert tabulate_held_out_losses(records) is None and tabulate_data(records) is None
    assert tabulate_stage_scores(records, [run.evaluations(record.stage) for record in records]) is None
