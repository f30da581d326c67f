"""Tables in a terminal of 80 columns: no cell is cut, and what matters most is there."""

import re

import pytest

from slop_hf.cli.calibrate import _show_result
from slop_hf.cli.shared import print_table
from slop_hf.cost.hours import CostModel
from slop_hf.dims import ModelDims

TINY = ["plan", "--initial", "16,32,2,2", "--hidden-multiple", 8, "--ffn-multiple", 16]
PLANS = {
    "tiny": [*TINY, "--target", "32,64,4,4", "--tokens", "4e3"],
    "small budget": ["plan", "--initial", "768,2048,6,6", "--target", "2816,7680,8,22", "--tokens", "45500"],
    "1B": ["plan", "--initial", "768,2048,6,6", "--target-params", "1e9", "--tokens", "65e9"],
    "70B": ["plan", "--initial", "4096,14336,32,32,8", "--target", "8192,28672,80,64,8", "--tokens", "2e12"],
    "many stages": [*TINY, "--target", "32,64,6,4", "--mode", "repeated", "--stages", 8, "--tokens", "4e9"],
    "own head size": ["plan", "--initial", "1024,3072,28,16,8,128", "--target", "2560,9728,36,32,8,128",
                      "--tokens", "1e12"],
    "without tokens": ["plan", "--initial", "768,2048,6,6", "--target-params", "1e9"],
}  # fmt: skip


@pytest.fixture
def narrow(monkeypatch, output_of):
    """Run `slop` in a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    return output_of


def check_width(text):
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80, text


@pytest.mark.parametrize("command", PLANS.values(), ids=PLANS)
def test_plans_fit(narrow, command):
    text = narrow(*command, "--explain", "--top-k", 3)
    check_width(text)
    heading = next(line for line in text.splitlines() if "order" in line)
    wanted = ["order", "target", "params", "Π Δparams"] + ["FLOPs", "hours"] * ("--tokens" in command)
    assert all(name in heading for name in wanted)
    assert not re.search(r"e-\d\dB", text)


def test_every_objective_is_listed_on_request(narrow):
    text = narrow(*PLANS["1B"], "--wide", "--no-arms")
    assert "…" not in text and all(title in text for title in ("by Eq. 3", "loss / hour", "Π Δparams"))
    assert "by Eq. 3" not in narrow(*PLANS["1B"], "--no-arms")


@pytest.mark.parametrize("part", ["table1", "table3", "table4", "hours"])
def test_reproductions_fit(narrow, part):
    text = narrow("reproduce", part)
    check_width(text)
    assert "agrees" in text and "computed" in text


@pytest.mark.parametrize("target", ["1536,4096,32,12", "8192,28672,80,64,8"])
def test_calibrations_fit(narrow, target):
    check_width(narrow("calibrate", "--initial", "768,2048,6,6", "--target", target, "--dry-run"))


class Times:
    """What `calibrate` reports of a large structure on a GPU."""

    def __init__(self, measurement):
        self.measurement, self.dims = measurement, ModelDims(8192, 28672, 80, 64, 8)
        self.parameters, self.flops_per_token, self.tokens = 68_976_648_192, 4.1e11, 65536
        self.seconds_per_step, self.peak_bytes = 123.456, 139_000_000_000


def test_results_of_a_calibration_fit(monkeypatch, capsys, tmp_path):
    from slop_hf.cost.hours import Measurement

    monkeypatch.setenv("COLUMNS", "80")
    runs = [Measurement("a", 4.1e11, 65536, 1234.5), Measurement("b", 8.2e11, 65536, 2500.0)]
    _show_result(CostModel.fit(runs, "8 x NVIDIA H200"), list(map(Times, runs)), tmp_path / "cost.yaml", as_json=False)
    text = capsys.readouterr().out
    assert "…" not in text and "139 GB" in text and "123" in text


def test_columns_are_left_out_by_name(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    columns, row = ("name", ">size", ">rest", "note"), ("a" * 18, "1" * 10, "2" * 10, "some words here")
    print_table("title", columns, [row], wraps=("note",), optional=("rest", "size"))
    text = capsys.readouterr().out
    assert "1" * 10 in text and "2" * 10 not in text and "left out in 40 columns" in text
    print_table("title", columns, [row])
    assert "2" * 10 in capsys.readouterr().out  # whole, on lines that the terminal wraps
