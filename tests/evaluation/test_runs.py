"""Scores of a run's stages, compared with the losses that training measured."""

import re
import shutil

import pytest
import torch
from benchmark_data import TEXTS
from transformers import AutoModelForCausalLM

from slop_hf import (
    EvalSettings,
    EvaluateStages,
    RunConfig,
    RunDirectory,
    build_trainer,
    evaluate_run,
    grow_model,
    prepare_data,
)
from slop_hf.data import load_tokenizer
from slop_hf.errors import EvaluationError, RunError
from slop_hf.evaluation import runs
from slop_hf.evaluation.held_out import HeldOut
from slop_hf.evaluation.runs import compute_run_utility
from slop_hf.growth import hash_weights
from slop_hf.report import summarise
from slop_hf.runs.directory import EVAL_FILE
from slop_hf.runs.records import EvalRecord


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tmp_path_factory.mktemp("trained") / "run"


@pytest.fixture
def settings(config, tmp_path):
    def make(**more):
        held_out = HeldOut.from_corpus(prepare_data(RunConfig.from_yaml(config).data, progress=False))
        return EvalSettings(
            **{"tasks": "perplexity", "held_out": held_out, "cache_dir": tmp_path / "results", "device": "cpu", **more}
        )

    return make


@pytest.fixture
def train(config):
    """Train a run of three stages with a callback."""

    def run(callback, path):
        changes = {"growth_init": {"layer": "interleave", "ffn": "copy"}, "growth_seed": 7, "growth_noise": 2.0}
        overrides = {f"training.{key}": one for key, one in changes.items()}
        run_config = RunConfig.from_yaml(config, {"model.max_position_embeddings": 128, **overrides})
        build_trainer(run_config, path, callbacks=[callback]).train()
        return RunDirectory(path)

    return run


@pytest.fixture
def run(train, settings, trained, tmp_path):
    """A copy of a run scored while it trained; trained for the first test that needs it."""
    if not trained.exists():
        train(EvaluateStages(settings(), after_growth=True), trained)
    return RunDirectory(shutil.copytree(trained, tmp_path / "run"))


def losses(records, when):
    return [one.metrics["loss"] for one in records if one.when == when]


def test_stages_have_the_losses_that_training_measured(run, settings):
    for number in range(3):
        (run.stage_dir(number) / EVAL_FILE).unlink()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    scores = evaluate_run(run.path, settings(), after_growth=True)
    assert list(scores) == [0, 1, 2]
    for number, record in enumerate(run.records()):
        assert losses(scores[number], "end") == [pytest.approx(record.eval_loss, rel=1e-5)]
        grown = [] if number == 0 else [pytest.approx(record.eval_loss_after_growth, rel=1e-5)]
        assert losses(scores[number], "after_growth") == grown
        assert run.evaluations(number) == scores[number]
    assert compute_run_utility(run, scores) == pytest.approx(summarise(run).marginal_utility, rel=1e-3)
    assert len({one.weights_hash for records in scores.values() for one in records}) == 5
    after = {path for path in run.path.rglob("*") if path.is_file()}
    assert after - set(before) == {run.stage_dir(number) / EVAL_FILE for number in range(3)}
    assert all(path.read_bytes() == content for path, content in before.items())


def test_models_scored_after_growth_have_the_bits_that_training_began_with(run):
    for number, record in enumerate(run.records()[1:], start=1):
        small = AutoModelForCausalLM.from_pretrained(run.stage_dir(number - 1), dtype="auto")
        drawn = {"seed": record.growth_seed, "noise": record.growth_noise}
        grown = grow_model(small, record.operators[0], record.dims, init=record.init, **drawn)
        scored = next(one for one in run.evaluations(number) if one.when == "after_growth")
        assert scored.weights_hash == hash_weights(grown.named_parameters())
        assert drawn == {"seed": 7 + number, "noise": 2.0}


def test_other_records_are_kept(run, settings):
    others = [EvalRecord("piqa", {"acc": 0.5}), EvalRecord("perplexity", {"perplexity": 1.0}, limit=1)]
    stale = EvalRecord("perplexity", {"perplexity": 2.0})
    (run.stage_dir(1) / EVAL_FILE).unlink()
    run.add_evaluations(1, [*others, stale])
    (record,) = evaluate_run(run, settings(), stages=[1])[1]
    assert run.evaluations(1) == [*others, record]
    (limited,) = evaluate_run(run, settings(limit=1), stages=[1])[1]
    assert run.evaluations(1) == [others[0], limited, record]


def test_missing_runs_and_stages_are_refused(run, settings, tmp_path):
    chosen = settings()
    with pytest.raises(RunError, match="is not a run"):
        evaluate_run(tmp_path / "none", chosen)
    with pytest.raises(RunError, match="has no finished stage 3: choose one from 0 to 2"):
        evaluate_run(run, chosen, stages=[0, 3])
    for number in range(3):
        run.stage_dir(number).rename(run.path / f"gone-{number}")
    with pytest.raises(RunError, match="has no finished stage yet"):
        evaluate_run(run, chosen)


def test_stages_are_scored_while_the_run_trains(run):
    both = ["after_growth", "end"]
    assert [[one.when for one in run.evaluations(number)] for number in range(3)] == [["end"], both, both]


def test_a_failed_evaluation_neither_stops_nor_changes_the_run(run, train, settings, monkeypatch, tmp_path):
    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs, "score_tasks", fails)
    failed = train(EvaluateStages(settings(), after_growth=True), tmp_path / "failed")
    assert failed.is_finished
    for number in range(3):
        assert failed.evaluations(number) == []
        one, other = (path.stage_dir(number) / "model.safetensors" for path in (failed, run))
        assert one.read_bytes() == other.read_bytes()


def test_unknown_tasks_are_refused_before_training():
    pytest.importorskip("lm_eval")
    with pytest.raises(EvaluationError, match="no task 'pika'"):
        EvaluateStages(EvalSettings(tasks="pika"))


@pytest.mark.parametrize(
    "changes, said",
    [
        (["evaluation.tasks=[perplexity, pika]"], "no task 'pika'"),
        (["evaluation.tasks=perplexity", "evaluation.limit=0"], "limit must be a whole number, 1 or more, got 0"),
        (["evaluation.tasks=piqa", "evaluation.datasets=nowhere"], "datasets .*nowhere: no such directory"),
        (["evaluation.task=piqa"], "unknown key 'evaluation.task'"),
        (["evaluation.limit=10"], "missing key 'evaluation.tasks'"),
        (["evaluation=piqa"], "evaluation: "),
        (["evaluation.tasks=perplexity", "data.held_out=0"], "no block of the data is held out"),
    ],
)
def test_a_wrong_evaluation_section_is_refused_before_training(config, error_of, tmp_path, changes, said):
    if "pika" in said:
        pytest.importorskip("lm_eval")
    settings = [part for change in changes for part in ("--set", change)]
    assert re.search(said, error_of("train", config, "-o", tmp_path / "run", *settings))
    assert not RunDirectory(tmp_path / "run").exists
    # Tokenizing may take hours: only what depends on the data is refused after it.
    assert (tmp_path / "cache").exists() is ("held out" in said)


def test_a_run_without_tasks_is_not_scored(config):
    assert EvaluateStages.of_run(RunConfig.from_yaml(config)) is None


def test_tasks_of_a_run_and_its_own_held_out_text(config, datasets_dir):
    asked = {"tasks": ["perplexity", "piqa"], "limit": 3, "datasets": str(datasets_dir), "after_growth": True}
    callback = EvaluateStages.of_run(RunConfig.from_yaml(config, {"evaluation": asked}))
    assert callback.after_growth and (callback.settings.tasks, callback.settings.limit) == (("perplexity", "piqa"), 3)
    held_out = HeldOut.from_corpus(prepare_data(RunConfig.from_yaml(config).data, progress=False))
    assert callback.settings.held_out.fingerprint == held_out.fingerprint


def test_perplexity_of_texts_and_tasks_together(run, settings, datasets_dir):
    texts = HeldOut.from_texts({"a": TEXTS[0]}, load_tokenizer(run.stage_dir(0)), 32)
    both = settings(tasks=("perplexity", "piqa"), held_out=texts, datasets=datasets_dir, limit=2)
    scores = evaluate_run(run, both, stages=[2])
    assert [one.task for one in scores[2]] == ["perplexity", "piqa"]
    assert compute_run_utility(run, scores) is None
