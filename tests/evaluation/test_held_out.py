"""Exact perplexity, compared with a token-by-token reference."""

import math

import pytest
import torch
from benchmark_data import TEXTS

from slop_hf.data import DataConfig, Mixture, Source, prepare_data
from slop_hf.errors import EvaluationError
from slop_hf.evaluation.held_out import HeldOut, measure_perplexity
from slop_hf.training.ranks import Ranks


def losses(model, ids):
    """Return the loss of every token of a block except the first, in float64 from the logits on."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    return [-float(row.log_softmax(-1)[token]) for row, token in zip(logits[:-1], ids[1:], strict=True)]


def reference(model, blocks):
    token_losses = [loss for block in blocks for loss in losses(model, block["input_ids"])]
    return math.fsum(token_losses) / len(token_losses)


@pytest.fixture(scope="module")
def two(tokenizer):
    return HeldOut.from_texts({"a": TEXTS[0], "b": TEXTS[1][:200]}, tokenizer, 32)


def test_it_is_exact_over_all_tokens(model, two):
    record = measure_perplexity(model, two, batch_size=4)
    every = [block for blocks in two.sources.values() for block in blocks]
    assert len({len(block["input_ids"]) for block in every}) == 3  # last blocks are shorter, and count for less
    assert record.metrics["loss"] == pytest.approx(reference(model, every), rel=1e-6)
    assert record.metrics["perplexity"] == math.exp(record.metrics["loss"])
    for name, blocks in two.sources.items():
        assert record.metrics[f"loss/{name}"] == pytest.approx(reference(model, blocks), rel=1e-6)
    assert record.task == "perplexity" and record.documents == len(every)
    assert two.fingerprint[:12] in record.harness


def test_it_does_not_depend_on_the_batch_size(model, two):
    mean_losses = [measure_perplexity(model, two, batch_size=size).metrics["loss"] for size in (1, 2, 5, 64, "auto")]
    assert max(mean_losses) - min(mean_losses) < 1e-6 * mean_losses[0]


def test_auto_halves_the_batch_until_it_fits(model, two, monkeypatch):
    sizes, forward = [], model.forward

    def scarce(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(input_ids, **kwargs)

    expected = measure_perplexity(model, two, batch_size=3).metrics
    monkeypatch.setattr(model, "forward", scarce)
    assert measure_perplexity(model, two).metrics == expected and sizes[0] == 8


def test_ranks_share_the_blocks(model, two):
    gathered = []

    class Rank(Ranks):
        def gather_all(self, value):
            gathered.append(value)
            return gathered

        def raise_any(self, error):
            assert error is None

    alone = measure_perplexity(model, two, batch_size=1).metrics
    for rank in range(3):
        together = measure_perplexity(model, two, batch_size=1, ranks=Rank(rank, 3)).metrics
    assert together == pytest.approx(alone, rel=1e-12)
    tokens = [[tokens for _, tokens in one.values()] for one in gathered]
    assert all(sum(of_rank) < sum(map(sum, tokens)) / 2 for of_rank in tokens)


def test_a_limit_takes_the_first_blocks_of_each_source(model, two):
    record = measure_perplexity(model, two, limit=2)
    chosen = [block for blocks in two.sources.values() for block in blocks[:2]]
    assert record.limit == 2 and record.documents == 4
    assert record.metrics["loss"] == pytest.approx(reference(model, chosen), rel=1e-6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, model_dir):
    folder = tmp_path_factory.mktemp("texts")
    for name in ("web", "books"):
        (folder / name).mkdir()
        for number in range(30):
            (folder / name / f"{number}.txt").write_text(f"{name} {number}: the door was red " * 4)
    sources = {"web": Source(str(folder / "web"), weight=0.9), "books": Source(str(folder / "books"), weight=0.1)}
    return lambda **more: prepare_data(
        DataConfig(
            mixture=Mixture(sources),
            tokenizer=str(model_dir),
            block_size=64,
            held_out=0.4,
            cache_dir=str(folder / "cache"),
            **more,
        ),
        progress=False,
    )


def test_sources_are_weighted_as_the_mixture_is(model, corpus):
    data = corpus()
    metrics = measure_perplexity(model, HeldOut.from_corpus(data)).metrics
    for name, source in data.sources.items():
        blocks = [source.held_out[index] for index in range(len(source.held_out))]
        assert metrics[f"loss/{name}"] == pytest.approx(reference(model, blocks), rel=1e-6)
    assert metrics["loss"] == pytest.approx(0.9 * metrics["loss/web"] + 0.1 * metrics["loss/books"], rel=1e-12)


def test_masked_documents_are_predicted_independently(model, corpus, tokenizer):
    held_out = HeldOut.from_corpus(corpus(document_mask=True))
    record = measure_perplexity(model, held_out, batch_size=3)
    unmasked = measure_perplexity(model, HeldOut.from_corpus(corpus()))
    assert record.metrics["loss"] != pytest.approx(unmasked.metrics["loss"])
    token_losses = []
    for index in range(len(blocks := held_out.sources["web"])):
        ids = blocks[index]["input_ids"]
        ends = [*(ids == tokenizer.eos_token_id).nonzero().flatten().tolist(), len(ids) - 1]
        begins = [0, *(end + 1 for end in ends[:-1])]
        parts = [ids[begin : end + 1] for begin, end in zip(begins, ends, strict=True)]
        token_losses += [loss for part in parts if len(part) > 1 for loss in losses(model, part)]
    assert record.metrics["loss/web"] == pytest.approx(math.fsum(token_losses) / len(token_losses), rel=1e-5)


def test_other_cuts_and_texts_have_other_fingerprints(corpus, tokenizer, two):
    texts = {"a": TEXTS[0]}
    fingerprints = {
        HeldOut.from_corpus(corpus()).fingerprint,
        HeldOut.from_corpus(corpus(document_mask=True)).fingerprint,
        two.fingerprint,
        HeldOut.from_texts(texts, tokenizer, 32).fingerprint,
        HeldOut.from_texts(texts, tokenizer, 64).fingerprint,
    }
    assert len(fingerprints) == 5


def test_unmeasurable_text_is_refused(model, tokenizer, tmp_path, model_dir):
    with pytest.raises(EvaluationError, match="empty has no text to predict"):
        HeldOut.from_texts({"empty": " \n"}, tokenizer, 32)
    with pytest.raises(EvaluationError, match="block_size must be a whole number, 2 or more"):
        HeldOut.from_texts({"a": "text"}, tokenizer, 1)
    long = HeldOut.from_texts({"a": " ".join(TEXTS * 3)}, tokenizer, 2000)
    with pytest.raises(EvaluationError, match=r"the model reads 1024: cut shorter ones"):
        measure_perplexity(model, long)
    (tmp_path / "a.txt").write_text("the door was red " * 50)
    none = DataConfig(
        source=str(tmp_path / "a.txt"), tokenizer=str(model_dir), block_size=8, held_out=0, cache_dir=str(tmp_path)
    )
    with pytest.raises(EvaluationError, match="no block of the data is held out"):
        HeldOut.from_corpus(prepare_data(none, progress=False))
