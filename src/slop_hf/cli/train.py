"""`slop train`."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

import slop_hf

from ..schedule import GrowthSchedule
from .run_view import read_changes, show_outcome, show_preview, train_run


def train(
    config: Annotated[Path, typer.Argument(help="The run as YAML: schedule, model, data, training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")],
    schedule: Annotated[
        Path | None, typer.Option("--schedule", "-s", help="A schedule made by `slop plan`, in place of the config's.")
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the target from random weights with the same FLOPs instead.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Begin with a published stage, user/name@stage-2-ffn, and go on as it was to."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output directory, or begin if there is none.")
    ] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: --set training.learning_rate=1e-3")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, tokens, FLOPs, steps and memory, and train nothing.")
    ] = False,
    devices: Annotated[int, typer.Option(help="With --dry-run: devices that the memory is counted for.")] = 1,
    zero_stage: Annotated[int, typer.Option(help="With --dry-run: the stage of ZeRO, 0 to 3, that they use.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the stages' records (or the plan) as JSON.")] = False,
) -> None:
    """Train a model through a growth schedule.

    Each stage ends as a stock transformers checkpoint, `RUN/stage-1-layer` and so on. A run that was killed goes on
    with `--resume`, and ends with the weights of a run that was not.

    `--from` takes the model and tokenizer of a published stage, and what was left of its schedule unless another is
    given. `training.push_to_hub=true` publishes each stage when it has finished.

    Example: `slop train recipes/grow_tiny.yaml -o runs/tiny`
    """
    run_config = slop_hf.RunConfig.from_yaml(config, overrides=read_changes(change or []))
    given = None if schedule is None else GrowthSchedule.from_yaml(schedule)
    stage = None if source is None else slop_hf.fetch_stage(source)
    run_config = run_config.with_schedule(given) if stage is None else slop_hf.continued(run_config, stage, given)
    if dry_run:
        show_preview(run_config, output, scratch=scratch, devices=devices, zero_stage=zero_stage, as_json=as_json)
        return
    # What transformers prints while it trains would get into the JSON.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        train_run(run_config, output, scratch=scratch, resume=resume, stage=stage)
    show_outcome(output, as_json=as_json)
