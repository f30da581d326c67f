"""`slop compare`: the command and its dry run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import slop_hf

from ..errors import RunError
from ..io.files import check_output
from ..io.serialization import Json
from ..io.units import NOTHING
from .job_progress import show_job_progress
from .options import AsJson, Devices, Workers, read_changes, read_seeds, split_list
from .shared import print_json, print_table

if TYPE_CHECKING:
    from ..experiments.config import Experiment
    from ..experiments.jobs import Job


def compare_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the experiment: arms and scales.")],
    scale: Annotated[str | None, typer.Option(help="Scale to run, such as `nano`.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the comparison. Default: runs/NAME-SCALE.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Run only this arm; repeat it for more.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds that replace the scale's, such as 0,1,2.")] = None,
    workers: Workers = 1,
    devices: Devices = "",
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of the config: scales.nano.flops=1e12")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write the measurements to this JSON file, too.")] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; report finished runs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs and their FLOPs; train nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the arms of an experiment at equal budgets, and compare them.

    Each arm is trained once per seed. Stages that several runs share are trained once. The result is a table, figures
    of loss against FLOPs and seconds, and `comparison.json` with all measurements and the compute that they took.

    After an interruption, the same command continues; finished runs are not repeated. The config of each run is next
    to its directory, so that you can launch it yourself:
    `accelerate launch recipes/grow_1b.py --config runs/…/seed-0.run.yaml --output-dir runs/…/seed-0`.

    Example: `slop compare recipes/experiments/table2.yaml --scale nano --workers 2`
    """
    from ..experiments.jobs import (  # with torch, which `slop --help` does without
        add_shared_prefixes,
        build_jobs,
        count_own_flops,
    )
    from ..experiments.running import check_jobs, check_workers, find_ended
    from ..experiments.summary_text import summarise_comparison
    from ..experiments.tables import build_arms_table, build_terminal_table, tabulate_ledger

    experiment = _select_arms(slop_hf.Experiment.from_yaml(config, scale, read_changes(change)), arm or [], seeds)
    root = output or Path("runs", f"{experiment.name}-{experiment.scale}")
    check_output(root, "--output", RunError, is_directory=True)
    check_output(record, "--record", RunError)
    check_workers(split_list(devices), workers)
    jobs = add_shared_prefixes(build_jobs(experiment))
    if not report_only:
        check_jobs(jobs, root)
    if dry_run:
        _show_runs(experiment, jobs, as_json=as_json)
        return
    flops, ended = count_own_flops(jobs), find_ended(jobs, root)
    if report_only and not any(job.arm and job.directory in ended for job in jobs):
        raise RunError(f"{root} has no finished run of this experiment; leave out --report-only to train them")
    with show_job_progress(experiment.name, () if report_only else jobs, root, flops, ended) as on_end:
        comparison = slop_hf.compare_arms(
            experiment, root, devices=split_list(devices), workers=workers, on_job_end=on_end, train=not report_only
        )
    if record is not None:
        comparison.save(record)
    if as_json:
        print_json(comparison)
        return
    console = Console()
    console.print(build_arms_table(comparison))
    console.print(build_terminal_table(tabulate_ledger(comparison), "What it cost"))
    for sentence in summarise_comparison(comparison):
        console.print(sentence)
    print(f"written: {root / 'comparison.md'}, with figures and comparison.json next to it")
    if record is not None:
        print(f"measurements written to {record}")


def _select_arms(experiment: Experiment, names: list[str], seeds: str | None) -> Experiment:
    """Return the experiment with the named arms only (with all if no name is given), and with other seeds."""
    for name in names:
        if name not in experiment.arms:
            raise RunError(f"--arm {name}: the arms at this scale are {', '.join(experiment.arms)}")
    arms = {name: arm for name, arm in experiment.arms.items() if not names or name in names}
    sizes = experiment.sizes
    if seeds is not None:
        sizes = dataclasses.replace(sizes, seeds=read_seeds(seeds))
        arms = {name: dataclasses.replace(arm, seeds=None) for name, arm in arms.items()}
    reference = experiment.reference if experiment.reference in arms else None
    return dataclasses.replace(experiment, arms=arms, sizes=sizes, reference=reference)


def _show_runs(experiment: Experiment, jobs: list[Job], *, as_json: bool) -> None:
    """Print what would be trained, one row per run; shared stages appear in each run that begins with them."""
    from ..experiments.jobs import count_own_flops

    flops, own = {job.directory: job.flops for job in jobs}, count_own_flops(jobs)
    rows: list[dict[str, Json]] = [
        {
            "run": job.name,
            "sequence": job.schedule.sequence,
            "structures": [str(dims) for dims in job.schedule.structures],
            "tokens": list(job.schedule.tokens),
            "flops": flops[job.directory],
            "own_flops": own[job.directory],
            "begins_with": None if job.parent is None else str(job.parent),
            "place": str(job.directory),
        }
        for job in jobs
    ]
    if as_json:
        print_json(rows)
        return
    print_table(
        f"{experiment.title} · {experiment.scale}",
        ("run", "grows", "structures", "tokens", ">FLOPs"),
        [
            (
                row["run"],
                row["sequence"] or NOTHING,
                " → ".join(row["structures"]),
                " + ".join(f"{count:,}" for count in row["tokens"]),
                f"{row['flops']:.3g}",
            )
            for row in rows
        ],
        wraps=("run", "grows", "structures", "tokens"),
    )
    costs = {arm: [own[job.directory] for job in jobs if job.arm == arm] for arm in experiment.arms}
    if shared := [own[job.directory] for job in jobs if not job.arm]:
        costs["what runs share"] = shared
    speed, total = experiment.sizes.flops_per_second, sum(own.values())
    print_table(
        "What it would cost, everything counted once",
        ("arm", ">runs", ">FLOPs", ">core-hours"),
        [
            (name, str(len(flops)), f"{sum(flops):.3g}", _format_hours(sum(flops), speed))
            for name, flops in costs.items()
        ],
        total=("sum", str(len(jobs)), f"{total:.3g}", _format_hours(total, speed)),
    )
    print(f"{len(jobs)} runs, {total:.3g} FLOPs in total; stages that runs share are counted once")


def _format_hours(flops: float, flops_per_second: float | None) -> str:
    return NOTHING if flops_per_second is None else f"{flops / flops_per_second / 3600:.2f}"
