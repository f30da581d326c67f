"""Where texts come from: the standard library, local files, URLs, the Hub.

Each place is read as pairs (text, where one stands behind it), from any such stand on. So the state of a stream is
the stand behind its last text. No torch here.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

from ..errors import DataError
from ..io.network_errors import is_transient, summarize_error
from .config import STDLIB, Format, Source
from .formats import File, LocalFile, Texts, format_of, read_texts, text_in
from .retrying import Patience, RemoteFile

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_URL = re.compile(r"https?://", re.IGNORECASE)


class DocumentStream:
    """The texts of a source, one by one, always in the same order; blank ones are left out.

    Files are read as they are asked for and Hub datasets and URLs are streamed, but every place is looked up at once,
    so that a wrong name fails before work begins. Failures of the network are waited out (see `retrying.py`).

    Args:
        source: where the texts are.
        state: of an earlier stream over the same source, which this one goes on from.

    Raises:
        DataError: for a place that is not there, a column that is not there or holds no text, a damaged file, a state
            that does not fit and, once the texts end, for a source without any.

    >>> stream = DocumentStream(Source("python-stdlib", max_documents=3))
    >>> first = next(iter(stream))
    >>> len(list(DocumentStream(stream.source, stream.state_dict())))
    2
    """

    def __init__(self, source: Source, state: dict[str, Any] | None = None) -> None:
        self.source = source
        self._state = {"documents": 0, "place": 0, "at": None} | (state or {})
        self._places = [_place(place, source) for place in source.places]
        if set(self._state) != {"documents", "place", "at"} or not self._state["place"] < len(self._places):
            raise DataError(f"the state {state!r} is of no stream over {len(self._places)} places: begin without it")
        for place in self._places[self._state["place"] :]:
            place.check()

    def __iter__(self) -> Iterator[str]:
        """Go on behind the last text that was given."""
        most = self.source.max_documents
        if most is not None and self._state["documents"] >= most:
            return
        for number in range(self._state["place"], len(self._places)):
            at = self._state["at"] if number == self._state["place"] else None
            for text, behind in self._places[number].read(at):
                if not text or text.isspace():
                    continue
                self._state = {"documents": self._state["documents"] + 1, "place": number, "at": behind}
                yield text
                if self._state["documents"] == most:
                    return
        if not self._state["documents"]:
            raise DataError(
                f"no document with text in {', '.join(repr(place.name) for place in self._places)}: expected files "
                f"of UTF-8 text or rows with text in the column {self.source.text_column!r}"
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, for JSON: `DocumentStream(source, state)` gives what comes after."""
        return dict(self._state)


def documents(source: Source) -> Iterator[str]:
    """The texts of a source; every place is looked up at the call.

    Raises:
        DataError: as `DocumentStream`.

    >>> len(list(documents(Source("python-stdlib", max_documents=3))))
    3
    """
    return iter(DocumentStream(source))


def local_files(place: str) -> dict[str, Path] | None:
    """The files of a local place by their names relative to it, sorted; None for a Hub dataset or a URL.

    Raises:
        DataError: for a name that is none of these.
    """
    if place == STDLIB:
        # Installed packages lie inside the standard library's folder and are no part of it.
        root = Path(sysconfig.get_paths()["stdlib"])
        return _walk(root, suffix=".py", skipped=("site-packages", "dist-packages"))
    if _URL.match(place):
        return None
    path = Path(place).expanduser()
    if path.is_dir():
        return _walk(path)
    if path.is_file():
        return {path.name: path}
    if _HUB_ID.fullmatch(place):
        return None
    raise DataError(
        f"source {place!r} is neither an existing file or folder nor a Hub dataset id (owner/name or "
        f"owner/name:config) nor a URL: correct the path, or use {STDLIB!r}, which needs no download"
    )


def local_bytes(source: Source) -> int | None:
    """The bytes of the files of a source, compressed as they are; None where a place is not local."""
    places = [local_files(place) for place in source.places]
    if any(files is None for files in places):
        return None
    return sum(path.stat().st_size for files in places for path in (files or {}).values())


def _walk(root: Path, suffix: str = "", skipped: tuple[str, ...] = ()) -> dict[str, Path]:
    found = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name for name in subfolders if name not in skipped and name != "__pycache__" and name[0] != "."
        ]
        for name in names:
            path = Path(folder, name)
            if name[0] != "." and name.endswith(suffix) and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


# Places: each can be checked, and read from anywhere on.


class _Place(Protocol):
    name: str

    def check(self) -> None: ...
    def read(self, at: Any) -> Texts: ...


def _place(place: str, source: Source) -> _Place:
    files = local_files(place)
    if files is not None:
        return _Files(place, {name: LocalFile(path) for name, path in files.items()}, source)
    if _URL.match(place):
        file = RemoteFile(place)
        return _Files(file.name, {file.filename: file}, source)
    return _HubDataset(place, source)


class _Files:
    """The files of a folder, or a single one, in the order of their names."""

    def __init__(self, name: str, files: Mapping[str, File], source: Source) -> None:
        self.name, self.files, self.source = name, files, source

    def check(self) -> None:
        """Look the first file up, and its first text where that does not take the whole file over the network."""
        for name, file in list(self.files.items())[:1]:
            if isinstance(file, RemoteFile) and self._format(name) in ("text", "parquet"):
                file.look_up()
            else:
                next(self.read(None), None)

    def read(self, at: Any) -> Texts:
        """Texts behind (name of a file, its identity, place in it)."""
        start, identity, inner = at or ("", None, None)
        if at and start not in self.files:
            raise DataError(f"{self.name} has no file {start!r} any more, which the state is in: bring it back")
        for name, file in self.files.items():
            if name < start:
                continue
            if at and name == start:
                file.expect(identity)
            place = inner if name == start else None
            for text, behind in read_texts(file, self._format(name), self.source.text_column, place):
                yield text, [name, file.identity, behind]

    def _format(self, name: str) -> Format:
        return self.source.format or format_of(name)


class _HubDataset:
    """A dataset on the Hub, streamed; each row is a document."""

    def __init__(self, place: str, source: Source) -> None:
        self.name, self.source = place, source
        self._opened: Any = None

    def check(self) -> None:
        next(self.read(None), None)

    def read(self, at: Any) -> Texts:
        patience = Patience(f"the Hub dataset {self.name!r}")
        while True:
            try:
                for row in self._rows(at):
                    at = self._opened.state_dict()
                    patience.progress()
                    yield self._text(row), at
                return
            except DataError:
                raise
            except Exception as caught:  # datasets, hub client, pyarrow and the network: their errors share no base
                self._opened = None
                if _is_offline() or not is_transient(caught):
                    self._refuse(caught)
                patience.wait(caught)

    def _rows(self, at: Any) -> Iterator[dict[str, Any]]:
        # Takes longer to import than everything else here together, and only Hub datasets need it.
        import datasets

        if self._opened is None:
            name, _, subset = self.name.partition(":")
            self._opened = datasets.load_dataset(name, subset or None, split=self.source.split, streaming=True)
        if at is not None:
            self._opened.load_state_dict(at)
        return iter(self._opened)

    def _text(self, row: dict[str, Any]) -> str:
        texts = [name for name, value in row.items() if isinstance(value, str)]
        return text_in(row, self.source.text_column, repr(self.name), texts)

    def _refuse(self, caught: Exception) -> NoReturn:
        raise DataError(
            f"source {self.name!r} is no local path, and the Hub did not give its split {self.source.split!r} "
            f"({summarize_error(caught)}): check the name (owner/name or owner/name:config), the split, "
            "`hf auth login`, the network and HF_ENDPOINT, or use a local path"
        ) from caught


def _is_offline() -> bool:
    """Whether the user has forbidden the network, which no waiting changes."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
