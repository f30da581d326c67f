"""Tokens on disk, and blocks of them for training.

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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..errors import DataError
from ..io.files import write_text

_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}  # by bytes per token


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that tokens of a vocabulary are stored as.

    >>> token_dtype(65535).itemsize, token_dtype(65536).itemsize
    (2, 4)
    """
    return _DTYPES[4 if vocab_size > 65535 else 2]


class TokenWriter:
    """Writes documents to a token file, and can go on with one that was left; as a context manager.

    Args:
        path: the `.ds` file.
        tokenizer_name: goes into the metadata.
        vocab_size: decides on the size of a token.
        state: what `state` gave when the file was last known to be whole; what was written after that is dropped.

    Attributes:
        documents, tokens: how many have been written.
        digest: of all tokens, batch by batch.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer_name: str,
        vocab_size: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path)
        state = state or {"documents": 0, "tokens": 0, "digest": ""}
        self.documents, self.tokens, self.digest = state["documents"], state["tokens"], state["digest"]
        self._name = tokenizer_name.replace("|", "_").replace("\n", " ")
        self._dtype = token_dtype(vocab_size)

    def __enter__(self) -> TokenWriter:
        self._file = _opened_at(self.path, self.tokens * self._dtype.itemsize)
        self._index = _opened_at(Path(f"{self.path}.index"), self.documents * 8)
        return self

    def write(self, documents: Sequence[Sequence[int]], eos: int) -> None:
        """Append a batch of documents, an eos behind each."""
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents)) + 1
        ends = np.cumsum(lengths)
        tokens = np.full(int(lengths.sum()), eos, dtype=self._dtype)
        for document, end, length in zip(documents, ends.tolist(), lengths.tolist(), strict=True):
            tokens[end - length : end - 1] = document
        self._file.write(tokens.tobytes())
        self._index.write((ends + self.tokens).astype("<u8").tobytes())
        self.digest = blake2b(self.digest.encode() + tokens.tobytes(), digest_size=16).hexdigest()
        self.documents += len(documents)
        self.tokens += len(tokens)

    def state(self) -> dict[str, Any]:
        """How far it is, once that is on the disk."""
        for file in (self._file, self._index):
            file.flush()
            os.fsync(file.fileno())
        return {"documents": self.documents, "tokens": self.tokens, "digest": self.digest}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._index:
            if kind is None:
                self.state()
        if kind is None:
            lines = (f"{self._name}|{self._dtype.itemsize}", str(self.tokens), _readable(self.tokens))
            write_text(f"{self.path}.metadata", "\n".join(lines))


def _opened_at(path: Path, size: int) -> Any:
    """A file to append to, behind its first `size` bytes."""
    file = path.open("ab")
    if file.tell() < size:
        raise DataError(f"{path} has {file.tell()} bytes, {size} were written: delete the folder {path.parent}")
    file.truncate(size)
    return file


def _readable(tokens: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}T"
    return f"{tokens} T"


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """The tokens of a `.ds` file as blocks of fixed size; what is left over at the end is not used.

    Item i is `{"input_ids": LongTensor [block_size], "labels": LongTensor [block_size]}` with tokens
    i * block_size and after. The labels are the same tensor: transformers models shift them.
    The file is mapped, not read, and every DataLoader worker maps it for itself.

    Args:
        path: the `.ds` file.
        block_size: tokens in an item.
        eos: the token that ends a document, to keep documents apart; None lets a block be one text. With it an item
            has `position_ids`, which begin at 0 in each document: by these transformers' models mask attention to
            what is in the same document. No token is predicted from another document: its label is -100.

    Raises:
        DataError: for a file that is missing, or that its metadata does not fit.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int, eos: int | None = None) -> None:
        self.path = Path(path)
        self.block_size = block_size
        self.eos = eos
        self._dtype, self._stored = _read_metadata(self.path)
        self._rows: npt.NDArray[Any] | None = None

    def __len__(self) -> int:
        return self._stored // self.block_size

    @property
    def tokens(self) -> int:
        """Tokens in all blocks together."""
        return len(self) * self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> list[dict[str, torch.Tensor]]:
        """The blocks of a batch at once, as torch's DataLoader asks for them: several times faster than one by one."""
        if self._rows is None:
            mapped = np.memmap(self.path, dtype=self._dtype, mode="r", shape=(len(self), self.block_size))
            self._rows = np.asarray(mapped)  # a view: slices of a memmap itself are slow to make
        input_ids = torch.from_numpy(self._rows.take(indices, axis=0).astype(np.int64))
        if self.eos is None:
            return [{"input_ids": row, "labels": row} for row in input_ids.unbind()]
        columns = kept_apart(input_ids, self.eos)
        return [
            dict(zip(columns, rows, strict=True)) for rows in zip(*map(torch.unbind, columns.values()), strict=True)
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would carry all its tokens along.
        return {**self.__dict__, "_rows": None}


def kept_apart(input_ids: torch.Tensor, eos: int) -> dict[str, torch.Tensor]:
    """An example in which documents do not see one another.

    Args:
        input_ids: shape [..., block_size], documents that end with `eos`.
        eos: that token.

    >>> example = kept_apart(torch.tensor([5, 6, 0, 7, 8]), eos=0)
    >>> example["position_ids"].tolist(), example["labels"].tolist()
    ([0, 1, 2, 0, 1], [5, 6, 0, -100, 8])
    """
    first = torch.zeros_like(input_ids, dtype=torch.bool)
    first[..., 1:] = input_ids[..., :-1] == eos
    places = torch.arange(input_ids.shape[-1]).expand_as(input_ids)
    begins = torch.where(first, places, 0).cummax(-1).values
    return {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(first, -100),
        "position_ids": places - begins,
    }


class MixedBlocks(Dataset[dict[str, torch.Tensor]]):
    """The blocks of several sources, one source behind the other; `weights` say how a run draws from them.

    Args:
        parts: the blocks of each source, none of them empty.
        weights: the share of each, which add up to 1.
        fingerprint: of their tokens and order.
    """

    def __init__(self, parts: Mapping[str, PackedDataset], weights: Mapping[str, float], fingerprint: str) -> None:
        self.parts = dict(parts)
        self.weights = {name: weights[name] for name in parts}
        self.fingerprint = fingerprint
        self._ends = np.cumsum([len(part) for part in self.parts.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def tokens(self) -> int:
        """Tokens in all blocks of all sources."""
        return sum(part.tokens for part in self.parts.values())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = list(self.parts.values())[number]
        return part[index - int(self._ends[number]) + len(part)]


def _read_metadata(path: Path) -> tuple[np.dtype[Any], int]:
    """The type and the number of the tokens in a file."""
    try:
        first, second = Path(f"{path}.metadata").read_text(encoding="utf-8").splitlines()[:2]
        token_bytes, tokens = int(first.rpartition("|")[2]), int(second)
        dtype = _DTYPES[token_bytes]
        size = path.stat().st_size
    except (OSError, ValueError, KeyError) as caught:
        raise DataError(f"{path} is not a whole token file ({caught}): delete the folder {path.parent}") from None
    if size != tokens * token_bytes:
        raise DataError(
            f"{path} has {size} bytes, its metadata says {tokens} tokens of {token_bytes} bytes: "
            f"delete the folder {path.parent}, and it will be made anew"
        )
    return dtype, tokens
