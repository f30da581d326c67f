"""`Lineage`: the history of a published stage; `Origin`: the published stage that a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import HubError
from ..io.record import Record
from ..runs.directory import RunFile
from ..runs.records import EvalRecord, StageRecord
from ..schedule import GrowthSchedule

LINEAGE_FILE = "lineage.json"
#: Name of `LINEAGE_FILE` in stages that slop-hf 0.1.0 published.
EARLIER_LINEAGE_FILE = "growth.json"
_IF_MISSING = "a stage published by slop-hf has one"


@dataclass(frozen=True)
class Parent(Record, error=HubError, if_missing=_IF_MISSING):
    """The model that a stage was grown from, or that a run starts from.

    Args:
        weights_hash: hash of its weights (`growth.hash_weights`).
        repo: repository that holds it; None for the stage's own repository.
    """

    revision: str
    weights_hash: str
    repo: str | None = None


@dataclass(frozen=True)
class Lineage(Record, error=HubError, if_missing=_IF_MISSING):
    """History of a published stage, stored next to its weights as `lineage.json`.

    Args:
        revision: the stage's own branch; if it is the last one, `main` holds it too.
        weights_hash: hash of its weights, to check a download.
        record: record of the stage: operators, inits, seed, tokens and data, losses, versions.
        parent: model that it was grown from; None for the initial model of a run that starts from scratch.
        ancestors: records of the stages before it, earlier runs first.
    """

    revision: str
    weights_hash: str
    schedule: GrowthSchedule
    record: StageRecord
    run_id: str = ""
    parent: Parent | None = None
    ancestors: tuple[StageRecord, ...] = ()
    evaluations: tuple[EvalRecord, ...] = ()

    def remaining_schedule(self) -> GrowthSchedule:
        """Return the part of its run's schedule that follows the stage; a `HubError` says that nothing does."""
        stages = self.schedule.stages[self.record.stage :]
        if not stages:
            raise HubError(f"{self.revision} is the last stage of its schedule; give another one (--schedule)")
        return GrowthSchedule(self.record.dims, stages)


@dataclass(frozen=True)
class Origin(RunFile, error=HubError, if_missing=_IF_MISSING):
    """The published stage that a run starts from; `ancestors` are the records of that stage and the ones before it."""

    file_name = "origin.json"

    parent: Parent
    ancestors: tuple[StageRecord, ...]
