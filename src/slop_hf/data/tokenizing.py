"""Documents to token files: read, tokenized and written side by side, and gone on with after an interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from ..io.files import write_text
from ..io.serialization import hash_json
from .config import Source
from .packing import TokenWriter
from .sources import DocumentStream, local_bytes

TRAIN, HELD_OUT = PARTS = ("train", "held_out")
JOURNAL = "journal.json"
# One batch for the threads of tokenizers: enough for many cores, while encodings take some 40 bytes a character.
BATCH_CHARACTERS = 2**21
#: After so many, what has been written is flushed and the journal says how far it is.
JOURNAL_BATCHES = 16


class _Batch(NamedTuple):
    texts: list[str]
    parts: list[str]
    state: dict[str, Any]  # of the stream, behind these texts
    nbytes: int


def tokenize(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    held_out: float,
    name: str,
    *,
    title: str,
    progress: bool = True,
) -> dict[str, TokenWriter]:
    """Tokenize a source into `folder/train.ds` and `folder/held_out.ds`.

    An eos follows each document. A document that spells out a special token gets the characters, not
    the token, so that an eos in the file is always the end of a document. Where the folder holds what an interrupted
    call has left, this one goes on there, and the files come out the same.

    A document is held out if the hash of its text, as a fraction, is below `held_out`: equal documents are on the same
    side, whatever their order, number and source.

    Args:
        source: of the documents.
        tokenizer: with an eos token.
        folder: an existing folder; the caller renames it into place once `tokenize` has returned.
        held_out: share of the documents.
        name: of the tokenizer, for the metadata.
        title: of the progress bar.
        progress: whether to show it.

    Returns:
        The closed writers by part.

    Raises:
        DataError: for a source that cannot be read (any more); what was tokenized until then is kept.
    """
    backend, eos = plain_backend(tokenizer), tokenizer.eos_token_id
    journal = folder / JOURNAL
    left: dict[str, Any] = {"stream": None, "bytes": 0}
    if journal.exists():
        left = json.loads(journal.read_text(encoding="utf-8"))
    stream = DocumentStream(source, left["stream"])
    with ExitStack() as stack:
        writers = {
            part: stack.enter_context(TokenWriter(folder / f"{part}.ds", name, len(tokenizer), left.get(part)))
            for part in PARTS
        }
        bar = stack.enter_context(
            tqdm(
                total=local_bytes(source),
                initial=left["bytes"],
                desc=title,
                unit="B",
                unit_scale=True,
                disable=None if progress else True,
            )
        )
        done = left["bytes"]

        def write(batch: _Batch, encodings: list[Any], number: int) -> None:
            nonlocal done
            for part, writer in writers.items():
                chosen = [one.ids for one, of in zip(encodings, batch.parts, strict=True) if of == part]
                if chosen:
                    writer.write(chosen, eos)
            done += batch.nbytes
            bar.update(batch.nbytes)
            if number % JOURNAL_BATCHES == 0:
                states = {part: writer.state() for part, writer in writers.items()}
                write_text(journal, json.dumps({"stream": batch.state, "bytes": done, **states}))

        _side_by_side(_batches(stream, held_out), backend, write)
    journal.unlink(missing_ok=True)
    return writers


def _side_by_side(batches: Iterator[_Batch], backend: Tokenizer, write: Any) -> None:
    """Read a batch and write another while the threads of tokenizers encode a third."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None
        number, reading = 0, reader.submit(next, batches, None)
        while (batch := reading.result()) is not None:
            number, reading = number + 1, reader.submit(next, batches, None)
            # The fast variant leaves out the offsets, which nothing here reads.
            encodings = backend.encode_batch_fast(batch.texts, add_special_tokens=False)
            if writing is not None:
                writing.result()
            writing = writer.submit(write, batch, encodings, number)
        if writing is not None:
            writing.result()


def _batches(stream: DocumentStream, held_out: float) -> Iterator[_Batch]:
    texts: list[str] = []
    characters = 0
    for text in stream:
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield _batch(texts, stream, held_out)
            texts, characters = [], 0
    if texts:
        yield _batch(texts, stream, held_out)


def _batch(texts: list[str], stream: DocumentStream, held_out: float) -> _Batch:
    contents = [text.encode() for text in texts]
    parts = [part_of(content, held_out) for content in contents]
    return _Batch(texts, parts, stream.state_dict(), sum(map(len, contents)))


def part_of(text: bytes, held_out: float) -> str:
    """Which part a document belongs to, by its text.

    >>> part_of(b"a document", 0.0), part_of(b"a document", 1.0)
    ('train', 'held_out')
    """
    fraction = int.from_bytes(blake2b(text, digest_size=8).digest(), "little") / 2**64
    return HELD_OUT if fraction < held_out else TRAIN


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy without truncation, padding and special tokens in texts: these are settings of the tokenizer itself."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of all that a tokenizer's tokens depend on: two with the same give the same tokens."""
    content = json.loads(plain_backend(tokenizer).to_str())
    content["eos"] = tokenizer.eos_token_id
    return hash_json(content)
