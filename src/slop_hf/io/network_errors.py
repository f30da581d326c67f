"""Network errors: which are transient, a safe one-line description, and how long the server asks to back off.

HTTP-client exceptions are recognised by name and attributes, so no client has to be imported.
"""

from __future__ import annotations

import errno
import re
import ssl
import time
from email.utils import parsedate_to_datetime
from http.client import HTTPException, InvalidURL
from socket import gaierror
from urllib.error import HTTPError, URLError

TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# Bases of what HTTP clients (httpx, requests, aiohttp, asyncio) raise for the network; naming them needs no import.
_TRANSIENT_NAMES = frozenset({"TransportError", "RequestException", "ClientError", "TimeoutError"})
_UNREACHABLE_NAMES = frozenset({"ConnectError", "ConnectTimeout"})
_UNREACHABLE_CODES = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)
#: The Hub's header of a used-up limit, `"api";r=0;t=55`: no requests remain for 55 seconds.
_USED_UP = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")
_LONGEST_REASON = 300  # characters


def is_transient(caught: BaseException) -> bool:
    """Whether the same request may succeed later.

    >>> is_transient(ConnectionResetError()), is_transient(FileNotFoundError())
    (True, False)
    """
    status = find_status(caught)
    if status is not None:
        return status in TRANSIENT_STATUS
    inner = caught.reason if isinstance(caught, URLError) else None
    if isinstance(inner or caught, (InvalidURL, FileNotFoundError, ssl.SSLCertVerificationError)):
        return False
    if type(caught).__name__ == "OfflineModeIsEnabled":  # by a setting
        return False
    if isinstance(caught, (ConnectionError, TimeoutError, HTTPException, URLError, ssl.SSLError)):
        return True
    if is_unreachable(caught):
        return True
    if _TRANSIENT_NAMES & {base.__name__ for base in type(caught).__mro__}:
        return True
    return caught.__cause__ is not None and is_transient(caught.__cause__)


def is_unreachable(caught: BaseException) -> bool:
    """Whether no connection could be opened: there is no network, the host is unknown, or it refuses.

    >>> is_unreachable(ConnectionRefusedError()), is_unreachable(ConnectionResetError())
    (True, False)
    """
    caught = caught.reason if isinstance(caught, URLError) and isinstance(caught.reason, OSError) else caught
    if isinstance(caught, (ConnectionRefusedError, gaierror)):
        return True
    if isinstance(caught, OSError) and caught.errno in _UNREACHABLE_CODES:
        return True
    if _UNREACHABLE_NAMES & {base.__name__ for base in type(caught).__mro__}:
        return True
    return caught.__cause__ is not None and is_unreachable(caught.__cause__)


def find_network_error(caught: BaseException) -> BaseException | None:
    """Return the transient failure behind an exception, or None; libraries wrap it, even as a missing file."""
    chain = [caught]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return next((link for link in reversed(chain) if is_transient(link)), None)


def get_first_line(caught: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its class if the message is empty.

    >>> get_first_line(OSError("no such file\\nhint: look elsewhere")), get_first_line(KeyError())
    ('no such file', 'KeyError')
    """
    # The text of a Hub error begins with a status line; what happened is in `server_message`.
    lines = _list_lines(getattr(caught, "server_message", None) or str(caught))
    return lines[0] if lines else type(caught).__name__


def _list_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def summarise_error(caught: BaseException) -> str:
    """Return the reason of an exception in one line, without what may be secret: passwords, tokens, signatures.

    It is the first line of the message, with the lines after it if it only announces them. Of the answer of a server,
    every line counts.

    >>> summarise_error(OSError("403 for https://me:pw@host/a?Signature=xyz with Bearer abc"))
    '403 for https://host/a with Bearer ...'
    >>> summarise_error(ValueError("two errors:\\nno space\\nno name"))
    'two errors: no space; no name'
    """
    first = get_first_line(caught)
    message = getattr(caught, "server_message", None)
    _, *rest = _list_lines(message or str(caught)) or [""]
    if rest and message:
        first = "; ".join([first, *rest])
    elif rest and first.endswith(":"):
        first = f"{first} {'; '.join(rest)}"
    reason = hide_secrets(first)
    return reason if len(reason) <= _LONGEST_REASON else f"{reason[:_LONGEST_REASON]} …"


def hide_secrets(text: str) -> str:
    """Return a text without the passwords and queries of its URLs, and without tokens, passwords and keys.

    >>> hide_secrets("https://me:pw@host/a?Signature=xyz"), hide_secrets("training.hub_token=abc")
    ('https://host/a', 'training.hub_token=...')
    """
    line = re.sub(r"\b(https?://)(?:[^\s/@]*@)?([^\s?#'\"]*)[^\s'\")]*", r"\1\2", text)
    line = re.sub(r"(?i)((?:token|password|key)=)[^\s'\"]+", r"\1...", line)
    return re.sub(r"(?i)\b(bearer|basic)\s+\S+|\bhf_\w+", lambda match: f"{match[1] or 'hf_'} ...", line)


def find_status(caught: BaseException) -> int | None:
    """Return the HTTP status of an exception; None without one."""
    if isinstance(caught, HTTPError):
        return caught.code
    return getattr(getattr(caught, "response", None), "status_code", None)


def find_retry_after(caught: BaseException) -> float:
    """Return the seconds that a server asks to wait, given as such or as a date; 0 if it does not ask."""
    headers = getattr(caught, "headers", None) or getattr(getattr(caught, "response", None), "headers", None)
    value = (headers.get("Retry-After") or "") if headers else ""
    if headers and not value and (used_up := _USED_UP.search(headers.get("RateLimit") or "")):
        value = used_up[1]
    try:
        seconds = float(value) if value.strip().isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError):  # absent, or neither
        return 0.0
    return max(seconds, 0.0)
