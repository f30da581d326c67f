"""`RunSnapshot`: the content of a run's files, read once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..io.serialization import Json
from ..schedule import GrowthSchedule
from .directory import RunDirectory, RunFacts
from .records import EvalRecord, StageRecord


@dataclass(frozen=True)
class RunSnapshot:
    """Everything that a run's files say about its finished stages.

    Args:
        facts: facts that must not change when it is resumed; None if it predates `run.json`.
        records: record of each finished stage, shape [finished stages].
        evaluations: scores of each finished stage, shape [finished stages][records].
        history: log entries of the finished stages, as in `RunDirectory.history`.
    """

    path: Path
    schedule: GrowthSchedule
    facts: RunFacts | None
    records: tuple[StageRecord, ...]
    evaluations: tuple[tuple[EvalRecord, ...], ...]
    history: tuple[dict[str, Json], ...]

    @classmethod
    def read(cls, run: RunDirectory) -> RunSnapshot:
        records = tuple(run.records())
        return cls(
            path=run.path,
            schedule=run.schedule,
            facts=RunFacts.load(run),
            records=records,
            evaluations=tuple(tuple(run.evaluations(number)) for number in range(len(records))),
            history=tuple(run.history()),
        )

    def up_to(self, stage: int) -> RunSnapshot:
        """Return the run as it was when the given stage had just finished."""
        return replace(
            self,
            records=self.records[: stage + 1],
            evaluations=self.evaluations[: stage + 1],
            history=tuple(entry for entry in self.history if entry.get("stage", 0) <= stage),
        )
