"""Files of texts: plain, lines, JSON lines, Parquet, compressed or not.

A reader is a generator of (text, place behind it) that starts from any such place; JSON can hold places.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from ..errors import DataError
from ..io.network_errors import summarize_error
from .config import Format

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_SKIPPED = 2**20  # bytes read at once on the way to a place in a compressed file
_PARQUET_ROWS = 1024  # rows decoded at once

Texts = Iterator[tuple[str, Any]]


class File(Protocol):
    """Bytes under a name, local or not."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> Any: ...
    def expect(self, identity: Any) -> None: ...
    def open(self, offset: int = 0) -> Any: ...
    def on_disk(self) -> AbstractContextManager[Path]: ...


class LocalFile:
    """A file on disk. Its size tells whether it is the one that an earlier run read."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    @cached_property
    def identity(self) -> int:
        return self.path.stat().st_size

    def expect(self, identity: int) -> None:
        if identity != self.identity:
            raise DataError(
                f"{self.name} has {self.identity} bytes, and had {identity} when reading began: bring the old file "
                "back, or begin anew without the state of the earlier run"
            )

    def open(self, offset: int = 0) -> BinaryIO:
        opened = self.path.open("rb")
        opened.seek(offset)
        return opened

    def on_disk(self) -> AbstractContextManager[Path]:
        return nullcontext(self.path)


def format_of(name: str) -> Format:
    """What a file holds, by its name.

    >>> format_of("a.jsonl.gz"), format_of("a.md"), format_of("A.PARQUET")
    ('jsonl', 'text', 'parquet')
    """
    path = Path(name.lower())
    return _FORMATS.get((Path(path.stem) if path.suffix in _OPENERS else path).suffix, "text")


def is_wrapped(name: str) -> bool:
    """Whether a file has other bytes than the texts that it holds.

    >>> [is_wrapped(name) for name in ("a.txt", "a.txt.gz", "a.jsonl")]
    [False, True, True]
    """
    return Path(name.lower()).suffix in {*_FORMATS, *_OPENERS}


def read_texts(file: File, format: Format, column: str, at: Any = None) -> Texts:
    """The texts of a file, each with the place behind it; a text may be blank.

    Args:
        file: local or remote.
        format: how it holds texts.
        column: of JSON lines and Parquet, the one with the text.
        at: the place to go on from; None, from the beginning.

    Raises:
        DataError: for a file that is cut off or damaged, a line that is not what it should be, and a column that is
            not there or holds no text.
    """
    with _faults_of(file):
        yield from _READERS[format](file, column, at)


def text_in(row: Mapping[str, Any], column: str, where: str, texts: list[str]) -> str:
    """The text of a row, "" for a null.

    Args:
        texts: names of the columns with text, for the message.

    Raises:
        DataError: for a column that is not there or holds no text.
    """
    _check_column(column, row, where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        kind, others = type(text).__name__, ", ".join(texts) or "none"
        raise DataError(f"column {column!r} of {where} holds {kind}, expected text; columns with text: {others}")
    return text or ""


def _whole(file: File, column: str, at: Any) -> Texts:
    """A file as a document, line ends as they are; "" if it is not text (a NUL byte is git's sign of that)."""
    if at is None:
        with _opened(file, 0) as opened:
            content = opened.read()
        try:
            text = "" if b"\0" in content else content.decode("utf-8")
        except UnicodeDecodeError:
            text = ""
        yield text, True


def _lines(file: File, column: str, at: Any) -> Texts:
    for line, behind in _raw_lines(file, at):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8"), behind
        except UnicodeDecodeError:
            raise DataError(f"line {behind[0]} of {file.name} is not UTF-8: convert the file, as with iconv") from None


def _json_lines(file: File, column: str, at: Any) -> Texts:
    for line, behind in _raw_lines(file, at):
        if not line.strip():
            continue
        where = f"line {behind[0]} of {file.name}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as caught:
            _refuse_line(where, f"not JSON ({caught})")
        if not isinstance(row, dict):
            _refuse_line(where, f"a JSON {type(row).__name__}")
        text = text_in(row, column, where, [name for name, value in row.items() if isinstance(value, str)])
        if b"\\u" in line:  # half of a surrogate pair can be written in JSON, but not in UTF-8
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text, behind


def _refuse_line(where: str, found: str) -> NoReturn:
    raise DataError(
        f"{where} is {found}, expected a JSON object: correct or remove the line, or set format "
        "(text takes a file as a document, lines a line)"
    )


def _raw_lines(file: File, at: Any) -> Iterator[tuple[bytes, list[int]]]:
    """Lines with [their number, the offset behind them], both of the content without compression."""
    number, offset = at or (0, 0)
    with _opened(file, offset) as opened:
        for line in opened:
            number, offset = number + 1, offset + len(line)
            yield line, [number, offset]


def _parquet(file: File, column: str, at: Any) -> Texts:
    """Places are [row group, rows of it]."""
    from pyarrow import parquet, types  # slow to import

    group, skipped = at or (0, 0)
    with file.on_disk() as path, parquet.ParquetFile(path) as table:
        kinds = {field.name: field.type for field in table.schema_arrow}
        texts = [name for name, kind in kinds.items() if types.is_string(kind) or types.is_large_string(kind)]
        _check_column(column, kinds, file.name)
        for number in range(group, table.num_row_groups):
            row = 0
            for batch in table.iter_batches(_PARQUET_ROWS, row_groups=[number], columns=[column]):
                first = min(max(skipped - row, 0), len(batch)) if number == group else 0
                for place, value in enumerate(batch.column(0)[first:].to_pylist(), row + first + 1):
                    yield text_in({column: value}, column, file.name, texts), [number, place]
                row += len(batch)


_READERS: dict[Format, Callable[[File, str, Any], Texts]] = {
    "text": _whole,
    "lines": _lines,
    "jsonl": _json_lines,
    "parquet": _parquet,
}


def _check_column(column: str, columns: Mapping[str, Any], where: str) -> None:
    if column not in columns:
        raise DataError(f"{where} has no column {column!r}: set text_column to one of {', '.join(columns) or 'none'}")


@contextmanager
def _opened(file: File, offset: int) -> Iterator[Any]:
    """The content of a file, without compression, from an offset on."""
    opener = _OPENERS.get(Path(file.name.lower()).suffix)
    if opener is None:
        with file.open(offset) as opened:
            yield opened
        return
    with file.open() as packed, opener(packed) as opened:
        while offset:
            skipped = len(opened.read(min(offset, _SKIPPED)))
            if not skipped:
                raise EOFError("it ends before the place to go on at")
            offset -= skipped
        yield opened


def _open_zstd(packed: BinaryIO) -> io.BufferedReader:
    import pyarrow  # slow to import; unlike the package zstandard it tells a file that is cut off from a whole one

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd"))


_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


@contextmanager
def _faults_of(file: File) -> Iterator[None]:
    """Tell what is wrong with a file, whichever reader found it."""
    try:
        yield
    except DataError:
        raise
    except Exception as caught:  # the system, zlib, lzma and pyarrow: their errors share no base
        raise DataError(
            f"cannot read {file.name} ({summarize_error(caught)}): if it is cut off or damaged, get it again"
        ) from caught
