"""Going on over failures of the network: `Patience`, which waits, and `RemoteFile`, which reads on where it stopped.

urllib is used rather than a client of more features: it is there on every Python, asks for bytes as they are stored,
and sends no credentials of its own.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from ..errors import DataError
from ..io.network_errors import find_status, is_transient, summarize_error
from ..io.retry import RetryPolicy

RETRIES = 8  # attempts without progress
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds; each wait is twice the one before
TIMEOUT = 60.0  # seconds without a byte

logger = logging.getLogger(__name__)


class Patience:
    """Waits after each failure, twice as long as the time before, and gives up after `RETRIES` without progress.

    Args:
        what: what is being read, for messages; without secrets.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0

    def progress(self) -> None:
        """Something new has arrived: count anew."""
        self.failures = 0

    def wait(self, caught: BaseException) -> None:
        """Log a failure and wait; at least as long as the server asks for.

        Raises:
            DataError: at the last attempt.
        """
        self.failures += 1
        reason = summarize_error(caught)
        if self.failures >= RETRIES:
            raise DataError(
                f"reading {self.what} failed {self.failures} times in a row, the last time with: {reason}; "
                "check the network, then run it again: it goes on where it stopped"
            ) from caught
        seconds = RetryPolicy(RETRIES, FIRST_WAIT, LONGEST_WAIT).choose_wait(self.failures, caught)
        logger.warning(
            "reading %s: %s; attempt %d of %d in %.1f s", self.what, reason, self.failures + 1, RETRIES, seconds
        )
        time.sleep(seconds)


class RemoteFile:
    """A file at a URL, read as a stream that outlives dropped connections.

    Its identity (size, ETag, time of change) is that of the first response, or of the state of an earlier run;
    another one later means that the file has changed, and the rest of it would not fit what was read.

    Raises:
        DataError: for a URL with a password in it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.url = url
        self.name = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"  # a query may hold a signature
        self.filename = unquote(parts.path).rpartition("/")[2]
        self.identity: dict[str, Any] | None = None
        if "@" in parts.netloc:
            raise DataError(f"the URL of {self.name} holds a user or password, which is not sent: use a signed URL")

    def expect(self, identity: dict[str, Any]) -> None:
        """Go on only if the file is the one with this identity.

        Raises:
            DataError: if it is known to be another.
        """
        if self.identity is not None and not _same(self.identity, identity):
            raise DataError(
                f"{self.name} has changed on the server since reading began (then {_told(identity)}, now "
                f"{_told(self.identity)}): bring the old file back, or begin anew without the state of the earlier run"
            )
        self.identity = self.identity or identity

    def look_up(self) -> None:
        """Ask for the file without reading it.

        Raises:
            DataError: if it is not to be had.
        """
        with self.open() as opened:
            opened.peek(1)

    def open(self, offset: int = 0) -> io.BufferedReader:
        """The bytes of the file from an offset on."""
        return io.BufferedReader(_Body(self, offset), buffer_size=2**17)

    @contextmanager
    def on_disk(self) -> Iterator[Path]:
        """A local copy, removed afterwards."""
        with tempfile.NamedTemporaryFile(prefix="slop-hf-", suffix=f"-{self.filename[-40:]}") as copy:
            with self.open() as opened:
                shutil.copyfileobj(opened, copy, 2**20)
            copy.flush()
            yield Path(copy.name)


class _Body(io.RawIOBase):
    """The raw bytes of a remote file. On a failure the next read connects again, where the last one ended."""

    def __init__(self, file: RemoteFile, offset: int) -> None:
        self._file, self._offset = file, offset
        self._patience = Patience(file.name)
        self._response: HTTPResponse | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                # read1 gives what has arrived, where read would lose it when a chunked body breaks off.
                read = self._connected().read1(len(buffer))
                if not read and self._offset < (self._size() or 0):
                    raise ConnectionError(f"the connection ended at byte {self._offset} of {self._size()}")
            except (OSError, HTTPException) as caught:
                self._disconnect()
                if not is_transient(caught):
                    _refuse(self._file.name, caught)
                self._patience.wait(caught)
                continue
            if read:
                self._patience.progress()
            self._offset += len(read)
            buffer[: len(read)] = read
            return len(read)

    def close(self) -> None:
        self._disconnect()
        super().close()

    def _size(self) -> int | None:
        return self._file.identity["size"] if self._file.identity else None

    def _disconnect(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None

    def _connected(self) -> HTTPResponse:
        """A response whose next byte is the one at the offset."""
        if self._response is None:
            # From a byte before: at the end of the file too there is something to send, and with it who the file is.
            headers = {"User-Agent": "slop-hf"} | ({"Range": f"bytes={self._offset - 1}-"} if self._offset else {})
            request = urllib.request.Request(self._file.url, headers=headers)
            self._response = _response(request, self._file, self._offset)
            start, size = _extent(self._response)
            told = self._response.headers
            identity = {"size": size, "ETag": told["ETag"], "Last-Modified": told["Last-Modified"]}
            seen, self._file.identity = self._file.identity, identity
            if seen is not None:
                self._file.expect(seen)
            _skip(self._response, self._offset - start)  # of a server that does not know ranges
        return self._response


def _response(request: urllib.request.Request, file: RemoteFile, offset: int) -> HTTPResponse:
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as caught:
        caught.close()
        if caught.code == 416:  # nothing lies at the offset
            raise DataError(
                f"{file.name} ends before byte {offset}, which was reached before: it has changed on the server; "
                "bring the old file back, or begin anew without the state of the earlier run"
            ) from None
        raise
    return response


def _extent(response: HTTPResponse) -> tuple[int, int | None]:
    """(offset of the first byte of the body, size of the whole file)"""
    if response.status != 206:
        length = response.headers["Content-Length"]
        return 0, int(length) if length else None
    place = response.headers["Content-Range"] or ""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", place)
    if not found:
        raise ConnectionError(f"the server gave a part of the file without its place (Content-Range {place!r})")
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _skip(response: HTTPResponse, count: int) -> None:
    if count < 0:
        raise ConnectionError("the server gave another part of the file than was asked for")
    while count:
        read = response.read1(min(count, 2**20))
        if not read:
            raise ConnectionError(f"the connection ended {count} bytes before the place to go on at")
        count -= len(read)


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """By size and ETag, where both have one; servers behind one address may differ in the time of change."""
    size, etag = "size", "ETag"
    names = (size, etag if one[etag] and other[etag] else "Last-Modified")
    return all(one[name] is None or other[name] is None or one[name] == other[name] for name in names)


def _told(identity: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value is not None) or "unknown"


def _refuse(name: str, caught: BaseException) -> NoReturn:
    remedies = {
        401: "it asks for a login: use a signed URL, or a Hub dataset as owner/name after `hf auth login`",
        403: "access is denied: use a signed URL that has not expired, or a Hub dataset as owner/name",
        404: "there is no such file: correct the URL",
        410: "the file is gone: correct the URL",
    }
    # What InvalidURL says may be a part of a password.
    reason = "the URL is malformed" if isinstance(caught, InvalidURL) else summarize_error(caught)
    remedy = remedies.get(find_status(caught) or 0, "open the URL in a browser, and correct it")
    raise DataError(f"cannot read {name} ({reason}): {remedy}") from None
