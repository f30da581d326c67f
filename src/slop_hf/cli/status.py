"""`slop status`: the state of a run."""

from __future__ import annotations

import shlex
import sys
import time
from datetime import timedelta
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from ..io.units import format_count
from ..runs.directory import RunDirectory
from ..runs.records import compute_perplexity
from ..runs.status import RunStatus, read_status
from .options import AsJson, Run
from .shared import print_json


def show_status(
    run: Run,
    watch: Annotated[bool, typer.Option("--watch", help="Repeat it until the run is no longer training.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two looks.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show the state of a run: its stage, share done, speed, time left, losses, and which process trains it.

    It reads the run's files, so it also works on another machine with the same disk. Ctrl-C ends `--watch`, not the
    run.

    Example: `slop status runs/first --watch`
    """
    directory = RunDirectory(run)
    status = read_status(directory)
    if not watch or status.state != "running":
        _print(status, as_json)
        return
    if as_json or not sys.stdout.isatty():
        while status.state == "running":
            _print(status, as_json)
            time.sleep(interval)
            status = read_status(directory)
        _print(status, as_json)
        return
    with Live(Text(_build_page(status)), auto_refresh=False) as live:
        while status.state == "running":
            time.sleep(interval)
            status = read_status(directory)
            live.update(Text(_build_page(status)), refresh=True)


def _print(status: RunStatus, as_json: bool) -> None:
    if as_json:
        print_json({**vars(status), "share": round(status.share, 4)})
    else:
        print(_build_page(status))
    sys.stdout.flush()


def _build_page(status: RunStatus) -> str:
    """Return a status as lines; what is unknown is left out."""
    rows = {
        "run": str(status.run),
        "state": status.state,
        "stage": f"{status.stage + 1} of {status.stages} ({status.stage_name})",
        "done": _describe_share(status),
        "speed": status.tokens_per_second and f"{status.tokens_per_second:,.0f} tokens per second",
        "time left": status.seconds_left is not None and str(timedelta(seconds=round(status.seconds_left))),
        "training loss": status.loss and f"{status.loss:.4g}",
        "held-out loss": status.eval_loss
        and f"{status.eval_loss:.4g} (perplexity {compute_perplexity(status.eval_loss):.4g})",
        "process": status.writers is not None and str(status.writers),
        "next": _describe_next(status),
    }
    return "\n".join(f"{name:<15}{text}" for name, text in rows.items() if text)


def _describe_share(status: RunStatus) -> str:
    steps = "" if status.steps is None else f" of {status.steps:,}"
    step = "" if status.step is None else f", step {status.step:,}{steps}"
    counts = f"{format_count(status.tokens)} of {format_count(status.total_tokens)} tokens"
    return f"{status.share:.0%} ({counts}{step})"


def _describe_next(status: RunStatus) -> str:
    run = shlex.quote(status.run)
    if status.state == "finished":
        return f"slop sample {run} PROMPT; slop report {run}"
    return f"slop train CONFIG -o {run} --resume" if status.state == "stopped" else ""
