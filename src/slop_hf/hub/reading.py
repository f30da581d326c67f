"""`fetch_stage`: a published stage, to go on from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi

from ..errors import GrowthError, HubError
from ..growth import stored_weights_hash
from ..io.hub_address import Address
from ..schedule import GrowthSchedule
from ..training.config import RunConfig
from .access import explained, fetch_file
from .lineage import GROWTH_FILE, Origin, Parent, PublishedGrowth


@dataclass(frozen=True)
class FetchedStage:
    """A published stage on this machine.

    Args:
        address: where it is from.
        path: where it lies, in the cache of the Hub's client.
        growth: what is told of it.
    """

    address: Address
    path: Path
    growth: PublishedGrowth

    @property
    def origin(self) -> Origin:
        """What a run that begins with it has to remember."""
        parent = Parent(self.address.revision, self.growth.weights_hash, self.address.repo_id)
        return Origin(parent, (*self.growth.ancestors, self.growth.record))


def fetch_stage(address: str, api: HfApi | None = None) -> FetchedStage:
    """Download a published stage and check that its weights are those that were published.

    Args:
        address: `user/name@stage-2-ffn`; without a revision, the final model on `main`.
        api: the Hub's client.

    Raises:
        HubError: where there is no such revision, no permission, no network, or where the weights are others.
    """
    found = Address.parse(address)
    growth_file = fetch_file(found, GROWTH_FILE, api)
    commit = growth_file.parent.name  # the branch may move on before the rest has come
    with explained(found, "reading", api):
        path = Path((api or HfApi()).snapshot_download(found.repo_id, revision=commit))
    growth = PublishedGrowth.load(growth_file)
    try:
        weights = stored_weights_hash(path)
    except GrowthError as caught:
        raise HubError(f"{found}: {caught}") from None
    if weights != growth.weights_hash:
        raise HubError(
            f"{found}: the weights in {path} have the hash {weights}, {GROWTH_FILE} says {growth.weights_hash}; "
            "remove that directory and fetch it again, or choose another revision"
        )
    return FetchedStage(found, path, growth)


def continued(config: RunConfig, stage: FetchedStage, schedule: GrowthSchedule | str | None = None) -> RunConfig:
    """A run that begins with a published stage, with its tokenizer.

    Args:
        config: its data and training arguments. Its own schedule is used where that begins with the stage's structure.
        stage: to begin with.
        schedule: to go through; default, the config's, or else what was left of the stage's own.

    Raises:
        HubError: where nothing was left.
    """
    own = config.schedule if schedule is None else schedule
    if isinstance(own, str):
        own = GrowthSchedule.from_yaml(own)
    if own is None or (schedule is None and own.structures == stage.growth.schedule.structures):
        own = stage.growth.rest()
    has_tokenizer = (stage.path / "tokenizer_config.json").exists()
    data = replace(config.data, tokenizer=str(stage.path)) if has_tokenizer else config.data
    return replace(config, schedule=own, model={"pretrained": str(stage.path)}, data=data)
