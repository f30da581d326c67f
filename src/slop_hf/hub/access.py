"""The Hub's failures in words, and trying again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from ..io.network_errors import is_transient, reason_of, seconds_to_wait, status_of

T = TypeVar("T")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_CONFLICTS = frozenset({409, 412})  # somebody else has committed meanwhile; looking again tells what


class HubUnreachable(HubError):
    """Nothing can be read or written at present."""


@dataclass(frozen=True)
class Retries:
    """How often to try what may succeed a little later, with waits that double, or are as long as the Hub asks for.

    Args:
        attempts: in all.
        first_wait, longest_wait: in seconds.
    """

    attempts: int = 8
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def persist(self, action: Callable[[], T], address: Address, doing: str) -> T:
        """Do it, again after failures that may pass.

        Args:
            action: may be done any number of times.
            address: what it is about, and `doing` what is done to it, for messages.

        Raises:
            HubError: in words, once it is clear that it fails.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except SlopError:
                raise
            except Exception as caught:
                if attempt == self.attempts or not _may_pass(caught):
                    raise explain(caught, address, doing) from None
                seconds = seconds_to_wait(attempt, self.first_wait, self.longest_wait, caught)
            time.sleep(seconds)
        raise AssertionError("attempts must be positive")


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
    while status_of(root) is None and root.__cause__ is not None:
        root = root.__cause__
    status, what, repo = status_of(root), f"{doing} {address}", address.repo_id
    if isinstance(caught, HFValidationError):
        return HubError(f"{repo!r} is no name of a repository: {reason_of(caught)}; give user/name")
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
            f"{what}: the Hub cannot be reached ({reason_of(root)}); check the network, and HF_HUB_OFFLINE"
        )
    if isinstance(caught, EntryNotFoundError):
        return HubError(f"{what}: there is no such file; choose a revision that was published by slop-hf")
    return HubError(f"{what} failed: {reason_of(root)}; it can be tried again at any time")


def _may_pass(caught: BaseException) -> bool:
    return is_transient(caught) or status_of(caught) in _CONFLICTS


def _known_revisions(address: Address, api: HfApi | None) -> str:
    try:
        refs = (api or HfApi()).list_repo_refs(address.repo_id)
    except Exception:  # this is for a message only
        return "; look at its branches on the Hub"
    return f"; it has {', '.join(ref.name for ref in [*refs.branches, *refs.tags])}"
