"""Reading with the Hub's client, `huggingface_hub`, whose own retries are too patient and log every URL.

The client repeats a request five times, waits as long as the server asks, be it hours, and writes two lines per
failure. It has no settings for that, so its waits and its log are replaced.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from .network_errors import find_network_error, hide_secrets
from .retry import RetryPolicy

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: For what someone is waiting for.
READING = RetryPolicy(attempts=5, connect_attempts=3, longest_retry_after=60.0)
#: Longest wait of the client before it repeats a request, in seconds.
LONGEST_CLIENT_WAIT = 60.0


def read_hub(action: Callable[[], T], doing: str) -> T:
    """Call a repeatable function that reads from the Hub, again after transient failures; every wait is logged.

    Args:
        doing: description of the action, for the log, such as `reading the tokenizer user/name`.

    Raises:
        Exception: the last one that `action` raised.
    """
    with disable_client_retries():
        return READING.call(action, doing, may_pass=lambda caught: find_network_error(caught) is not None)


@contextmanager
def disable_client_retries() -> Iterator[None]:
    """Let the client repeat no request during the block, in any thread: the caller repeats it."""
    shorten_client_waits()
    with _suspended:
        yield


@cache
def shorten_client_waits() -> None:
    """Cut the client's waits to `LONGEST_CLIENT_WAIT`, and log each of them in one line."""
    from huggingface_hub.utils import _http

    vars(_http)["time"] = _Clock()
    for name in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        logging.getLogger(name).addFilter(_keep_other_lines)


class _Suspension:
    """Sets the client's number of retries to 0 while one or more blocks are open."""

    def __init__(self) -> None:
        self._lock, self._blocks, self._retries = threading.Lock(), 0, 0

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._retries = _get_client_defaults().get("max_retries", 0)
                _get_client_defaults()["max_retries"] = 0

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                _get_client_defaults()["max_retries"] = self._retries


_suspended = _Suspension()
_failure = threading.local()


def _get_client_defaults() -> dict[str, Any]:
    from huggingface_hub.utils import _http

    return _http.http_backoff.__kwdefaults__ or {}


class _Clock:
    """The module `time`, for the client, with shorter waits."""

    def sleep(self, seconds: float) -> None:
        seconds = min(seconds, LONGEST_CLIENT_WAIT)
        logger.warning(f"the Hub: {getattr(_failure, 'reason', 'no answer')}; asking again in {seconds:.1f} s")
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def _keep_other_lines(record: logging.LogRecord) -> bool:
    """Drop the client's lines about failed requests; `_Clock` logs the last reason without its URL."""
    message = record.getMessage()
    reason, separator, _ = message.partition(" thrown while requesting ")
    if separator:
        _failure.reason = hide_secrets(reason).strip("'")
        return False
    if message.startswith(("Retrying in ", "Rate limited. ")):
        return False
    record.msg, record.args = hide_secrets(message), ()
    return True
