from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from slop_hf.data import DataConfig, Mixture, Source, prepare_data, train_tokenizer
from slop_hf.data import estimate as module
from slop_hf.data.estimate import SourceEstimate, estimate, find_first_repeat, shorten
from slop_hf.errors import DataError

SETTINGS: dict[str, Any] = {"vocab_size": 300, "block_size": 16, "held_out": 0.25}


def texts(count: int, word: str) -> list[str]:
    return [f"{word} {number:03} " * 40 for number in range(count)]


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    """600 texts in one file of JSON lines, and 40 in a folder."""
    (tmp_path / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(600, "web")))
    (tmp_path / "books").mkdir()
    for number, text in enumerate(texts(40, "book")):
        (tmp_path / "books" / f"{number:02}.txt").write_text(text)
    sources = {"web": Source(str(tmp_path / "web.jsonl"), 0.8), "books": Source(str(tmp_path / "books"), 0.2)}
    return Mixture(sources)


def config(mixture: Mixture, tmp_path: Path, **changes: Any) -> DataConfig:
    return DataConfig(mixture=mixture, cache_dir=str(tmp_path / "cache"), **SETTINGS, **changes)


def text_bytes(source: SourceEstimate) -> float:
    return (source.tokens or 0) * source.bytes_per_token


def test_a_source_that_is_read_whole_is_counted(mixture: Mixture, tmp_path: Path) -> None:
    estimated = estimate(config(mixture, tmp_path))
    assert [(name, source.documents) for name, source in estimated.sources.items()] == [("web", 600), ("books", 40)]
    web = estimated.sources["web"]
    assert text_bytes(web) == pytest.approx(sum(map(len, texts(600, "web"))))
    assert web.disk_bytes == 2 * (web.tokens or 0) and (web.seconds or 0) > 0
    assert "a bpe of 300 tokens trained on the sample" in estimated.tokenizer


def test_tokens_are_those_of_the_corpus(mixture: Mixture, tmp_path: Path) -> None:
    """With the same tokenizer; the corpus leaves out what fills no block."""
    data = config(mixture, tmp_path)
    prepare_data(data, progress=False).tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "tokenizer"))
    estimated, corpus = estimate(data), prepare_data(data, progress=False)
    assert estimated.tokenizer == str(tmp_path / "tokenizer")
    for name, source in corpus.sources.items():
        tokens = source.train.tokens + source.held_out.tokens
        assert 0 <= (estimated.sources[name].tokens or 0) - tokens < 32


def test_a_sample_predicts_the_whole(mixture: Mixture, tmp_path: Path) -> None:
    train_tokenizer(["bytes alone"], 257).save_pretrained(tmp_path / "tokenizer")
    data = config(mixture, tmp_path, tokenizer=str(tmp_path / "tokenizer"))
    whole, part = (estimate(data, size).sources for size in (2**22, 2**13))
    for name in whole:
        assert text_bytes(part[name]) == pytest.approx(text_bytes(whole[name]), rel=0.03)
        assert part[name].documents == pytest.approx(whole[name].documents, rel=0.03)
        assert part[name].tokens == pytest.approx(whole[name].tokens, rel=0.03)


def test_compressed_files_are_counted_as_their_text(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts(500, "zip"))
    for number in range(3):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    estimated = estimate(DataConfig(str(tmp_path), text_column="body", **SETTINGS), 2**12).sources["corpus"]
    assert text_bytes(estimated) == pytest.approx(3 * sum(map(len, texts(500, "zip"))), rel=0.01)


def test_max_documents_bounds_a_source(tmp_path: Path, mixture: Mixture) -> None:
    web = dataclasses.replace(mixture.sources["web"], max_documents=100)
    estimated = estimate(config(Mixture({**mixture.sources, "web": web}), tmp_path), 2**13).sources["web"]
    assert estimated.documents == 100


def test_only_max_documents_bounds_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_documents", lambda source, cache_dir: iter(texts(200, "hub")))
    monkeypatch.setattr(module, "count_local_bytes", lambda source: None)
    sources = {"known": Source("owner/a", 0.5, max_documents=5000), "unknown": Source("owner/b", 0.5)}
    estimated = estimate(DataConfig(mixture=Mixture(sources), **SETTINGS), 2**13)
    known, unknown = estimated.sources.values()
    assert known.documents == 5000 and text_bytes(known) == pytest.approx(5000 * len(texts(1, "hub")[0]))
    assert unknown.bytes_per_token > 1
    assert {unknown.tokens, unknown.documents, unknown.disk_bytes, unknown.seconds} == {None}
    training_tokens = estimated.training_tokens
    weights = {name: source.weight for name, source in sources.items()}
    assert find_first_repeat(training_tokens, weights) == (round((training_tokens["known"] or 0) * 2), "known")


def test_the_scarcest_source_ends_first(mixture: Mixture, tmp_path: Path) -> None:
    estimated = estimate(config(mixture, tmp_path))
    repeat = find_first_repeat(estimated.training_tokens, mixture.weights)
    assert repeat is not None
    tokens, name = repeat
    books = estimated.sources["books"].tokens
    assert name == "books" and books is not None
    assert tokens == pytest.approx(books * 0.75 / 0.2, abs=5)
    assert find_first_repeat({"web": None}, {"web": 1.0}) is None


def test_a_tokenizer_that_cannot_be_loaded_is_replaced(mixture: Mixture, tmp_path: Path) -> None:
    estimated = estimate(config(mixture, tmp_path, tokenizer="owner/name"))
    assert estimated.tokenizer.endswith("trained on the sample, as owner/name cannot be loaded")


def test_a_long_document_is_shortened(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("long " * 100_000)
    estimated = estimate(DataConfig(str(tmp_path), **SETTINGS), 2**12).sources["corpus"]
    assert text_bytes(estimated) == pytest.approx(500_000, rel=1e-4) and estimated.documents == 1
    assert shorten("long " * 100_000) == f"{('long ' * 80).rstrip()} …"


def test_nothing_is_written(mixture: Mixture, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    estimate(config(mixture, tmp_path))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="no/such/folder"):
        estimate(DataConfig("no/such/folder"))
