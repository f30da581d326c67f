"""Where a run begins: at its first step, after a finished stage, or at a checkpoint inside one."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers.utils import logging

from ..errors import RunError
from ..growth import resolve_inits
from ..runs.directory import OPTIMIZER_STEM, SCHEDULE_FILE, RunDirectory, RunFacts, parse_step
from ..runs.settings import RunSettings
from ..schedule import GrowthSchedule
from .arguments import ADAMW_STATE
from .checkpoints import check_stage, find_last_good_checkpoint
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
                    "resume it (`--resume`, in Python resume_from_checkpoint=True), or choose another output directory"
                )
            replace(plan.facts, run_id=f"{run.path.resolve().name}-{secrets.token_hex(3)}").save(run)
            RunSettings().resume(0, plan.settings).save(run)
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
        begun = RunFacts.load(run)
        known_init = begun.growth_init if begun is not None and begun.knows_growth else growth_init
        _check_same_schedule(run, with_inits(run.schedule, known_init), schedule)
        if begun is not None:
            begun.check(plan.facts, run)
        stage, finished = run.finished_stages, run.is_finished
    stage, finished = ranks.from_first((stage, finished))
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
    if path is None and stage:
        check_stage(run, stage - 1, ranks)
    position = Position(stage, path)
    with ranks.raise_on_all():
        if path is not None and (begun is None or not begun.optimizer):
            _check_optimizer_state(path, plan.facts.optimizer)
        if ranks.is_first and not finished:
            _write_down(run, plan, begun, position.find_step(plan))
    if path is not None:
        logger.info(f"Resuming {schedule.stage_name(stage)} from {path}")
    elif stage:
        logger.info(f"Resuming after {schedule.stage_name(stage - 1)}")
    return position


def _check_optimizer_state(checkpoint: Path, optimizer: str) -> None:
    """Refuse AdamW's state for another optimizer, which a run of an earlier release does not name."""
    if optimizer != ADAMW_STATE and list(checkpoint.glob(f"{OPTIMIZER_STEM}*.safetensors")):
        raise RunError(
            f"{checkpoint} holds AdamW's state, which {optimizer} cannot use; resume with the same optimizer"
        )


def _write_down(run: RunDirectory, plan: RunPlan, begun: RunFacts | None, step: int) -> None:
    """Write down the settings with which a run continues at a step, and facts that were unknown."""
    settings = RunSettings.load(run) or RunSettings()
    before = settings.before(step)
    changes = [
        f"{name} {value} instead of {before[name]}"
        for name, value in plan.settings.items()
        if name in before and before[name] != value
    ]
    if changes:
        logger.warning(f"from step {step} on, the run has {', '.join(changes)}")
    if (now := settings.resume(step, plan.settings)) != settings:
        now.save(run)
    if begun is not None and (facts := begun.complete(plan.facts)) != begun:
        facts.save(run)


def _check_same_schedule(run: RunDirectory, begun: GrowthSchedule, schedule: GrowthSchedule) -> None:
    """Refuse to resume a run with another schedule, or other inits, than it was begun with."""
    remedy = f"resume with {run.path / SCHEDULE_FILE}, or choose another output directory"
    old = list(zip(begun.structures, begun.tokens, strict=True))
    new = list(zip(schedule.structures, schedule.tokens, strict=True))
    if old != new:
        pairs = enumerate(zip(old, new, strict=False))
        stage = next((number for number, (before, after) in pairs if before != after), None)
        difference = "they differ in their number of stages" if stage is None else f"stage {stage} differs"
        raise RunError(f"{run.path} holds a run of another schedule ({difference}); {remedy}")
    for number, (before, after) in enumerate(zip(begun.stages, schedule.stages, strict=True), 1):
        if before.operators != after.operators:
            raise RunError(f"{run.path} holds a run of another schedule (stage {number} differs); {remedy}")
        inits = [resolve_inits(stage.operators, stage.init) for stage in (before, after)]
        if inits[0] != inits[1]:
            raise RunError(
                f"{run.path} was begun with growth_init {inits[0]} in stage {number}, not {inits[1]}; {remedy}, "
                "and leave growth_init as it was"
            )
