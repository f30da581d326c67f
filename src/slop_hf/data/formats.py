"""Readers of text files: plain text, lines, JSON lines and Parquet, compressed or not.

A reader yields (text, cursor) pairs and can start from any cursor; cursors are JSON-serialisable.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, Protocol, TypeAlias

from ..errors import DataError
from ..io.network_errors import summarise_error
from ..io.serialization import Json
from ..io.units import format_bytes
from .config import Format

if TYPE_CHECKING:
    from pyarrow.parquet import RowGroupMetaData

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_PIECE_BYTES = 2**20  # read at once from a file of one document, and on the way to an offset in a compressed file
_PARQUET_ROWS = 1024  # rows decoded at once, fewer if they are long
_PARQUET_BYTES = 2**26
#: Size of the largest document, uncompressed. A small compressed file can hold any amount of text, and tokenizing
#: takes about 40 bytes of memory per byte of a document.
LARGEST_DOCUMENT_BYTES = 2**28

#: The position after a text, in a form that depends on the format; None is the beginning.
Cursor: TypeAlias = Json
#: Texts, each with the cursor after it; None stands for a file that is not UTF-8 text.
Texts: TypeAlias = Iterator[tuple[str | None, Cursor]]


class File(Protocol):
    """A file, local or not."""

    @property
    def name(self) -> str: ...
    @property
    def identity(self) -> Json: ...
    def expect(self, identity: Json) -> None: ...
    def open(self, offset: int = 0) -> BinaryIO: ...
    def download(self) -> Path: ...


class LocalFile:
    """A file on disk. Its size shows whether it is the one that an earlier run read."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)

    @cached_property
    def identity(self) -> int:
        return self.path.stat().st_size

    def expect(self, identity: int) -> None:
        if identity != self.identity:
            raise DataError(
                f"{self.name} has {self.identity} bytes, and had {identity} when reading began: bring the old file "
                "back, or begin again without the state of the earlier run"
            )

    def open(self, offset: int = 0) -> BinaryIO:
        opened = self.path.open("rb")
        opened.seek(offset)
        return opened

    def download(self) -> Path:
        """Return the path: a local file needs no download."""
        return self.path


def find_format(name: str) -> Format:
    """Return the format of a file, by its name.

    >>> find_format("a.jsonl.gz"), find_format("a.md"), find_format("A.PARQUET")
    ('jsonl', 'text', 'parquet')
    """
    path = Path(name.lower())
    return _FORMATS.get((Path(path.stem) if path.suffix in _OPENERS else path).suffix, "text")


def is_wrapped(name: str) -> bool:
    """Whether a file holds its texts in another form: compressed, as JSON or as Parquet.

    >>> [is_wrapped(name) for name in ("a.txt", "a.txt.gz", "a.jsonl")]
    [False, True, True]
    """
    return Path(name.lower()).suffix in {*_FORMATS, *_OPENERS}


def read_texts(file: File, format: Format, column: str, start: Cursor = None) -> Texts:
    """Yield the texts of a file, each with the cursor after it; a text may be blank, and None is a binary file.

    Args:
        column: column with the text, in JSON lines and Parquet.
        start: cursor to start from; None, the beginning.

    Raises:
        DataError: for a truncated or damaged file, a malformed line, a document of more than
            `LARGEST_DOCUMENT_BYTES`, and a missing column or one without text.
    """
    try:
        yield from _READERS[format](file, column, start)
    except DataError:
        raise
    except Exception as caught:  # the system, zlib, lzma and pyarrow: their errors share no base
        raise DataError(
            f"cannot read {file.name} ({summarise_error(caught)}): if it is cut off or damaged, get it again"
        ) from caught


def get_text(row: Mapping[str, Json], column: str, where: str, text_columns: Collection[str] = ()) -> str:
    """Return the text of a row, "" for a null.

    Args:
        row, column: values by column, and the column with the text.
        where: description of the row, for messages.
        text_columns: columns that hold text, for messages; default, this row's.
    """
    _check_column(column, row, where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        text_columns = text_columns or [name for name, value in row.items() if isinstance(value, str)]
        kind, others = type(text).__name__, ", ".join(text_columns) or "none"
        raise DataError(f"column {column!r} of {where} holds {kind}, expected text; columns with text: {others}")
    if text is not None and len(text) > LARGEST_DOCUMENT_BYTES:
        _refuse_size(f"a row of {where}")
    return text or ""


def _read_whole(file: File, column: str, start: Cursor) -> Texts:
    """Yield a file as a document with its line ends; None for a binary file or another encoding than UTF-8."""
    if start is None:
        with _open(file, 0) as stream:
            yield _read_text(stream, file.name), True


def _read_text(stream: BinaryIO, name: str) -> str | None:
    """Read UTF-8 text to its end; None if it is none, or has a NUL byte (git's sign of a binary file)."""
    decoder, parts, nbytes = codecs.getincrementaldecoder("utf-8")(), [], 0
    while True:
        piece = stream.read(_PIECE_BYTES)
        nbytes += len(piece)
        if b"\0" in piece:
            return None
        try:
            parts.append(decoder.decode(piece, final=not piece))
        except UnicodeDecodeError:
            return None
        if not piece:
            return "".join(parts)
        if nbytes > LARGEST_DOCUMENT_BYTES:
            _refuse_size(name, "split it, or set format to lines (one document per line) or jsonl if it holds several")


def _refuse_size(what: str, remedy: str = "shorten it, or split it into several documents") -> NoReturn:
    limit = format_bytes(LARGEST_DOCUMENT_BYTES)
    raise DataError(f"{what} is a document of more than {limit} of text, the largest allowed: {remedy}")


def _read_lines(file: File, column: str, start: Cursor) -> Texts:
    for line, cursor in _read_raw_lines(file, start):
        try:
            yield line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8"), cursor
        except UnicodeDecodeError:
            raise DataError(
                f"line {cursor[0]} of {file.name} is not UTF-8: convert the file, for example with iconv"
            ) from None


def _read_json_lines(file: File, column: str, start: Cursor) -> Texts:
    for line, cursor in _read_raw_lines(file, start):
        if not line.strip():
            continue
        where = f"line {cursor[0]} of {file.name}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError as caught:
            _refuse_line(where, f"not JSON ({caught})")
        if not isinstance(row, dict):
            _refuse_line(where, f"a JSON {type(row).__name__}")
        text = get_text(row, column, where)
        if b"\\u" in line:  # half of a surrogate pair can be written in JSON, but not in UTF-8
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        yield text, cursor


def _refuse_line(where: str, content: str) -> NoReturn:
    raise DataError(
        f"{where} is {content}, expected a JSON object: correct or remove the line, or set format "
        "(text: one document per file; lines: one per line)"
    )


def _read_raw_lines(file: File, start: Cursor) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield lines, each with the cursor (its number, the offset after it), both in the uncompressed content."""
    number, offset = start or (0, 0)
    with _open(file, offset) as stream:
        while line := stream.readline(LARGEST_DOCUMENT_BYTES + 1):
            number, offset = number + 1, offset + len(line)
            if len(line) > LARGEST_DOCUMENT_BYTES:
                _refuse_size(f"line {number} of {file.name}")
            yield line, (number, offset)


def _read_parquet(file: File, column: str, start: Cursor) -> Texts:
    """Yield rows, each with the cursor (row group, rows read of it)."""
    from pyarrow import parquet, types  # slow to import

    group, skipped = start or (0, 0)
    with parquet.ParquetFile(file.download()) as table:
        kinds = {field.name: field.type for field in table.schema_arrow}
        text_columns = [name for name, kind in kinds.items() if types.is_string(kind) or types.is_large_string(kind)]
        _check_column(column, kinds, file.name)
        for number in range(group, table.num_row_groups):
            row, rows_at_once = 0, _choose_batch(table.metadata.row_group(number), column)
            for batch in table.iter_batches(rows_at_once, row_groups=[number], columns=[column]):
                first = min(max(skipped - row, 0), len(batch)) if number == group else 0
                for rows_read, value in enumerate(batch.column(0)[first:].to_pylist(), row + first + 1):
                    yield get_text({column: value}, column, file.name, text_columns), (number, rows_read)
                row += len(batch)


def _choose_batch(group: RowGroupMetaData, column: str) -> int:
    """Return the number of rows to decode at once: fewer than usual if the texts of the row group are long."""
    columns = map(group.column, range(group.num_columns))
    nbytes = sum(one.total_uncompressed_size for one in columns if one.path_in_schema == column)
    return max(1, min(_PARQUET_ROWS, _PARQUET_BYTES * group.num_rows // max(nbytes, 1)))


_READERS: dict[Format, Callable[[File, str, Cursor], Texts]] = {
    "text": _read_whole,
    "lines": _read_lines,
    "jsonl": _read_json_lines,
    "parquet": _read_parquet,
}


def _check_column(column: str, columns: Collection[str], where: str) -> None:
    if column not in columns:
        raise DataError(f"{where} has no column {column!r}: set text_column to one of {', '.join(columns) or 'none'}")


@contextmanager
def _open(file: File, offset: int) -> Iterator[BinaryIO]:
    """Open the uncompressed content of a file at an offset."""
    opener = _OPENERS.get(Path(file.name.lower()).suffix)
    if opener is None:
        with file.open(offset) as stream:
            yield stream
        return
    with file.open() as compressed, opener(compressed) as stream:
        while offset:
            skipped = len(stream.read(min(offset, _PIECE_BYTES)))
            if not skipped:
                raise EOFError("it ends before the offset to resume at")
            offset -= skipped
        yield stream


def _open_zstd(compressed: BinaryIO) -> BinaryIO:
    import pyarrow  # slow to import; unlike the package zstandard it recognises a truncated file

    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(compressed, "r"), "zstd"))


_OPENERS: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": gzip.open,  # type: ignore[dict-item]
    ".bz2": bz2.open,  # type: ignore[dict-item]
    ".xz": lzma.open,  # type: ignore[dict-item]
    ".zst": _open_zstd,
}
