"""`slop eval` as a user would type it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slop_hf.evaluation import lm_eval
from slop_hf.evaluation.tasks import PAPER_TASKS
from slop_hf.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def run(config, trained, tmp_path, output_of):
    """A finished run of three stages: trained for the first test that wants it, and copied."""
    if not trained.exists():
        output_of("train", config, "-o", trained, "--set", "model.max_position_embeddings=128")
    return shutil.copytree(trained, tmp_path / "run")


def test_help_states_the_settings(output_of):
    text = " ".join(output_of("eval", "--help").split())
    for name, task in PAPER_TASKS.items():
        assert f"{name}: {task.task}, {task.num_fewshot}-shot, {task.metric}" in text
    options = ("--tasks", "--limit", "--batch-size", "--num-fewshot", "--stage", "--include-path", "--data", "--text")
    assert all(option in text for option in (*options, "--datasets", "--json", "--dry-run", "RUN|MODEL"))


def test_help_loads_no_heavy_library():
    code = """
import sys
from slop_hf.cli import main
sys.argv = ["slop", "eval", "--help"]
try:
    main()
except SystemExit as done:
    assert not done.code
print("loaded", *{"torch", "transformers", "lm_eval"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded"


def test_perplexity_of_a_run(run, config, tmp_path, output_of):
    command = ["eval", run, "--tasks", "perplexity", "--data", config, "--cache-dir", tmp_path / "results"]
    text = output_of(*command, "--after-growth")
    rows = [line for line in text.splitlines() if "stage-" in line]
    names = ["stage-0-initial", "stage-1-layer, after growth", "stage-1-layer", "stage-2-ffn, after growth"]
    assert [re.split(r"\s{2,}", row.strip())[0] for row in rows] == [*names, "stage-2-ffn"]
    last = RunDirectory(run).records()[2]
    assert f"{last.perplexity:.2f}" in rows[-1] and "marginal utility (Eq. 2):" in text

    answer = json.loads(output_of(*command, "--stage", 1, "--json"))
    assert [stage["name"] for stage in answer["stages"]] == ["stage-1-layer"] and answer["marginal_utility"] is None
    assert answer["stages"][0]["evaluations"][0]["metrics"]["loss"] > 0
    assert [record.when for record in RunDirectory(run).evaluations(1)] == ["after_growth", "end"]


def test_perplexity_of_a_model_on_a_text(run, tmp_path, output_of):
    (tmp_path / "a.txt").write_text("file 1: 1 2 3 4 5 6 7 8 9 " * 20)
    command = ["eval", run / "stage-1-layer", "--tasks", "perplexity", "--text", tmp_path / "a.txt"]
    options = ["--block-size", 32, "--batch-size", 2, "--limit", 3, "--cache-dir", tmp_path / "results"]
    answer = json.loads(output_of(*command, *options, "--json"))
    (record,) = answer["evaluations"]
    assert record["documents"] == record["limit"] == 3 and answer["model"] == str(run / "stage-1-layer")
    assert f"{record['metrics']['perplexity']:,.2f}" in output_of(*command, *options)
    assert not (run / "stage-1-layer" / "evaluations.json").exists()


def test_steps_are_named_on_stderr(run, tmp_path, slop):
    (tmp_path / "a.txt").write_text("file 1: 1 2 3 4 5 6 7 8 9 " * 20)
    words = ["eval", run, "--stage", 1, "--tasks", "perplexity", "--text", tmp_path / "a.txt", "--block-size", 32]
    code, _, err = slop(*words, "--cache-dir", tmp_path / "results")
    assert code == 0 and "scoring stage-1-layer on perplexity\nloading stage-1-layer\n" in err


def test_texts_of_one_name_are_measured_each(run, tmp_path, output_of, error_of):
    paths = [tmp_path / name / "a.txt" for name in ("old", "new")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"{path.parent.name} file 1 2 3 4 5 6 7 8 9 " * 20)
    words = [
        "eval",
        run,
        "--stage",
        0,
        "--tasks",
        "perplexity",
        "--block-size",
        32,
        "--cache-dir",
        tmp_path / "results",
    ]
    options = [word for path in paths for word in ("--text", path)]
    answer = json.loads(output_of(*words, *options, "--json"))
    assert {f"loss/{path}" for path in paths} <= set(answer["stages"][0]["evaluations"][0]["metrics"])
    assert "is given twice" in error_of(*words, *options, "--text", paths[0])


@pytest.fixture
def only_piqa(monkeypatch):
    """Let lm-eval's list of tasks be a list of one: all of them take ten seconds to read."""
    tasks = pytest.importorskip("lm_eval.tasks")
    folder = Path(tasks.__file__).parent / "piqa"
    index = tasks.TaskManager(include_path=folder, include_defaults=False).task_index
    monkeypatch.setattr(lm_eval, "_list_stock_tasks", lambda: dict(index))


def test_tasks_of_a_run(run, only_piqa, tmp_path, output_of):
    rows = [{"goal": f"open door {n}", "sol1": "pull", "sol2": "push it", "label": n % 2} for n in range(4)]
    for split in ("train", "validation"):
        path = tmp_path / "datasets" / "piqa" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", run, "--tasks", "piqa", "--datasets", tmp_path / "datasets", "--limit", 3]
    text = output_of(*command, "--cache-dir", tmp_path / "results")
    assert "acc_norm" in text and text.count("stage-") == 3
    (record,) = RunDirectory(run).evaluations(2)
    assert record.task == "piqa" and record.documents == 3 and record.num_fewshot == 0


def test_a_dry_run_scores_nothing(run, output_of, tmp_path):
    text = output_of("eval", run, "--dry-run", "--after-growth")
    assert "would score stage-0-initial, stage-1-layer, stage-2-ffn (and each right after its growth)" in text
    assert "leaderboard_bbh (3-shot)" in text and "gsm8k (5-shot)" in text
    answer = json.loads(output_of("eval", run, "--tasks", "piqa,perplexity", "--stage", 2, "--dry-run", "--json"))
    assert answer == {"stages": ["stage-2-ffn"], "tasks": ["piqa", "perplexity"], "after_growth": False}
    assert not list(run.rglob("evaluations.json"))


def test_errors(run, config, only_piqa, tmp_path, error_of):
    perplexity = ("--tasks", "perplexity", "--data", config)
    assert "no such directory" in error_of("eval", tmp_path / "none", *perplexity)
    assert "neither a run nor a model directory" in error_of("eval", tmp_path, "--tasks", "piqa")
    assert "is not a run, and has no stages" in error_of("eval", run / "stage-0-initial", "--stage", 0, *perplexity)
    assert "no finished stage 7" in error_of("eval", run, "--stage", 7, *perplexity)
    assert "no finished stage 7" in error_of("eval", run, "--stage", 7, "--dry-run")
    assert "perplexity is measured on held-out text, got none" in error_of("eval", run, "--tasks", "perplexity")
    assert "--batch-size must be 'auto'" in error_of("eval", run, "--batch-size", "big", *perplexity)
    text = tmp_path / "a.txt"
    assert "no such file" in error_of("eval", run, "--tasks", "perplexity", "--text", text)
    assert "give one of them" in error_of("eval", run, *perplexity, "--text", text)
    text.write_bytes("ä".encode("latin-1"))
    words = ("eval", run, "--tasks", "perplexity", "--text", text)
    assert "a.txt: not a text file in UTF-8" in error_of(*words)
    assert "folder" in error_of("eval", run, "--tasks", "perplexity", "--text", tmp_path)
    text.write_text(" ")
    assert "a.txt has no text to predict" in error_of(*words)
    assert "device 'cuda:77': this machine has no such device" in error_of(*words, "--device", "cuda:77")
    assert "give --data" in error_of(*words, "--set", "data.block_size=8")
    assert "is neither a run nor a model" in error_of("eval", "missing", *words[2:], "--dry-run")
    assert "did you mean piqa?" in error_of("eval", run, "--tasks", "piqaa")
