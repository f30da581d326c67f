"""`fetch_stage`: download of a published stage; `continue_from`: the run that starts from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi
from transformers.utils import logging

from ..errors import GrowthError, HubError
from ..growth import hash_stored_weights
from ..io.hub_address import Address
from ..io.hub_client import read_hub
from ..schedule import GrowthSchedule
from ..training.config import RunConfig
from .access import HubFileMissing, HubUnreachable, fetch_file, report_failures
from .lineage import EARLIER_LINEAGE_FILE, LINEAGE_FILE, Lineage, Origin, Parent

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class FetchedStage:
    """A published stage on this machine; `path` is the directory of its files, in the Hub client's cache."""

    address: Address
    path: Path
    lineage: Lineage

    @property
    def origin(self) -> Origin:
        """The origin of a run that starts from the stage."""
        parent = Parent(self.address.revision, self.lineage.weights_hash, self.address.repo_id)
        return Origin(parent, (*self.lineage.ancestors, self.lineage.record))


def fetch_stage(address: str, api: HfApi | None = None) -> FetchedStage:
    """Download a published stage and check its weights against their hash.

    Args:
        address: address such as `user/name@stage-2-ffn`; without a revision, the final model on `main`.
        api: client of the Hub; None for the default client.

    Raises:
        HubError: if there is no such revision, no permission or no network, or the weights differ from the published
            ones also when they are fetched again.
    """
    stage = _parse_address(address)
    lineage_path = _fetch_lineage(stage, api)
    lineage, commit = Lineage.from_json(lineage_path), lineage_path.parent.name  # the branch may move meanwhile
    path = _fetch_snapshot(stage, commit, api)
    if _find_fault(path, lineage) is not None:  # the cache would keep wrong bytes
        logger.warning(f"{stage}: the downloaded weights are not the published ones; fetching them again")
        path = _fetch_snapshot(stage, commit, api, force_download=True)
        if (fault := _find_fault(path, lineage)) is not None:
            raise HubError(f"{stage}: {fault}; the Hub has sent them twice, choose another revision")
    return FetchedStage(stage, path, lineage)


def _parse_address(address: str) -> Address:
    if Path(address).exists():
        raise HubError(
            f"{address} is a local path, not a published stage (user/name@stage-2-ffn): to start from a local model, "
            "set model.pretrained and data.tokenizer to it and give its schedule"
        )
    return Address.parse(address)


def _fetch_snapshot(stage: Address, commit: str, api: HfApi | None, *, force_download: bool = False) -> Path:
    """Download all files of a commit, those in the cache only if forced, and return their directory."""
    client = api or HfApi()
    with report_failures(stage, "reading", api):
        return Path(
            read_hub(
                lambda: client.snapshot_download(stage.repo_id, revision=commit, force_download=force_download),
                f"reading {stage}",
            )
        )


def _find_fault(path: Path, lineage: Lineage) -> str | None:
    """Return how the weights in a directory differ from the published ones; None if they do not."""
    try:
        weights = hash_stored_weights(path)
    except GrowthError as caught:
        return str(caught)
    if weights == lineage.weights_hash:
        return None
    return f"the weights in {path} have the hash {weights}, but lineage.json says {lineage.weights_hash}"


def _fetch_lineage(address: Address, api: HfApi | None) -> Path:
    """Fetch `lineage.json`, or the same file under its earlier name."""
    try:
        return fetch_file(address, LINEAGE_FILE, api)
    except (HubFileMissing, HubUnreachable) as caught:  # offline, the earlier name may be the one in the cache
        try:
            return fetch_file(address, EARLIER_LINEAGE_FILE, api)
        except HubError:
            raise caught from None


def continue_from(config: RunConfig, stage: FetchedStage, schedule: GrowthSchedule | str | None = None) -> RunConfig:
    """Return the config of a run that starts from a published stage, with the stage's model and tokenizer.

    Args:
        config: data and training arguments of the run. Its schedule is used if it starts with the stage's structure
            and is not the published run's.
        stage: stage to start from.
        schedule: schedule to train, or the path of its YAML file; None for the config's, or else the rest of the
            stage's own.

    Raises:
        HubError: if no schedule is given, and nothing follows the stage in its own.
    """
    given = config.schedule if schedule is None else schedule
    if isinstance(given, str):
        given = GrowthSchedule.from_yaml(given)
    if given is None or (schedule is None and given.structures == stage.lineage.schedule.structures):
        given = stage.lineage.remaining_schedule()
    has_tokenizer = (stage.path / "tokenizer_config.json").exists()
    data = replace(config.data, tokenizer=str(stage.path)) if has_tokenizer else config.data
    return replace(config, schedule=given, model={"pretrained": str(stage.path)}, data=data)
