"""`RemoteFile`: a file at a URL, downloaded into the cache as far as it is read.

urllib is used rather than a client with more features: it asks for bytes as they are stored, sends no credentials, and
logs no URLs, whose query may hold a signature.
"""

from __future__ import annotations

import io
import re
import urllib.request
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import BinaryIO, TypedDict, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from ..errors import DataError
from ..io.files import write_text
from ..io.network_errors import find_status, is_transient, summarise_error
from ..io.retry import Retries, RetryPolicy
from ..io.serialization import Json, hash_json, read_json, to_json

T = TypeVar("T")

RETRY_POLICY = RetryPolicy()  # for URLs and Hub datasets; it counts failures in a row without progress
TIMEOUT = 60.0  # seconds without a byte
PIECE_BYTES = 16 * 2**20  # per request
_BUFFER_BYTES = 2**18

#: Headers by which a server's file is recognised; None for those that it does not send.
FileIdentity = TypedDict("FileIdentity", {"size": int | None, "ETag": str | None, "Last-Modified": str | None})


class RemoteFile:
    """A file at a URL, readable despite dropped connections and interrupted programs.

    Its bytes are appended to a file in the cache, a piece at a time, when they are first read. A later reader uses the
    downloaded bytes if the server still has the same file.

    Args:
        url: address of the file.
        folder: folder for downloads in the cache.

    Raises:
        DataError: for a URL with a password in it.
    """

    def __init__(self, url: str, folder: Path) -> None:
        parts = urlsplit(url)
        self.url = url
        self.name = hide_query(url)
        self.filename = unquote(parts.path).rpartition("/")[2]
        self.identity: FileIdentity | None = None
        self._path = folder / hash_json(url)  # a hash gives no signature away
        self._stored_identity = self._path.with_suffix(".json")
        self._retries = Retries(RETRY_POLICY, f"reading {self.name}")
        if "@" in parts.netloc:
            raise DataError(f"the URL of {self.name} holds a user or password, which is not sent: use a signed URL")

    def look_up(self) -> None:
        """Ask the server which file it has, and drop an earlier download of another one.

        Raises:
            DataError: if the server does not give the file.
        """
        self.identity = self._retry(self._ask_for_identity)
        with self._lock():
            if not _is_known_to_be_same(self._read_stored_identity(), self.identity):
                self._path.unlink(missing_ok=True)
            write_text(self._stored_identity, to_json(self.identity))

    def expect(self, identity: FileIdentity) -> None:
        """Refuse to continue with a file other than the one with this identity.

        Raises:
            DataError: if the server has another file.
        """
        if self.identity is None:
            self.look_up()
        assert self.identity is not None
        if not _may_be_same(self.identity, identity):
            raise DataError(
                f"{self.name} has changed on the server since reading began (then {_describe(identity)}, now "
                f"{_describe(self.identity)}): bring the old file back, or begin again without the state of the "
                "earlier run"
            )

    def open(self, offset: int = 0) -> BinaryIO:
        """Return a stream of the bytes of the file from an offset on; the download grows as it is read."""
        return io.BufferedReader(_DownloadReader(self, offset), _BUFFER_BYTES)

    def download(self) -> Path:
        """Download the rest of the file, and return the path of the copy in the cache."""
        while self._download_piece():
            pass
        return self._path

    def discard(self) -> None:
        """Delete the download."""
        with self._lock():
            self._path.unlink(missing_ok=True)
            self._stored_identity.unlink(missing_ok=True)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read bytes at an offset, downloading them if necessary; return their number, 0 at the end of the file."""
        while True:
            if self._count_bytes() > offset:
                with self._path.open("rb", buffering=0) as file:
                    file.seek(offset)
                    return file.readinto(buffer)
            if not self._download_piece():
                return 0

    def _download_piece(self) -> bool:
        """Download the next piece; return False if there is none."""
        if self.identity is None:
            self.look_up()
        return self._retry(self._append_piece)

    def _retry(self, request: Callable[[], T]) -> T:
        reached = self._count_bytes()
        while True:
            try:
                result = request()
            except (OSError, HTTPException) as caught:
                if not is_transient(caught):
                    raise _explain_refusal(self.name, caught) from None
                if self._count_bytes() > reached:
                    reached = self._count_bytes()
                    self._retries.reset()
                wait_or_give_up(self._retries, caught)
            else:
                self._retries.reset()
                return result

    def _append_piece(self) -> bool:
        with self._lock():
            assert self.identity is not None
            start = self._count_bytes()
            if start == self.identity["size"]:
                return False
            try:
                response = self._send({"Range": f"bytes={start}-{start + PIECE_BYTES - 1}"})
            except HTTPError as caught:
                if caught.code == 416 and self.identity["size"] is None:  # no bytes are left
                    self.identity["size"] = start
                    return False
                raise
            with closing(response):
                self._append(response, start)
            return True

    def _append(self, response: HTTPResponse, start: int) -> None:
        first, size = _find_extent(response)
        seen, self.identity = self.identity, _identify(response)
        assert seen is not None
        self.expect(seen)
        if first not in (0, start):
            raise ConnectionError("the server sent another part of the file than requested")
        # A server that knows no ranges sends the whole file again.
        with self._path.open("ab" if first else "wb") as file:
            end = first
            # read would lose the bytes that have arrived if a chunked body breaks off.
            while chunk := response.read1(_BUFFER_BYTES):
                end += file.write(chunk)
        if response.length or (response.status == 206 and end == first):
            raise ConnectionError(f"the connection ended at byte {end} of {size}")
        if response.status == 200:
            self.identity["size"] = end

    def _ask_for_identity(self) -> FileIdentity:
        with closing(self._send({})) as response:
            return _identify(response)

    def _send(self, headers: dict[str, str]) -> HTTPResponse:
        request = urllib.request.Request(self.url, headers={"User-Agent": "slop-hf"} | headers)
        try:
            response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
        except HTTPError as caught:
            caught.close()
            raise
        return response

    def _count_bytes(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _read_stored_identity(self) -> Json:
        return read_json(self._stored_identity, if_missing="") if self._stored_identity.exists() else None

    def _lock(self) -> FileLock:
        """Let one process at a time append to the download."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path.with_suffix(".lock"))


class _DownloadReader(io.RawIOBase):
    def __init__(self, file: RemoteFile, offset: int) -> None:
        self._file, self._offset = file, offset

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = self._file.read_into(buffer, self._offset)
        self._offset += count
        return count


def wait_or_give_up(retries: Retries, caught: BaseException) -> None:
    """Log a failure of the network and wait.

    Raises:
        DataError: if it was the last attempt.
    """
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


def _find_extent(response: HTTPResponse) -> tuple[int, int | None]:
    """Return the offset of the first byte of the body, and the size of the whole file if the server says it."""
    if response.status != 206:
        length = response.headers["Content-Length"]
        return 0, int(length) if length else None
    content_range = response.headers["Content-Range"] or ""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range)
    if match is None:
        raise ConnectionError(
            f"the server sent a part of the file without its offset (Content-Range {content_range!r})"
        )
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _identify(response: HTTPResponse) -> FileIdentity:
    headers = response.headers
    return {"size": _find_extent(response)[1], "ETag": headers["ETag"], "Last-Modified": headers["Last-Modified"]}


def _may_be_same(one: FileIdentity, other: FileIdentity) -> bool:
    """Compare sizes and ETags; times only without ETags, since servers behind one address may differ in them."""
    pairs = [(one["size"], other["size"])]
    if one["ETag"] and other["ETag"]:
        pairs.append((one["ETag"], other["ETag"]))  # type: ignore[arg-type]
    else:
        pairs.append((one["Last-Modified"], other["Last-Modified"]))  # type: ignore[arg-type]
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _is_known_to_be_same(stored: FileIdentity | None, identity: FileIdentity) -> bool:
    if stored is None or not _may_be_same(stored, identity):
        return False
    return any(stored[name] and stored[name] == identity[name] for name in ("ETag", "Last-Modified"))


def _describe(identity: FileIdentity) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value is not None) or "unknown"


def _explain_refusal(name: str, caught: BaseException) -> DataError:
    remedies = {
        401: "it asks for a login: use a signed URL, or a Hub dataset as owner/name after `hf auth login`",
        403: "access is denied: use a signed URL that has not expired, or a Hub dataset as owner/name",
        404: "there is no such file: correct the URL",
        410: "the file is gone: correct the URL",
        416: "the file has changed on the server: bring the old file back, or begin again",
    }
    # The message of InvalidURL may hold a part of a password.
    reason = "the URL is malformed" if isinstance(caught, InvalidURL) else summarise_error(caught)
    remedy = remedies.get(find_status(caught) or 0, "open the URL in a browser, and correct it")
    return DataError(f"cannot read {name} ({reason}): {remedy}")
