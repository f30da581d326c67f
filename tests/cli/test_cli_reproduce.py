"""`slop reproduce`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slop_hf.cli import app
from slop_hf.errors import PlanError
from slop_hf.paper import reproduction
from slop_hf.paper import tables as paper
from slop_hf.paper.page import PAGE_COMMAND, format_reproduction_page

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"


def run(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_page_is_what_the_command_writes(tmp_path):
    done = run("--output", tmp_path / "docs" / "page.md")
    assert done.exit_code == 0 and "page written to" in done.stdout
    assert (tmp_path / "docs" / "page.md").read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), (
        PAGE_COMMAND
    )


def test_the_page_has_every_figure():
    page = format_reproduction_page()
    for row in [row for table in paper.GROWTH_TABLES for row in reproduction.reproduce_products(table)]:
        assert f"{row.target} | {row.sequence} | {row.printed} |" in page and f"{row.computed:.3E}" in page
    for row in reproduction.reproduce_hours():
        assert f"| {row.table} | {row.target} | {row.trained} | {row.printed:g} | {row.computed:.1f} |" in page


@pytest.mark.parametrize(
    ("part", "title"),
    [
        ("table1", "Table 1: Π Δparams, 10 of 10 agree"),
        ("table3", "Table 3: Π Δparams, 5 of 6 agree"),
        ("table4", "Table 4: Π Δparams, 2 of 2 agree"),
        ("hours", "GPU hours, 39 of 42 agree"),
    ],
)
def test_tables(part, title):
    text = run(part).stdout
    assert title in text and title in run("all").stdout
    for column in ("printed", "computed", "agrees", "note"):
        assert column in text


def test_json():
    rows = json.loads(run("table3", "--json").stdout)
    assert [row["agrees"] for row in rows] == [True, True, True, True, False, True]
    assert rows[4]["printed"] == "5.54E+25" and rows[4]["note"].startswith("misprint")
    everything = json.loads(run("--json").stdout)
    assert len(everything) == 18 + len(reproduction.reproduce_hours())
    assert all({"table", "target", "printed", "computed", "agrees", "note"} <= row.keys() for row in everything)


def test_unknown_part():
    done = run("days")
    assert isinstance(done.exception, PlanError)
    assert str(done.exception) == "unknown part 'days' (known: table1, table3, table4, hours, all)"
    assert str(run("hour").exception) == "unknown part 'hour'; did you mean 'hours'?"


def test_it_loads_no_torch():
    code = "import sys; from slop_hf.paper import page; page.format_reproduction_page(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
