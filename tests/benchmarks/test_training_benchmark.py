"""The training benchmark runs and leaves records with right ratios; what it measures at this size means nothing."""

import functools
import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmark; files import their neighbours."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def record(module, tmp_path):
    return functools.partial(run, module("training"), tmp_path)


def run(training, tmp_path, part):
    """Return the record of a part; timed processes are started by it, as by its users."""
    output, workdir = tmp_path / "results/training.json", tmp_path / "work"
    workdir.mkdir(exist_ok=True)
    training.main([part, "--scale", "tiny", "--output", str(output), "--workdir", str(workdir)])
    assert list(workdir.iterdir()) == [], "what it wrote is removed"
    text = output.read_text()
    assert str(tmp_path) not in text and str(BENCHMARKS) not in text, "a record names no path of the machine"
    result = json.loads(text)[part]
    assert result["command"].startswith(f"python benchmarks/training.py {part} ")
    assert {"date", "scale", "repetitions", "machine", "versions"} <= result.keys()
    assert {"cpu", "cores", "memory_bytes", "disk", "load_average_before"} <= result["machine"].keys()
    for goal in result["goals"]:
        assert goal["met"] is (goal["value"] <= goal["limit"]), goal
    for case in result.get("cases", [result]):
        assert all(len(runs) == result["repetitions"] and min(runs) > 0 for runs in case["seconds"].values())
    return result


@pytest.mark.slow
def test_steps(record):
    result = record("steps")
    assert set(result["median_seconds"]) == {"SlopTrainer", "Trainer"}
    assert len(result["ratios"]["steps_per_second"]) == result["repetitions"] == 1
    assert result["goals"][0]["value"] == pytest.approx(1 / result["ratio"])


@pytest.mark.slow
def test_boundary(record):
    result = record("boundary")
    (case,) = result["cases"]
    medians = case["median_seconds"]
    assert case["ratio"] == pytest.approx(medians["boundary"] / (medians["save_file"] + medians["load_file"]))
    assert sum(case["median_phase_seconds"].values()) == pytest.approx(medians["boundary"])
    phases = {"writing states", "checksums", "releasing", "building", "reading and growing", "other"}
    assert phases <= case["median_phase_seconds"].keys()
    for size, parameters in (("saved_bytes", "source_parameters"), ("loaded_bytes", "target_parameters")):
        extra = case[size] - 12 * case[parameters]  # headers, and AdamW's count of steps
        assert 0 <= extra < 20_000, size


@pytest.mark.slow
@pytest.mark.deepspeed
def test_memory(record):
    pytest.importorskip("deepspeed")
    result = record("memory")
    assert [case["allocator"] for case in result["cases"]] == ["as it comes", "gives back"]
    for case in result["cases"]:
        one, *others = case["peak_bytes"].values()
        assert list(case["ratio"].values()) == [max(ranks) / max(one) for ranks in others] and len(others) == 2
        for number, (name, peaks) in enumerate(case["peak_bytes"].items()):
            (peak,), (base,), (above,) = peaks, case["baseline_bytes"][name], case["above_baseline_bytes"][name]
            # Each is the largest of the ranks, and the ranks may differ.
            assert 0 < peak - base <= above and (number or peak - base == above)
            assert 2**26 < base < peak
            seen = case["phase_peak_bytes"][name].values()
            assert max(phase["anonymous"] for phase in seen) == case["anonymous_peak_bytes"][name][0] < peak


@pytest.mark.slow
def test_settings(record):
    (case,) = record("settings")["cases"]
    (name,) = case["dims"].keys() - {"heads of 8"}
    (ours,), (theirs,) = case["seconds"]["heads of 8"], case["seconds"][name]
    assert case["speed"] == {"heads of 8": 1.0, name: ours / theirs}
    assert case["flops_per_second"][name] * theirs == pytest.approx(case["flops_per_second"]["heads of 8"] * ours)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in case["shares"].values())
    assert case["shares"][name]["attention"] > 0.01 and case["shares"][name]["matrix products"] > 0.01


def test_operations_are_grouped(module):
    times = {"aten::mm": 2.0, "aten::_scaled_dot_product_flash_attention_for_cpu": 5.0, "aten::mul": 3.0}
    shares = module("training_settings").group_shares(times)
    expected = {"attention": 0.5, "matrix products": 0.2, "loss": 0, "clipping and optimizer": 0, "other": 0.3}
    assert shares == pytest.approx(expected)


def test_all_parts_are_the_default(module):
    training = module("training")
    assert training.parse([]).parts == training.parse(["all"]).parts == ["steps", "boundary", "memory", "settings"]
    assert training.parse(["memory"]).parts == ["memory"]
    with pytest.raises(SystemExit):
        training.parse(["speed"])


def test_parts_keep_the_records_of_others(module, tmp_path):
    training, path = module("training"), tmp_path / "training.json"
    for part, value in (("memory", 1), ("steps", 2), ("memory", 3)):
        training.save_part(path, part, {"value": value}, training.PARTS)
    assert json.loads(path.read_text()) == {"steps": {"value": 2}, "memory": {"value": 3}}


def test_steps_are_compared_side_by_side(module):
    steps = module("training_steps")
    one = {"SlopTrainer": [9.0, 1.0, 2.0, 4.0], "Trainer": [1.0, 2.0, 3.0, 4.0]}
    result = steps.compare([one], warm_up=1)
    assert result["seconds"] == {"SlopTrainer": [2.0], "Trainer": [3.0]}
    assert result["ratio"] == 1.5 == result["ratios"]["steps_per_second"][0]


@pytest.mark.slow
def test_a_process_that_fails_ends_those_that_wait_for_it(module, tmp_path):
    steps = module("training_steps")
    settings = {"dims": [16, 32, 2, 2], "vocab_size": 64, "block_size": 16, "batch": 2, "steps": 4}
    with pytest.raises(RuntimeError, match="unknown_argument"):
        steps.train_in_turns(("SlopTrainer", "Trainer"), {**settings, "changes": {"unknown_argument": 1}}, tmp_path)


def test_targets_have_twice_the_parameters(module):
    setup = module("training_setup")
    config = setup.llama_config(setup.INITIAL["full"], setup.VOCAB["full"], 64)
    for target in setup.TARGETS["full"].values():
        growth = setup.describe_growth(setup.INITIAL["full"], target, config)
        assert 0.99e8 < growth["source_parameters"] < 1.01e8
        assert 1.97e8 < growth["target_parameters"] < 2.05e8
