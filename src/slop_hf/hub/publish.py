"""`publish_stage` and `publish_run`: finished stages as branches of a repository on the Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..errors import HubError
from ..io.hub_address import Address, check_repository
from ..io.retry import RetryPolicy
from ..runs.directory import RunDirectory
from ..runs.lock import lock_directory
from .access import call_hub
from .lineage import EARLIER_LINEAGE_FILE, LINEAGE_FILE, Lineage
from .revision import Revision, plan_revision

#: Number of attempts to connect to the Hub at first.
FIRST_CONNECT_ATTEMPTS = 3
#: Files that may be in a repository before the first stage is published; any other file belongs to something else.
_FURNITURE = {".gitattributes", "README.md", "LICENSE"}


@dataclass(frozen=True)
class Published:
    """A stage on the Hub.

    Args:
        is_new: whether it was sent just now; otherwise it was there already.
        nbytes: size of its files in bytes.
    """

    address: Address
    is_new: bool
    nbytes: int


def publish_stage(
    run_dir: RunDirectory | str | Path,
    number: int,
    repo_id: str,
    *,
    private: bool = True,
    base_model: str | None = None,
    api: HfApi | None = None,
    retries: RetryPolicy | None = None,
) -> tuple[Published, ...]:
    """Publish a finished stage as a branch named like its directory; the last stage of a schedule on `main` too.

    A revision arrives in one commit, whole or not at all, and is left alone if it is there already: the call can be
    repeated any number of times, also after a failure. Transient failures are retried.

    Args:
        run_dir: directory of the run.
        number: number of the stage; 0 is the initial model.
        repo_id: repository, such as `user/name`; created if it does not exist.
        private: whether a created repository is private.
        base_model: model on the Hub that the run started from, for the card's metadata.
        api: client of the Hub; None for `huggingface_hub`'s default, with the token that it finds.
        retries: how often transient failures are retried; None for the default policy.

    Returns:
        One value per branch.

    Raises:
        RunError: if there is no such finished stage.
        HubError: if a name is not valid, the Hub cannot be reached or denies permission, or the repository holds
            something else.
    """
    publisher = Publisher(run_dir, repo_id, private=private, base_model=base_model, api=api, retries=retries)
    return publisher.publish(number)


def publish_run(
    run_dir: RunDirectory | str | Path,
    repo_id: str,
    *,
    stages: Sequence[int] | None = None,
    report: Callable[[Published], object] | None = None,
    **options: object,
) -> list[Published]:
    """Publish finished stages of a run in order.

    Args:
        run_dir, repo_id, options: as for `publish_stage`.
        stages: numbers of the stages; None for all finished ones.
        report: function to call with each branch when it has arrived.

    Returns:
        One value per branch, in the order of publishing.

    Raises:
        RunError: if there is no run, or a stage has not finished.
        HubError: as for `publish_stage`.
    """
    publisher = Publisher(run_dir, repo_id, **options)  # type: ignore[arg-type]
    return [
        published
        for number in publisher.run.select_stages(stages)
        for published in publisher.publish(number, report=report)
    ]


class Publisher:
    """Publishes the stages of a run into one repository, with the arguments and errors of `publish_stage`."""

    def __init__(
        self,
        run: RunDirectory | str | Path,
        repo_id: str,
        *,
        private: bool = True,
        base_model: str | None = None,
        api: HfApi | None = None,
        retries: RetryPolicy | None = None,
    ) -> None:
        check_repository(repo_id)
        if base_model is not None:
            check_repository(base_model, "base_model")
        self.run = run if isinstance(run, RunDirectory) else RunDirectory(run)
        self.repo_id, self._private, self._base_model = repo_id, private, base_model
        self._api, self._retries, self._is_open = api or HfApi(), retries, False

    def open(self) -> None:
        """Create the repository unless it exists. A name without a user gets the token's user."""
        if not self._is_open:

            def create() -> str:
                return self._api.create_repo(self.repo_id, private=self._private, exist_ok=True).repo_id

            # Without a network the user learns of it within seconds; once something has arrived, patience pays.
            policy = replace(self._retries or RetryPolicy(), connect_attempts=FIRST_CONNECT_ATTEMPTS)
            self.repo_id = call_hub(create, Address(self.repo_id), "creating", policy)
            self._is_open = True

    def publish(self, number: int, *, report: Callable[[Published], object] | None = None) -> tuple[Published, ...]:
        self.run.select_stages([number])  # before a repository is created for nothing
        # Training removes an old stage's optimizer state, and a rollback moves stages. Nobody writes where this user
        # must not write, as far as we can tell.
        locked = lock_directory(self.run.path, "publishing") if os.access(self.run.path, os.W_OK) else nullcontext()
        with locked:
            return self._publish(number, report)

    def _publish(self, number: int, report: Callable[[Published], object] | None) -> tuple[Published, ...]:
        self.open()
        revision = plan_revision(self.run, number, self.repo_id, base_model=self._base_model)
        branches: list[Published] = []
        for branch in revision.branches:
            branches.append(self._write(revision, branch))
            if report is not None:
                report(branches[-1])
        return tuple(branches)

    def _write(self, revision: Revision, branch: str) -> Published:
        address, nbytes = Address(self.repo_id, branch), sum(revision.sizes.values())
        additions = [
            CommitOperationAdd(path, source if isinstance(source, bytes) else str(source))
            for path, source in revision.content.items()
        ]

        def attempt() -> Published:
            files = self._list_files(branch)
            if self._holds(address, files, revision.lineage):
                return Published(address, is_new=False, nbytes=nbytes)
            strays = [path for path in files if path not in revision.content and path not in _FURNITURE]
            self._api.create_commit(
                self.repo_id,
                [*additions, *map(CommitOperationDelete, strays)],
                commit_message=f"{revision.lineage.revision}: {revision.lineage.record.parameters:,} parameters",
                revision=branch,
            )
            return Published(address, is_new=True, nbytes=nbytes)

        return call_hub(attempt, address, "writing", self._retries)

    def _list_files(self, branch: str) -> list[str]:
        """Return the files of a branch, creating the branch unless it exists."""
        try:
            return self._api.list_repo_files(self.repo_id, revision=branch)
        except RevisionNotFoundError:
            self._api.create_branch(self.repo_id, branch=branch, exist_ok=True)
            return self._api.list_repo_files(self.repo_id, revision=branch)

    def _holds(self, address: Address, files: list[str], lineage: Lineage) -> bool:
        """Whether a branch holds the stage already; if it holds something else, raise a `HubError`."""
        name = next((name for name in (LINEAGE_FILE, EARLIER_LINEAGE_FILE) if name in files), None)
        if name is None:
            if strays := sorted(set(files) - _FURNITURE):
                raise HubError(
                    f"{address} holds something else ({', '.join(strays[:3])}); publish into another repository"
                )
            return False
        with tempfile.TemporaryDirectory() as directory:  # the client's cache may be older than the branch
            path = self._api.hf_hub_download(
                self.repo_id, name, revision=address.revision, local_dir=directory, force_download=True
            )
            there = Lineage.from_json(path)
        if there.run_id != lineage.run_id:
            raise HubError(
                f"{address} holds a stage of another run ({there.run_id}, not {lineage.run_id}); "
                "publish each run into its own repository"
            )
        return (there.weights_hash, there.evaluations) == (lineage.weights_hash, lineage.evaluations)
