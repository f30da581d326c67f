"""A web server in a thread, with scripted failures."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer:
    """A context manager that serves files from memory.

    Args:
        files: contents by name; they may change while the server runs.
        faults: one per request, in order: None serves it; a float below 1 drops the connection after that share of
            the body; a whole number is the status to answer with.
        ranges: whether the server supports the header Range.
        chunked: whether to send bodies in chunks, without their length.
        headers: headers by name of the file, which replace the usual ones.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        faults: Iterable[Any] = (),
        *,
        ranges: bool = True,
        chunked: bool = False,
        headers: dict[str, dict[str, str]] | None = None,
    ) -> None:
        self.files, self.faults, self.ranges, self.chunked = files, iter(faults), ranges, chunked
        self.headers = headers or {}
        self.requests: list[tuple[str, str | None]] = []  # (name, Range) per request
        self._lock = threading.Lock()

    def __enter__(self) -> FileServer:
        self._server = _QuietServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{name}"

    def next_fault(self, name: str, asked: str | None) -> Any:
        with self._lock:
            self.requests.append((name, asked))
            return next(self.faults, None)


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None: ...  # a client that hangs up


def _handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True  # a request a connection
            name, asked = self.path[1:].partition("?")[0], self.headers["Range"]
            fault, content = server.next_fault(name, asked), server.files.get(name)
            if isinstance(fault, int):
                return self.answer(fault, b"", {"Retry-After": "0"} if fault == 429 else {})
            if content is None:
                return self.answer(404, b"", {})
            headers = {"ETag": f'"{sha256(content).hexdigest()}"'}
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "") if server.ranges else None
            start, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(content))
            body = content[start:end]
            if match and not body:
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            if match:
                headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{len(content)}"
            self.answer(206 if match else 200, body, headers, fault)

        def answer(self, status: int, body: bytes, headers: dict[str, str], share: float | None = None) -> None:
            self.send_response(status)
            headers = {**headers, **server.headers.get(self.path[1:], {})}
            chunked = server.chunked and status in (200, 206)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header(
                    *(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body))))
                )
            self.end_headers()
            sent = body if share is None else body[: int(share * len(body))]
            if chunked and body:
                self.wfile.write(b"%x\r\n%s" % (len(body), sent) + (b"\r\n0\r\n\r\n" if share is None else b""))
            else:
                self.wfile.write(sent)

        def log_message(self, *_: Any) -> None: ...

    return Handler
