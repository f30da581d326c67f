"""The Hub's failures in words, and trying again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ..io.network_errors import find_status, is_transient, summarize_error
from ..io.retry import RetryPolicy

T = TypeVar("T")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_CONFLICTS = frozenset({409, 412})  # somebody else has committed meanwhile; looking again tells what


class HubUnreachable(HubError):
    """Nothing can be read or written at present."""


def call_hub(action: Callable[[], T], address: Address, doing: str, policy: RetryPolicy | None = None) -> T:
    """Call a function that talks to the Hub; repeat it after failures that may pass.

    Args:
        action: function that can be called any number of times.
        address: the revision that it reads or writes.
        doing: description of the action, for messages, such as `writing to`.
        policy: how often to repeat it.

    Raises:
        HubError: readable, once it is clear that the action fails.
    """
    try:
        return (policy or RetryPolicy()).call(action, f"{doing} {address}", may_pass=_may_pass)
    except SlopError:
        raise
    except Exception as caught:
        raise explain(caught, address, doing) from None


def fetch_file(address: Address, name: str, api: HfApi | None = None) -> Path:
    """One file of a revision, in the cache of the Hub's client.

    Raises:
        HubError: where there is no such repository, revision or file, no permission, or no network.
    """
    with explained(address, f"reading {name} of", api):
        return Path((api or HfApi()).hf_hub_download(address.repo_id, name, revision=address.revision))


@contextmanager
def explained(address: Address, doing: str, api: HfApi | None = None) -> Iterator[None]:
    """A block whose failures become `HubError`s; a wrong revision is told with those that there are."""
    try:
        yield
    except SlopError:
        raise
    except Exception as caught:
        raise explain(caught, address, doing, api) from None


def explain(caught: Exception, address: Address, doing: str, api: HfApi | None = None) -> HubError:
    """What went wrong, and what to do about it; nothing in it is secret.

    Args:
        caught: by a call of `huggingface_hub`.
        address: what it was about, and `doing` what was done to it.
        api: to ask for the revisions that there are.
    """
    root: BaseException = caught  # the client wraps what it was told
    while find_status(root) is None and root.__cause__ is not None:
        root = root.__cause__
    status, what, repo = find_status(root), f"{doing} {address}", address.repo_id
    if isinstance(caught, HFValidationError):
        return HubError(f"{repo!r} is no name of a repository: {summarize_error(caught)}; give user/name")
    if isinstance(caught, RevisionNotFoundError):
        return HubError(f"{repo} has no revision {address.revision!r}{_known_revisions(address, api)}")
    if status == 401 and not isinstance(caught, RepositoryNotFoundError):
        return HubError(f"{what}: the Hub does not accept the token, or there is none (401); {_LOG_IN}")
    if status == 403 or isinstance(caught, GatedRepoError):
        return HubError(
            f"{what}: no permission (403); use a token that has it (`hf auth whoami` says whose), or another name"
        )
    if isinstance(caught, RepositoryNotFoundError):
        return HubError(f"{what}: there is no such repository, or you may not see it; check the name, or {_LOG_IN}")
    if isinstance(caught, (OfflineModeIsEnabled, LocalEntryNotFoundError)) or (status is None and _may_pass(caught)):
        return HubUnreachable(
            f"{what}: the Hub cannot be reached ({summarize_error(root)}); check the network, and HF_HUB_OFFLINE"
        )
    if isinstance(caught, EntryNotFoundError):
        return HubError(f"{what}: there is no such file; choose a revision that was published by slop-hf")
    return HubError(f"{what} failed: {summarize_error(root)}; it can be tried again at any time")


def _may_pass(caught: BaseException) -> bool:
    return not isinstance(caught, SlopError) and (is_transient(caught) or find_status(caught) in _CONFLICTS)


def _known_revisions(address: Address, api: HfApi | None) -> str:
    try:
        refs = (api or HfApi()).list_repo_refs(address.repo_id)
    except Exception:  # this is for a message only
        return "; look at its branches on the Hub"
    return f"; it has {', '.join(ref.name for ref in [*refs.branches, *refs.tags])}"
