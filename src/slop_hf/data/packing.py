"""Tokens on disk, and the blocks of tokens that training reads.

The layout is datatrove's, which nanotron reads too. For a file of tokens NAME.ds:

    NAME.ds            the tokens of all documents, little-endian uint16, or uint32 for a vocabulary over 65535
    NAME.ds.index      where each document ends, in tokens from the start, little-endian uint64
    NAME.ds.metadata   text: "tokenizer|bytes per token", number of tokens, the same for people
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Protocol, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..dims import IntArray
from ..errors import DataError
from ..io.files import write_text
from .config import ONLY

#: Label of tokens not to predict.
IGNORED = -100
#: A training example: `input_ids`, and `labels` and `position_ids` if it has them, each int64 of shape [block_size].
Block: TypeAlias = Mapping[str, torch.Tensor]


class Blocks(Protocol):
    """A map-style data set of blocks of equal length."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Block: ...


#: Tokens as they are stored.
TokenDtype: TypeAlias = np.dtype[np.uint16] | np.dtype[np.uint32]

#: Blocks that identify data without a fingerprint.
SAMPLED_BLOCKS = 256

_DTYPES: dict[int, TokenDtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}  # by bytes per token


class WriterState(TypedDict):
    """The state of a token file on disk: documents and tokens written, and the digest of the tokens."""

    documents: int
    tokens: int
    digest: str


def choose_token_dtype(vocab_size: int) -> TokenDtype:
    """Return the type that tokens of a vocabulary are stored as.

    >>> choose_token_dtype(65535).itemsize, choose_token_dtype(65536).itemsize
    (2, 4)
    """
    return _DTYPES[4 if vocab_size > 65535 else 2]


class TokenWriter:
    """A context manager that writes documents to a token file, and can resume an unfinished one.

    Args:
        tokenizer_name: name of the tokenizer, for the metadata.
        vocab_size: size of the vocabulary, which decides on the size of a token.
        state: state of an unfinished file, from `flush`; later bytes of the file are dropped.

    Attributes:
        documents, tokens: numbers of documents and tokens written.
        digest: hash of all tokens, batch by batch.
    """

    def __init__(
        self, path: str | os.PathLike[str], tokenizer_name: str, vocab_size: int, state: WriterState | None = None
    ) -> None:
        self.path = Path(path)
        state = state or {"documents": 0, "tokens": 0, "digest": ""}
        self.documents, self.tokens, self.digest = state["documents"], state["tokens"], state["digest"]
        self._name = tokenizer_name.replace("|", "_").replace("\n", " ")
        self._dtype = choose_token_dtype(vocab_size)

    def __enter__(self) -> TokenWriter:
        self._file = open_at(self.path, self.tokens * self._dtype.itemsize)
        self._index = open_at(Path(f"{self.path}.index"), self.documents * 8)
        return self

    def write(self, documents: Sequence[Sequence[int]], eos: int) -> None:
        """Append a batch of documents, each followed by an eos."""
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents)) + 1
        ends = np.cumsum(lengths)
        tokens = np.full(int(lengths.sum()), eos, dtype=self._dtype)
        for document, end, length in zip(documents, ends.tolist(), lengths.tolist(), strict=True):
            tokens[end - length : end - 1] = document
        self.append(tokens, ends)

    def append(self, tokens: npt.NDArray[np.uint16 | np.uint32], ends: npt.NDArray[np.int64 | np.uint64]) -> None:
        """Append a batch of documents as they are stored.

        Args:
            tokens: tokens of all documents, each with its eos, shape [tokens].
            ends: where each document ends in `tokens`, shape [documents].
        """
        self._file.write(tokens.tobytes())
        self._index.write((ends + self.tokens).astype("<u8").tobytes())
        self.digest = blake2b(self.digest.encode() + tokens.tobytes(), digest_size=16).hexdigest()
        self.documents += len(ends)
        self.tokens += len(tokens)

    def flush(self) -> WriterState:
        """Wait until the disk holds everything written so far, and return the state."""
        for file in (self._file, self._index):
            file.flush()
            os.fsync(file.fileno())
        return {"documents": self.documents, "tokens": self.tokens, "digest": self.digest}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._index:
            if kind is None:
                self.flush()
        if kind is None:
            lines = (f"{self._name}|{self._dtype.itemsize}", str(self.tokens), _format_tokens(self.tokens))
            write_text(f"{self.path}.metadata", "\n".join(lines))


def open_at(path: Path, size: int) -> BinaryIO:
    """Open a file to append to after its first `size` bytes.

    Raises:
        DataError: if it has fewer.
    """
    file = path.open("ab")
    if file.tell() < size:
        raise DataError(f"{path} has {file.tell()} bytes, {size} were written: delete the folder {path.parent}")
    file.truncate(size)
    return file


def _format_tokens(tokens: int) -> str:  # as datatrove writes it
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}T"
    return f"{tokens} T"


class PackedDataset(Dataset[Block]):
    """The tokens of a `.ds` file as blocks of fixed size; the remainder at the end is not used.

    Item i is `{"input_ids": LongTensor [block_size], "labels": LongTensor [block_size]}` with the tokens from
    i * block_size on. The labels are the same tensor: transformers models shift them.
    The file is mapped, not read, and every DataLoader worker maps it separately.

    Args:
        path: path of the `.ds` file.
        block_size: tokens per item.
        eos: token that ends a document, to separate documents; None treats a block as one text. With it an item has
            `position_ids` that restart at 0 in each document, by which transformers models mask attention to the same
            document. No token is predicted from another document: its label is -100.

    Raises:
        DataError: for a missing file, or one that does not match its metadata.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int, eos: int | None = None) -> None:
        self.path = Path(path)
        self.block_size = block_size
        self.eos = eos
        self._dtype, self._stored = _read_metadata(self.path)
        self._rows: npt.NDArray[np.uint16 | np.uint32] | None = None  # [blocks, block_size]

    def __len__(self) -> int:
        return self._stored // self.block_size

    @property
    def tokens(self) -> int:
        """The number of tokens in all blocks."""
        return len(self) * self.block_size

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | IntArray) -> list[Block]:
        """The blocks of a batch, for torch's DataLoader: several times faster than one by one."""
        if self._rows is None:
            mapped = np.memmap(self.path, dtype=self._dtype, mode="r", shape=(len(self), self.block_size))
            self._rows = np.asarray(mapped)  # a view: slices of a memmap itself are slow to make
        input_ids = torch.from_numpy(self._rows.take(indices, axis=0).astype(np.int64))
        if self.eos is None:
            return [{"input_ids": row, "labels": row} for row in input_ids.unbind()]
        columns = separate_documents(input_ids, self.eos)
        return [dict(zip(columns, row, strict=True)) for row in zip(*map(torch.unbind, columns.values()), strict=True)]

    def __getstate__(self) -> dict[str, object]:
        # A pickled memory map would contain all tokens.
        return {**self.__dict__, "_rows": None}


def separate_documents(input_ids: torch.Tensor, eos: int) -> dict[str, torch.Tensor]:
    """Return blocks, shape [..., block_size], whose labels and position ids separate documents that end with `eos`.

    >>> example = separate_documents(torch.tensor([5, 6, 0, 7, 8]), eos=0)
    >>> example["position_ids"].tolist(), example["labels"].tolist()
    ([0, 1, 2, 0, 1], [5, 6, 0, -100, 8])
    """
    first = torch.zeros_like(input_ids, dtype=torch.bool)
    first[..., 1:] = input_ids[..., :-1] == eos
    positions = torch.arange(input_ids.shape[-1]).expand_as(input_ids)
    begins = torch.where(first, positions, 0).cummax(-1).values
    labels = input_ids.masked_fill(first, IGNORED)
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions - begins}


class MixedBlocks(Dataset[Block]):
    """The blocks of several sources, source after source; `weights` say how a run draws from them.

    Args:
        parts: blocks of each source, none of them empty.
        weights: share of each source; the shares add up to 1.
        fingerprint: hash of their tokens and order; "" if unknown.
    """

    def __init__(self, parts: Mapping[str, Blocks], weights: Mapping[str, float], fingerprint: str = "") -> None:
        self.parts = dict(parts)
        self.weights = {name: weights[name] for name in parts}
        self.fingerprint = fingerprint
        self._ends = np.cumsum([len(part) for part in self.parts.values()])

    @classmethod
    def wrap(cls, dataset: Blocks) -> MixedBlocks:
        """Return a mixture as it is, and any other map-style data set as a mixture of one source.

        >>> rows = [{"input_ids": torch.tensor([1, 2])}]
        >>> MixedBlocks.wrap(rows).weights
        {'corpus': 1.0}
        """
        if isinstance(dataset, MixedBlocks):
            return dataset
        return cls({ONLY: dataset}, {ONLY: 1.0}, getattr(dataset, "fingerprint", ""))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = list(self.parts.values())[number]
        return part[index - int(self._ends[number]) + len(part)]


def hash_sample(blocks: Blocks) -> str:
    """Return a hash of up to 256 evenly spaced blocks; "" if a block differs each time that it is read.

    >>> rows = [{"input_ids": torch.tensor([number])} for number in range(3)]
    >>> hash_sample(rows) == hash_sample(list(rows)), hash_sample(rows) == hash_sample(rows[:2])
    (True, False)
    """
    indices = sorted({round(index) for index in np.linspace(0, len(blocks) - 1, SAMPLED_BLOCKS)})
    hashes = [_hash_block(blocks[index]) for index in indices]
    if _hash_block(blocks[0]) != hashes[0]:  # such as one with random masks
        return ""
    return blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def _hash_block(block: Block) -> str:
    ids = torch.as_tensor(block["input_ids"]).cpu().numpy().astype("<i8")
    return blake2b(ids.tobytes(), digest_size=16).hexdigest()


def _read_metadata(path: Path) -> tuple[TokenDtype, int]:
    """Return the type and the number of the tokens in a file."""
    try:
        first, second = Path(f"{path}.metadata").read_text(encoding="utf-8").splitlines()[:2]
        token_bytes, tokens = int(first.rpartition("|")[2]), int(second)
        dtype = _DTYPES[token_bytes]
        size = path.stat().st_size
    except (OSError, ValueError, KeyError) as caught:
        raise DataError(f"{path} is not a complete token file ({caught}): delete the folder {path.parent}") from None
    if size != tokens * token_bytes:
        raise DataError(
            f"{path} has {size} bytes, its metadata says {tokens} tokens of {token_bytes} bytes: "
            f"delete the folder {path.parent}; it will be made again"
        )
    return dtype, tokens
