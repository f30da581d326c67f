"""From documents to token files: resumable tokenization, with reading, encoding and writing in parallel."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from tokenizers import Encoding, Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from ..io.files import flush_to_disk, write_text
from ..io.serialization import hash_json
from .config import DataPart, Source
from .packing import TokenWriter, WriterState, open_at
from .sources import DocumentStream, StreamState, count_local_bytes

TRAIN_SPLIT, HELD_OUT_SPLIT = SPLITS = ("train", "held_out")
JOURNAL, LENGTHS = "journal.json", "lengths"
#: Marks the length of a held-out document; no document is that long.
HELD_OUT_BIT = np.uint32(2**31)
# One batch for the threads of tokenizers: enough for many cores, while encodings take about 40 bytes per character.
BATCH_CHARACTERS = 2**21
#: Number of batches after which the files are flushed and the journal is written.
JOURNAL_BATCHES = 16


class _Journal(TypedDict):  # the state of an interrupted tokenization
    stream: StreamState | None
    bytes: int
    train: WriterState | None
    held_out: WriterState | None


class _Batch(NamedTuple):
    texts: list[str]
    splits: list[str]
    state: StreamState  # after these texts
    nbytes: int


def tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    held_out: float,
    name: str,
    *,
    title: str | None = None,
    cache_dir: str | None = None,
    parts: Sequence[DataPart] = (),
) -> dict[str, TokenWriter]:
    """Tokenize a source into `folder/train.ds` and `folder/held_out.ds`.

    An eos follows each document. A special token spelled out in a document becomes its characters, not the token, so
    an eos in the file is always the end of a document. If the folder holds the files of an interrupted call, this one
    resumes from them, and the files come out the same.

    A document is held out if the hash of its text, as a fraction, is below `held_out`: equal documents are on the same
    side, whatever their order, number and source.

    Args:
        source, held_out, cache_dir: as for `DataConfig`.
        tokenizer: tokenizer with an eos token.
        folder: existing folder; the caller renames it when `tokenize` has returned.
        name: name of the tokenizer, for the metadata.
        title: title of the progress bar; None, no bar.
        parts: part of the source, as for `DocumentStream`. The folder then also gets `lengths`: for each document its
            number of characters, plus 2**31 if it is held out, little-endian uint32. `parts.merge_parts` needs it.

    Returns:
        The closed writers by split.

    Raises:
        DataError: for a source that cannot be read; what was tokenized until then is kept.
    """
    backend, eos = make_plain_backend(tokenizer), tokenizer.eos_token_id
    path = folder / JOURNAL
    journal: _Journal = {"stream": None, "bytes": 0, "train": None, "held_out": None}
    if path.exists():
        journal = json.loads(path.read_text(encoding="utf-8"))
    stream = DocumentStream(source, journal["stream"], cache_dir=cache_dir, parts=parts)
    states = {TRAIN_SPLIT: journal["train"], HELD_OUT_SPLIT: journal["held_out"]}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenWriter(folder / f"{split}.ds", name, len(tokenizer), state))
            for split, state in states.items()
        }
        done = journal["stream"]["documents"] if journal["stream"] else 0
        lengths = stack.enter_context(open_at(folder / LENGTHS, done * 4)) if parts else None
        nbytes, total, disable = journal["bytes"], count_local_bytes(source), True if title is None else None
        bar = stack.enter_context(
            tqdm(total=total, initial=nbytes, desc=title, unit="B", unit_scale=True, disable=disable)
        )

        def write(batch: _Batch, encodings: list[Encoding], number: int) -> None:
            nonlocal nbytes
            for split, writer in writers.items():
                documents = [
                    encoding.ids for encoding, its in zip(encodings, batch.splits, strict=True) if its == split
                ]
                if documents:
                    writer.write(documents, eos)
            if lengths is not None:
                lengths.write(_pack_lengths(batch))
            nbytes += batch.nbytes
            bar.update(batch.nbytes)
            if number % JOURNAL_BATCHES == 0:
                if lengths is not None:
                    lengths.flush()
                    os.fsync(lengths.fileno())
                flushed = {split: writer.flush() for split, writer in writers.items()}
                write_text(path, json.dumps({"stream": batch.state, "bytes": nbytes, **flushed}))

        _encode(_make_batches(stream, held_out), backend, write)
    if parts:
        flush_to_disk(folder / LENGTHS)  # like the writers' files: the caller's rename says that all are complete
    path.unlink(missing_ok=True)
    return writers


def _pack_lengths(batch: _Batch) -> bytes:
    lengths = np.fromiter(map(len, batch.texts), dtype="<u4", count=len(batch.texts))
    lengths[[split == HELD_OUT_SPLIT for split in batch.splits]] += HELD_OUT_BIT
    return lengths.tobytes()


def _encode(
    batches: Iterator[_Batch], backend: Tokenizer, write: Callable[[_Batch, list[Encoding], int], None]
) -> None:
    """Encode batches in order, while the next one is read and the last one is written."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing = writer.submit(lambda: None)
        number, reading = 0, reader.submit(next, batches, None)
        while (batch := reading.result()) is not None:
            number, reading = number + 1, reader.submit(next, batches, None)
            # The fast variant leaves out the offsets, which nothing here reads.
            encodings = backend.encode_batch_fast(batch.texts, add_special_tokens=False)
            writing.result()
            writing = writer.submit(write, batch, encodings, number)
        writing.result()


def _make_batches(stream: DocumentStream, held_out: float) -> Iterator[_Batch]:
    remaining = iter(stream)
    while texts := _take_batch(remaining):
        contents = [text.encode() for text in texts]
        splits = [choose_split(content, held_out) for content in contents]
        yield _Batch(texts, splits, stream.state_dict(), sum(map(len, contents)))


def _take_batch(remaining: Iterator[str]) -> list[str]:
    texts: list[str] = []
    characters = 0
    while characters < BATCH_CHARACTERS and (text := next(remaining, None)) is not None:
        texts.append(text)
        characters += len(text)
    return texts


def choose_split(text: bytes, held_out: float) -> str:
    """Return the split that a document belongs to, by the hash of its text.

    >>> choose_split(b"a document", 0.0), choose_split(b"a document", 1.0)
    ('train', 'held_out')
    """
    fraction = int.from_bytes(blake2b(text, digest_size=8).digest(), "little") / 2**64
    return HELD_OUT_SPLIT if fraction < held_out else TRAIN_SPLIT


def make_plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return a copy without truncation and padding, which reads special tokens in texts as characters."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def hash_vocabulary(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return a hash of everything that a tokenizer's tokens depend on: equal hashes mean equal tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return hash_json({**content, "truncation": None, "padding": None, "eos": tokenizer.eos_token_id})
