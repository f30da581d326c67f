"""The comparison as a document."""

from __future__ import annotations

import re

from comparisons import comparison

from slop_hf.experiments.comparison import Comparison
from slop_hf.experiments.summary_text import summarise_comparison
from slop_hf.experiments.tables import tabulate_arm_stages, tabulate_arms, tabulate_ledger
from slop_hf.experiments.write import write_comparison

FILES = ["comparison.json", "comparison.md", "loss.png", "losses.png", "seconds.png"]


def test_everything_lies_in_the_directory(tmp_path):
    record = comparison(2, about="Does growth pay?")
    directory = write_comparison(record, tmp_path / "out")
    assert directory == tmp_path / "out" and sorted(file.name for file in directory.iterdir()) == FILES
    assert Comparison.load(directory / "comparison.json") == record
    text = (directory / "comparison.md").read_text()
    assert text.startswith("# SLOP and other ways to the same target · nano\n\nDoes growth pay?\n\n")
    assert (
        " ".join(summarise_comparison(record)) in text
        and "Run on two CPU cores, slop-hf 0.1.0, torch 2.8.0.\n" in text
    )
    for cells in (tabulate_arms(record), tabulate_arm_stages(record), tabulate_ledger(record)):
        assert cells.markdown() in text
    assert all((directory / link).is_file() for link in re.findall(r"!\[.*?\]\((.*?)\)", text))
    assert "\n\n\n" not in text and text.endswith(".\n")


def test_it_is_written_again(tmp_path):
    (tmp_path / "runs").mkdir()
    write_comparison(comparison(2, 1), tmp_path)
    write_comparison(comparison(2, 0, ledger=()), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["comparison.json", "comparison.md", "runs"]
    text = (tmp_path / "comparison.md").read_text()
    assert "No run at the full budget has finished." in text and "##" not in text and ".png" not in text


def test_only_columns_that_are_there_are_explained(tmp_path):
    text = (write_comparison(comparison(2, 1), tmp_path) / "comparison.md").read_text()
    assert "- **FLOPs saved**: " in text and "- **budget**: " not in text
