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

from slop_hf.architectures import ARCHITECTURES
from slop_hf.data import MixedBlocks, PackedDataset, packing, train_tokenizer
from slop_hf.data.packing import TokenWriter, separate_documents
from slop_hf.data.tokenizing import make_plain_backend
from slop_hf.errors import DataError
from slop_hf.testing import build_tiny_model

TEXTS = [
    "to be or not to be",
    "that is the question",
    "whether 'tis nobler",
    "naïve ☕\r\n",
    "a<|endoftext|>b",
    "x",
] * 3
TOKENIZER = train_tokenizer(TEXTS, 290)


def pack(folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast = TOKENIZER, name: str = "train") -> Path:
    backend = make_plain_backend(tokenizer)
    with TokenWriter(folder / f"{name}.ds", "a tokenizer", len(tokenizer)) as writer:
        for text in texts:
            writer.write([backend.encode(text, add_special_tokens=False).ids], tokenizer.eos_token_id)
    return folder / f"{name}.ds"


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


def test_a_writer_resumes_from_its_state(tmp_path: Path) -> None:
    """Bytes written after the state was taken, such as by a killed call, are dropped."""
    documents = [[7, 8], [9], [], [10, 11, 12]]
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    with TokenWriter(tmp_path / "whole" / "x.ds", "t", 300) as whole:
        for document in documents:
            whole.write([document], 0)
    with pytest.raises(KeyboardInterrupt), TokenWriter(tmp_path / "resumed" / "x.ds", "t", 300) as writer:
        for document in documents[:2]:
            writer.write([document], 0)
        state = writer.flush()
        writer.write([[99] * 1000], 0)
        raise KeyboardInterrupt
    assert not (tmp_path / "resumed" / "x.ds.metadata").exists()
    with TokenWriter(tmp_path / "resumed" / "x.ds", "t", 300, state) as writer:
        for document in documents[2:]:
            writer.write([document], 0)
    assert (writer.documents, writer.tokens, writer.digest) == (4, 10, whole.digest)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()
    with pytest.raises(DataError, match=r"x.ds has 20 bytes, 2000 were written: delete the folder"):
        TokenWriter(tmp_path / "whole" / "x.ds", "t", 300, {**state, "tokens": 1000}).__enter__()


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
    item["input_ids"][0] = -100  # not the file's memory
    assert blocks[1]["input_ids"].tolist() == tokens[8:16]


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
        with pytest.raises(DataError, match=f"not a complete token file .*: delete the folder {tmp_path}"):
            PackedDataset(path, 8)
    with pytest.raises(DataError, match="not a complete token file"):
        PackedDataset(tmp_path / "nothing.ds", 8)


@pytest.mark.parametrize(
    ("tokens", "expected"), [(12, "12 T"), (1500, "1.5 kT"), (10_281_560, "10.3 MT"), (2 * 10**9, "2 GT")]
)
def test_counts_are_readable(tokens: int, expected: str) -> None:
    assert packing._format_tokens(tokens) == expected


def test_documents_are_separated(tmp_path: Path) -> None:
    """Positions restart after every eos, and no token is predicted across it."""
    path = pack(tmp_path, TEXTS)
    plain, apart = PackedDataset(path, 16), PackedDataset(path, 16, eos=TOKENIZER.eos_token_id)
    for number in range(len(plain)):
        item = apart[number]
        assert torch.equal(item["input_ids"], plain[number]["input_ids"])
        position = -1
        for index, token in enumerate(item["input_ids"].tolist()):
            first = index > 0 and item["input_ids"][index - 1] == TOKENIZER.eos_token_id
            position = 0 if first else position + 1
            assert item["position_ids"][index] == position
            assert item["labels"][index] == (-100 if first else token)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_models_mask_attention_between_documents(family: str) -> None:
    """With position ids, a document has the same logits in a block as alone, in every family."""
    model = build_tiny_model(family, use_cache=False)
    vocab = model.config.vocab_size
    one, two = (torch.randint(1, vocab, (2, length), generator=torch.manual_seed(length)) for length in (5, 7))
    packed = torch.cat([one, torch.zeros(2, 1, dtype=torch.long), two], dim=1)
    positions = torch.stack([separate_documents(row, eos=0)["position_ids"] for row in packed])
    with torch.no_grad():
        together = model(input_ids=packed, position_ids=positions).logits
        alone = model(input_ids=two).logits
        seen = model(input_ids=packed).logits[:, 6:]
    assert torch.allclose(together[:, 6:], alone, atol=1e-5)
    assert not torch.allclose(seen, alone, atol=1e-3)


def test_mixed_blocks_are_all_blocks_of_all_sources(tmp_path: Path) -> None:
    parts = {
        name: PackedDataset(pack(tmp_path, texts, name=name), 8) for name, texts in (("a", TEXTS), ("b", TEXTS[::2]))
    }
    mixed = MixedBlocks(parts, {"b": 0.25, "a": 0.75, "c": 0.0}, "f")
    assert list(mixed.weights.items()) == [("a", 0.75), ("b", 0.25)]
    expected = [part[i]["input_ids"] for part in parts.values() for i in range(len(part))]
    assert len(mixed) == len(expected)
    assert all(torch.equal(mixed[i]["input_ids"], one) for i, one in enumerate(expected))
    for index in (-1, len(mixed)):
        with pytest.raises(IndexError):
            mixed[index]
