"""`slop probe`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import slop_hf

from ..errors import RunError
from ..io.serialization import to_plain
from ..planning.objectives import OBJECTIVES
from ..schedule import GrowthSchedule
from .shared import make_progress_bar, read_changes, read_seeds, split_list

if TYPE_CHECKING:
    from ..experiments.jobs import Job
    from ..probing.candidates import Candidate, Start
    from ..probing.probe import PlannedTrial
    from ..training import RunConfig

_WHAT, _TRIAL, _HARDWARE, _OUTPUT = "What to try", "Trials", "Hardware", "Output"


def _option(panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


def probe(
    config: Annotated[Path, typer.Argument(help="The run as YAML, as for `slop train`.")],
    output: Annotated[Path, _option(_OUTPUT, "--output", "-o", help="Directory of the trials and of probe.json.")],
    schedule: Annotated[
        Path | None, _option(_WHAT, "--schedule", "-s", help="A schedule in place of the config's, or of --from's.")
    ] = None,
    source: Annotated[
        str | None,
        _option(_WHAT, "--from", help="Go on from a finished stage, RUN[@STAGE]; default, a new initial model."),
    ] = None,
    top_k: Annotated[
        int | None, _option(_WHAT, "--top-k", "-k", help="Try the planner's best so many schedules. Default: 5.")
    ] = None,
    objective: Annotated[
        str, _option(_WHAT, help=f"What the planner ranks those by: {', '.join(OBJECTIVES)}.")
    ] = "delta_params",
    inits: Annotated[
        str | None, _option(_WHAT, help="Or inits of the next stage, such as random,preserving,copy.")
    ] = None,
    next_stages: Annotated[
        str | None, _option(_WHAT, "--next", help="Or stages that could come next, such as layer,ffn,hidden.")
    ] = None,
    lag: Annotated[float | None, _option(_TRIAL, help="Try the next stage alone, for so many tokens.")] = None,
    share: Annotated[
        float | None, _option(_TRIAL, help="Try every stage, for this share of its tokens. Default: 0.1.")
    ] = None,
    initial_tokens: Annotated[
        float | None, _option(_TRIAL, help="Tokens of the initial model first. Default: as --share or --lag say.")
    ] = None,
    by: Annotated[
        str, _option(_TRIAL, help="What decides: utility (loss a FLOP), utility_per_hour (Eq. 2) or loss.")
    ] = "utility",
    seeds: Annotated[str, _option(_TRIAL, help="Try each candidate once with each.")] = "0",
    change: Annotated[
        list[str] | None, _option(_TRIAL, "--set", help="Change a value: --set training.learning_rate=1e-3")
    ] = None,
    workers: Annotated[int, _option(_HARDWARE, help="Trials at a time on CPUs, each with its share of cores.")] = 1,
    devices: Annotated[str, _option(_HARDWARE, help="CUDA devices to spread trials over, such as 0,1,2,3.")] = "",
    write_schedule: Annotated[
        Path | None, _option(_OUTPUT, help="Write the schedule of the best candidate here, for `slop train`.")
    ] = None,
    dry_run: Annotated[
        bool, _option(_OUTPUT, "--dry-run", help="Print candidates, tokens and FLOPs, and train nothing.")
    ] = False,
    as_json: Annotated[bool, _option(_OUTPUT, "--json", help="Print the report (or the trials) as JSON.")] = False,
) -> None:
    """Train candidates for a little, and rank them by what was measured.

    Candidates are the planner's best ways from the schedule's beginning to its end, or inits of its next stage, or
    dimensions that could grow next. All begin with the same weights, from --from or from an initial model that is
    trained once; held-out loss is measured right after growth and after the trial. What trials have in common is
    trained once. Killed and run again it goes on.

    Example: `slop probe recipes/grow_tiny.yaml -o runs/probe --share 0.1 --write-schedule best.yaml`
    """
    from ..probing.candidates import Start  # with torch, which `slop --help` does without
    from ..probing.report import probe_sentences, probe_table

    start = None if source is None else Start.of(source)
    run = slop_hf.RunConfig.from_yaml(config, overrides=read_changes(change))
    candidates = _candidates(run, _schedule(run, schedule, start), start, top_k, objective, inits, next_stages)
    trial = slop_hf.Probe(
        run,
        output,
        lag=_whole(lag, "--lag"),
        share=share,
        start=start,
        initial_tokens=_whole(initial_tokens, "--initial-tokens"),
        by=by,  # type: ignore[arg-type]
        seeds=read_seeds(seeds),
        devices=split_list(devices),
        workers=workers,
    )
    trials = trial.preview(candidates)  # refuses what cannot be tried, before a bar is there
    if dry_run:
        _show_trials(trials, len(candidates), as_json=as_json)
        return
    with make_progress_bar(quiet=as_json) as progress:
        task = progress.add_task(output.name, total=len(trials))

        def told(job: Job, done: int, count: int) -> None:
            progress.update(task, completed=done, description=f"{job.name} has ended")

        report = dataclasses.replace(trial, told=told).run(candidates)
    if write_schedule is not None:
        report.best.schedule.to_yaml(write_schedule)
    if as_json:
        print(json.dumps(to_plain(report), indent=2))
        return
    console = Console()
    console.print(probe_table(report))
    for sentence in probe_sentences(report):
        console.print(sentence)
    if start is not None and run.training.get("carry_optimizer_state") and not start.keeps_optimizer:
        console.print("AdamW's state at the start is gone: every trial began a new one.")
    written = "" if write_schedule is None else f"; {write_schedule}, the schedule of {report.best.name}"
    print(f"{output / 'probe.json'}, all that was measured{written}")


def _schedule(run: RunConfig, path: Path | None, start: Start | None) -> GrowthSchedule:
    """The schedule that candidates are to lead to the end of."""
    if path is not None:
        return GrowthSchedule.from_yaml(path)
    return run.read_schedule() if start is None or run.schedule is not None else start.run.schedule


def _candidates(
    run: RunConfig,
    schedule: GrowthSchedule,
    start: Start | None,
    top_k: int | None,
    objective: str,
    inits: str | None,
    next_stages: str | None,
) -> list[Candidate]:
    from ..probing.candidates import init_candidates, next_candidates, planned

    if sum(given is not None for given in (top_k, inits, next_stages)) > 1:
        raise RunError("give one of --top-k, --inits and --next: a probe compares candidates of one kind")
    if inits is not None:
        return init_candidates(schedule, split_list(inits), start)
    if next_stages is not None:
        return next_candidates(schedule, split_list(next_stages), start)
    return planned(run, schedule, 5 if top_k is None else top_k, start, objective=objective)


def _whole(value: float | None, option: str) -> int | None:
    """A number of tokens, which may be written as 2e6."""
    if value is not None and value != int(value):
        raise RunError(f"{option} must be a whole number of tokens, got {value:g}")
    return None if value is None else int(value)


def _show_trials(trials: Sequence[PlannedTrial], candidates: int, *, as_json: bool) -> None:
    """What would be trained, a row a run."""
    if as_json:
        print(json.dumps(to_plain(trials), indent=2))
        return
    table = Table(box=SIMPLE, title=f"Trials of {candidates} candidates", pad_edge=False, collapse_padding=True)
    table.add_column("of", no_wrap=True)
    table.add_column("trains")
    for heading in ("tokens", "FLOPs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in trials:
        table.add_row(trial.name, ", ".join(trial.stages), f"{trial.tokens:,}", f"{trial.flops:.3g}")
    table.add_section()
    tokens, flops = sum(trial.tokens for trial in trials), sum(trial.flops for trial in trials)
    table.add_row("sum", "", f"{tokens:,}", f"{flops:.3g}")
    Console().print(table)
