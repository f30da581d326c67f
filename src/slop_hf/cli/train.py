"""`slop train`."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import slop_hf

from ..cost import TRAINING_BYTES_PER_PARAMETER
from ..errors import RunError
from ..records import RunDirectory
from ..schedule import GrowthSchedule
from ..serialization import read_yaml_text

if TYPE_CHECKING:
    from ..training import StageSpan


def train(
    config: Annotated[Path, typer.Argument(help="The run as YAML: schedule, model, data, training.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the run.")],
    schedule: Annotated[
        Path | None, typer.Option("--schedule", "-s", help="A schedule made by `slop plan`, in place of the config's.")
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the target from random weights with the same FLOPs instead.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output directory, or begin if there is none.")
    ] = False,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: --set training.learning_rate=1e-3")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print stages, parameters, tokens, FLOPs and steps, and train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the stages' records (or the plan) as JSON.")] = False,
) -> None:
    """Train a model through a growth schedule.

    Each stage ends as a stock transformers checkpoint, `RUN/stage-1-layer` and so on. A run that was killed goes on
    with `--resume`, and ends with the weights of a run that was not.

    Example: `slop train recipes/grow_tiny.yaml -o runs/tiny`
    """
    run_config = slop_hf.RunConfig.from_yaml(config, overrides=_overrides(change or []))
    run_config = run_config.with_schedule(None if schedule is None else GrowthSchedule.from_yaml(schedule))
    if dry_run:
        spans = slop_hf.preview_run(run_config, output, scratch=scratch)
        if as_json:
            print(json.dumps([_row(span) for span in spans], indent=2))
        else:
            Console().print(_table(spans, str(output)))
        return
    # What transformers prints while it trains would get into the JSON.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        trainer = slop_hf.build_trainer(run_config, output, scratch=scratch)
        trainer.train(resume_from_checkpoint=resume and RunDirectory(output).exists)
    records = RunDirectory(output).records()
    if as_json:
        print("[" + ",\n".join(record.to_json().rstrip() for record in records) + "]")
    else:
        last = records[-1]
        quality = f", perplexity {last.perplexity:.2f}" if last.perplexity else ""
        print(f"{output}: {len(records)} stages, {last.total_tokens:,} tokens, {last.total_flops:.3g} FLOPs{quality}")


def _overrides(changes: list[str]) -> dict[str, Any]:
    pairs = [change.partition("=") for change in changes]
    for key, equals, _ in pairs:
        if not equals:
            raise RunError(f"--set {key}: expected key=value, such as training.learning_rate=1e-3")
    return {key: read_yaml_text(value) for key, _, value in pairs}


def _row(span: StageSpan) -> dict[str, Any]:
    return {
        "stage": span.name,
        "structure": str(span.dims),
        "parameters": span.parameters,
        "tokens": span.tokens,
        "steps": span.steps,
        "flops": span.flops,
        "training_state_bytes": span.parameters * TRAINING_BYTES_PER_PARAMETER,
    }


def _table(spans: tuple[StageSpan, ...], name: str) -> Table:
    """What the run would do, a row a stage."""
    state = max(span.parameters for span in spans) * TRAINING_BYTES_PER_PARAMETER / 2**20
    caption = (
        f"largest training state (float32 weights, gradients, two moments): {state:,.0f} MiB, without activations"
    )
    table = Table(box=SIMPLE, title=f"{name} would train", caption=caption)
    table.add_column("stage", no_wrap=True)
    table.add_column("structure")
    for column in ("parameters", "tokens", "steps", "FLOPs"):
        table.add_column(column, justify="right")
    for span in spans:
        sizes = f"{span.parameters:,}", f"{span.tokens:,}", f"{span.steps:,}", f"{span.flops:.3g}"
        table.add_row(span.name, str(span.dims), *sizes)
    table.add_section()
    tokens, flops = sum(span.tokens for span in spans), sum(span.flops for span in spans)
    table.add_row("sum", "", "", f"{tokens:,}", f"{spans[-1].end_step:,}", f"{flops:.3g}")
    return table
