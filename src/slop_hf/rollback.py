"""`plan_rollback`: a run put back to the end of one of its stages."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

from .errors import RunError
from .records import SCHEDULE_FILE, RunDirectory, RunFacts
from .schedule import GrowthSchedule

ASIDE = "rolled-back"


@dataclass(frozen=True)
class Rollback:
    """What putting a run back to the end of a stage does; nothing of it is lost.

    Args:
        run: the run's directory.
        stage: that will be the last one finished.
        moved: directories and files that will be moved.
        aside: where to.
        keeps_optimizer: whether AdamW's state at the end of the stage is still there; otherwise the next stage begins
            with a new one.
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
        run = RunDirectory(self.run)
        self.aside.mkdir(parents=True)
        for path in self.moved:
            path.rename(self.aside / path.name)
        if self.schedule is not None:
            (self.aside / SCHEDULE_FILE).write_bytes((self.run / SCHEDULE_FILE).read_bytes())
            _keep_batches(run, self.schedule)
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
        for number in range(stage + 1):
            of_run, of_other = _stage(found, number), _stage(schedule, number)
            if of_run != of_other:
                raise RunError(f"the schedule differs from the run's in stage {number}, which is to stay: {of_other}")
    aside = next(path for n in count(1) if not (path := run.path / ASIDE / f"{n}").exists())
    return Rollback(run.path, stage, moved, aside, bool(run.optimizer_files(stage)), schedule)


def _stage(schedule: GrowthSchedule, number: int) -> object:
    """A stage of a schedule, the initial one counted; None where there is none."""
    if number == 0:
        return schedule.initial, schedule.initial_tokens
    return schedule.stages[number - 1] if number <= len(schedule.stages) else None


def _keep_batches(run: RunDirectory, schedule: GrowthSchedule) -> None:
    """Give stages that the run did not have the batch of its last one."""
    facts = RunFacts.load(run)
    if facts is None:
        return
    batches, stages = facts.blocks_per_step, len(schedule.structures)
    batches = (*batches[:stages], *batches[-1:] * (stages - len(batches)))
    RunFacts(facts.block_size, facts.blocks, batches, facts.data_seed, facts.run_id).save(run)
