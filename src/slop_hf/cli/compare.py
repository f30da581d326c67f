"""`slop compare`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import slop_hf

from ..errors import RunError
from ..io.serialization import to_plain
from .shared import make_progress_bar, read_changes, read_seeds, split_list

if TYPE_CHECKING:
    from ..experiments.config import Experiment
    from ..experiments.jobs import Job


def compare(
    config: Annotated[Path, typer.Argument(help="The experiment as YAML: arms, scales.")],
    scale: Annotated[str | None, typer.Option(help="Which of its scales, such as `nano`.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the comparison; default, runs/NAME-SCALE.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option(help="Run this arm only; give it again for more.")] = None,
    seeds: Annotated[str | None, typer.Option(help="In place of the scale's, such as 0,1,2.")] = None,
    workers: Annotated[int, typer.Option(help="Runs at a time on CPUs, each with its share of the cores.")] = 1,
    devices: Annotated[str, typer.Option(help="CUDA devices to spread the runs over, such as 0,1,2,3.")] = "",
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value: --set scales.nano.flops=1e12")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write what was measured here too, as JSON.")] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing; table and figures of what has finished.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs, their stages and FLOPs, and train nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record (or the runs) as JSON.")] = False,
) -> None:
    """Run the arms of an experiment at equal budgets, and compare them.

    Every arm is run once with each seed, beginnings that runs share only once. Leaves a table, figures of loss against
    FLOPs and seconds, and `comparison.json` with all that was measured and what it cost. Killed and run again it goes
    on; runs that have finished are not trained again. The config of each run lies beside it, for a launch of its own:
    `accelerate launch recipes/grow_1b.py --config runs/…/seed-0.run.yaml --output-dir runs/…/seed-0`.

    Example: `slop compare recipes/experiments/table2.yaml --scale nano --workers 2`
    """
    from ..experiments.arms import arm_runs  # with torch, which `slop --help` does without
    from ..experiments.jobs import add_shared_prefixes
    from ..experiments.running import ended_places
    from ..experiments.summary_text import sentences
    from ..experiments.tables import arms_table, ledger_table

    experiment = _chosen(slop_hf.Experiment.from_yaml(config, scale, read_changes(change)), arm or [], seeds)
    root = output or Path("runs", f"{experiment.name}-{experiment.scale}")
    jobs = add_shared_prefixes(arm_runs(experiment))
    if dry_run:
        _show_runs(experiment, jobs, as_json=as_json)
        return
    with make_progress_bar(quiet=as_json or report_only) as progress:
        task = progress.add_task(experiment.name, total=len(jobs), completed=len(ended_places(jobs, root)))

        def told(job: Job, done: int, count: int) -> None:
            progress.update(task, completed=done, description=f"{job.name} has ended")

        comparison = slop_hf.compare_arms(
            experiment, root, devices=split_list(devices), workers=workers, told=told, train=not report_only
        )
    if record is not None:
        comparison.save(record)
    if as_json:
        print(json.dumps(to_plain(comparison), indent=2))
        return
    console = Console()
    console.print(arms_table(comparison))
    console.print(ledger_table(comparison))
    for sentence in sentences(comparison):
        console.print(sentence)
    print(f"{root / 'comparison.md'}, beside it figures and comparison.json" + (f"; {record}" if record else ""))


def _chosen(experiment: Experiment, arms: list[str], seeds: str | None) -> Experiment:
    """The experiment with some of its arms, and other seeds."""
    for name in arms:
        if name not in experiment.arms:
            raise RunError(f"--arm {name}: the arms at this scale are {', '.join(experiment.arms)}")
    kept = {name: arm for name, arm in experiment.arms.items() if not arms or name in arms}
    sizes = experiment.sizes
    if seeds is not None:
        sizes = dataclasses.replace(sizes, seeds=read_seeds(seeds))
        kept = {name: dataclasses.replace(one, seeds=None) for name, one in kept.items()}
    reference = experiment.reference if experiment.reference in kept else None
    return dataclasses.replace(experiment, arms=kept, sizes=sizes, reference=reference)


def _show_runs(experiment: Experiment, jobs: list[Job], *, as_json: bool) -> None:
    """What would be run, a row a run; a trunk's stages are told with the runs that begin with it, too."""
    from ..experiments.arms import count_job_flops

    rows = [
        {
            "run": job.name,
            "sequence": job.schedule.sequence,
            "structures": [str(dims) for dims in job.schedule.structures],
            "tokens": list(job.schedule.tokens),
            "flops": count_job_flops(experiment, job),
            "begins_with": None if job.parent is None else str(job.parent),
            "place": str(job.place),
        }
        for job in jobs
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=SIMPLE, title=f"{experiment.title} · {experiment.scale}", pad_edge=False, collapse_padding=True)
    for heading in ("run", "grows", "structures", "tokens", "FLOPs"):
        table.add_column(heading, justify="right" if heading == "FLOPs" else "left")
    for job, row in zip(jobs, rows, strict=True):
        tokens = " + ".join(f"{count:,}" for count in job.schedule.tokens)
        structures = " → ".join(str(dims) for dims in job.schedule.structures)
        table.add_row(job.name, job.schedule.sequence or "–", structures, tokens, f"{row['flops']:.3g}")
    Console().print(table)
    paid = sum(_own_flops(experiment, job, jobs) for job in jobs)
    print(f"{len(jobs)} runs, {paid:.3g} FLOPs in all; beginnings that runs share are counted once")


def _own_flops(experiment: Experiment, job: Job, jobs: list[Job]) -> float:
    from ..experiments.arms import count_job_flops

    inherited = next((other for other in jobs if other.place == job.parent), None)
    return count_job_flops(experiment, job) - (count_job_flops(experiment, inherited) if inherited else 0.0)
