"""Tokenization in parts: by several processes, or machines, into the files that one process writes.

A part is a stretch of the source's files, in the order in which they are read. A machine's part is cut again into
pieces, which its worker processes tokenize one by one:

    .KEY.parts/3-of-8/1-of-16/     the first piece of the third part: train.ds, held_out.ds and `lengths`

The digest of a token file goes over batches that follow from the lengths of all documents. So the merge copies the
tokens in just these batches, and every byte and digest is that of one process.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from . import tokenizing
from .config import DataPart, Source
from .packing import TokenWriter, choose_token_dtype
from .sources import count_files, read_documents
from .tokenizing import HELD_OUT_BIT, HELD_OUT_SPLIT, JOURNAL, LENGTHS, SPLITS, TRAIN_SPLIT, tokenize

#: Pieces per worker: workers that finish early take another piece.
PIECES_PER_WORKER = 4
_PIECE = re.compile(r"\.?(\d+)-of-(\d+)(\.building)?")


class TokenizingJob(NamedTuple):
    """A source to tokenize; the fields are the arguments of `tokenize`."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    held_out: float
    name: str
    cache_dir: str | None

    def run(self, folder: Path, *, title: str | None = None, parts: Sequence[DataPart] = ()) -> dict[str, TokenWriter]:
        """Call `tokenize`."""
        return tokenize(
            self.source,
            self.tokenizer,
            folder,
            self.held_out,
            self.name,
            title=title,
            cache_dir=self.cache_dir,
            parts=parts,
        )


def tokenize_part(job: TokenizingJob, folder: Path, part: DataPart, workers: int, title: str | None) -> None:
    """Tokenize a part of a source into `folder`, piece by piece; nothing is done if the folder exists.

    After an interruption, the next call resumes.

    Args:
        folder: folder of the part, complete or absent.
        workers: number of processes.
        title: title of the progress bar; None, no bar.

    Raises:
        DataError: for a source that cannot be read; the tokens so far are kept.
    """
    if folder.is_dir():
        return
    building = folder.with_name(f".{folder.name}.building")
    building.mkdir(parents=True, exist_ok=True)
    pieces = _list_pieces(building) or _cut_pieces(job.source, workers)
    waiting = [piece for piece in pieces if not (building / str(piece)).is_dir()]
    with tqdm(
        total=len(pieces),
        initial=len(pieces) - len(waiting),
        desc=title,
        unit="piece",
        disable=True if title is None else None,
    ) as bar:
        if workers == 1:
            for piece in waiting:
                _tokenize_piece(job, building, (part, piece))
                bar.update()
        elif waiting:
            with ProcessPoolExecutor(min(workers, len(waiting)), _choose_context()) as pool:
                running = [pool.submit(_tokenize_alone, job, building, (part, piece)) for piece in waiting]
                try:
                    for done in as_completed(running):
                        done.result()
                        bar.update()
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # pieces in work are finished first, so they are not lost
                    raise
    building.rename(folder)


def _list_pieces(folder: Path) -> list[DataPart]:
    """Return all pieces of a part in work; empty if none has been begun."""
    matches = (_PIECE.fullmatch(path.name) for path in folder.iterdir())
    count = next((int(match[2]) for match in matches if match), 0)
    return [DataPart(number, count) for number in range(1, count + 1)]


def _cut_pieces(source: Source, workers: int) -> list[DataPart]:
    count = 1 if workers == 1 else max(1, min(workers * PIECES_PER_WORKER, count_files(source)))
    return [DataPart(number, count) for number in range(1, count + 1)]


def _choose_context() -> multiprocessing.context.BaseContext:
    """Return how worker processes start: from a process without threads, which has imported what they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _tokenize_alone(job: TokenizingJob, folder: Path, parts: tuple[DataPart, DataPart]) -> None:
    """Tokenize a piece in a process of its own, on one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenize_piece(job, folder, parts)


def _tokenize_piece(job: TokenizingJob, folder: Path, parts: tuple[DataPart, DataPart]) -> None:
    building = folder / f".{parts[-1]}.building"
    building.mkdir(exist_ok=True)
    job.run(building, parts=parts)
    building.rename(folder / str(parts[-1]))


def merge_parts(job: TokenizingJob, folders: Sequence[Path], target: Path) -> dict[str, TokenWriter]:
    """Write the token files of a source from those of all its parts, as `tokenize` would have.

    Args:
        folders: folders of all parts, in order.
        target: existing folder of the merged files.

    Returns:
        The closed writers by split.

    Raises:
        DataError: if no part has a document.
    """
    (target / JOURNAL).unlink(missing_ok=True)  # of a call without parts, whose files are replaced
    pieces = [folder / str(piece) for folder in folders for piece in _list_pieces(folder)]
    vocab_size = len(job.tokenizer)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenWriter(target / f"{split}.ds", job.name, vocab_size)) for split in SPLITS
        }
        readers = {split: _DocumentReader([piece / f"{split}.ds" for piece in pieces], vocab_size) for split in SPLITS}
        for counts in _count_batches([piece / LENGTHS for piece in pieces]):
            for split, count in counts.items():
                if count:
                    writers[split].append(*readers[split].read(count))
    if not any(writer.documents for writer in writers.values()):
        next(read_documents(job.source, cache_dir=job.cache_dir))  # raises the error that describes the fault
    return writers


def _count_batches(paths: Sequence[Path]) -> Iterator[dict[str, int]]:
    """Yield the documents of each batch of `tokenize`, by split.

    Args:
        paths: files of the lengths of documents, in order.
    """
    characters, counts = 0, dict.fromkeys(SPLITS, 0)
    for path in paths:
        lengths = np.fromfile(path, "<u4")
        held_out = np.concatenate([[0], np.cumsum(lengths >= HELD_OUT_BIT)])
        ends = np.concatenate([[0], np.cumsum(lengths % HELD_OUT_BIT, dtype=np.int64)])
        begin = 0
        while begin < len(lengths):
            full = ends[begin] + tokenizing.BATCH_CHARACTERS - characters
            end = min(int(np.searchsorted(ends, full)), len(lengths))
            counts[HELD_OUT_SPLIT] += int(held_out[end] - held_out[begin])
            counts[TRAIN_SPLIT] += int(end - begin - (held_out[end] - held_out[begin]))
            characters += int(ends[end] - ends[begin])
            begin = end
            if characters >= tokenizing.BATCH_CHARACTERS:
                yield counts
                characters, counts = 0, dict.fromkeys(SPLITS, 0)
    yield counts


class _DocumentReader:
    """The documents of several token files, one file after another."""

    def __init__(self, paths: Sequence[Path], vocab_size: int) -> None:
        self._paths, self._dtype = iter(paths), choose_token_dtype(vocab_size)
        self._ends: npt.NDArray[np.int64] = np.zeros(1, np.int64)  # where documents end, after a 0
        self._tokens: npt.NDArray[np.uint16 | np.uint32] = np.zeros(0, self._dtype)
        self._at = 0  # documents read of the current file

    def read(self, count: int) -> tuple[npt.NDArray[np.uint16 | np.uint32], npt.NDArray[np.int64]]:
        """Return the tokens of the next documents, shape [tokens], and where each ends, shape [documents]."""
        tokens, lengths = [], []
        while count:
            if self._at == len(self._ends) - 1:
                self._open(next(self._paths))
                continue
            end = min(self._at + count, len(self._ends) - 1)
            tokens.append(self._tokens[self._ends[self._at] : self._ends[end]])
            lengths.append(np.diff(self._ends[self._at : end + 1]))
            count, self._at = count - (end - self._at), end
        return np.concatenate(tokens), np.cumsum(np.concatenate(lengths))

    def _open(self, path: Path) -> None:
        self._ends = np.concatenate([[0], np.fromfile(f"{path}.index", "<u8").astype(np.int64)])
        self._at = 0
        if len(self._ends) > 1:
            self._tokens = np.memmap(path, self._dtype, "r")
