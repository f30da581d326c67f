"""Collecting the records of finished runs into a `Comparison`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import RunError
from ..io.serialization import list_versions, parse, read_json, to_plain
from ..runs.directory import RunDirectory
from ..runs.records import StageRecord
from .config import Experiment
from .jobs import Job
from .comparison import _DIGITS, EVAL_LOSS, PROBE_FILE, PROBES, Comparison, Cost, Curve, RunResult, StageResult


def collect_comparison(experiment: Experiment, jobs: Sequence[Job], root: Path, device: str = "") -> Comparison:
    """Read what the finished runs of an experiment came to.

    Args:
        experiment: that was run.
        jobs: its runs with their trunks, as `with_trunks` gives them.
        root: the comparison's directory; probes in `probes/` there are in the ledger.
        device: what it ran on.

    Raises:
        RunError: where a run has no held-out losses.
    """
    from .jobs import find_diverged

    begun = [job for job in jobs if RunDirectory(root / job.place).exists]
    done = {job.place for job in begun if RunDirectory(root / job.place).is_finished}
    lost = find_diverged(jobs, root)
    ended = [job for job in begun if job.place in done | lost]
    runs, trunks = [job for job in ended if job.arm], [job for job in ended if not job.arm]
    ledger = sum_cost("runs", runs, root), sum_cost("trunks", trunks, root), _probed(root)
    left = [job for job in jobs if job.arm and job.place not in done]
    return Comparison(
        name=experiment.name,
        scale=experiment.scale,
        title=experiment.title,
        about=experiment.about,
        equal=experiment.sizes.equal,
        budget=experiment.sizes.budget,
        arms={name: arm.about for name, arm in experiment.arms.items()},
        runs=tuple(read_run_result(job, root) for job in runs if job.place in done),
        ledger=tuple(cost for cost in ledger if cost.count),
        reference=experiment.reference,
        missing=tuple(job.name for job in left if job.place not in lost),
        diverged=tuple(job.name for job in left if job.place in lost),
        printed=experiment.printed,
        settings={
            "run": to_plain(experiment.run),
            "arms": {name: arm.training for name, arm in experiment.arms.items() if arm.training},
        },
        versions=list_versions(),
        device=device,
    )


def sum_cost(what: str, jobs: Sequence[Job], root: Path) -> Cost:
    """What the finished stages of some runs have cost, those that they took over from a trunk left out.

    Args:
        what: to call them.
        jobs: the runs.
        root: the directory that their places are in.
    """
    paid = [record for job in jobs for record in RunDirectory(root / job.place).records()[_inherited(root, job) :]]
    return Cost(
        what,
        len(jobs),
        sum(record.tokens for record in paid),
        sum(record.flops for record in paid),
        round(sum(record.seconds * record.devices for record in paid), 1),
    )


def _probed(root: Path) -> Cost:
    """What the probes have cost whose directories lie in the comparison's `probes/`.

    Raises:
        RunError: for a report of one that is none.
    """
    costs = []
    for path in sorted((root / PROBES).rglob(PROBE_FILE)):
        report = read_json(path, if_missing="run `slop probe` again", error=RunError)
        if not isinstance(report, dict) or "cost" not in report:
            raise RunError(f"{path} is no report of `slop probe`: it does not say what it cost; move it out of there")
        costs.append(parse(Cost, report["cost"], where=f"{path}: cost", error=RunError))
    return Cost(
        "probes",
        sum(cost.count for cost in costs),
        sum(cost.tokens for cost in costs),
        sum(cost.flops for cost in costs),
        sum(cost.seconds for cost in costs),
    )


def _inherited(root: Path, job: Job) -> int:
    """How many stages the run took over from a trunk when it began, whatever trunks there are now."""
    from .jobs import PREFIX_FILE, beside

    path = beside(root, job, PREFIX_FILE)
    return RunDirectory(root / path.read_text().strip()).finished_stages if path.exists() else 0


def read_run_result(job: Job, root: Path) -> RunResult:
    """What a finished run came to.

    Args:
        job: the run.
        root: the directory that its place is in.

    Raises:
        RunError: where it has no held-out losses.
    """
    run = RunDirectory(root / job.place)
    records = run.records()
    stages = tuple(_stage_result(run, record) for record in records)
    curve = _curve(run, records)
    return RunResult(job.arm, job.budget, job.seed, run.schedule, stages, curve, _inherited(root, job))


def _stage_result(run: RunDirectory, record: StageRecord) -> StageResult:
    if record.eval_loss is None:
        raise RunError(f"{run.path}: {record.name} has no held-out loss; set `held_out` in the scale's data")
    after_growth = record.eval_loss_after_growth
    return StageResult(
        name=record.name,
        dims=record.dims,
        parameters=record.parameters,
        tokens=record.tokens,
        flops=record.flops,
        seconds=round(record.seconds, 2),
        eval_loss=round(record.eval_loss, _DIGITS),
        eval_loss_after_growth=None if after_growth is None else round(after_growth, _DIGITS),
        devices=record.devices,
    )


def _curve(run: RunDirectory, records: Sequence[StageRecord]) -> Curve:
    """The held-out losses of a run's log; within a stage every step takes as long and as many FLOPs as the others."""
    stages, flops, seconds, losses = [], [], [], []
    for entry in run.history():
        if EVAL_LOSS not in entry or not math.isfinite(entry[EVAL_LOSS]):
            continue
        record = records[entry["stage"]]
        before = sum(one.seconds for one in records[: record.stage])
        done = (entry["tokens"] - record.first_token) / max(record.tokens, 1)
        stages.append(record.stage)
        flops.append(float(entry["train_flops"]))
        seconds.append(round(before + done * record.seconds, 2))
        losses.append(round(entry[EVAL_LOSS], _DIGITS))
    return Curve(tuple(stages), tuple(flops), tuple(seconds), tuple(losses))
