"""Calls of the Hub: readable errors, and retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError, SlopError
from ..io.hub_address import Address
from ..io.hub_client import read_hub, shorten_client_waits
from ..io.network_errors import find_network_error, find_status, summarise_error
from ..io.retry import RetryPolicy

T = TypeVar("T")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
#: Beginnings of the client's errors about answers that come without a status: a server's failure may be behind them.
_ODD_ANSWERS = ("LFS batch API returned errors", "Malformed response from server")
_CONFLICTS = frozenset({409, 412})  # another process has committed meanwhile: the next attempt sees its commit


class HubUnreachable(HubError):
    """The Hub cannot be reached at present."""


class OddAnswerError(ConnectionError):
    """An answer that is not the Hub's usual one; the next one may be."""


class HubFileMissing(HubError):
    """The revision exists, but not the file."""


def call_hub(action: Callable[[], T], address: Address, doing: str, policy: RetryPolicy | None = None) -> T:
    """Call a repeatable function that talks to the Hub, again after transient failures; others become a `HubError`."""
    shorten_client_waits()

    def attempt() -> T:
        try:
            return action()
        except JSONDecodeError:
            raise OddAnswerError("the server did not answer in JSON, as a proxy or a login page does") from None
        except ValueError as caught:
            if not str(caught).startswith(_ODD_ANSWERS):
                raise
            raise OddAnswerError(summarise_error(caught)) from None

    with report_failures(address, doing):
        return (policy or RetryPolicy()).call(attempt, f"{doing} {address}", may_pass=_may_pass)


def fetch_file(address: Address, name: str, api: HfApi | None = None) -> Path:
    """Download one file of a revision into the Hub client's cache, and return its path there."""
    client, doing = api or HfApi(), f"reading {name} of"
    with report_failures(address, doing, api):
        return Path(
            read_hub(
                lambda: client.hf_hub_download(address.repo_id, name, revision=address.revision), f"{doing} {address}"
            )
        )


@contextmanager
def report_failures(address: Address, doing: str, api: HfApi | None = None) -> Iterator[None]:
    """Turn any failure of the block into a `HubError`; for an unknown revision, it lists the existing ones."""
    try:
        yield
    except SlopError:
        raise
    except Exception as caught:
        raise _describe_failure(caught, address, doing, api) from None


def _describe_failure(caught: Exception, address: Address, doing: str, api: HfApi | None) -> HubError:
    """Return an error that says what went wrong and what to do about it, without secrets."""
    root: BaseException = caught  # the client wraps the answer of the server
    while find_status(root) is None and root.__cause__ is not None:
        root = root.__cause__
    status, action, repo = find_status(root), f"{doing} {address}", address.repo_id
    if isinstance(caught, HFValidationError):
        return HubError(f"{repo!r} is not a valid repository name: {summarise_error(caught)}; give user/name")
    if isinstance(caught, RevisionNotFoundError):
        return HubError(f"{repo} has no revision {address.revision!r}{_list_revisions(address, api)}")
    if status == 401 and not isinstance(caught, RepositoryNotFoundError):
        return HubError(f"{action}: the token is missing, or the Hub rejects it (401); {_LOG_IN}")
    if status == 403 or isinstance(caught, GatedRepoError):
        return HubError(
            f"{action}: no permission (403); use a token that has it (`hf auth whoami` names its user), "
            "or another repository"
        )
    if isinstance(caught, RepositoryNotFoundError):
        return HubError(f"{action}: there is no such repository, or you may not see it; check the name, or {_LOG_IN}")
    is_odd = isinstance(caught, OddAnswerError)
    is_unanswered = status is None and not is_odd and _may_pass(caught)
    if is_unanswered or isinstance(caught, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return HubUnreachable(
            f"{action}: the Hub cannot be reached ({summarise_error(root)}); check the network, and HF_HUB_OFFLINE"
        )
    if isinstance(caught, EntryNotFoundError):
        return HubFileMissing(f"{action}: there is no such file; choose a revision that slop-hf has published")
    return HubError(f"{action} failed: {summarise_error(root)}; you can try again at any time")


def _may_pass(caught: BaseException) -> bool:
    if isinstance(caught, SlopError):
        return False
    return find_network_error(caught) is not None or find_status(caught) in _CONFLICTS


def _list_revisions(address: Address, api: HfApi | None) -> str:
    try:
        refs = (api or HfApi()).list_repo_refs(address.repo_id)
    except Exception:  # the list only completes a message
        return "; look at its branches on the Hub"
    return f"; it has {', '.join(ref.name for ref in [*refs.branches, *refs.tags])}"
