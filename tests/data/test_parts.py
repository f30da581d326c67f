"""Tokenization by several processes and machines: every byte is that of one process."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from slop_hf.data import DataConfig, Source, corpus, parts, prepare_data, tokenizing, train_tokenizer
from slop_hf.data.config import ONLY, DataPart
from slop_hf.data.corpus import prepare_part
from slop_hf.data.sources import DocumentStream, choose_files, read_documents
from slop_hf.errors import DataError

FILES = (
    "source.json",
    *(f"{split}.ds{end}" for split in ("train", "held_out") for end in ("", ".index", ".metadata")),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of several formats, one of them without a document, in two folders."""
    root = tmp_path / "texts"
    (root / "more").mkdir(parents=True)
    for number in range(12):
        words = " ".join(str((number + 1) * k) for k in range(20 + 7 * (number % 5)))
        (root / f"{number:02}.txt").write_text(words, encoding="utf-8")
    (root / "05.txt").write_text(" \n")
    lines = "".join(json.dumps({"text": f"line {number} " * 9}) + "\n" for number in range(40))
    (root / "more" / "lines.jsonl").write_text(lines)
    (root / "more" / "packed.jsonl.gz").write_bytes(gzip.compress(lines.replace("line", "packed").encode()))
    return root


@pytest.fixture
def config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Batches of a few documents, so that they do not end where files or parts do."""
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 700)
    monkeypatch.setattr(tokenizing, "JOURNAL_BATCHES", 2)
    train_tokenizer(read_documents(Source(str(folder))), 300).save_pretrained(tmp_path / "tokenizer")
    return DataConfig(
        str(folder),
        tokenizer=str(tmp_path / "tokenizer"),
        block_size=16,
        held_out=0.3,
        cache_dir=str(tmp_path / "cache"),
    )


@pytest.fixture
def expected(config: DataConfig) -> dict[str, bytes]:
    """The files that one process writes."""
    return read_files(dataclasses.replace(config, cache_dir=f"{config.cache_dir}-whole"))


def read_files(config: DataConfig) -> dict[str, bytes]:
    made = prepare_data(config, progress=False)
    assert made.documents == 91
    folder = made.sources[ONLY].train.path.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_machines_fill_one_cache_in_any_order(config: DataConfig, expected: dict[str, bytes], count: int) -> None:
    order = [*range(count, 0, -2), *range(count - 1, 0, -2)]
    for done, number in enumerate(order, start=1):
        missing = prepare_part(config, DataPart(number, count), progress=False)
        assert [part.number for part in missing.get(ONLY, [])] == sorted(set(range(1, count + 1)) - set(order[:done]))
    assert read_files(config) == expected
    assert not list(Path(str(config.cache_dir), "sources").glob(".*.parts"))


@pytest.mark.slow
def test_worker_processes_write_the_same_files(config: DataConfig, expected: dict[str, bytes], folder: Path) -> None:
    """Also after a failure in one of them, which is reported by the first process."""
    damaged = folder / "more" / "packed.jsonl.gz"
    stat, content = damaged.stat(), damaged.read_bytes()
    damaged.write_bytes(content[:-9] + bytes(9))
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"packed\.jsonl\.gz"):
        prepare_data(config, progress=False, workers=2)
    damaged.write_bytes(content)
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    prepare_data(config, progress=False, workers=2)
    assert read_files(config) == expected


def test_workers_share_the_pieces(
    config: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same with threads instead of processes, which take seconds to start."""
    monkeypatch.setattr(parts, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    tokenized: list[str] = []
    tokenize_piece = parts._tokenize_piece

    def fail_once(job: parts.TokenizingJob, folder: Path, of: tuple[DataPart, DataPart]) -> None:
        tokenized.append(str(of[-1]))
        if tokenized.count("5-of-8") == 1 and str(of[-1]) == "5-of-8":
            raise DataError("a damaged file")
        tokenize_piece(job, folder, of)

    monkeypatch.setattr(parts, "_tokenize_piece", fail_once)
    with pytest.raises(DataError, match="a damaged file"):
        prepare_data(config, progress=False, workers=2)
    prepare_data(config, progress=False, workers=3)  # resumes, with the pieces of the first call
    assert set(tokenized) == {f"{number}-of-8" for number in range(1, 9)} and tokenized.count("1-of-8") == 1
    assert read_files(config) == expected


def test_pieces_make_up_a_part(
    config: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with several workers cuts its part again; the others need not have as many."""
    monkeypatch.setattr(parts, "_cut_pieces", lambda source, workers: [DataPart(number, 5) for number in range(1, 6)])
    prepare_part(config, DataPart(2, 2), progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 700)
    assert prepare_part(config, DataPart(1, 2), progress=False) == {}
    assert read_files(config) == expected


@pytest.mark.parametrize("stop", [0, 20, 60])
def test_an_interrupted_part_is_resumed(
    config: DataConfig, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    texts, read = DocumentStream.__iter__, []

    def interrupt(self: Any) -> Iterator[str]:
        for text in texts(self):
            if len(read) == stop:
                raise KeyboardInterrupt
            read.append(text)
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(DocumentStream, "__iter__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_part(config, DataPart(1, 1), progress=False)
    read.clear()
    with monkeypatch.context() as patch:
        patch.setattr(DocumentStream, "__iter__", lambda self: (read.append(text) or text for text in texts(self)))
        assert prepare_part(config, DataPart(1, 1), progress=False) == {}
    assert len(read) <= 91 - stop + 20, "only the last batches are read twice"
    assert read_files(config) == expected


def test_a_part_that_was_merged_is_not_tokenized_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_data(config, progress=False)
    monkeypatch.setattr(corpus, "tokenize_part", None)
    assert prepare_part(config, DataPart(1, 4), progress=False) == {}


def test_parts_are_contiguous_and_of_equal_size(folder: Path) -> None:
    source = Source((str(folder), str(folder / "more")))
    whole = [sorted(names) for names in choose_files(source, [])]
    assert [len(names) for names in whole] == [14, 2]
    for count in (2, 5, 40):
        cut = [choose_files(source, [DataPart(number, count)]) for number in range(1, count + 1)]
        for place, names in enumerate(whole):
            assert [name for part in cut for name in sorted(part[place])] == names
    halves = [choose_files(source, [DataPart(1, 2), DataPart(number, 2)])[0] for number in (1, 2)]
    assert halves[0] | halves[1] == choose_files(source, [DataPart(1, 2)])[0] and not halves[0] & halves[1]


def test_documents_of_no_part_are_missing_or_read_twice(folder: Path) -> None:
    source = Source(str(folder))
    whole = list(read_documents(source))
    for count in (1, 3, 20):
        streams = [DocumentStream(source, parts=[DataPart(number, count)]) for number in range(1, count + 1)]
        assert [text for stream in streams for text in stream] == whole


def test_a_source_without_text_is_refused_when_it_is_merged(config: DataConfig, folder: Path) -> None:
    blank = folder.parent / "blank"
    blank.mkdir()
    for number in range(3):
        (blank / f"{number}.txt").write_text(" ")
    empty = dataclasses.replace(config, source=str(blank))
    with pytest.raises(DataError, match=r"no document with text in .*blank"):
        prepare_part(empty, DataPart(1, 1), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_documents": 5}, "leave max_documents out, or leave `workers` and `part` out"),
        ({"source": "user/dataset"}, "hf download user/dataset --repo-type dataset"),
    ],
)
def test_what_has_no_parts_is_refused(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("slop_hf.data.sources._HubDataset.check", lambda self: None)
    changed = dataclasses.replace(config, **change)
    for refused in (
        lambda: prepare_part(changed, DataPart(1, 2), progress=False),
        lambda: prepare_data(changed, progress=False, workers=2),
    ):
        with pytest.raises(DataError, match=message):
            refused()
    assert not list(Path(str(config.cache_dir)).glob("sources/*/*"))


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "", "1/2/3", "-1/2", "1.5/2"])
def test_a_wrong_part_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="part must be K/N"):
        DataPart.parse(text)
