"""Where a run begins: at its first step, after a finished stage, or at a checkpoint inside one."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from ..errors import RunError
from ..runs.directory import SCHEDULE_FILE, RunDirectory, RunFacts
from ..schedule import GrowthSchedule
from .checkpoints import check_stage, find_last_good_checkpoint, parse_step
from .checksums import find_corruption
from .ranks import Ranks
from .run_plan import RunPlan, with_inits

logger = logging.get_logger(__name__)


class Position(NamedTuple):
    """The position at which training begins.

    Args:
        stage: number of the stage; the number of stages if the run is finished.
        checkpoint: checkpoint inside the stage; None for the stage's beginning.
    """

    stage: int
    checkpoint: Path | None = None

    def find_step(self, plan: RunPlan) -> int:
        """Return the number of global steps done."""
        if self.checkpoint is not None:
            return parse_step(self.checkpoint)
        return plan.spans[self.stage].first_step if self.stage < len(plan.spans) else plan.end_step


def begin_run(run: RunDirectory, plan: RunPlan, ranks: Ranks) -> Position:
    """Begin a run in a directory without one."""
    with ranks.raise_on_all():
        if ranks.is_first:
            if run.exists:
                raise RunError(
                    f"{run.path} holds another run, with {run.finished_stages} stages finished; "
                    "resume it (resume_from_checkpoint=True) or choose another output directory"
                )
            replace(plan.facts, run_id=f"{run.path.resolve().name}-{secrets.token_hex(3)}").save(run)
            plan.schedule.to_yaml(run.path / SCHEDULE_FILE)
    with ranks.raise_on_all():
        if not run.exists:
            raise RunError(f"rank {ranks.rank} does not see {run.path}; all nodes need output_dir on a shared disk")
    return Position(0)


def resume_run(
    run: RunDirectory, plan: RunPlan, ranks: Ranks, checkpoint: str | bool, growth_init: str | dict[str, str] | None
) -> Position:
    """Find the position at which a run stopped; corrupt checkpoints are skipped, and a corrupt stage is refused.

    All ranks return the same position.

    Args:
        plan: plan of the trainer; it must match the run's.
        checkpoint: path of a checkpoint of the stage in training, or True for the last one.
        growth_init: init of stages whose init is not set in the directory's schedule, as after `slop rollback`.
    """
    schedule = plan.schedule
    with ranks.raise_on_all():
        if not run.exists:
            raise RunError(f"nothing to resume: {run.path} holds no run; begin one with resume_from_checkpoint=None")
        _check_same_schedule(run, with_inits(run.schedule, growth_init), schedule)
        if (begun := RunFacts.load(run)) is not None:
            begun.check(plan.facts, run)
    stage, finished = ranks.from_first((run.finished_stages, run.is_finished))
    path: Path | None = None
    if isinstance(checkpoint, str) and Path(checkpoint).resolve() != run.path.resolve():
        path = Path(checkpoint)
        with ranks.raise_on_all():
            if finished or path.resolve().parent != run.running_dir(stage).resolve():
                raise RunError(f"{path} is not a checkpoint of the stage in training; resume with True")
        if fault := find_corruption(path, ranks):
            raise RunError(f"{path} is corrupt: {fault}; resume with True, which finds the last good one")
    elif not finished:
        path = find_last_good_checkpoint(run, stage, ranks)
    if path is not None:
        logger.info(f"Resuming {schedule.stage_name(stage)} from {path}")
    elif stage:
        check_stage(run, stage - 1, ranks)
        logger.info(f"Resuming after {schedule.stage_name(stage - 1)}")
    return Position(stage, path)


def _check_same_schedule(run: RunDirectory, begun: GrowthSchedule, schedule: GrowthSchedule) -> None:
    """Refuse to resume a run with another schedule than it was begun with."""
    if begun == schedule:
        return
    old = zip(begun.structures, begun.tokens, strict=True)
    new = zip(schedule.structures, schedule.tokens, strict=True)
    pairs = enumerate(zip(old, new, strict=False))
    stage = next((number for number, (before, after) in pairs if before != after), None)
    difference = "they differ in their number of stages or inits" if stage is None else f"stage {stage} differs"
    raise RunError(
        f"{run.path} holds a run of another schedule ({difference}); resume with {run.path / SCHEDULE_FILE}, "
        "or choose another output directory"
    )
