"""Documents agree with the records that they were made from."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
from comparisons import comparison

from slop_hf.experiments.summary_text import summarise_comparison
from slop_hf.experiments.tables import tabulate_arm_stages, tabulate_arms, tabulate_ledger

ROOT = Path(__file__).parents[2]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_results", ROOT / "benchmarks" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


results = load()

PAGE = """# Results

By hand.

<!-- results: table2_nano sentences -->
<!-- end -->
<!-- results: table2_nano table -->
stale
<!-- end -->

Between.
<!-- results: table2_nano stages -->
<!-- end -->
<!-- results: table2_nano ledger -->
<!-- end -->
"""
FIGURES = "<!-- results: table2_nano figure-losses -->\n<!-- end -->\n"


@pytest.fixture
def root(tmp_path):
    """A repository with one record, a README and a page."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(
        "# x\n\n<!-- results: table2_nano table -->\n<!-- end -->\nlast line, no newline"
    )
    (tmp_path / "docs" / "results.md").write_text(PAGE)
    comparison(2, 2).save(tmp_path / "benchmarks" / "results" / "table2_nano.json")
    (tmp_path / "benchmarks" / "results" / "planner.json").write_text('{"cases": [], "versions": {}}')
    return tmp_path


def run(root: Path, *options: str) -> int:
    return results.main(["--root", str(root), *options])


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_committed_documents_agree_with_the_committed_records(capsys):
    status = results.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_blocks_are_filled_in_and_the_rest_stays(root, capsys):
    assert run(root) == 0
    assert capsys.readouterr().out.splitlines() == [
        "README.md brought up to date",
        "docs/results.md brought up to date",
    ]
    record = comparison(2, 2)
    text = (root / "docs" / "results.md").read_text()
    for cells in (tabulate_arms(record), tabulate_arm_stages(record), tabulate_ledger(record)):
        assert f"-->\n{cells.markdown()}<!-- end -->\n" in text
    assert " ".join(summarise_comparison(record)) in text.replace("\n", " ") and "stale" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 119
    kept = [line for line in PAGE.splitlines() if line != "stale"]
    assert [line for line in text.splitlines() if line in kept] == kept
    assert (root / "README.md").read_text().endswith("<!-- end -->\nlast line, no newline")


def test_a_second_time_changes_nothing(root, capsys):
    (root / "docs" / "results.md").write_text(PAGE + FIGURES)
    run(root)
    before = contents(root)
    assert "docs/images/results/table2_nano_losses.png" in before
    assert "![Held-out loss at the end](images/results/table2_nano_losses.png)" in before["docs/results.md"].decode()
    capsys.readouterr()
    assert run(root) == 0 and run(root, "--check") == 0
    assert contents(root) == before and capsys.readouterr().out == ""


def test_a_changed_record_is_noticed(root, capsys):
    (root / "docs" / "results.md").write_text(PAGE + FIGURES)
    run(root)
    before = contents(root)
    comparison(2, 2, losses={"slop": 3.0}).save(root / "benchmarks" / "results" / "table2_nano.json")
    capsys.readouterr()
    assert run(root, "--check") == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "README.md", "docs/results.md", "docs/images/results/table2_nano_losses.png"
    ]  # fmt: skip
    changed = {name for name, content in contents(root).items() if before[name] != content}
    assert changed == {"benchmarks/results/table2_nano.json"}, "--check writes nothing"
    assert run(root) == 0 and run(root, "--check") == 0


@pytest.mark.parametrize("link", ["images/results/table2_nano_loss.png", "./images/results/table2_nano_loss.png"])
def test_a_figure_that_is_shown_by_hand_is_drawn(root, link):
    (root / "docs" / "other.md").write_text(f"![Loss]({link})\n")
    assert run(root, "--check") == 1
    assert run(root) == 0 and run(root, "--check") == 0
    (root / "docs/images/results/table2_nano_loss.png").unlink()
    assert run(root, "--check") == 1


def test_text_edited_within_a_block_is_noticed(root):
    run(root)
    page = root / "docs" / "results.md"
    page.write_text(page.read_text().replace("| slop |", "| SLOP |", 1))
    assert run(root, "--check") == 1
    page.write_text(page.read_text().replace("By hand.", "By another hand."))
    run(root)
    assert "By another hand." in page.read_text() and run(root, "--check") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- results: table1 table -->\n<!-- end -->\n", "line 1: no record benchmarks/results/table1.json"),
        ("\n<!-- results: table2_nano pie -->\n<!-- end -->\n", "line 2: expected NAME KIND, with a KIND of table, "),
        ("<!-- results: table2_nano -->\n<!-- end -->\n", "got 'table2_nano'"),
        ("<!-- results: table2_nano table -->\n", "line 1: the block has no <!-- end -->"),
        ("<!-- results: table2_nano table -->\n" * 2 + "<!-- end -->\n", "line 2: the block that begins in line 1"),
        ("<!-- end -->\n", "line 1: <!-- end -->, but no block has begun"),
        ("![](images/results/table1_loss.png)\n", "there is no record benchmarks/results/table1.json"),
    ],
)
def test_markers_that_make_no_sense_are_refused(root, capsys, text, message):
    (root / "docs" / "results.md").write_text(text)
    assert run(root, "--check") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and len(error.splitlines()) == 1


def test_a_record_that_cannot_be_read_is_refused(root, capsys):
    record = root / "benchmarks" / "results" / "table2_nano.json"
    record.write_text('{"scale": "nano", "equal": "flops", "arms": {}, "surprise": 1}')
    assert run(root) == 2 and "table2_nano.json" in capsys.readouterr().err
    record.write_text("{")
    assert run(root) == 2 and "not valid JSON" in capsys.readouterr().err


def test_without_records_there_is_nothing_to_do(root):
    for path in (root / "benchmarks" / "results").iterdir():
        path.unlink()
    (root / "README.md").write_text("# x\n")
    (root / "docs" / "results.md").write_text("By hand.\n")
    before = contents(root)
    assert run(root) == 0 and run(root, "--check") == 0 and contents(root) == before
    assert os.listdir(root / "docs") == ["results.md"]
