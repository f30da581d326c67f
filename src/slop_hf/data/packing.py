"""Documents to tokens on disk, and tokens on disk to blocks for training.

The layout is datatrove's, which nanotron reads too. For a file of tokens NAME.ds:

    NAME.ds            the tokens of all documents, little-endian uint16, or uint32 for a vocabulary over 65535
    NAME.ds.index      where each document ends, in tokens from the start, little-endian uint64
    NAME.ds.metadata   text: "tokenizer|bytes per token", number of tokens, the same for people
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from ..errors import DataError
from ..serialization import write_text

# One batch for the threads of tokenizers: enough for many cores, while encodings take some 40 bytes a character.
BATCH_CHARACTERS = 2**21

_DTYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}  # by bytes per token


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type that tokens of a vocabulary are stored as.

    >>> token_dtype(65535).itemsize, token_dtype(65536).itemsize
    (2, 4)
    """
    return _DTYPES[4 if vocab_size > 65535 else 2]


class TokenWriter:
    """Writes documents to a token file; as a context manager, it adds index and metadata at the end.

    Args:
        path: the `.ds` file to write.
        tokenizer_name: goes into the metadata.
        vocab_size: decides on the size of a token.

    Attributes:
        documents, tokens: how many have been written.
        digest: blake2b of the tokens.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer_name: str, vocab_size: int) -> None:
        self.path = Path(path)
        self.tokens = 0
        self.digest = blake2b(digest_size=16)
        self._name = tokenizer_name.replace("|", "_").replace("\n", " ")
        self._dtype = token_dtype(vocab_size)
        self._ends: list[int] = []

    @property
    def documents(self) -> int:
        return len(self._ends)

    def __enter__(self) -> TokenWriter:
        self._file = self.path.open("wb")
        return self

    def write(self, ids: Sequence[int]) -> None:
        """Append the tokens of one document, which end with its eos."""
        content = np.asarray(ids, dtype=self._dtype).tobytes()
        self._file.write(content)
        self.digest.update(content)
        self.tokens += len(ids)
        self._ends.append(self.tokens)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            np.asarray(self._ends, dtype="<u8").tofile(f"{self.path}.index")
            lines = (f"{self._name}|{self._dtype.itemsize}", str(self.tokens), _readable(self.tokens))
            write_text(f"{self.path}.metadata", "\n".join(lines))


def _readable(tokens: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}T"
    return f"{tokens} T"


def pack(
    documents: Iterable[tuple[str, str]],
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike[str],
    parts: Sequence[str],
    tokenizer_name: str,
) -> list[TokenWriter]:
    """Tokenize documents into one token file for each part, `folder/PART.ds`.

    An eos follows each document. A document that spells out a special token gets the characters, not
    the token, so that an eos in the file is always the end of a document.

    Args:
        documents: pairs (part, text).
        folder: an existing folder; the caller renames it into place once `pack` has returned.
        parts: names of the parts; each gets a file, be it an empty one.

    Returns:
        The closed writers, in the order of `parts`.
    """
    # A copy, for truncation, padding and the treatment of special tokens are settings of the tokenizer itself.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    eos = tokenizer.eos_token_id
    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(TokenWriter(Path(folder, f"{part}.ds"), tokenizer_name, len(tokenizer)))
            for part in parts
        }
        progress = stack.enter_context(tqdm(desc="tokenizing", unit=" documents"))
        for batch in _batches(documents):
            # The fast variant leaves out the offsets, which nothing here reads.
            encodings = backend.encode_batch_fast([text for _, text in batch], add_special_tokens=False)
            for (part, _), encoding in zip(batch, encodings, strict=True):
                writers[part].write([*encoding.ids, eos])
            progress.update(len(batch))
    return list(writers.values())


def _batches(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class PackedDataset(Dataset[dict[str, torch.Tensor]]):
    """The tokens of a `.ds` file as blocks of fixed size; what is left over at the end is not used.

    Item i is `{"input_ids": LongTensor [block_size], "labels": LongTensor [block_size]}` with tokens
    i * block_size and after. The labels are the same tokens: transformers models shift them.
    The file is mapped, not read, and every DataLoader worker maps it for itself.

    Args:
        path: the `.ds` file.
        block_size: tokens in an item.

    Raises:
        DataError: for a file that is missing, or that its metadata does not fit.
    """

    def __init__(self, path: str | os.PathLike[str], block_size: int) -> None:
        self.path = Path(path)
        self.block_size = block_size
        self._dtype, self._stored = _read_metadata(self.path)
        self._mapped: np.memmap[Any, Any] | None = None

    def __len__(self) -> int:
        return self._stored // self.block_size

    @property
    def tokens(self) -> int:
        """Tokens in all blocks together."""
        return len(self) * self.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        if self._mapped is None:
            self._mapped = np.memmap(self.path, dtype=self._dtype, mode="r")
        start = index * self.block_size
        input_ids = torch.from_numpy(self._mapped[start : start + self.block_size].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def __getstate__(self) -> dict[str, Any]:
        # A pickled map would carry all its tokens along.
        return {**self.__dict__, "_mapped": None}


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
