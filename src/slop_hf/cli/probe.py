"""`slop probe`: the command and its dry run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import slop_hf

from ..errors import RunError
from ..io.files import check_output
from ..io.numbers import is_finite_number
from ..planning.objectives import OBJECTIVES
from ..schedule import GrowthSchedule
from .job_progress import show_job_progress
from .mixing import probe_mixing
from .options import AsJson, Changes, Devices, Workers, make_option, read_changes, read_seeds, split_list
from .shared import print_json, print_table

if TYPE_CHECKING:
    from ..probing.candidates import Candidate, Start
    from ..probing.probe import PlannedTrial
    from ..training.config import RunConfig

_WHAT, _TRIAL, _MIXING, _OUTPUT = "What to try", "Trials", "Mixing", "Output"
_OBJECTIVE = "delta_params"


def probe_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, as for `slop train`.")],
    output: Annotated[Path, make_option(_OUTPUT, "--output", "-o", help="Directory for the trials and probe.json.")],
    schedule: Annotated[
        Path | None, make_option(_WHAT, "--schedule", "-s", help="Schedule that replaces the config's, or --from's.")
    ] = None,
    source: Annotated[
        str | None,
        make_option(_WHAT, "--from", help="Finished stage to start from, RUN[@STAGE]. Default: a new initial model."),
    ] = None,
    top_k: Annotated[
        int | None, make_option(_WHAT, "--top-k", "-k", help="Try the planner's best K schedules. Default: 5.")
    ] = None,
    objective: Annotated[
        str, make_option(_WHAT, help=f"Objective that the planner ranks those by: {', '.join(OBJECTIVES)}.")
    ] = _OBJECTIVE,
    inits: Annotated[
        str | None, make_option(_WHAT, help="Or: try inits of the next stage, such as random,preserving,copy.")
    ] = None,
    next_stages: Annotated[
        str | None, make_option(_WHAT, "--next", help="Or: try dimensions to grow next, such as layer,ffn,hidden.")
    ] = None,
    lag: Annotated[float | None, make_option(_TRIAL, help="Try only the next stage, for N tokens.")] = None,
    share: Annotated[
        float | None, make_option(_TRIAL, help="Try every stage, for this fraction of its tokens. Default: 0.1.")
    ] = None,
    initial_tokens: Annotated[
        float | None, make_option(_TRIAL, help="Tokens of the initial model. Default: follows from --share or --lag.")
    ] = None,
    by: Annotated[
        str, make_option(_TRIAL, help="Rank by utility (loss per FLOP), utility_per_hour (Eq. 2), or loss.")
    ] = "utility",
    seeds: Annotated[str, make_option(_TRIAL, help="Try each candidate once per seed, such as 0,1,2.")] = "0",
    mixing: Annotated[
        bool, make_option(_MIXING, "--mixing", help="Measure how much tokens of small models count once grown.")
    ] = False,
    factors: Annotated[
        str | None,
        make_option(
            _MIXING, help="Factors of growth in each dimension of --next, such as 2,4. Default: the schedule's."
        ),
    ] = None,
    at: Annotated[
        str | None, make_option(_MIXING, help="Tokens at which small models grow, such as 1e6,4e6. Default: as --lag.")
    ] = None,
    largest_kappa: Annotated[
        float | None,
        make_option(_MIXING, help="Largest κ to measure: a longer target from scratch. Default: 1.25."),
    ] = None,
    tolerance: Annotated[
        float | None,
        make_option(_MIXING, help="Distance from the settled value that counts as settled. Default: 0.1."),
    ] = None,
    change: Changes = None,
    workers: Workers = 1,
    devices: Devices = "",
    write_schedule: Annotated[
        Path | None, make_option(_OUTPUT, help="Write the best candidate's schedule to this file, for `slop train`.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print trials and their FLOPs; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train each candidate briefly, and rank the candidates by what was measured.

    Candidates are the planner's best schedules between the structures at the start and the end of your schedule, or
    inits of its next stage, or dimensions that could grow next. All begin with the same weights: those of `--from`, or
    of an initial model trained once. Held-out loss is measured right after growth and after the trial. Stages
    that several trials share are trained once.

    With `--mixing`, small models train at a constant rate, grow to the end of your schedule in one dimension of
    `--next` each, and are compared with the target from scratch: how many of its tokens a small token is worth (κ),
    and how many tokens a grown model takes to catch up (mixing time). `--lag` is then the length of the grown models,
    `--share` the length of the target from scratch, as a fraction of the schedule's tokens. `--inits` tries
    several.

    After an interruption, the same command continues.

    Example: `slop probe recipes/grow_tiny.yaml -o runs/probe --share 0.1 --write-schedule best.yaml`
    """
    check_output(output, "--output", RunError, is_directory=True)
    check_output(write_schedule, "--write-schedule", RunError)
    lag_tokens, first_tokens = _read_tokens(lag, "--lag"), _read_tokens(initial_tokens, "--initial-tokens")
    ranking = {
        "--from": source,
        "--top-k": top_k,
        "--initial-tokens": initial_tokens,
        "--write-schedule": write_schedule,
    }
    ranking |= {"--by": by if by != "utility" else None, "--objective": objective if objective != _OBJECTIVE else None}
    measuring = {"--factors": factors, "--at": at, "--largest-kappa": largest_kappa, "--tolerance": tolerance}
    _refuse_options(mixing, ranking, measuring)
    if mixing:
        run = slop_hf.RunConfig.from_yaml(config, overrides=read_changes(change))
        probe_mixing(
            run,
            output,
            lambda trials, title: _show_trials(trials, title, as_json=as_json),
            schedule=_read_schedule(run, schedule, None),
            dimensions=next_stages,
            factors=factors,
            inits=inits,
            at=_read_moments(at),
            lag=lag_tokens,
            share=share,
            largest_kappa=largest_kappa,
            tolerance=tolerance,
            seeds=read_seeds(seeds),
            devices=split_list(devices),
            workers=workers,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    from ..experiments.running import find_ended
    from ..probing.candidates import Start  # with torch, which `slop --help` does without
    from ..probing.report import build_probe_table, describe_probe

    start = None if source is None else Start.parse(source)
    run = slop_hf.RunConfig.from_yaml(config, overrides=read_changes(change))
    candidates = _choose_candidates(
        run, _read_schedule(run, schedule, start), start, top_k, objective, inits, next_stages
    )
    trial = slop_hf.Probe(
        run,
        output,
        lag=lag_tokens,
        share=share,
        start=start,
        initial_tokens=first_tokens,
        by=by,  # type: ignore[arg-type]
        seeds=read_seeds(seeds),
        devices=split_list(devices),
        workers=workers,
    )
    trials = trial.preview(candidates)  # refuses what cannot be tried before the bar appears
    if dry_run:
        _show_trials(trials, f"Trials of {len(candidates)} candidates", as_json=as_json)
        return
    jobs = trial.build_jobs(candidates)
    flops = {job.directory: planned.flops for job, planned in zip(jobs, trials, strict=True)}
    with show_job_progress(output.name, jobs, output, flops, find_ended(jobs, output)) as on_end:
        report = dataclasses.replace(trial, on_job_end=on_end).run(candidates)
    if write_schedule is not None:
        report.best.schedule.to_yaml(write_schedule)
    if as_json:
        print_json(report)
        return
    console = Console()
    console.print(build_probe_table(report))
    for sentence in describe_probe(report):
        console.print(sentence)
    state = run.training.get("optimizer_state_at_growth", "new")
    carries = run.training.get("carry_optimizer_state") or state not in (None, "new")
    if start is not None and carries and not start.has_optimizer_state:
        console.print("The start has no AdamW state any more: every trial began with a new one.")
    print(f"measurements written to {output / 'probe.json'}")
    if write_schedule is not None:
        print(f"schedule of {report.best.name} written to {write_schedule}")


def _read_schedule(run: RunConfig, path: Path | None, start: Start | None) -> GrowthSchedule:
    """Return the schedule whose last structure the candidates lead to."""
    if path is not None:
        return GrowthSchedule.from_yaml(path)
    return run.read_schedule() if start is None or run.schedule is not None else start.run.schedule


def _choose_candidates(
    run: RunConfig,
    schedule: GrowthSchedule,
    start: Start | None,
    top_k: int | None,
    objective: str,
    inits: str | None,
    next_stages: str | None,
) -> list[Candidate]:
    from ..probing.candidates import build_init_candidates, build_next_candidates, plan_candidates

    if sum(option is not None for option in (top_k, inits, next_stages)) > 1:
        raise RunError("give only one of --top-k, --inits and --next: a probe compares candidates of one kind")
    if inits is not None:
        return build_init_candidates(schedule, split_list(inits), start)
    if next_stages is not None:
        return build_next_candidates(schedule, split_list(next_stages), start)
    return plan_candidates(run, schedule, 5 if top_k is None else top_k, start, objective=objective)


def _read_tokens(value: float | None, option: str) -> int | None:
    """Return a number of tokens, which may be written as 2e6, as an int."""
    if value is None:
        return None
    if not is_finite_number(value, least=1) or value != int(value):
        raise RunError(f"{option} must be a whole number of tokens, 1 or more, got {value:g}")
    return int(value)


def _read_moments(text: str | None) -> tuple[int, ...]:
    """Return the numbers of tokens in the value of `--at`."""
    try:
        return tuple(_read_tokens(float(part), "--at") or 0 for part in split_list(text or ""))
    except ValueError:  # of float, or a SlopError
        raise RunError(f"--at must be whole numbers of tokens, such as 1e6,4e6, got {text!r}") from None


def _refuse_options(mixing: bool, ranking: Mapping[str, object], measuring: Mapping[str, object]) -> None:
    """Refuse options of the other kind of probe."""
    present = [name for name, value in (ranking if mixing else measuring).items() if value is not None]
    if present and mixing:
        raise RunError(f"--mixing measures growths and ranks no candidates; leave {', '.join(present)} out")
    if present:
        raise RunError(f"{', '.join(present)}: give --mixing too, or leave this out")


def _show_trials(trials: Sequence[PlannedTrial], title: str, *, as_json: bool) -> None:
    """Print what would be trained, one row per trial."""
    if as_json:
        print_json(trials)
        return
    tokens, flops = sum(trial.tokens for trial in trials), sum(trial.flops for trial in trials)
    print_table(
        title,
        ("trial", "stages", ">tokens", ">FLOPs"),
        [(trial.name, ", ".join(trial.stages), f"{trial.tokens:,}", f"{trial.flops:.3g}") for trial in trials],
        total=("sum", "", f"{tokens:,}", f"{flops:.3g}"),
        wraps=("stages",),
    )
