"""The measurements of the library `evaluate`: loaded by path, without a network."""

import pytest
from benchmark_data import TEXTS

from slop_hf.errors import EvaluationError
from slop_hf.evaluation.held_out import HeldOut, measure_perplexity
from slop_hf.evaluation.measurements import path_of
from slop_hf.report.summary import compute_marginal_utility

evaluate = pytest.importorskip("evaluate")


@pytest.fixture
def load(tmp_path, no_network):
    return lambda name: evaluate.load(path_of(name), cache_dir=str(tmp_path))


def test_perplexity(load, model, model_dir, tokenizer):
    results = load("perplexity").compute(data=TEXTS, model_id=str(model_dir), block_size=32, batch_size=3)
    held_out = HeldOut.from_texts(dict(zip("ab", TEXTS, strict=True)), tokenizer, 32)
    expected = measure_perplexity(model, held_out).metrics
    assert results["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert results["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert results["perplexities"] == [pytest.approx(expected[f"perplexity/{name}"], rel=1e-6) for name in "ab"]


def test_perplexity_of_one_text(load, model_dir):
    results = load("perplexity").compute(data=TEXTS[:1], model_id=str(model_dir))
    assert results["perplexities"] == [results["perplexity"]]


def test_marginal_utility(load):
    perplexities, hours = [40.0, 30.0, 32.0, 27.0], [2.0, 4.0, 5.0]
    results = load("marginal_utility").compute(data=perplexities, hours=hours)
    assert results == {"marginal_utility": compute_marginal_utility(perplexities, hours)}


def test_an_unknown_one():
    with pytest.raises(EvaluationError, match="choose one of marginal_utility, perplexity"):
        path_of("bleu")
