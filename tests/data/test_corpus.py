from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slop_hf.data import Corpus, DataConfig, corpus, documents, prepare_data, train_tokenizer
from slop_hf.errors import DataError

SETTINGS: dict[str, Any] = {"vocab_size": 300, "block_size": 16, "held_out": 0.3, "max_documents": 20}
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
    return DataConfig(str(folder), cache_dir=str(tmp_path / "cache"), **SETTINGS)


def changed(config: DataConfig, **changes: Any) -> DataConfig:
    return DataConfig(**{**vars(config), **changes})


def texts_in(made: Corpus, part: str) -> list[str]:
    path = getattr(made, part).path
    tokens, ends = np.fromfile(path, "<u2").tolist(), np.fromfile(f"{path}.index", "<u8").tolist()
    return [made.tokenizer.decode(tokens[start : end - 1]) for start, end in zip([0, *ends], ends, strict=False)]


def test_every_document_is_on_one_side(config: DataConfig) -> None:
    made = prepare_data(config)
    train, held_out = texts_in(made, "train"), texts_in(made, "held_out")
    assert sorted(train + held_out) == sorted(documents(config))
    assert train and held_out and not set(train) & set(held_out)
    assert made.documents == 20 and len(set(train + held_out)) == 19
    assert len(made.train) > len(made.held_out) >= 1
    assert made.train.block_size == made.held_out.block_size == 16


def test_the_split_follows_the_text_and_the_share() -> None:
    texts = [f"text {i}" for i in range(2000)]
    some, more = ({text for text in texts if corpus._part(text, share) == "held_out"} for share in (0.1, 0.3))
    assert 150 < len(some) < 250 and 520 < len(more) < 680  # within four standard deviations
    assert some < more
    assert not any(corpus._part(text, 0.0) == "held_out" for text in texts)


def test_the_split_does_not_depend_on_the_order(config: DataConfig, folder: Path) -> None:
    before = prepare_data(config)
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(f"{99 - int(path.stem):02}.txt"))
    after = prepare_data(config)
    assert after.held_out.path != before.held_out.path
    assert texts_in(after, "held_out") == texts_in(before, "held_out")[::-1]


def test_the_tokenizer_is_trained_on_the_first_training_documents_only(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def spy(texts: Iterator[str], vocab_size: int) -> Any:
        seen.append(list(texts))
        return train_tokenizer(seen[-1], vocab_size)

    monkeypatch.setattr(corpus, "train_tokenizer", spy)
    train = texts_in(prepare_data(config), "train")
    monkeypatch.setattr(corpus, "TOKENIZER_TRAINING_BYTES", len((train[0] + train[1]).encode()))
    prepare_data(changed(config, vocab_size=299))
    assert seen == [train, train[:2]]


def test_a_second_call_reads_no_text(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_data(config)
    monkeypatch.setattr(corpus, "documents", lambda config: pytest.fail("texts are read again"))
    again, coarser = prepare_data(config), prepare_data(changed(config, block_size=32))
    assert again.fingerprint == coarser.fingerprint == first.fingerprint
    assert again.documents == first.documents
    assert again.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert again.train[1]["input_ids"].tolist() == first.train[1]["input_ids"].tolist()
    pair = [token for i in (0, 1) for token in first.train[i]["input_ids"].tolist()]
    assert coarser.train[0]["input_ids"].tolist() == pair


def test_what_the_tokens_depend_on_makes_another_cache(config: DataConfig, folder: Path) -> None:
    keys = [
        corpus._key(changed(config, **change))
        for change in (
            {},
            {"source": (str(folder), "python-stdlib")},
            {"split": "test"},
            {"text_column": "body"},
            {"vocab_size": 301},
            {"held_out": 0.2},
            {"max_documents": None},
            {"tokenizer": "owner/name"},
        )
    ]
    (folder / "00.txt").write_text("changed")
    keys.append(corpus._key(config))
    (folder / "new.txt").write_text("more")
    keys.append(corpus._key(config))
    assert len(set(keys)) == len(keys)
    same = [{"block_size": 99}, {"cache_dir": "elsewhere"}, {"source": (str(folder),)}]
    assert {corpus._key(changed(config, **change)) for change in same} == {keys[-1]}


def test_the_cache_says_what_it_is(config: DataConfig) -> None:
    made = prepare_data(config)
    folder = made.train.path.parent
    assert folder.parent == Path(str(config.cache_dir))
    ends = ("", ".index", ".metadata")
    names = {f"{part}.ds{end}" for part in ("train", "held_out") for end in ends} | {"corpus.json", "tokenizer"}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "corpus.json").read_text())
    assert record["documents"] == 20
    assert record["tokens"]["train"] * 2 == made.train.path.stat().st_size
    assert record["fingerprint"] == made.fingerprint
    assert record["config"]["source"] == list(config.sources)


def test_the_cache_lies_in_the_hugging_face_home(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    assert prepare_data(changed(config, cache_dir=None)).train.path.parents[1] == tmp_path / "home/slop_hf"


def test_another_process_and_place_give_the_same_fingerprint(tmp_path: Path) -> None:
    # Another process has other hash seeds, in Python as in Rust.
    code = (
        "import sys; from slop_hf.data import DataConfig, prepare_data\n"
        f"print(prepare_data(DataConfig(cache_dir=sys.argv[1], **{SETTINGS!r})).fingerprint)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    here = prepare_data(DataConfig(cache_dir=str(tmp_path / "here"), **SETTINGS))
    assert done.stdout.strip() == here.fingerprint, done.stderr


def test_other_content_gives_another_fingerprint(config: DataConfig, folder: Path) -> None:
    before = prepare_data(config)
    os.utime(folder / "00.txt", (1, 1))  # another cache with the same content
    touched = prepare_data(config)
    assert touched.train.path != before.train.path and touched.fingerprint == before.fingerprint
    (folder / "05.txt").write_text("something else")
    assert prepare_data(config).fingerprint != before.fingerprint


@pytest.mark.parametrize("where", ["documents", "metadata", "tokenizer"])
def test_a_failure_on_the_way_leaves_no_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    def fail_halfway(config: DataConfig) -> Iterator[str]:
        for i, text in enumerate(documents(config)):
            # The first reading, for the tokenizer, is of training documents; the second comes to a file half written.
            if i == 10 and any(Path(str(config.cache_dir)).glob(".*/train.ds")):
                fail()
            yield text

    with monkeypatch.context() as patch:
        if where == "documents":
            patch.setattr("slop_hf.data.packing.BATCH_CHARACTERS", 500)
            patch.setattr(corpus, "documents", fail_halfway)
        elif where == "metadata":
            patch.setattr("slop_hf.data.packing.write_text", fail)
        else:
            patch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config)
    cache = Path(str(config.cache_dir))
    assert cache.is_dir() and list(cache.iterdir()) == []
    assert prepare_data(config).documents == 20


def test_a_lost_race_gives_the_winners_cache(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    winner = prepare_data(config)
    key, cache = winner.train.path.parent, Path(str(config.cache_dir))
    shutil.move(key, cache.parent / "won")

    def overtaken(*args: Any) -> Any:
        shutil.move(cache.parent / "won", key)
        return packed(*args)

    packed = corpus.pack
    monkeypatch.setattr(corpus, "pack", overtaken)
    assert prepare_data(config).fingerprint == winner.fingerprint
    assert list(cache.iterdir()) == [key]


def test_simultaneous_calls_agree(config: DataConfig) -> None:
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(prepare_data, [config] * 3))
    assert len({(one.fingerprint, one.train.path) for one in made}) == 1
    assert len(list(Path(str(config.cache_dir)).iterdir())) == 1


def test_a_damaged_cache_is_refused_with_the_folder_to_delete(config: DataConfig) -> None:
    folder = prepare_data(config).train.path.parent
    shutil.copytree(folder, folder.with_name("whole"))
    for damage in (
        lambda: os.truncate(folder / "held_out.ds", 4),
        lambda: (folder / "train.ds").unlink(),
        lambda: (folder / "corpus.json").write_text("{"),
        lambda: (folder / "corpus.json").unlink(),
        lambda: shutil.rmtree(folder / "tokenizer"),
    ):
        damage()
        with pytest.raises(DataError, match=f"delete the folder {folder}"):
            prepare_data(config)
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("whole"), folder)
    assert prepare_data(config).documents == 20


def test_a_part_without_a_block_is_refused_with_remedies(config: DataConfig) -> None:
    with pytest.raises(DataError, match=r"the held_out part has \d+ tokens, .*larger corpus.*0 holds out none"):
        prepare_data(changed(config, held_out=1e-9))
    with pytest.raises(DataError, match=r"the train part has \d+ tokens, less than a block of 100000"):
        prepare_data(changed(config, held_out=0, block_size=100000))


def test_nothing_need_be_held_out(config: DataConfig) -> None:
    made = prepare_data(changed(config, held_out=0))
    assert len(made.held_out) == 0
    assert len(texts_in(made, "train")) == 20


def test_a_given_tokenizer_is_used_and_kept_with_the_tokens(config: DataConfig, tmp_path: Path) -> None:
    train_tokenizer(["another text"] * 2, 260).save_pretrained(tmp_path / "given")
    given = changed(config, tokenizer=str(tmp_path / "given"), vocab_size=5)
    made = prepare_data(given)
    assert len(made.tokenizer) == 260
    assert sorted(texts_in(made, "train") + texts_in(made, "held_out")) == sorted(documents(config))
    train_tokenizer(["yet another text"] * 2, 261).save_pretrained(tmp_path / "given")
    assert len(prepare_data(given).tokenizer) == 261


def test_wrong_input_is_refused_before_anything_is_written(config: DataConfig) -> None:
    for change in ({"source": "owner/name"}, {"source": "./nowhere"}, {"tokenizer": "owner/name"}):
        with pytest.raises(DataError):
            prepare_data(changed(config, **change))
    assert not Path(str(config.cache_dir)).exists()
