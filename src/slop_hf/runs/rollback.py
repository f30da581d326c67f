"""`plan_rollback`: a run put back to the end of one of its stages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from ..errors import RunError
from ..schedule import GrowthSchedule
from .directory import SCHEDULE_FILE, RunDirectory

ASIDE = "rolled-back"


@dataclass(frozen=True)
class Rollback:
    """What putting a run back to the end of a stage does; nothing of it is lost.

    Args:
        run: the run's directory.
        stage: that will be the last one finished.
        moved: directories and files that will be moved.
        aside: where to.
        keeps_optimizer: whether AdamW's state at the end of the stage, if there ever was one, is still there;
            otherwise the next stage begins with a new one.
        schedule: that will be the run's; None leaves it.
    """

    run: Path
    stage: int
    moved: tuple[Path, ...]
    aside: Path
    keeps_optimizer: bool
    schedule: GrowthSchedule | None = None

    def apply(self) -> None:
        """Do it: a later stage before an earlier one, so that a run that is killed meanwhile can still be resumed."""
        self.aside.mkdir(parents=True)
        for path in self.moved:
            path.rename(self.aside / path.name)
        if self.schedule is not None:
            (self.aside / SCHEDULE_FILE).write_bytes((self.run / SCHEDULE_FILE).read_bytes())
            self.schedule.to_yaml(self.run / SCHEDULE_FILE)


def plan_rollback(run: RunDirectory, stage: int, schedule: GrowthSchedule | None = None) -> Rollback:
    """Decide what putting a run back to the end of a stage does.

    Args:
        run: its directory.
        stage: its number; 0 is the initial model.
        schedule: for the stages after it; up to it, it has to be the run's.

    Raises:
        RunError: for a stage that has not finished, a run without later ones, or a schedule of another run.
    """
    found, finished = run.schedule, run.finished_stages
    if not 0 <= stage < finished:
        known = f"0 to {finished - 1}" if finished else "none yet"
        raise RunError(f"{run.path}: stage {stage} has not finished; finished are {known}")
    names = found.stage_names
    later = [run.path / name for name in names[stage + 1 :]]
    paths = [path for name in reversed(later) for path in (name.with_name(f"{name.name}.running"), name)]
    moved = tuple(path for path in paths if path.exists())
    if not moved and schedule is None:
        raise RunError(f"{run.path} ends with {names[stage]}; there is nothing after it to move away")
    if schedule is not None:
        schedule = _keeping(found, schedule, stage)
    aside = next(path for n in count(1) if not (path := run.path / ASIDE / f"{n}").exists())
    return Rollback(run.path, stage, moved, aside, _keeps_optimizer(run, stage), schedule)


def _keeps_optimizer(run: RunDirectory, stage: int) -> bool:
    return bool(run.optimizer_files(stage)) or not sum(run.schedule.tokens[: stage + 1])


def _keeping(found: GrowthSchedule, other: GrowthSchedule, stage: int) -> GrowthSchedule:
    """Another schedule with the run's own stages up to one; it may leave their inits open.

    Raises:
        RunError: where it differs in what is to stay.
    """
    if (found.initial, found.initial_tokens) != (other.initial, other.initial_tokens):
        given = f"{other.initial}, {other.initial_tokens:,} tokens"
        raise RunError(f"the schedule differs from the run's in stage 0, which is to stay: {given}")
    for number, own in enumerate(found.stages[:stage], 1):
        there = other.stages[number - 1] if number <= len(other.stages) else None
        if there is None or own != replace(there, init=there.init or own.init):
            raise RunError(f"the schedule differs from the run's in stage {number}, which is to stay: {there}")
    return replace(other, stages=(*found.stages[:stage], *other.stages[stage:]))
