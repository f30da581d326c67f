"""`slop rollback`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..runs.directory import SCHEDULE_FILE, RunDirectory
from ..runs.rollback import Rollback, plan_rollback
from ..schedule import GrowthSchedule


def rollback(
    run: Annotated[Path, typer.Argument(help="Directory of the run.")],
    to_stage: Annotated[int, typer.Option("--to-stage", help="The stage that will be the last finished; 0: initial.")],
    schedule: Annotated[
        Path | None, typer.Option("--schedule", "-s", help="Another schedule for the stages after it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be moved, and move nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is moved as JSON.")] = False,
) -> None:
    """Put a run back to the end of one of its stages.

    Later stages and their checkpoints are moved to `RUN/rolled-back/1` (2, 3 …), not removed. `slop train --resume`
    then goes on with the stage after it. That one begins with a new AdamW unless the run keeps the optimizer's states
    (`keep_optimizer_states: true`).

    Example: `slop rollback runs/tiny --to-stage 2`
    """
    other = None if schedule is None else GrowthSchedule.from_yaml(schedule)
    plan = plan_rollback(RunDirectory(run), to_stage, other)
    if not dry_run:
        plan.apply()
    if as_json:
        print(json.dumps(_row(plan), indent=2))
        return
    for path in plan.moved:
        print(f"{path.name} → {plan.aside}" if not dry_run else f"{path.name} would go to {plan.aside}")
    name = RunDirectory(run).schedule.stage_name(to_stage)
    with_schedule = f" --schedule {run / SCHEDULE_FILE}" if other is not None else ""
    go_on = f"go on with `slop train CONFIG -o {run}{with_schedule} --resume`"
    print(f"{run} {'would end' if dry_run else 'ends'} with {name}; {go_on}")
    if other is not None:
        print(
            f"its schedule {'would be' if dry_run else 'is now'} that of {schedule}; the old one goes to {plan.aside}"
        )
    if not plan.keeps_optimizer:
        print("AdamW's state at its end is gone (keep_optimizer_states keeps it): the next stage will begin a new one")


def _row(plan: Rollback) -> dict[str, object]:
    return {
        "run": str(plan.run),
        "stage": plan.stage,
        "moved": [path.name for path in plan.moved],
        "aside": str(plan.aside),
        "keeps_optimizer": plan.keeps_optimizer,
    }
