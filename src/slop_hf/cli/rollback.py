"""`slop rollback`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..runs.directory import SCHEDULE_FILE, RunDirectory
from ..runs.rollback import plan_rollback
from ..schedule import GrowthSchedule
from .options import AsJson, Run
from .shared import print_json


def rollback_command(
    run: Run,
    to_stage: Annotated[
        int, typer.Option("--to-stage", help="Stage that becomes the last finished one; 0 is the initial model.")
    ],
    schedule: Annotated[Path | None, typer.Option("--schedule", "-s", help="New schedule of later stages.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be moved; move nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Return a run to the end of one of its stages.

    Later stages and their checkpoints are not removed, but moved to `RUN/rolled-back/1` (2, 3 …). Then
    `slop train --resume` trains the stage after it. That stage begins with a new AdamW state unless the run keeps the
    states of finished stages (`keep_optimizer_states: true`).

    Example: `slop rollback runs/tiny --to-stage 2`
    """
    new_schedule = None if schedule is None else GrowthSchedule.from_yaml(schedule)
    plan = plan_rollback(RunDirectory(run), to_stage, new_schedule)
    if not dry_run:
        plan.apply()
    if as_json:
        moved = {"moved": [path.name for path in plan.moved], "aside": str(plan.aside)}
        print_json({"run": str(plan.run), "stage": plan.stage, **moved, "keeps_optimizer": plan.keeps_optimizer})
        return
    for path in plan.moved:
        print(f"{path.name} would be moved to {plan.aside}" if dry_run else f"{path.name} → {plan.aside}")
    name = RunDirectory(run).schedule.stage_name(to_stage)
    with_schedule = "" if schedule is None else f" --schedule {run / SCHEDULE_FILE}"
    print(
        f"{run} {'would end' if dry_run else 'ends'} with {name}; "
        f"to continue: `slop train CONFIG -o {run}{with_schedule} --resume`"
    )
    if schedule is not None:
        print(f"its schedule {'would be' if dry_run else 'is now'} {schedule}; the old one is in {plan.aside}")
    if not plan.keeps_optimizer:
        print(
            "its AdamW state no longer exists, so the next stage begins with a new one; "
            "with keep_optimizer_states: true, runs keep it"
        )
