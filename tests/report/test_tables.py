"""Tables, cell by cell."""

from __future__ import annotations

import io

import pytest
from report_runs import SCRATCH
from rich.console import Console

from slop_hf.io.units import format_count, format_significant
from slop_hf.report import build_comparison_table, summarise, tabulate_runs, tabulate_stages

COMPARISON_HEADINGS = [
    "run", "target structure", "sequence", "Π Δparams", "ppl", "seconds per stage", "sum (s)", "tokens", "FLOPs",
    "marginal utility",
]  # fmt: skip
STAGE_HEADINGS = [
    "stage", "grew", "structure", "parameters", "tokens", "steps", "FLOPs", "seconds", "loss after growth",
    "held-out loss", "ppl",
]  # fmt: skip


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.fixture
def summaries(make_run):
    runs = [make_run("slop"), make_run("scratch", SCRATCH), make_run("half", stages=2)]
    return [summarise(run) for run in runs]


def test_comparison_as_markdown(summaries):
    heading, rule, slop, scratch, half = tabulate_runs(summaries).markdown().splitlines()
    assert cells(heading) == COMPARISON_HEADINGS
    assert len(cells(rule)) == len(COMPARISON_HEADINGS)
    assert cells(slop)[:4] == ["slop", "(128, 352, 4, 4, kv 2)", "l-f-h", "1.69e+14"]
    assert cells(slop)[5:8] == ["36.0 + 72.0 + 108.0 + 144.0", "360.0", "2.05M"]
    assert [cells(scratch)[number] for number in (2, 3, 9)] == ["–"] * 3
    assert cells(half)[0] == "half (2 of 4 stages)"


def test_comparison_in_the_terminal_has_the_same_cells(summaries):
    out = io.StringIO()
    Console(file=out, width=220).print(build_comparison_table(summaries))
    for line in tabulate_runs(summaries).markdown().splitlines()[2:]:
        assert all(cell in out.getvalue() for cell in cells(line))


def test_names_are_not_read_as_markup(make_run):
    summary = summarise(make_run(), name="a[bold]|b")
    out = io.StringIO()
    Console(file=out, width=220).print(build_comparison_table([summary]))
    assert "a[bold]|b" in out.getvalue()
    assert r"a\[bold\]\|b" in tabulate_runs([summary]).markdown()


def test_stages_as_markdown(make_run):
    records = make_run().records()
    heading, _, *rows = tabulate_stages(records).markdown().splitlines()
    assert cells(heading) == STAGE_HEADINGS
    assert [cells(row)[1] for row in rows] == ["–", "layer", "ffn", "hidden, mha"]
    assert cells(rows[0])[8] == "–" and cells(rows[0])[5] == "200"
    assert cells(rows[3])[9] == f"{records[3].eval_loss:.4f}" and cells(rows[3])[10] == f"{records[3].perplexity:.2f}"


@pytest.mark.parametrize(
    "value, text", [(0, "0"), (999, "999"), (999_600, "1M"), (99_949, "99.9k"), (1.02e9, "1.02B"), (3.2e15, "3,200T")]
)
def test_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize("value, text", [(0.0, "0"), (-66.94, "-66.9"), (0.0012345, "0.00123"), (1234.5, "1,230")])
def test_significant(value, text):
    assert format_significant(value) == text
