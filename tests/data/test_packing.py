from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from slop_hf.data import PackedDataset, packing, train_tokenizer
from slop_hf.errors import DataError

TEXTS = [
    "to be or not to be",
    "that is the question",
    "whether 'tis nobler",
    "naïve ☕\r\n",
    "a<|endoftext|>b",
    "x",
] * 3
TOKENIZER = train_tokenizer(TEXTS, 290)


def pack(folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> Path:
    packing.pack((("train", text) for text in texts), tokenizer, folder, ["train"], "a tokenizer")
    return folder / "train.ds"


def tokens_of(path: Path, dtype: str = "<u2") -> list[int]:
    return np.fromfile(path, dtype=dtype).tolist()


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size - 1)} | {"[EOS]": size - 1}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[EOS]")


def test_the_file_holds_every_document_and_where_it_ends(tmp_path: Path) -> None:
    path = pack(tmp_path, TEXTS)
    tokens, ends = tokens_of(path), tokens_of(Path(f"{path}.index"), "<u8")
    assert ends[-1] == len(tokens)
    documents = [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert [document[-1] for document in documents] == [TOKENIZER.eos_token_id] * len(TEXTS)
    assert [TOKENIZER.decode(document[:-1]) for document in documents] == TEXTS
    assert Path(f"{path}.metadata").read_text().splitlines() == [
        "a tokenizer|2",
        str(len(tokens)),
        f"{len(tokens)} T",
    ]


def test_a_special_token_spelled_out_in_a_text_ends_no_document(tmp_path: Path) -> None:
    tokens = tokens_of(pack(tmp_path, ["a<|endoftext|>b"]))
    assert tokens.count(TOKENIZER.eos_token_id) == 1
    # ... and the tokenizer is left as it was.
    assert TOKENIZER("a<|endoftext|>b").input_ids.count(TOKENIZER.eos_token_id) == 1


def test_truncation_and_padding_of_the_tokenizer_do_not_matter(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    for name in ("plain", "set"):
        (tmp_path / name).mkdir()
    assert tokens_of(pack(tmp_path / "set", TEXTS, tokenizer)) == tokens_of(pack(tmp_path / "plain", TEXTS))


def test_batches_do_not_change_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    one = tokens_of(pack(tmp_path / "one", TEXTS))
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 25)
    assert len(list(packing._batches(("", text) for text in TEXTS))) > 4
    assert tokens_of(pack(tmp_path / "many", TEXTS)) == one


def test_each_part_has_a_file(tmp_path: Path) -> None:
    documents = [("even" if len(text) % 2 == 0 else "odd", text) for text in TEXTS]
    even, odd, none = packing.pack(documents, TOKENIZER, tmp_path, ["even", "odd", "none"], "a tokenizer")
    assert (even.documents + odd.documents, none.documents) == (len(TEXTS), 0)
    for writer in (even, odd, none):
        expected = [text for part, text in documents if f"{part}.ds" == writer.path.name]
        decoded = TOKENIZER.decode(tokens_of(writer.path))
        assert decoded == "".join(f"{text}<|endoftext|>" for text in expected)
    assert len(PackedDataset(none.path, 4)) == 0


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65535, "<u2"), (65536, "<u4"), (70000, "<u4")])
def test_the_vocabulary_decides_on_the_size_of_a_token(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    last = vocab_size - 2
    path = pack(tmp_path, [f"w7 w{last}", "w9"], word_tokenizer(vocab_size))
    expected = [7, last, vocab_size - 1, 9, vocab_size - 1]
    assert tokens_of(path, dtype) == expected
    assert PackedDataset(path, 5)[0]["input_ids"].tolist() == expected


def test_blocks_follow_one_another_and_the_rest_is_left_out(tmp_path: Path) -> None:
    path = pack(tmp_path, TEXTS)
    tokens = tokens_of(path)
    blocks = PackedDataset(path, 8)
    assert len(tokens) % 8
    assert (len(blocks), blocks.tokens, blocks.block_size) == (len(tokens) // 8, len(tokens) // 8 * 8, 8)
    assert torch.cat([blocks[i]["input_ids"] for i in range(len(blocks))]).tolist() == tokens[: blocks.tokens]
    item = blocks[1]
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])
    item["input_ids"][0] = -100  # neither the labels nor the file share its memory
    assert blocks[1]["input_ids"].tolist() == item["labels"].tolist() == tokens[8:16]


@pytest.mark.parametrize("index", [-1, 10**9])
def test_a_block_out_of_range_is_an_index_error(tmp_path: Path, index: int) -> None:
    blocks = PackedDataset(pack(tmp_path, TEXTS), 8)
    with pytest.raises(IndexError, match=str(index)):
        blocks[index]
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_a_pickled_dataset_carries_no_tokens(tmp_path: Path) -> None:
    blocks = PackedDataset(pack(tmp_path, TEXTS * 100), 8)
    expected = blocks[3]["input_ids"].tolist()  # the file is mapped now
    content = pickle.dumps(blocks)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert again[3]["input_ids"].tolist() == expected
    assert blocks[3]["input_ids"].tolist() == expected


def test_workers_give_the_same_batches(tmp_path: Path) -> None:
    blocks = PackedDataset(pack(tmp_path, TEXTS), 8)
    alone, workers = ([batch["input_ids"] for batch in DataLoader(blocks, 4, num_workers=n)] for n in (0, 2))
    assert torch.equal(torch.cat(alone), torch.cat(workers))
    assert sum(map(len, workers)) == len(blocks)


def test_a_damaged_file_is_refused_with_the_folder_to_delete(tmp_path: Path) -> None:
    path = pack(tmp_path, TEXTS)
    os.truncate(path, path.stat().st_size - 2)
    with pytest.raises(DataError, match=rf"its metadata says \d+ tokens of 2 bytes: delete the folder {tmp_path}"):
        PackedDataset(path, 8)
    for content in ("", "a tokenizer|3\n4\n4 T", "a tokenizer|2\nmany\n"):
        Path(f"{path}.metadata").write_text(content)
        with pytest.raises(DataError, match=f"not a whole token file .*: delete the folder {tmp_path}"):
            PackedDataset(path, 8)
    with pytest.raises(DataError, match="not a whole token file"):
        PackedDataset(tmp_path / "nothing.ds", 8)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(12, "12 T"), (1500, "1.5 kT"), (10_281_560, "10.3 MT"), (2 * 10**9, "2 GT")]
)
def test_counts_are_readable(tokens: int, expected: str) -> None:
    assert packing._readable(tokens) == expected
