"""`plan_rollback`: returning a run to the end of one of its stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from ..errors import RunError
from ..schedule import GrowthSchedule
from .directory import SCHEDULE_FILE, RunDirectory
from .lock import lock_directory

ASIDE = "rolled-back"


@dataclass(frozen=True)
class Rollback:
    """The moves that return a run to the end of a stage; nothing is deleted.

    Args:
        stage: number of the stage that becomes the last finished one.
        aside: directory that `moved` is moved to.
        keeps_optimizer: whether AdamW's state at the end of the stage still exists, or there never was one; otherwise
            the next stage begins with a new state.
        schedule: new schedule of the run; None leaves the old one.
    """

    run: Path
    stage: int
    moved: tuple[Path, ...]
    aside: Path
    keeps_optimizer: bool
    schedule: GrowthSchedule | None = None

    def apply(self) -> None:
        """Move the files, later stages first, so that a run killed in between can still be resumed.

        Raises:
            RunError: if another process writes into the run's directory.
        """
        with lock_directory(self.run, "rolling back"):
            self.aside.mkdir(parents=True)
            for path in self.moved:
                path.rename(self.aside / path.name)
            if self.schedule is not None:
                (self.aside / SCHEDULE_FILE).write_bytes((self.run / SCHEDULE_FILE).read_bytes())
                self.schedule.to_yaml(self.run / SCHEDULE_FILE)


def plan_rollback(run: RunDirectory, stage: int, schedule: GrowthSchedule | None = None) -> Rollback:
    """Decide how to return a run to the end of a stage (0 is the initial model).

    `schedule` replaces the run's after this stage; up to it, the two must be equal.
    """
    run.select_stages([stage], allow_gap=True)  # a gap is what one may roll back from
    names = run.schedule.stage_names
    later = [run.path / name for name in names[stage + 1 :]]
    paths = [path for name in reversed(later) for path in (name.with_name(f"{name.name}.running"), name)]
    moved = tuple(path for path in paths if path.exists())
    if not moved and schedule is None:
        raise RunError(f"{run.path} ends with {names[stage]}; there is nothing after it to move away")
    if schedule is not None:
        schedule = _merge_schedules(run.schedule, schedule, stage)
    aside = next(path for n in count(1) if not (path := run.path / ASIDE / f"{n}").exists())
    keeps_optimizer = bool(run.optimizer_files(stage)) or not sum(run.schedule.tokens[: stage + 1])
    return Rollback(run.path, stage, moved, aside, keeps_optimizer, schedule)


def _merge_schedules(old: GrowthSchedule, new: GrowthSchedule, stage: int) -> GrowthSchedule:
    """Return the old schedule up to a stage and the new one after it; the new one may leave earlier inits open."""
    if (old.initial, old.initial_tokens) != (new.initial, new.initial_tokens):
        got = f"{new.initial}, {new.initial_tokens:,} tokens"
        raise RunError(f"the schedule differs from the run's in stage 0, which must stay the same: {got}")
    for number, before in enumerate(old.stages[:stage], 1):
        after = new.stages[number - 1] if number <= len(new.stages) else None
        if after is None or before != replace(after, init=after.init or before.init):
            raise RunError(f"the schedule differs from the run's in stage {number}, which must stay the same: {after}")
    return replace(new, stages=(*old.stages[:stage], *new.stages[stage:]))
