"""`publish_stage` and `publish_run`: finished stages as branches of a repository on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RevisionNotFoundError

from ..errors import HubError, RunError
from ..io.hub_address import Address
from ..io.retry import RetryPolicy
from ..runs.directory import RunDirectory
from .access import call_hub
from .lineage import GROWTH_FILE, PublishedGrowth
from .revision import Revision, check_finished, plan_revision

#: What a repository may hold before anything was published; the rest belongs to somebody.
_FURNITURE = {".gitattributes", "README.md", "LICENSE"}


@dataclass(frozen=True)
class Published:
    """A revision that is on the Hub.

    Args:
        address: of it.
        is_new: whether it was sent just now; otherwise it was there.
        nbytes: that it holds.
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
    """Publish a finished stage as a branch named like its directory; the last one of a schedule on `main` too.

    A revision arrives in one commit, whole or not at all, and one that is there already is left alone: this can be
    called any number of times, also after a failure. Failures that may pass are tried again.

    Args:
        run_dir: the run's directory.
        number: of the stage, 0 for the initial model.
        repo_id: such as `user/name`; made if there is none.
        private: whether it is then private.
        base_model: for the card's metadata, the model on the Hub that the run began with.
        api: the Hub's client; default, that of `huggingface_hub`, with the token that it finds.
        retries: how often failures are tried again.

    Raises:
        RunError: where there is no such stage.
        HubError: where the Hub cannot be reached or does not permit it, or the repository holds something else.
    """
    publisher = Publisher(run_dir, repo_id, private=private, base_model=base_model, api=api, retries=retries)
    return publisher.publish(number)


def publish_run(
    run_dir: RunDirectory | str | Path, repo_id: str, *, stages: Sequence[int] | None = None, **options: object
) -> Iterator[Published]:
    """Publish finished stages of a run, in order, as `publish_stage` does; each is told of when it is there.

    Args:
        run_dir, repo_id, options: as for `publish_stage`.
        stages: their numbers; None, all that have finished.

    Raises:
        RunError: where there is no run, or no finished stage.
        HubError: as for `publish_stage`.
    """
    publisher = Publisher(run_dir, repo_id, **options)  # type: ignore[arg-type]
    for number in stages_to_publish(publisher.run, stages):
        yield from publisher.publish(number)


def stages_to_publish(run: RunDirectory, stages: Sequence[int] | None = None) -> Sequence[int]:
    """The numbers of the stages that are asked for, or of all that have finished.

    Raises:
        RunError: where there is no run, or a stage has not finished.
    """
    if run.schedule and not run.finished_stages:
        raise RunError(f"{run.path} has no finished stage to publish; let `slop train` finish its first one")
    chosen = range(run.finished_stages) if stages is None else stages
    for number in chosen:
        check_finished(run, number)  # before anything is sent
    return chosen


class Publisher:
    """Publishes a run's stages into one repository; arguments and errors are those of `publish_stage`."""

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
        self.run = run if isinstance(run, RunDirectory) else RunDirectory(run)
        self.repo_id = repo_id
        self._private, self._base_model = private, base_model
        self._api, self._retries = api or HfApi(), retries
        self._is_open = False

    def open(self) -> None:
        """Make the repository, if there is none. A name without a user is taken for the token's user."""
        if not self._is_open:

            def create() -> str:
                return self._api.create_repo(self.repo_id, private=self._private, exist_ok=True).repo_id

            self.repo_id = call_hub(create, Address(self.repo_id), "creating", self._retries)
            self._is_open = True

    def publish(self, number: int) -> tuple[Published, ...]:
        """Publish a finished stage."""
        check_finished(self.run, number)  # before a repository is made for nothing
        self.open()
        revision = plan_revision(self.run, number, self.repo_id, base_model=self._base_model)
        return tuple(self._put(revision, branch) for branch in revision.branches)

    def _put(self, revision: Revision, branch: str) -> Published:
        address, nbytes = Address(self.repo_id, branch), sum(revision.sizes.values())
        additions = [
            CommitOperationAdd(path, one if isinstance(one, bytes) else str(one))
            for path, one in revision.content.items()
        ]

        def attempt() -> Published:
            files = self._files(branch)
            if self._holds(address, files, revision.growth):
                return Published(address, is_new=False, nbytes=nbytes)
            strays = [path for path in files if path not in revision.content and path not in _FURNITURE]
            self._api.create_commit(
                self.repo_id,
                [*additions, *map(CommitOperationDelete, strays)],
                commit_message=f"{revision.growth.revision}: {revision.growth.record.parameters:,} parameters",
                revision=branch,
            )
            return Published(address, is_new=True, nbytes=nbytes)

        return call_hub(attempt, address, "writing", self._retries)

    def _files(self, branch: str) -> list[str]:
        """What a branch holds; it is made where there is none."""
        try:
            return self._api.list_repo_files(self.repo_id, revision=branch)
        except RevisionNotFoundError:
            self._api.create_branch(self.repo_id, branch=branch, exist_ok=True)
            return self._api.list_repo_files(self.repo_id, revision=branch)

    def _holds(self, address: Address, files: list[str], growth: PublishedGrowth) -> bool:
        """Whether a branch holds the stage already.

        Raises:
            HubError: where it holds something else.
        """
        if GROWTH_FILE not in files:
            if strays := sorted(set(files) - _FURNITURE):
                raise HubError(
                    f"{address} holds something else ({', '.join(strays[:3])}); publish into a repository of its own"
                )
            return False
        with tempfile.TemporaryDirectory() as directory:  # the client's cache may be older than the branch
            path = self._api.hf_hub_download(
                self.repo_id, GROWTH_FILE, revision=address.revision, local_dir=directory, force_download=True
            )
            there = PublishedGrowth.load(Path(path))
        if there.run_id != growth.run_id:
            raise HubError(
                f"{address} holds a stage of another run ({there.run_id}, not {growth.run_id}); "
                "publish each run into a repository of its own"
            )
        return (there.weights_hash, there.evaluations) == (growth.weights_hash, growth.evaluations)
