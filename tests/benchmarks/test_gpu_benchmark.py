"""The parts of `make gpu`, rehearsed on the CPU, and its messages on a machine that cannot run them."""

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import logging

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "benchmarks", ROOT / "benchmarks/gpu"]


@pytest.fixture
def module(monkeypatch):
    """A file of the benchmark, by its name."""
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module


@pytest.fixture
def rehearse(module, monkeypatch, tmp_path):
    """Rehearse a part in this process, and return its record."""
    setup, before = module("training_setup"), logging.get_verbosity()
    for owner, name, _ in setup.Phases.WRAPPED:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards

    def run(part):
        settings = module("common").Settings(True, tmp_path / f"gpu_{part}.json", tmp_path / "work", seconds=300)
        settings.workdir.mkdir()
        program = module(f"part_{part}")
        gc.freeze()  # as in `run_here`
        program.run(settings)
        return json.loads(settings.output.read_text())

    yield run
    logging.set_verbosity(before)


def test_speed(rehearse, tmp_path):
    record = rehearse("speed")
    assert str(tmp_path) not in json.dumps(record), "a record names no path of the machine"
    assert record["command"] == "python benchmarks/gpu/run.py speed --rehearse"
    assert {"date", "machine", "versions", "device"} <= record.keys()
    assert [case["torch_compile"] for case in record["cases"]] == [True, False]
    for case in record["cases"]:
        ours, theirs = (case["seconds"][name][0] for name in ("SlopTrainer", "Trainer"))
        assert case["ratio"] == pytest.approx(theirs / ours)
        assert case["tokens_per_second"]["SlopTrainer"] == pytest.approx(record["tokens_per_step"] / ours)
        assert case["mfu"] is None and case["of_matrix_product"]["SlopTrainer"] > 0
    calibration = record["calibration"]
    assert calibration["error"] == pytest.approx(
        calibration["predicted_seconds"] / record["cases"][1]["seconds"]["SlopTrainer"][0] - 1
    )
    assert record["memory"]["estimated_bytes"] > 16 * record["parameters"]
    crossing = record["boundary"]
    assert crossing["saved_bytes"] > 12 * crossing["source_parameters"]
    assert crossing["loaded_bytes"] > 12 * crossing["target_parameters"]
    for goal in record["goals"]:
        assert goal["met"] is (goal["value"] <= goal["limit"]), goal


def test_growth(rehearse):
    record = rehearse("growth")
    assert record["scale"] == "micro"
    assert list(record["arms"]) == ["ladder", "from-scratch"]


@pytest.mark.slow
def test_the_command_rehearses_the_tests(tmp_path):
    """The tests of `tests/gpu` pass on the CPU, from a checkout alone."""
    words = [sys.executable, ROOT / "benchmarks/gpu/run.py", "runs", "--rehearse", "--output-dir", tmp_path]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "gpu_runs.json").read_text())
    assert {test["outcome"] for test in record["tests"]} == {"passed", "skipped"}
    assert sum(test["outcome"] == "passed" for test in record["tests"]) > 20
    assert record["fault"] is None and record["part_seconds"] > 0
    (goal,) = record["goals"]
    assert goal["met"] and "tests that fail: 0, at most 0: met" in done.stdout


def test_a_part_that_is_cut_off_keeps_its_record(module, monkeypatch, tmp_path, capsys):
    run = module("run")
    path = tmp_path / "gpu_runs.json"

    def cut_off(part, options, seconds, environment):
        assert seconds == pytest.approx(30, abs=1)  # the only part has all the time
        path.write_text(json.dumps({"tests": [], "goals": [{"goal": "g", "value": 1, "limit": 0, "met": False}]}))
        return "cut off"

    monkeypatch.setattr(run, "run_part", cut_off)
    assert run.main(["runs", "--rehearse", "--minutes", "0.5", "--output-dir", str(tmp_path)]) == 1
    assert json.loads(path.read_text())["fault"] == "cut off"
    assert "NOT met" in capsys.readouterr().out


def test_a_part_has_a_time_limit(module, monkeypatch, tmp_path):
    run, popen = module("run"), subprocess.Popen
    started = []

    def start(words, **settings):
        started.append(words)
        return popen(["sleep", "60"], **settings)

    monkeypatch.setattr(run.subprocess, "Popen", start)
    options = run.parse(["runs", "--rehearse", "--workdir", str(tmp_path)])
    assert run.run_part("runs", options, 0.2, dict(os.environ)) == "cut off"
    assert "--rehearse" in started[0] and list(tmp_path.iterdir()) == [], "its files are removed"


def test_without_a_gpu_it_says_so(module, monkeypatch, capsys):
    run = module("run")
    monkeypatch.setattr(run, "sees_gpu", lambda environment: False)
    assert run.main(["speed"]) == 2
    assert "no CUDA device is visible" in capsys.readouterr().err


def test_missing_packages_are_listed_with_the_way_to_bring_them(module, monkeypatch, capsys):
    run, packages = module("run"), module("packages")
    installed = {**packages.list_installed(), "rich": "1.0"}
    del installed["datasets"]
    monkeypatch.setattr(packages, "list_installed", lambda: installed)
    assert run.main(["--rehearse"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "missing here: datasets>=4, rich>=13"
    assert any("packages.py there.txt wheels/" in line for line in lines)


def test_the_list_of_packages_is_read_back(module):
    packages = module("packages")
    installed = {"torch": "2.11.0+cu130", "rich": "14.0"}
    assert packages.parse_list(packages.format_list(installed, "3.12")) == ("3.12", installed)
    with pytest.raises(SystemExit, match="not a list"):
        packages.parse_list("rich==14.0")


def test_requirements_are_those_of_the_package(module):
    packages = module("packages")
    names = {packages.normalise(text.partition(">")[0]) for text in packages.read_requirements()}
    assert {"torch", "transformers", "datasets", "pydantic", "huggingface-hub", "pytest"} <= names
    text = (ROOT / "pyproject.toml").read_text()
    assert len(packages.read_requirements()) == text.split("dependencies = [")[1].split("]")[0].count('"') // 2 + 2


def test_wheels_bring_what_they_need_and_no_more(module, monkeypatch, tmp_path):
    packages = module("packages")
    needs = {
        "datasets": ["dill>=0.3,<0.4", "numpy>=1", "torch; extra == 'x'", "multiprocess"],
        "multiprocess": ["dill>=0.3.5"],
    }
    fetched = []

    def fetch(python, requirement, target):
        fetched.append(requirement)
        version = "0.3.2" if requirement.endswith(",>=0.3") else "0.3.9"  # the second request wants a newer one
        path = target / f"{packages.re.split('[<>=]', requirement)[0]}-{version}-py3-none-any.whl"
        path.touch()
        return path

    monkeypatch.setattr(packages, "_download_wheel", fetch)
    monkeypatch.setattr(packages, "_read_needs", lambda wheel: needs.get(wheel.name.split("-")[0], []))
    wheels = packages.download("3.12", {"numpy": "2.0"}, ["datasets>=0.2"], tmp_path)
    assert [path.name.split("-")[0] for path in wheels] == ["datasets", "dill", "multiprocess"]
    assert set(wheels) == set(tmp_path.iterdir()), "one version of each"


def test_the_table_of_the_docs_is_what_the_code_estimates(module):
    estimates = module("estimates")
    assert estimates.build_table() in (ROOT / "docs/gpu.md").read_text()


@pytest.mark.parametrize("is_product_known", (True, False))
def test_speeds_are_compared(module, is_product_known):
    speed = module("part_speed")
    speeds = {
        "SlopTrainer": [{"seconds": 0.5, "tokens_per_second": 200.0, "logged": {"tokens_per_second": 198.0}}],
        "Trainer": [{"seconds": 0.4, "tokens_per_second": 250.0, "logged": {}}],
    }
    result = speed.compare_speeds(speeds, flops=2e9, peak=1e12, product=8e11 if is_product_known else None)
    assert result["mfu"] == pytest.approx({"SlopTrainer": 0.4, "Trainer": 0.5})
    assert (result["of_matrix_product"] or {}).get("SlopTrainer") == (0.5 if is_product_known else None)
    assert result["ratio"] == pytest.approx(0.8)
    assert result["logged"] == {"tokens_per_second": 198.0}
    goals = speed.make_step_goals({"torch_compile": True, **result}, 1e12)
    assert [goal["met"] for goal in goals] == [False, False]
    assert goals[1]["value"] == pytest.approx(2.5)


def test_the_speed_between_logs(module):
    speed = module("part_speed")
    logs = [{"at": at, "step": step} for at, step in ((50, 10), (90, 20), (92, 30), (94, 40), (100, 50))]
    assert speed.compute_speed(logs, tokens_per_step=100, warm_up=20) == {
        "seconds": 0.2,
        "tokens_per_second": 500.0,
        "logged": {},
    }
    logs = [{**log, "tokens_per_second": log["step"], "mfu": 0.4} for log in logs]
    assert speed.compute_speed(logs, 100, 20)["logged"] == {"tokens_per_second": 40, "mfu": 0.4}
