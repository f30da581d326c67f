"""`slop calibrate` as a user would type it."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest
from transformers import LlamaConfig

from slop_hf import ModelDims
from slop_hf.cli import main
from slop_hf.cli.calibrate import LADDER, interpolate_structures
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.cost.hours import CostModel

SIZES = "16,32,1,2; 128,512,4,4"
QUICK = ["--vocab-size", 64, "--sequence-length", 32, "--batch-size", 4, "--steps", 2, "--warmup-steps", 1, "--cpu"]


@pytest.fixture
def slop(monkeypatch, capfd, tmp_path):
    """Run `slop calibrate` in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slop", "calibrate", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, *capfd.readouterr()

    return run


def test_measures_and_writes(slop, tmp_path):
    code, out, err = slop("--structures", SIZES, *QUICK)
    assert code == 0, err
    assert "(128, 512, 4, 4)" in out and "mean error" in out and "cost model written to cost_model.yaml" in out
    assert [path.name for path in tmp_path.iterdir()] == ["cost_model.yaml"]
    cost_model = CostModel.from_yaml("cost_model.yaml")
    assert [measurement.label for measurement in cost_model.measurements] == ["(16, 32, 1, 2)", "(128, 512, 4, 4)"]


def test_json(slop):
    code, out, err = slop("--structures", SIZES, *QUICK, "-o", "out/cost.yaml", "--json")
    assert code == 0, err
    answer, cost_model = json.loads(out), CostModel.from_yaml("out/cost.yaml")
    assert answer["cost_model"]["hours_per_flop"] == cost_model.hours_per_flop
    assert answer["mean_error"] == cost_model.mean_error
    assert [row["error"] for row in answer["structures"]] == list(cost_model.errors)
    for row, measurement in zip(answer["structures"], cost_model.measurements, strict=True):
        assert row["structure"] == measurement.label and row["seconds_per_step"] > 0
        assert row["predicted_hours"] / row["measured_hours"] - 1 == pytest.approx(row["error"])


def test_dry_run(slop, tmp_path):
    code, out, err = slop("--dry-run")
    assert code == 0, err
    assert "would measure 3 + 10 steps of 4 × 256 tokens" in out and all(str(dims) in out for dims in LADDER)
    rows = json.loads(slop("--dry-run", "--json", "--batch-size", 2)[1])
    first = {
        "parameters": count_parameters(LADDER[0]),
        "flops_per_step": count_flops_per_token(LADDER[0], sequence_length=256) * 512,
    }
    assert rows[0].items() >= first.items() and len(rows) == len(LADDER)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_loads_no_torch():
    code = """
import sys
from slop_hf.cli import main
sys.argv = ["slop", "calibrate", "--dry-run"]
try:
    main()
except SystemExit as done:
    assert not done.code
print("loaded", *{"torch", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_sizes_from_the_ends(slop, tmp_path):
    """Structures lie between the ends; the family and its vocabulary come from the model."""
    dims = ModelDims(64, 128, 2, 4, 2)
    dims.to_config(LlamaConfig(vocab_size=100, tie_word_embeddings=True)).save_pretrained(tmp_path / "small")
    wide = ModelDims(256, 512, 8, 16, 8)
    wide.to_config(LlamaConfig(vocab_size=100)).save_pretrained(tmp_path / "large")
    ends = ["--from", "small", "--to", "large/config.json"]
    rows = json.loads(slop(*ends, "--dry-run", "--json")[1])
    assert [row["structure"] for row in rows] == [str(size) for size in interpolate_structures(dims, wide)]
    assert rows[0]["parameters"] == count_parameters(
        dims, {"model_type": "llama", "vocab_size": 100, "tie_word_embeddings": True}
    )
    by_text = slop("--initial", "64,128,2,4,2", "--target", "256,512,8,16,8", "--dry-run", "--json")[1]
    assert [row["structure"] for row in json.loads(by_text)] == [row["structure"] for row in rows]


@pytest.mark.parametrize(
    ("smallest", "largest"),
    [
        (ModelDims(768, 2048, 6, 6), ModelDims(4096, 11008, 32, 32, 8)),
        (ModelDims(896, 4864, 24, 14, 2), ModelDims(8192, 29568, 80, 64, 8)),
        (ModelDims(1024, 3072, 28, 16, 8, 128), ModelDims(2560, 9728, 36, 32, 8, 128)),
        (ModelDims(64, 128, 2, 2), ModelDims(64, 130, 2, 2)),
    ],
)
def test_interpolate_structures_rise(smallest, largest):
    structures = interpolate_structures(smallest, largest)
    flops = [count_flops_per_token(dims) for dims in structures]
    assert flops == sorted(flops) and (structures[0], structures[-1]) == (smallest, largest)
    if flops[-1] > 10 * flops[0]:
        ratios = [after / before for before, after in pairwise(flops)]
        assert len(structures) == 5 and max(ratios) < 2.5 * min(ratios)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--structures", "16,32,1,2"], "at least 2 structures"),
        (["--structures", "16,32,1"], "expected hidden,ffn,layers,heads"),
        (["--structures", SIZES, "--target", "16,32,1,2"], "either --structures, or both ends"),
        (["--initial", "16,32,1,2"], "give the largest structure with either --target or --to"),
        (["--target", "16,32,1,2"], "give the smallest structure with either --initial or --from"),
        (["--initial", "16,32,1,2", "--target", "16,32,1,2"], "at least 2 structures"),
        (["--from", "nowhere"], "--from nowhere: no readable config.json"),
        (["--structures", SIZES, "--steps", 0], "steps must be a whole number, 1 or more"),
        (["--structures", SIZES, "--precision", "fp8"], "precision must be one of bf16, fp32, got 'fp8'"),
        (["-o", "."], "--output . is a directory"),
    ],
)
def test_refusals(slop, tmp_path, arguments, message):
    code, out, err = slop(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_teaches(slop):
    code, out, _ = slop("--help")
    assert code == 0 and "slop calibrate" in out and "Example" in out and "--dry-run" in out
