"""Collects the records of finished runs into a `Comparison`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ..cost.flops import ADAMW_FLOPS
from ..errors import RunError
from ..io.serialization import list_versions, read_json, to_plain
from ..runs.directory import RunDirectory, RunFacts
from ..runs.records import EVAL_LOSS, StageRecord
from .comparison import Comparison, Cost, Curve, RunResult, StageResult
from .config import Experiment
from .jobs import PREFIX_FILE, Job, find_diverged, find_end_rate, is_trained_with_adamw
from .progress import measure_progress, read_progress_at_branch

#: Folder of a comparison in which the reports of probes are looked for, and the names of such reports.
PROBES, PROBE_FILE, MIXING_FILE = "probes", "probe.json", "mixing.json"
#: Decimal places of measured losses in the record; further ones are noise.
_PLACES = 6


def collect_comparison(experiment: Experiment, jobs: Sequence[Job], root: Path, device: str = "") -> Comparison:
    """Return the results of an experiment's finished runs, with the compute ledger, including probes in `probes/`.

    Args:
        jobs: its jobs and shared prefixes, from `add_shared_prefixes`.
        device: hardware that the runs were trained on.
    """
    begun = [job for job in jobs if RunDirectory(root / job.directory).exists]
    finished = {job.directory for job in begun if job.is_finished(root)}
    diverged = find_diverged(jobs, root)
    ended = [job for job in begun if job.directory in finished | diverged]
    runs, prefixes = [job for job in ended if job.arm], [job for job in ended if not job.arm]
    ledger = sum_cost("runs", runs, root), sum_cost("trunks", prefixes, root), _sum_probes(root)
    unfinished = [job for job in jobs if job.arm and job.directory not in finished]
    return Comparison(
        name=experiment.name,
        scale=experiment.scale,
        title=experiment.title,
        about=experiment.about,
        equal=experiment.sizes.equal,
        budget=experiment.sizes.budget,
        arms={name: arm.about for name, arm in experiment.arms.items()},
        runs=tuple(read_run_result(job, root) for job in runs if job.directory in finished),
        ledger=tuple(cost for cost in ledger if cost.count),
        reference=experiment.reference,
        missing=tuple(job.name for job in unfinished if job.directory not in diverged),
        diverged=tuple(job.name for job in unfinished if job.directory in diverged),
        printed=experiment.printed,
        settings={
            "run": to_plain(experiment.run),
            "arms": {name: arm.training for name, arm in experiment.arms.items() if arm.training},
        },
        versions=list_versions(),
        device=device,
    )


def sum_cost(what: str, jobs: Sequence[Job], root: Path) -> Cost:
    """Return the cost of some runs, without the stages and steps taken over from a shared prefix or trunk."""
    return dataclasses.replace(Cost.sum(what, [_compute_own_cost(what, job, root) for job in jobs]), count=len(jobs))


def _compute_own_cost(what: str, job: Job, root: Path) -> Cost:
    run = RunDirectory(root / job.directory)
    if job.end_step is not None and job.is_finished(root):
        total = measure_progress(job, run, job.end_step)
        cost = Cost(what, 1, total.tokens, total.flops, total.seconds, job.count_optimizer_flops(job.end_step))
    else:
        paid = run.records()[_count_inherited(root, job) :]
        seconds = sum(record.seconds * record.devices for record in paid)
        tokens, flops = sum(record.tokens for record in paid), sum(record.flops for record in paid)
        cost = Cost(what, 1, tokens, flops, round(seconds, 1), _sum_optimizer_flops(job, paid) or 0.0)
    before = read_progress_at_branch(job, root)
    if before is None:
        return cost
    if cost.tokens < before.tokens:  # it diverged before it had finished a stage of its own
        return Cost(what, 1, 0, 0.0, 0.0)
    return Cost(
        what,
        1,
        cost.tokens - before.tokens,
        cost.flops - before.flops,
        round(cost.seconds - before.seconds, 1),
        cost.optimizer_flops - job.count_optimizer_flops(before.step),
    )


def _sum_optimizer_flops(job: Job, records: Sequence[StageRecord]) -> float | None:
    """Return the FLOPs of the optimizer in some stages; None for other optimizers than AdamW."""
    steps = sum(record.steps * record.parameters for record in records)
    return float(ADAMW_FLOPS * steps) if is_trained_with_adamw(job.config) else None


def _sum_probes(root: Path) -> Cost:
    """Return the cost of all probes whose reports lie in the comparison's folder `probes/`."""
    costs = []
    for path in sorted(path for name in (PROBE_FILE, MIXING_FILE) for path in (root / PROBES).rglob(name)):
        report = read_json(path, if_missing="run `slop probe` again", error=RunError)
        if not isinstance(report, dict) or "cost" not in report:
            raise RunError(f"{path} is not a report of `slop probe`: it has no key `cost`; move the file elsewhere")
        costs.append(Cost.from_plain(report["cost"], where=f"{path}: cost"))
    return Cost.sum("probes", costs)


def _count_inherited(root: Path, job: Job) -> int:
    """Return how many stages a run took over from a shared prefix when it began, whatever prefixes there are now."""
    path = job.sibling_file(root, PREFIX_FILE)
    return RunDirectory(root / path.read_text().strip()).finished_stages if path.exists() else 0


def read_run_result(job: Job, root: Path) -> RunResult:
    """Return the result of a finished run with held-out losses."""
    run = RunDirectory(root / job.directory)
    records = run.records()
    stages = tuple(_read_stage_result(run, record) for record in records)
    facts = RunFacts.load(run)
    text = facts.blocks * facts.block_size if facts is not None else 0
    return RunResult(
        arm=job.arm,
        budget=job.budget,
        seed=job.seed,
        schedule=run.schedule,
        stages=stages,
        curve=_read_curve(run, records),
        inherited=_count_inherited(root, job),
        end_rate=find_end_rate(job.config),
        optimizer_flops=_sum_optimizer_flops(job, records),
        passes=round(records[-1].total_tokens / text, 4) if text else None,
    )


def _read_stage_result(run: RunDirectory, record: StageRecord) -> StageResult:
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
        eval_loss=round(record.eval_loss, _PLACES),
        eval_loss_after_growth=None if after_growth is None else round(after_growth, _PLACES),
        devices=record.devices,
    )


def _read_curve(run: RunDirectory, records: Sequence[StageRecord]) -> Curve:
    """Return the held-out losses in a run's log; within a stage, time is taken to be proportional to tokens."""
    stages, flops, seconds, losses = [], [], [], []
    for entry in run.history():
        if EVAL_LOSS not in entry or not math.isfinite(entry[EVAL_LOSS]):
            continue
        record = records[entry["stage"]]
        before = sum(earlier.seconds for earlier in records[: record.stage])
        share = (entry["tokens"] - record.first_token) / max(record.tokens, 1)
        stages.append(record.stage)
        flops.append(float(entry["train_flops"]))
        seconds.append(round(before + share * record.seconds, 2))
        losses.append(round(entry[EVAL_LOSS], _PLACES))
    return Curve(tuple(stages), tuple(flops), tuple(seconds), tuple(losses))
