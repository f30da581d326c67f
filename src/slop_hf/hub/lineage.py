"""`PublishedGrowth`: where a published stage comes from, its `growth.json`; `Origin`: where a continued run does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..errors import HubError
from ..io.files import write_text
from ..io.serialization import parse, read_json, to_json
from ..runs.directory import RunDirectory
from ..runs.records import EvalRecord, StageRecord
from ..schedule import GrowthSchedule

GROWTH_FILE = "growth.json"
ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Parent:
    """The model that a stage has grown from.

    Args:
        revision: that holds it.
        weights_hash: of its weights (`growth.weights_hash`).
        repo: where another repository than the stage's own holds it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    revision: str
    weights_hash: str
    repo: str | None = None


@dataclass(frozen=True)
class PublishedGrowth:
    """What is told of a published stage, in `growth.json` beside its weights.

    Args:
        revision: the branch of its own; `main` may hold it too.
        weights_hash: of its weights, by which one sees that they have arrived.
        schedule: of its run.
        record: what happened in the stage: operators, inits, seed, tokens and data, losses, versions.
        run_id: of its run.
        parent: what it has grown from; None for a run's initial model.
        ancestors: records of the stages before it, those of earlier runs first.
        evaluations: what it scored.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    revision: str
    weights_hash: str
    schedule: GrowthSchedule
    record: StageRecord
    run_id: str = ""
    parent: Parent | None = None
    ancestors: tuple[StageRecord, ...] = ()
    evaluations: tuple[EvalRecord, ...] = ()

    def to_json(self) -> str:
        """It as JSON text."""
        return to_json(self)

    @classmethod
    def load(cls, path: Path) -> PublishedGrowth:
        """Read a `growth.json`.

        Raises:
            HubError: for a file that is none.
        """
        return _load(cls, path)

    def rest(self) -> GrowthSchedule:
        """What its run's schedule still had to do, from the stage on.

        Raises:
            HubError: where that is nothing.
        """
        stages = self.schedule.stages[self.record.stage :]
        if not stages:
            raise HubError(f"{self.revision} is the last stage of its schedule; give one to go on with (--schedule)")
        return GrowthSchedule(self.record.dims, stages)


@dataclass(frozen=True)
class Origin:
    """The published stage that a run began with, kept as `origin.json` in its directory.

    Args:
        parent: that stage.
        ancestors: the records of it and the stages before it.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    parent: Parent
    ancestors: tuple[StageRecord, ...]

    def save(self, run: RunDirectory) -> None:
        """Write it into a run's directory."""
        write_text(run.path / ORIGIN_FILE, to_json(self))

    @classmethod
    def load(cls, run: RunDirectory) -> Origin | None:
        """That of a run; None where it began with no published stage.

        Raises:
            HubError: for a file that is none.
        """
        path = run.path / ORIGIN_FILE
        return _load(cls, path) if path.exists() else None


def _load(cls: Any, path: Path) -> Any:
    content = read_json(path, if_missing="a stage published by slop-hf has one", error=HubError)
    return parse(cls, content, where=str(path), error=HubError)
