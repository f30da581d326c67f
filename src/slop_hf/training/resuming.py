"""Where a run begins: at its first step, after a stage, or at a checkpoint inside one."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from ..errors import RunError
from ..runs.directory import SCHEDULE_FILE, RunDirectory, RunFacts
from ..schedule import GrowthSchedule
from .checkpoints import check_stage, last_good_checkpoint, step_of
from .checks import with_inits
from .checksums import fault_of
from .ranks import Ranks
from .recording import check_same_schedule
from .spans import StageSpan

logger = logging.get_logger(__name__)


class Position(NamedTuple):
    """Where to begin.

    Args:
        stage: its number; that of the stage after the last if the run is finished.
        checkpoint: inside it; None for its beginning.
    """

    stage: int
    checkpoint: Path | None = None

    def first_step(self, spans: Sequence[StageSpan]) -> int:
        """The global step that training goes on from."""
        if self.checkpoint is not None:
            return step_of(self.checkpoint)
        return spans[self.stage].first_step if self.stage < len(spans) else spans[-1].end_step


def begin(run: RunDirectory, schedule: GrowthSchedule, facts: RunFacts, ranks: Ranks) -> Position:
    """Begin a run in an empty directory.

    Raises:
        RunError: where it holds a run already.
    """
    with ranks.together():
        if ranks.is_first:
            if run.exists:
                raise RunError(
                    f"{run.path} holds another run, with {run.finished_stages} stages finished; "
                    "resume it (resume_from_checkpoint=True) or choose another output directory"
                )
            replace(facts, run_id=f"{run.path.resolve().name}-{secrets.token_hex(3)}").save(run)
            schedule.to_yaml(run.path / SCHEDULE_FILE)
    with ranks.together():
        if not run.exists:
            raise RunError(f"rank {ranks.rank} does not see {run.path}; all nodes need output_dir on a shared disk")
    return Position(0)


def resume(
    run: RunDirectory,
    schedule: GrowthSchedule,
    facts: RunFacts,
    ranks: Ranks,
    where: str | bool = True,
    growth_init: str | dict[str, str] | None = None,
) -> Position:
    """Find where a run stopped; files that are not what was written are passed over, or refused.

    Args:
        run: its directory.
        schedule, facts: of the trainer; they have to be the run's.
        ranks: all come to the same answer.
        where: a checkpoint of the stage in training; True finds the last.
        growth_init: of stages that the run's schedule leaves open, as one may that was given to `slop rollback`.

    Raises:
        RunError: for a directory without a run, or with another.
    """
    with ranks.together():
        if not run.exists:
            raise RunError(f"nothing to resume: {run.path} holds no run; begin one with resume_from_checkpoint=None")
        check_same_schedule(run, with_inits(run.schedule, growth_init), schedule)
        begun = RunFacts.load(run)
        if begun is not None:
            begun.check(facts, run)
    stage, finished = ranks.from_first((run.finished_stages, run.is_finished))
    checkpoint = None
    if isinstance(where, str) and Path(where).resolve() != run.path.resolve():
        checkpoint = Path(where)
        with ranks.together():
            if finished or checkpoint.resolve().parent != run.running_dir(stage).resolve():
                raise RunError(f"{where} is not a checkpoint of the stage in training; resume with True")
        if fault := fault_of(checkpoint, ranks):
            raise RunError(f"{checkpoint} is corrupt: {fault}; resume with True, which finds the last good one")
    elif not finished:
        checkpoint = last_good_checkpoint(run, stage, ranks)
    if checkpoint is not None:
        logger.info(f"Resuming {schedule.stage_name(stage)} from {checkpoint}")
    elif stage:
        check_stage(run, stage - 1, ranks)
        logger.info(f"Resuming after {schedule.stage_name(stage - 1)}")
    return Position(stage, checkpoint)
