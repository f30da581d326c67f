"""Failures of the network: which may pass, what they say, and how long a server asks to wait.

Exceptions of HTTP clients are told by name and attributes, so that none of the clients is imported.
"""

from __future__ import annotations

import errno
import random
import re
import ssl
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from urllib.error import HTTPError, URLError

LONGEST_RETRY_AFTER = 3600.0  # seconds that a server may ask for
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_dice = random.Random()  # the global generator stays as the training seed left it
# Bases of what HTTP clients (httpx, requests, aiohttp, asyncio) raise for the network; naming them needs no import.
_TRANSIENT_NAMES = frozenset({"TransportError", "RequestException", "ClientError", "TimeoutError"})


def is_transient(caught: BaseException) -> bool:
    """Whether the same request may succeed a little later.

    >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
    (True, False)
    """
    status = status_of(caught)
    if status is not None:
        return status in TRANSIENT_STATUS
    inner = caught.reason if isinstance(caught, URLError) else None
    if isinstance(inner or caught, (InvalidURL, FileNotFoundError, ssl.SSLCertVerificationError)):
        return False
    if isinstance(caught, (ConnectionError, TimeoutError, HTTPException, URLError, ssl.SSLError)):
        return True
    if isinstance(caught, OSError) and caught.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN):
        return True
    if _TRANSIENT_NAMES & {base.__name__ for base in type(caught).__mro__}:
        return True
    return caught.__cause__ is not None and is_transient(caught.__cause__)


def reason_of(caught: BaseException) -> str:
    """The first line of what an exception says, without what may be secret.

    >>> reason_of(OSError("403 for https://me:pw@host/a?Signature=xyz with Bearer abc"))
    '403 for https://host/a with Bearer ...'
    """
    lines = str(caught).strip().splitlines()
    reason = lines[0] if lines else type(caught).__name__
    reason = re.sub(r"\b(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)[^\s'\")]*", r"\1\2", reason)
    return re.sub(r"(?i)\b(bearer|basic)\s+\S+|\bhf_\w+", lambda found: f"{found[1] or 'hf_'} ...", reason)


def seconds_to_wait(failures: int, first: float, longest: float, caught: BaseException) -> float:
    """Twice as long after each failure, less a random part of up to a half, and at least what the server asks for.

    Args:
        failures: in a row, this one counted.
        first, longest: of the waits, in seconds.
        caught: the last failure.

    >>> 0.5 <= seconds_to_wait(1, 1.0, 5.0, ConnectionResetError()) <= 1.0
    True
    >>> 2.5 <= seconds_to_wait(9, 1.0, 5.0, ConnectionResetError()) <= 5.0
    True
    """
    wait = min(first * 2 ** (failures - 1), longest) * _dice.uniform(0.5, 1)
    return max(wait, retry_after(caught))


def status_of(caught: BaseException) -> int | None:
    """The HTTP status that a failure tells of; None where it tells none."""
    if isinstance(caught, HTTPError):
        return caught.code
    return getattr(getattr(caught, "response", None), "status_code", None)


def retry_after(caught: BaseException) -> float:
    """The seconds that a server asks to wait, given as such or as a date; 0 where it does not."""
    headers = getattr(caught, "headers", None) or getattr(getattr(caught, "response", None), "headers", None)
    value = (headers.get("Retry-After") or "") if headers else ""
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):  # absent, or neither
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
