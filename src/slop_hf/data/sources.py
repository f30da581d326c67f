"""Documents of a source, one after another: from the standard library, local files, URLs and the Hub.

Every place yields (text, cursor) pairs and can resume from any cursor, so a stream's state is the cursor of its last
text. No torch here.
"""

from __future__ import annotations

import logging
import os
import re
import sysconfig
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from huggingface_hub import constants

from ..errors import DataError
from ..io.network_errors import is_transient, summarise_error
from ..io.retry import Retries
from . import download
from .config import PACKAGES, STDLIB, DataPart, Format, Source, find_cache, is_url
from .download import RemoteFile
from .formats import Cursor, File, LocalFile, Texts, find_format, get_text, read_texts

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")


class StreamState(TypedDict):
    """The state of a stream: the number of documents read, the number of the current place, and the cursor in it."""

    documents: int
    place: int
    at: Cursor


class DocumentStream:
    """The texts of a source, one by one, always in the same order; blank ones are left out.

    Files are read when they are needed, URLs are downloaded into the cache as far as they are read, and Hub datasets
    are streamed. Every place is looked up at once, so that a wrong name fails before work begins. Transient failures
    of the network are retried.

    Args:
        source: source of the texts.
        state: state of an earlier stream over the same source, to resume from.
        cache_dir: cache for downloads, as for `DataConfig`.
        parts: part of the source's files to read, then part of that, and so on; default, all. A part may be empty.

    Raises:
        DataError: for a missing place, a missing column or one without text, a damaged file, a state that does
            not fit, parts of a source that has none and, once the texts of all files end, for a source without any.

    >>> stream = DocumentStream(Source("python-stdlib", max_documents=3))
    >>> first = next(iter(stream))
    >>> len(list(DocumentStream(stream.source, stream.state_dict())))
    2
    """

    def __init__(
        self,
        source: Source,
        state: StreamState | None = None,
        *,
        cache_dir: str | None = None,
        parts: Sequence[DataPart] = (),
    ) -> None:
        self.source, self._is_whole = source, not parts
        self._state = state or StreamState(documents=0, place=0, at=None)
        files = choose_files(source, parts) if parts else [None] * len(source.places)
        self._places = [
            _make_place(place, source, cache_dir, names) for place, names in zip(source.places, files, strict=True)
        ]
        if set(self._state) != {"documents", "place", "at"} or not self._state["place"] < len(self._places):
            raise DataError(
                f"the state {state!r} does not belong to a stream over {len(self._places)} places: begin without it"
            )
        for place in self._places[self._state["place"] :]:
            place.check()

    def __iter__(self) -> Iterator[str]:
        """Yield the texts after the last one given."""
        limit = self.source.max_documents
        if limit is not None and self._state["documents"] >= limit:
            return
        for number in range(self._state["place"], len(self._places)):
            start = self._state["at"] if number == self._state["place"] else None
            for text, cursor in self._places[number].read(start):
                if not text or text.isspace():
                    continue
                self._state = {"documents": self._state["documents"] + 1, "place": number, "at": cursor}
                yield text
                if self._state["documents"] == limit:
                    return
        if not self._state["documents"] and self._is_whole:
            raise DataError(
                f"no document with text in {', '.join(repr(place.name) for place in self._places)}: expected files "
                f"of UTF-8 text or rows with text in the column {self.source.text_column!r}"
            )

    def state_dict(self) -> StreamState:
        """The state of the stream, for JSON: `DocumentStream(source, state)` yields the texts that follow."""
        return self._state.copy()


def read_documents(source: Source, *, cache_dir: str | None = None) -> Iterator[str]:
    """Yield the texts of a source, with the lookups and errors of `DocumentStream`.

    >>> len(list(read_documents(Source("python-stdlib", max_documents=3))))
    3
    """
    return iter(DocumentStream(source, cache_dir=cache_dir))


def discard_downloads(source: Source, cache_dir: str | None) -> None:
    """Delete the downloads of a source from the cache."""
    for place in source.places:
        if is_url(place):
            _open_url(place, cache_dir, source).discard()


def list_local_files(place: str) -> dict[str, Path] | None:
    """Return the files of a local place by their names relative to it, sorted; None for a Hub dataset or a URL.

    Raises:
        DataError: for any other name.
    """
    if place == STDLIB:
        # Installed packages lie inside the standard library's folder and are no part of it.
        root = Path(sysconfig.get_paths()["stdlib"])
        return _walk(root, suffix=".py", skipped=("site-packages", "dist-packages"))
    if place == PACKAGES:
        roots = dict.fromkeys(Path(sysconfig.get_paths()[kind]).resolve() for kind in ("purelib", "platlib"))
        return dict(sorted((name, path) for root in roots for name, path in _walk(root, suffix=".py").items()))
    if is_url(place):
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
        f"owner/name:config) nor a URL: correct the path, or use {STDLIB!r} or {PACKAGES!r}, which need no download"
    )


def choose_files(source: Source, parts: Sequence[DataPart]) -> list[frozenset[str]]:
    """Return the names of the files in a part of a source, by place; a URL counts as one file, named by itself.

    Args:
        source: source whose files are in the order in which they are read.
        parts: part of the files, then part of that, and so on.

    Raises:
        DataError: if a dataset on the Hub, or `max_documents`, makes parts impossible.
    """
    check_parts(source)
    files: list[tuple[int, str, float | None]] = []
    for number, place in enumerate(source.places):
        local = list_local_files(place)
        named = {place: None} if local is None else {name: path.stat().st_size for name, path in local.items()}
        files += [(number, name, size) for name, size in named.items()]
    known = [size for *_, size in files if size is not None]
    usual = sum(known) / len(known) if known else 1.0
    sizes = [(usual if size is None else size) + 1 for *_, size in files]
    for part in parts:
        cut = part.cut(sizes)
        files, sizes = files[cut.start : cut.stop], sizes[cut.start : cut.stop]
    return [frozenset(name for place, name, _ in files if place == number) for number in range(len(source.places))]


def check_parts(source: Source) -> None:
    """Refuse a source that cannot be read in parts.

    Raises:
        DataError: if it has a dataset on the Hub, or `max_documents`.
    """
    remedy = "or leave `workers` and `part` out"
    for place in source.places:
        if list_local_files(place) is None and not is_url(place):
            name = place.partition(":")[0]
            raise DataError(
                f"source {place!r} is a Hub dataset, which cannot be read in parts: download its files "
                f"(`hf download {name} --repo-type dataset --local-dir DIR`) and give the folder, {remedy}"
            )
    if source.max_documents is not None:
        raise DataError(
            f"max_documents {source.max_documents} counts from the first document on, which a part does not know: "
            f"leave max_documents out, {remedy}"
        )


def count_files(source: Source) -> int:
    """Return the number of files of a source that can be read in parts."""
    return sum(1 if (files := list_local_files(place)) is None else len(files) for place in source.places)


def count_local_bytes(source: Source) -> int | None:
    """Return the size of a source's files, as they are stored; None if some place is not local."""
    places = [list_local_files(place) for place in source.places]
    if any(files is None for files in places):
        return None
    return sum(path.stat().st_size for files in places for path in (files or {}).values())


def list_place_names(source: Source) -> list[str]:
    """Return the places of a source, URLs without their query, which may hold a signature."""
    return [download.hide_query(place) if is_url(place) else place for place in source.places]


def _walk(root: Path, suffix: str = "", skipped: tuple[str, ...] = ()) -> dict[str, Path]:
    """List the files below a folder; links to folders are not followed, and folders that cannot be read are empty."""
    files, folders = dict[str, Path](), [("", str(root))]
    while folders:
        prefix, folder = folders.pop()
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if entry.name not in (*skipped, "__pycache__"):
                        folders.append((f"{prefix}{entry.name}/", entry.path))
                elif entry.name.endswith(suffix) and entry.is_file():
                    files[prefix + entry.name] = Path(entry.path)
    return dict(sorted(files.items()))


def _make_place(
    place: str, source: Source, cache_dir: str | None, chosen: Collection[str] | None
) -> _Files | _HubDataset:
    """Return the reader of a place, or of some of its files."""
    files = list_local_files(place)
    if files is not None:
        local = {name: LocalFile(path) for name, path in files.items() if chosen is None or name in chosen}
        return _Files(place, local, source)
    if is_url(place):
        file = _open_url(place, cache_dir, source)
        return _Files(file.name, {file.filename: file} if chosen is None or chosen else {}, source)
    return _HubDataset(place, source)


def _open_url(url: str, cache_dir: str | None, source: Source) -> RemoteFile:
    return RemoteFile(url, find_cache(cache_dir) / "downloads", accepts_pages=source.format == "text")


class _Files:
    """The files of a folder, or a single one, in the order of their names."""

    def __init__(self, name: str, files: Mapping[str, File], source: Source) -> None:
        self.name, self.files, self.source = name, files, source

    def check(self) -> None:
        """Look up the first file, and its first text unless that needs the whole file over the network."""
        for name, file in islice(self.files.items(), 1):
            if isinstance(file, RemoteFile):
                file.look_up()
            if not isinstance(file, RemoteFile) or self._find_format(name) in ("lines", "jsonl"):
                next(self.read(None), None)

    def read(self, start: Cursor) -> Texts:
        """Yield texts; a cursor is [name of a file, its identity, cursor in it]."""
        skipped: list[str] = []
        first_name, identity, first_cursor = start or ("", None, None)
        if start and first_name not in self.files:
            raise DataError(f"{self.name} no longer has the file {first_name!r}, which the state needs: bring it back")
        for name, file in self.files.items():
            if name < first_name:
                continue
            if start and name == first_name:
                file.expect(identity)
            cursor = first_cursor if name == first_name else None
            for text, behind in read_texts(file, self._find_format(name), self.source.text_column, cursor):
                if text is None:
                    skipped.append(name)
                yield text, [name, file.identity, behind]
        if skipped and len(self.files) > len(skipped):  # without any text, an error follows
            _warn_of_skipped(self.name, tuple(skipped), len(self.files))

    def _find_format(self, name: str) -> Format:
        return self.source.format or find_format(name)


@cache  # once per process: a source is read for its tokenizer, and again for its tokens
def _warn_of_skipped(place: str, names: tuple[str, ...], count: int) -> None:
    shown = ", ".join([*names[:3], *(["…"] if len(names) > 3 else [])])
    logger.warning(
        f"{place}: {len(names)} of {count} files are left out, as they are not UTF-8 text ({shown}); "
        "convert texts in other encodings, for example with iconv"
    )


class _HubDataset:
    """A dataset on the Hub, streamed; each row is a document."""

    def __init__(self, place: str, source: Source) -> None:
        self.name, self.source = place, source
        self._dataset: IterableDataset | None = None

    def check(self) -> None:
        next(self.read(None), None)

    def read(self, start: Cursor) -> Texts:
        retries = Retries(download.RETRY_POLICY, f"reading the Hub dataset {self.name!r}")
        while True:
            try:
                dataset = self._open(start)
                for row in dataset:
                    start = dataset.state_dict()
                    retries.reset()
                    yield get_text(row, self.source.text_column, repr(self.name)), start
                return
            except DataError:
                raise
            except Exception as caught:  # datasets, hub client, pyarrow and the network: their errors share no base
                self._dataset = None
                if constants.HF_HUB_OFFLINE or not is_transient(caught):
                    raise DataError(
                        f"source {self.name!r} is not a local path, and its split {self.source.split!r} cannot be "
                        f"read from the Hub ({summarise_error(caught)}): check the name (owner/name or owner/name:"
                        "config), the split, `hf auth login`, the network and HF_ENDPOINT, or use a local path"
                    ) from caught
                download.wait_or_give_up(retries, caught)

    def _open(self, start: Cursor) -> IterableDataset:
        # Takes longer to import than everything else here together, and only Hub datasets need it.
        import datasets

        if self._dataset is None:
            name, _, subset = self.name.partition(":")
            self._dataset = datasets.load_dataset(name, subset or None, split=self.source.split, streaming=True)
        if start is not None:
            self._dataset.load_state_dict(start)
        return self._dataset
