"""`RemoteFile`: a file at a URL, downloaded into the cache as far as it is read.

urllib is used rather than a client with more features: it asks for bytes as they are stored, sends no credentials, and
logs no URLs, whose query may hold a signature.
"""

from __future__ import annotations

import io
import math
import re
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import BinaryIO, TypeAlias, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from ..errors import DataError
from ..io.files import write_text
from ..io.network_errors import find_status, is_transient, summarise_error
from ..io.retry import Retries, RetryPolicy
from ..io.serialization import hash_json, read_json, to_json
from .locking import lock_cache

T = TypeVar("T")

RETRY_POLICY = RetryPolicy()  # for URLs and Hub datasets; it counts failures in a row without progress
TIMEOUT = 60.0  # seconds without a byte
PIECE_BYTES = 16 * 2**20  # per request
_BUFFER_BYTES = 2**18
_PAGE_TYPES = ("text/html", "application/xhtml+xml")
_PAGE_SUFFIXES = (".html", ".htm", ".xhtml")

#: What a server's file is recognised by: size, ETag and Last-Modified; None if the server does not send it.
FileIdentity: TypeAlias = dict[str, int | str | None]

_REMEDIES = {
    401: "it asks for a login: use a signed URL, or a Hub dataset as owner/name after `hf auth login`",
    403: "access is denied: use an unexpired signed URL, or a Hub dataset as owner/name",
    404: "there is no such file: correct the URL",
    410: "the file is gone: correct the URL",
    416: "the file has changed on the server: bring the old file back, or begin again",
}


class RemoteFile:
    """A file at a URL, readable despite dropped connections and interrupted programs, after `look_up`.

    Its bytes are appended to a file in the cache, a piece at a time, when they are first read. A later reader uses the
    downloaded bytes if the server still has the same file. A web page is refused unless `accepts_pages` is set or the
    name of the file is a page's: servers answer with one if a file has moved, or needs a login.
    """

    def __init__(self, url: str, folder: Path, *, accepts_pages: bool = False) -> None:
        parts = urlsplit(url)
        self.url, self.name = url, hide_query(url)
        self.filename = unquote(parts.path).rpartition("/")[2]
        self._accepts_pages = accepts_pages or Path(self.filename.lower()).suffix in _PAGE_SUFFIXES
        self.identity: FileIdentity = {}
        self._path = folder / hash_json(url)  # a hash gives no signature away
        self._identity_path = self._path.with_suffix(".json")
        if "@" in parts.netloc:
            raise DataError(f"the URL of {self.name} holds a user or password, which is never sent: use a signed URL")

    def look_up(self) -> None:
        """Ask the server which file it has, and drop an earlier download of another one."""
        self.identity = self._retry(self._ask_for_identity)
        with self._lock():
            stored = read_json(self._identity_path, if_missing="") if self._identity_path.exists() else None
            if stored is None or not _is_same(stored, self.identity, surely=True):
                self._path.write_bytes(b"")
            write_text(self._identity_path, to_json(self.identity))

    def expect(self, identity: FileIdentity) -> None:
        """Refuse to continue with a file other than the one with this identity."""
        if not _is_same(identity, self.identity):
            raise DataError(
                f"{self.name} has changed on the server since reading began (then {_describe(identity)}, now "
                f"{_describe(self.identity)}): bring the old file back, or begin again without the state of the "
                "earlier run"
            )

    def open(self, offset: int = 0) -> BinaryIO:
        """Return a stream of the bytes of the file from an offset on; the download grows as it is read."""
        return io.BufferedReader(_DownloadReader(self, offset), _BUFFER_BYTES)

    def download(self, beyond: float = math.inf) -> Path:
        """Download the file to its end, or beyond an offset, and return the path of the copy in the cache."""
        while self._count_bytes() <= beyond and self._retry(self._append_piece):
            pass
        return self._path

    def discard(self) -> None:
        """Delete the download."""
        with self._lock():
            self._path.unlink(missing_ok=True)
            self._identity_path.unlink(missing_ok=True)

    def _retry(self, request: Callable[[], T]) -> T:
        retries, reached = Retries(RETRY_POLICY, f"reading {self.name}"), self._count_bytes()
        while True:
            try:
                return request()
            except (OSError, HTTPException, UnicodeError) as caught:  # a host or path outside of ASCII
                if isinstance(caught, HTTPError):
                    caught.close()
                if not is_transient(caught):
                    # The message of InvalidURL may hold a part of a password.
                    is_malformed = isinstance(caught, (InvalidURL, UnicodeError))
                    reason = "the URL is malformed" if is_malformed else summarise_error(caught)
                    remedy = _REMEDIES.get(find_status(caught) or 0, "open the URL in a browser, and correct it")
                    raise DataError(f"cannot read {self.name} ({reason}): {remedy}") from None
                if self._count_bytes() > reached:
                    reached = self._count_bytes()
                    retries.reset()
                wait_or_give_up(retries, caught)

    def _ask_for_identity(self) -> FileIdentity:
        with self._send() as response:
            identity = _read_headers(response)[1]
            if not self._accepts_pages and _is_page(response):
                if response.read1(_BUFFER_BYTES).lstrip().startswith(b"<"):
                    raise DataError(
                        f"{self.name} is a web page ({response.headers['Content-Type']}), not a file of texts: give "
                        "the address of the file itself, or set format to text to train on the page"
                    )
                self._accepts_pages = True  # a file that the server calls a page
            return identity

    def _append_piece(self) -> bool:
        """Download the next piece; return False at the end of the file."""
        with self._lock():
            start = self._count_bytes()
            if start == self.identity["size"]:
                return False
            try:
                response = self._send(Range=f"bytes={start}-{start + PIECE_BYTES - 1}")
            except HTTPError as caught:
                if caught.code != 416 or self.identity["size"] is not None:
                    raise
                caught.close()
                self.identity["size"] = start  # no bytes are left
                return False
            with response:
                seen = self.identity
                first, self.identity = _read_headers(response)
                self.expect(seen)
                if not self._accepts_pages and response.status == 200 and _is_page(response):
                    raise ConnectionError("the server sent a web page instead of the file")
                if first not in (0, start):
                    raise ConnectionError("the server sent another part of the file than requested")
                # A server that knows no ranges sends the whole file again.
                with self._path.open("ab" if first else "wb") as file:
                    # read would lose the bytes received so far if a chunked body breaks off.
                    while chunk := response.read1(_BUFFER_BYTES):
                        file.write(chunk)
                    end = file.tell()
                if response.length or (response.status == 206 and end == first):
                    raise ConnectionError(f"the connection ended at byte {end} of {self.identity['size']}")
                if response.status == 200:
                    self.identity["size"] = end
            return True

    def _send(self, **headers: str) -> HTTPResponse:
        request = urllib.request.Request(self.url, headers={"User-Agent": "slop-hf", **headers})
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        return response

    def _count_bytes(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _lock(self) -> AbstractContextManager[None]:
        """Let one process at a time append to the download."""
        return lock_cache(self._path.with_suffix(".lock"))


class _DownloadReader(io.RawIOBase):
    def __init__(self, file: RemoteFile, offset: int) -> None:
        self._file, self._offset = file, offset

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        with self._file.download(beyond=self._offset).open("rb", buffering=0) as file:
            file.seek(self._offset)
            count = file.readinto(buffer)
        self._offset += count
        return count


def wait_or_give_up(retries: Retries, caught: BaseException) -> None:
    """Log a failure of the network and wait; raise a DataError if it was the last attempt."""
    if not retries.wait_after(caught):
        raise DataError(
            f"{retries.doing} failed {retries.failures} times in a row, the last time with: "
            f"{summarise_error(caught)}; check the network, then run it again: it resumes where it stopped"
        ) from caught


def hide_query(url: str) -> str:
    """Return a URL without user, password and query, which may hold a signature.

    >>> hide_query("https://me:secret@example.org/a.jsonl?signature=secret")
    'https://example.org/a.jsonl'
    """
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _read_headers(response: HTTPResponse) -> tuple[int, FileIdentity]:
    """Return the offset of the first byte of the body, and the identity of the whole file."""
    first, size = 0, response.length
    if response.status == 206:
        extent = response.headers["Content-Range"] or ""
        match = re.fullmatch(r"bytes (\d+)-\d+/(?:(\d+)|\*)", extent)
        if match is None:
            raise ConnectionError(f"the server sent a part without its offset (Content-Range {extent!r})")
        first, size = int(match[1]), int(match[2]) if match[2] else None
    return first, {"size": size, **{name: response.headers[name] for name in ("ETag", "Last-Modified")}}


def _is_page(response: HTTPResponse) -> bool:
    return response.headers.get_content_type() in _PAGE_TYPES


def _is_same(one: FileIdentity, other: FileIdentity, surely: bool = False) -> bool:
    """Compare sizes and ETags; times only without ETags, since servers behind one address may differ in them."""
    name = "ETag" if one["ETag"] and other["ETag"] else "Last-Modified"
    pairs = [(one["size"], other["size"]), (one[name], other[name])]
    return all(None in pair or pair[0] == pair[1] for pair in pairs) and (not surely or all(pairs[1]))


def _describe(identity: FileIdentity) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value is not None) or "unknown"
