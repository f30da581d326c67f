from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_server import FileServer

from slop_hf.data import (
    Corpus,
    DataConfig,
    Mixture,
    Source,
    corpus,
    download,
    parts,
    prepare_data,
    read_documents,
    tokenizing,
    train_tokenizer,
)
from slop_hf.data.config import ONLY
from slop_hf.errors import DataError
from slop_hf.io.retry import RetryPolicy

SETTINGS: dict[str, Any] = {"vocab_size": 300, "block_size": 16, "held_out": 0.3}
WORDS = ["layer", "stage", "grow", "token", "block", "naïve", "☕"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty short texts, the first and the last the same."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        words = (WORDS[(i % 19 + 1) * j % 7] for j in range(40 + i % 19))
        (texts / f"{i:02}.txt").write_text(" ".join(words), encoding="utf-8")
    return texts


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(str(folder), max_documents=20, cache_dir=str(tmp_path / "cache"), **SETTINGS)


def changed(config: DataConfig, **changes: Any) -> DataConfig:
    return dataclasses.replace(config, **changes)


def texts_in(made: Corpus, part: str, name: str = ONLY) -> list[str]:
    path = getattr(made.sources[name], part).path
    tokens, ends = np.fromfile(path, "<u2").tolist(), np.fromfile(f"{path}.index", "<u8").tolist()
    return [made.tokenizer.decode(tokens[start : end - 1]) for start, end in zip([0, *ends], ends, strict=False)]


def all_texts(config: DataConfig) -> list[str]:
    return list(read_documents(config.sources[ONLY]))


def folder_of(made: Corpus, name: str = ONLY) -> Path:
    return made.sources[name].train.path.parent


def made_folders(config: DataConfig) -> list[str]:
    """The complete folders of the cache."""
    cache = Path(str(config.cache_dir))
    return sorted(str(path.relative_to(cache)) for path in cache.glob("*/*") if path.name[0] != ".")


def test_every_document_is_on_one_side(config: DataConfig) -> None:
    made = prepare_data(config)
    train, held_out = texts_in(made, "train"), texts_in(made, "held_out")
    assert sorted(train + held_out) == sorted(all_texts(config))
    assert train and held_out and not set(train) & set(held_out)
    assert made.documents == 20 and len(set(train + held_out)) == 19
    assert len(made.train) > len(made.held_out[ONLY]) >= 1
    assert made.train.parts[ONLY].block_size == made.held_out[ONLY].block_size == 16


def test_the_split_follows_the_text_and_the_share() -> None:
    texts = [f"text {i}".encode() for i in range(2000)]
    some, more = (
        {text for text in texts if tokenizing.choose_split(text, share) == "held_out"} for share in (0.1, 0.3)
    )
    assert 150 < len(some) < 250 and 520 < len(more) < 680  # within four standard deviations
    assert some < more
    assert not any(tokenizing.choose_split(text, 0.0) == "held_out" for text in texts)


def test_the_split_does_not_depend_on_the_order(config: DataConfig, folder: Path) -> None:
    before = prepare_data(config)
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(f"{99 - int(path.stem):02}.txt"))
    after = prepare_data(config)
    assert folder_of(after) != folder_of(before)
    assert texts_in(after, "held_out") == texts_in(before, "held_out")[::-1]


def test_the_tokenizer_is_trained_on_the_first_training_documents_only(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def spy(texts: Iterator[str], vocab_size: int, kind: str) -> Any:
        seen.append(list(texts))
        return train_tokenizer(seen[-1], vocab_size, kind)

    monkeypatch.setattr(corpus, "train_tokenizer", spy)
    train = texts_in(prepare_data(config), "train")
    monkeypatch.setattr(corpus, "TOKENIZER_TRAINING_BYTES", len((train[0] + train[1]).encode()))
    prepare_data(config)
    assert seen == [train, train[:2]]


def test_a_second_call_reads_no_text(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not corpus.is_cached(config)
    first = prepare_data(config)
    monkeypatch.setattr("slop_hf.data.sources.DocumentStream.__iter__", lambda self: pytest.fail("texts are read"))
    again, coarser = prepare_data(config), prepare_data(changed(config, block_size=32))
    assert corpus.is_cached(config) and not corpus.is_cached(changed(config, held_out=0.2))
    assert again.fingerprint == coarser.fingerprint == first.fingerprint
    assert again.documents == first.documents
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.train[1]["input_ids"].tolist() == first.train[1]["input_ids"].tolist()
    pair = [token for i in (0, 1) for token in first.train[i]["input_ids"].tolist()]
    assert coarser.train[0]["input_ids"].tolist() == pair


def test_what_the_tokens_depend_on_makes_another_cache(config: DataConfig, folder: Path) -> None:
    def keys(config: DataConfig) -> tuple[str, str]:
        texts = corpus._describe_sources(config)
        (source,) = corpus._find_sources(config, texts, "v")
        return source.folder.name, corpus._find_tokenizer(config, texts).name

    changes = (
        {},
        {"source": (str(folder), "python-stdlib")},
        {"split": "test"},
        {"text_column": "body"},
        {"held_out": 0.2},
        {"max_documents": None},
        {"format": "lines"},
    )
    different = [keys(changed(config, **change)) for change in changes]
    (folder / "00.txt").write_text("changed")
    different.append(keys(config))
    (folder / "new.txt").write_text("more")
    different.append(keys(config))
    assert len({source for source, _ in different}) == len({tokenizer for _, tokenizer in different}) == len(different)
    others = [keys(changed(config, **change)) for change in ({"vocab_size": 301}, {"tokenizer_kind": "sentencepiece"})]
    assert {source for source, _ in others} == {different[-1][0]}
    assert len({tokenizer for _, tokenizer in others} | {different[-1][1]}) == 3
    same = [{"block_size": 99}, {"cache_dir": "elsewhere"}, {"source": (str(folder),)}, {"document_mask": True}]
    assert {keys(changed(config, **change)) for change in same} == {different[-1]}


def test_the_cache_says_what_it_is(config: DataConfig) -> None:
    made = prepare_data(config)
    folder = folder_of(made)
    assert folder.parent == Path(str(config.cache_dir)) / "sources"
    ends = ("", ".index", ".metadata")
    names = {f"{part}.ds{end}" for part in ("train", "held_out") for end in ends} | {"source.json"}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "source.json").read_text())
    assert record["documents"] == 20
    assert record["tokens"]["train"] * 2 == (folder / "train.ds").stat().st_size
    assert record["fingerprint"] == made.sources[ONLY].fingerprint
    assert record["made_from"]["source"] == [config.source]


def test_the_cache_lies_in_the_hugging_face_home(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert folder_of(prepare_data(changed(config, cache_dir=None))).parent == tmp_path / "home/slop_hf/sources"


@pytest.mark.slow
def test_another_process_and_place_give_the_same_fingerprint(tmp_path: Path) -> None:
    # Another process has other hash seeds, in Python as in Rust.
    settings = {**SETTINGS, "max_documents": 20}
    code = (
        "import sys; from slop_hf.data import DataConfig, prepare_data\n"
        f"print(prepare_data(DataConfig(cache_dir=sys.argv[1], **{settings!r})).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    here = prepare_data(DataConfig(cache_dir=str(tmp_path / "here"), **settings))
    assert done.stdout.strip() == here.fingerprint, done.stderr


def test_other_content_gives_another_fingerprint(config: DataConfig, folder: Path) -> None:
    before = prepare_data(config)
    os.utime(folder / "00.txt", (1, 1))  # another cache with the same content
    touched = prepare_data(config)
    assert folder_of(touched) != folder_of(before) and touched.fingerprint == before.fingerprint
    (folder / "05.txt").write_text("something else")
    assert prepare_data(config).fingerprint != before.fingerprint


def test_an_interrupted_call_is_resumed(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is that of an uninterrupted call, and only the last batches are tokenized twice."""
    whole = prepare_data(config)
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 500)
    monkeypatch.setattr(tokenizing, "JOURNAL_BATCHES", 2)
    expected = prepare_data(changed(config, cache_dir=f"{config.cache_dir}-whole"))
    assert texts_in(expected, "train") == texts_in(whole, "train")
    stream, tokenized = tokenizing.DocumentStream.__iter__, []

    def stop(number: int) -> Any:
        def texts(self: Any) -> Iterator[str]:
            for text in stream(self):
                if number == len(tokenized):
                    raise KeyboardInterrupt
                tokenized.append(text)
                yield text

        return texts

    for number in range(0, 21, 3):
        broken = changed(config, cache_dir=f"{config.cache_dir}-{number}", tokenizer=str(tokenizer_of(config)))
        tokenized.clear()
        monkeypatch.setattr(tokenizing.DocumentStream, "__iter__", stop(number))
        with pytest.raises(KeyboardInterrupt):
            prepare_data(broken)
        assert made_folders(broken) == []
        tokenized.clear()
        monkeypatch.setattr(tokenizing.DocumentStream, "__iter__", stop(-1))
        made = prepare_data(broken)
        # Two batches of three texts or so each are between two entries of the journal, and two more are in progress.
        assert 20 - number <= len(tokenized) <= 20 - number + 14
        for part in ("train.ds", "held_out.ds", "train.ds.index"):
            assert (folder_of(made) / part).read_bytes() == (folder_of(expected) / part).read_bytes()
        assert made.sources[ONLY].fingerprint == expected.sources[ONLY].fingerprint
        assert not (folder_of(made) / tokenizing.JOURNAL).exists()


def tokenizer_of(config: DataConfig) -> Path:
    (folder,) = (path for path in Path(str(config.cache_dir), "tokenizers").iterdir() if path.name[0] != ".")
    return folder


@pytest.mark.parametrize("where", ["metadata", "tokenizer"])
def test_a_failure_on_the_way_leaves_no_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "metadata":
            patch.setattr("slop_hf.data.packing.write_text", fail)
        else:
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config)
    assert [name for name in made_folders(config) if name.startswith("sources")] == []
    assert prepare_data(config).documents == 20


def test_simultaneous_calls_do_the_work_once(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return tokenize(*args, **kwargs)

    tokenize = parts.tokenize
    monkeypatch.setattr(parts, "tokenize", counted)
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(prepare_data, [config] * 3))
    assert len({(one.fingerprint, folder_of(one)) for one in made}) == len(calls) == 1


def test_a_damaged_cache_is_refused_with_the_folder_to_delete(config: DataConfig) -> None:
    made = prepare_data(config)
    folder, tokenizer = folder_of(made), tokenizer_of(config)
    for damaged, damage in (
        (folder, lambda: os.truncate(folder / "held_out.ds", 4)),
        (folder, lambda: (folder / "train.ds").unlink()),
        (folder, lambda: (folder / "source.json").write_text("{")),
        (folder, lambda: (folder / "source.json").unlink()),
        (tokenizer, lambda: (tokenizer / "tokenizer.json").unlink()),
    ):
        shutil.copytree(damaged, Path(str(config.cache_dir)) / "whole")
        damage()
        with pytest.raises(DataError, match=f"delete the folder {damaged}"):
            prepare_data(config)
        shutil.rmtree(damaged)
        shutil.move(Path(str(config.cache_dir)) / "whole", damaged)
    assert prepare_data(config).documents == 20


def test_a_part_without_a_block_is_refused_with_remedies(config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"the held_out part of corpus has \d+ tokens, .*larger.*0 holds out none"):
        prepare_data(changed(config, held_out=1e-9))
    with pytest.raises(DataError, match=r"the train part of corpus has \d+ tokens, less than a block of 100000"):
        prepare_data(changed(config, held_out=0, block_size=100000))


def test_nothing_need_be_held_out(config: DataConfig) -> None:
    made = prepare_data(changed(config, held_out=0))
    assert made.held_out == {}
    assert len(texts_in(made, "train")) == 20


def test_a_given_tokenizer_is_used(config: DataConfig, tmp_path: Path) -> None:
    train_tokenizer(["another text"] * 2, 260).save_pretrained(tmp_path / "given")
    config = changed(config, tokenizer=str(tmp_path / "given"), vocab_size=5)
    made = prepare_data(config)
    assert len(made.tokenizer) == 260
    assert sorted(texts_in(made, "train") + texts_in(made, "held_out")) == sorted(all_texts(config))
    train_tokenizer(["yet another text"] * 2, 261).save_pretrained(tmp_path / "given")
    assert len(prepare_data(config).tokenizer) == 261


def test_wrong_input_is_refused_before_anything_is_written(config: DataConfig) -> None:
    for change in ({"source": "owner/name"}, {"source": "./nowhere"}, {"tokenizer": "owner/name"}):
        with pytest.raises(DataError):
            prepare_data(changed(config, **change))
    assert not Path(str(config.cache_dir)).exists()


@pytest.fixture
def mixture(folder: Path, tmp_path: Path) -> DataConfig:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"body": f"row {i} of the rows"}) + "\n" for i in range(90))
    )
    (tmp_path / "few.txt").write_text("a few words, and a few more words, and that is all there is of it " * 3)
    sources = {
        "files": Source(str(folder), weight=60),
        "rows": Source(str(tmp_path / "rows.jsonl"), weight=39, text_column="body"),
        "few": Source(str(tmp_path / "few.txt"), weight=1),
    }
    return DataConfig(mixture=Mixture(sources), cache_dir=str(tmp_path / "cache"), **SETTINGS)


def test_a_mixture_keeps_its_sources_apart(mixture: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        made = prepare_data(mixture)
    assert "no held-out loss for few: the held-out documents have less than a block of 16 tokens" in caplog.text
    assert list(made.sources) == list(made.train.parts) == ["files", "rows", "few"]
    assert made.weights == made.train.weights == pytest.approx({"files": 0.6, "rows": 0.39, "few": 0.01})
    assert made.documents == 111 and len(made.train) == sum(len(one.train) for one in made.sources.values())
    assert set(made.held_out) == {"files", "rows"}
    rows = texts_in(made, "train", "rows") + texts_in(made, "held_out", "rows")
    assert sorted(rows) == sorted(f"row {i} of the rows" for i in range(90))


def test_other_weights_take_the_same_tokens(mixture: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tokenizer no text is read again, but the fingerprint differs."""
    first = prepare_data(mixture)
    config = changed(mixture, tokenizer=str(tokenizer_of(mixture)))
    assert prepare_data(config).fingerprint == first.fingerprint
    sources = {name: dataclasses.replace(one, weight=1 / 3) for name, one in mixture.sources.items()}
    monkeypatch.setattr("slop_hf.data.sources.DocumentStream.__iter__", lambda self: pytest.fail("texts are read"))
    other = prepare_data(changed(config, mixture=Mixture(sources)))
    assert [folder_of(other, name) for name in sources] == [folder_of(first, name) for name in sources]
    assert other.fingerprint != first.fingerprint


def test_a_tokenizer_sees_every_source_by_its_weight(mixture: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "TOKENIZER_TRAINING_BYTES", 2000)
    texts = list(corpus.read_tokenizer_texts(mixture))
    rows = [text for text in texts if text.startswith("row ")]
    few = [text for text in texts if text.startswith("a few")]
    files = [text for text in texts if text not in rows + few]
    sizes = [sum(len(text.encode()) for text in part) for part in (files, rows, few)]
    # The document that reaches the share is the last.
    assert 1200 <= sizes[0] < 1200 + len(files[-1].encode()) and 780 <= sizes[1] < 805 and len(few) == 1


@pytest.fixture
def served(mixture: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, DataConfig]]:
    """The mixture with more rows, and a web server that serves them."""
    monkeypatch.setattr(download, "RETRY_POLICY", RetryPolicy(first_wait=0.0))
    monkeypatch.setattr(download, "PIECE_BYTES", 50_000)
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 20_000)
    monkeypatch.setattr(tokenizing, "JOURNAL_BATCHES", 1)
    rows = tmp_path / "many.jsonl"
    rows.write_text("".join(json.dumps({"body": f"row {i} " * 20}) + "\n" for i in range(2000)))
    sources = {**mixture.sources, "rows": dataclasses.replace(mixture.sources["rows"], source=str(rows))}
    with FileServer({"many.jsonl": rows.read_bytes()}) as server:
        yield server, changed(mixture, mixture=Mixture(sources))


def fetched(server: Any, config: DataConfig, tmp_path: Path) -> DataConfig:
    """The same mixture with the rows from the server, in another cache, with the same tokenizer."""
    rows = dataclasses.replace(config.sources["rows"], source=server.url("many.jsonl"))
    mixture = Mixture({**config.sources, "rows": rows})
    return changed(config, mixture=mixture, cache_dir=str(tmp_path / "other"), tokenizer=str(tokenizer_of(config)))


def test_a_failing_server_loses_nothing(served: tuple[Any, DataConfig], tmp_path: Path) -> None:
    server, config = served
    expected = prepare_data(config)
    server.faults = iter([None, None, 0.3, 500, 429, 0.5, 503, 0.1, 502, 0.8])
    made = prepare_data(fetched(server, config, tmp_path))
    assert made.fingerprint == expected.fingerprint
    assert next(server.faults, None) is None
    assert [path.suffix for path in (tmp_path / "other/downloads").iterdir()] == [".lock"], "tokens replace downloads"


def test_a_server_that_is_gone_is_waited_for_by_the_next_call(served: tuple[Any, DataConfig], tmp_path: Path) -> None:
    """The first call stops with an error and keeps its progress; the next one asks for the rest only."""
    server, config = served
    expected, config = prepare_data(config), fetched(server, config, tmp_path)
    server.faults = iter([None, None, None, None, None, 0.7, *[500] * 100])
    with pytest.raises(DataError, match=r"many\.jsonl.*it resumes where it stopped"):
        prepare_data(config)
    (journal,) = Path(str(config.cache_dir)).glob(f"sources/.*.building/{tokenizing.JOURNAL}")
    assert json.loads(journal.read_text())["bytes"] > 100_000
    server.faults = iter(())
    server.requests.clear()
    assert prepare_data(config).fingerprint == expected.fingerprint
    pieces = [asked for _, asked in server.requests if asked]  # the others have looked the file up
    assert int(pieces[0].removeprefix("bytes=").partition("-")[0]) > 100_000


def test_a_signature_is_not_stored(served: tuple[Any, DataConfig], tmp_path: Path) -> None:
    server, config = served
    prepare_data(config)
    signed = fetched(server, config, tmp_path)
    rows = dataclasses.replace(signed.sources["rows"], source=f"{server.url('many.jsonl')}?signature=secret")
    made = prepare_data(changed(signed, mixture=Mixture({**signed.sources, "rows": rows})))
    record = json.loads((folder_of(made, "rows") / "source.json").read_text())
    assert record["made_from"]["source"] == [server.url("many.jsonl")]
    assert not any(b"secret" in path.read_bytes() for path in (tmp_path / "other").rglob("*") if path.is_file())


def test_a_signature_is_not_shown(tmp_path: Path, output_of: Callable[..., str]) -> None:
    rows = "".join(json.dumps({"text": f"row {i} " * 20}) + "\n" for i in range(50))
    settings = [f"--set=data.{key}={value}" for key, value in {**SETTINGS, "cache_dir": tmp_path / "cache"}.items()]
    with FileServer({"rows.jsonl": rows.encode()}) as server:
        source = {"source": f"{server.url('rows.jsonl')}?signature=secret", "weight": 1}
        (tmp_path / "mixture.yaml").write_text(json.dumps({"sources": {"rows": source}}))
        for _ in ("estimated", "cached"):
            printed = output_of("data", "inspect", tmp_path / "mixture.yaml", *settings, "--json")
            assert json.loads(printed)["sources"][0]["places"] == [server.url("rows.jsonl")]
            assert "secret" not in printed + output_of("data", "inspect", tmp_path / "mixture.yaml", *settings)
            output_of("data", "tokenize", tmp_path / "mixture.yaml", *settings)
