"""`LossCalibration`: a growth law fitted to short runs of the structures and the data of a run that is planned.

A share of the run's FLOPs is spent on

    the initial model from scratch, with decays at 1/4, 1/2 and all of its length
    the target from scratch, and the run's own schedule, with decays at 1/2 and all of their length
    a mixing probe of each growth of the schedule, at a constant rate

all under one learning-rate schedule per run: warm-up, a constant rate, and a linear decay over the last fifth. So the
steps before a decay are a trunk, which runs of several lengths share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from ..cost.growth_law import GrowthLaw
from ..cost.staged_run import RunTable, StagedRun, TrainedStage
from ..errors import RunError
from ..experiments.arms import get_model_fields
from ..experiments.collect import read_run_result
from ..experiments.comparison import Cost
from ..experiments.jobs import Job, add_shared_prefixes, find_diverged
from ..experiments.running import JobEndCallback, check_workers, run_jobs
from ..experiments.staged_runs import measure_staged_run, plan_staged_run
from ..io.files import check_output
from ..io.numbers import is_finite_number
from ..io.record import Record
from ..io.serialization import Json
from ..io.units import format_power
from ..runs.lock import lock_directory
from ..schedule import GrowthSchedule
from ..training.config import RunConfig, preview_run
from .catch_up import MIN_EVALUATIONS
from .mixing import LARGEST_KAPPA, TRUNK, MixingGrowth, MixingProbe, build_mixing_growths, plan_trials
from .mixing_report import MixingReport
from .probe import PlannedTrial, sum_trials

#: Default of the share of a run's FLOPs.
DEFAULT_LOSS_SHARE = 0.05
#: File of the report in the directory of the runs.
LOSS_CALIBRATION_FILE = "loss_calibration.json"
#: Lengths at which a decay ends, as shares of the longest run's FLOPs; without growth, those of the only structure.
_INITIAL_ENDS, _ENDS, _LONE_ENDS = (0.25, 0.5, 1.0), (0.5, 1.0), (0.125, 0.25, 0.5, 1.0)
_INITIAL, _TARGET, _SCHEDULE = "initial model", "target", "schedule"
#: Share of a run in which the rate falls to 0.
_DECAY = 0.2
#: Largest share of the shortest run for its warm-up.
_MOST_WARMUP = 0.1
#: Fewest optimizer steps of a run: losses of the first ones follow no law.
_LEAST_STEPS = 24
#: The length of the runs is found by at most this many corrections.
_CORRECTIONS = 3
_CONSTANT: dict[str, Json] = {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}
_DECAYING: dict[str, Json] = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": _DECAY, "decay_type": "linear"},
}


@dataclass(frozen=True)
class CalibrationRun(Record, error=RunError):
    """One finished run, measured and as the fitted law has it.

    Args:
        tokens: tokens of all stages.
        flops: training FLOPs, including the trunk that it begins with.
        loss: held-out loss at its end, in nats per token.
        fitted: loss by the law.
    """

    name: str
    tokens: int
    flops: float
    loss: float
    fitted: float


@dataclass(frozen=True)
class LossCalibrationReport(Record, error=RunError, if_missing="`slop calibrate --loss` writes one"):
    """The result of a calibration.

    Args:
        law: the fitted law.
        runs: finished runs, without those at a constant rate.
        measured: all runs that the law was fitted to.
        forecast: loss at the end of the planned run and its central 80% interval, in nats per token.
        distance: distance of the planned run from the measured scales, in decades.
        share: share of the planned run's FLOPs that was asked for.
        planned_flops: FLOPs of the planned run.
        cost: cost of the calibration, everything counted once; evaluations are not in it.
        mixing: report of the mixing probe; None if the schedule grows nothing.
        diverged: names of runs that diverged and that the law does not know.
    """

    law: GrowthLaw
    runs: tuple[CalibrationRun, ...]
    measured: tuple[StagedRun, ...]
    forecast: tuple[float, float, float]
    distance: float
    share: float
    planned_flops: float
    cost: Cost
    mixing: MixingReport | None = None
    diverged: tuple[str, ...] = ()

    @property
    def expected_error(self) -> float:
        """Half of the width of the interval, in nats per token."""
        return (self.forecast[2] - self.forecast[1]) / 2


@dataclass(frozen=True)
class LossCalibration:
    """Fits a growth law to short runs of the structures and data of a planned run.

    Runs are kept in a directory. An interrupted calibration resumes; finished runs are not repeated.

    Args:
        config: config of the planned run: model, data, training and schedule. Its peak learning rate, optimizer and
            settings of growth are those of all runs, its learning-rate schedule is not.
        output_dir: directory of the runs, of `loss_calibration.json`, and of the mixing probe's `mixing.json`.
        share: share of the planned run's FLOPs to spend, above 0 and at most 1.
        prior: law to begin the fit with; None for the priors of `GrowthConstants`.
        devices, workers, on_job_end: as in `run_experiment`.

    Raises:
        RunError: if an argument is out of range, no text is held out, or the run cannot be shortened.

    >>> LossCalibration(RunConfig(), "runs/calibrate", share=2)
    Traceback (most recent call last):
    slop_hf.errors.RunError: share must be above 0 and at most 1, got 2: give a share of the run's FLOPs, such as 0.05
    """

    config: RunConfig
    output_dir: str | Path
    _: KW_ONLY
    share: float = DEFAULT_LOSS_SHARE
    prior: GrowthLaw | None = None
    devices: Sequence[str] = ()
    workers: int = 1
    on_job_end: JobEndCallback | None = None

    def __post_init__(self) -> None:
        if not (is_finite_number(self.share) and 0 < self.share <= 1):
            raise RunError(
                f"share must be above 0 and at most 1, got {self.share}: give a share of the run's FLOPs, such as 0.05"
            )
        check_workers(self.devices, self.workers)
        check_output(self.output_dir, "output_dir", RunError, is_directory=True)
        if not self.config.data.held_out:
            raise RunError("a growth law predicts losses on held-out documents; set data.held_out, such as 0.02")
        if "pretrained" in self.config.model:
            raise RunError(
                "a calibration trains models from random weights, and model.pretrained is set: give the fields of the "
                "model's config instead, such as model_type"
            )

    @property
    def planned_flops(self) -> float:
        """Training FLOPs of the planned run.

        Raises:
            SlopError: if its schedule has no tokens.
        """
        flops = self._count_flops(self._schedule)
        if not flops:
            raise RunError("the schedule has no tokens, so that there is no budget to take a share of: give it tokens")
        return flops

    def build_jobs(self) -> list[Job]:
        """Return the runs, preceded by the trunks that several of them share, for at most the share of the FLOPs.

        Raises:
            SlopError: if a run could not begin, or the share buys too few steps.
        """
        return self._plan.jobs

    def preview(self) -> list[PlannedTrial]:
        """Return what `run` would train, in its order, without training or writing anything.

        Raises:
            SlopError: if a run could not begin.
        """
        jobs = self.build_jobs()
        for job in jobs:
            preview_run(job.config, job.sibling_file(Path(self.output_dir), "preview"))  # a path without a run
        return plan_trials(jobs)

    def run(self) -> LossCalibrationReport:
        """Train the runs that are not finished, fit the law, and write `loss_calibration.json`.

        Raises:
            SlopError: if a run cannot begin (checked before any training) or fails, or if another process writes into
                the directory.
        """
        root, plan, planned = Path(self.output_dir), self._plan, plan_staged_run(self.config)
        with lock_directory(root, "calibrating a growth law"):
            run_jobs(plan.jobs, root, devices=self.devices, workers=self.workers, on_job_end=self.on_job_end)
            diverged = find_diverged(plan.jobs, root)
            # All its runs have ended: it only reads them.
            mixing = plan.probe.run(plan.growths) if plan.growths else None
            measured = _measure_jobs([job for job in plan.jobs if job.directory not in diverged], root)
            law = GrowthLaw.fit([run for _, run in measured], prior=self.prior)
            forecast = law.predict(planned)
            report = LossCalibrationReport(
                law=law,
                runs=tuple(_compare_with_law(law, measured)),
                measured=tuple(run for _, run in measured),
                forecast=(round(forecast.loss, 4), round(forecast.low, 4), round(forecast.high, 4)),
                distance=round(float(law.measure_distances(RunTable.of([planned]))[0]), 4),
                share=self.share,
                planned_flops=self.planned_flops,
                cost=replace(sum_trials(plan.jobs, root), what="calibration"),
                mixing=mixing,
                diverged=tuple(job.name for job in plan.jobs if job.arm and job.directory in diverged),
            )
            report.to_json(root / LOSS_CALIBRATION_FILE)
        return report

    @property
    def report(self) -> LossCalibrationReport:
        """Report of the last finished calibration in the directory; a `RunError` if there is none."""
        return LossCalibrationReport.from_json(Path(self.output_dir) / LOSS_CALIBRATION_FILE)

    # ---- From a budget to jobs ---------------------------------------------------------------------------------

    @property
    def _schedule(self) -> GrowthSchedule:
        return self.config.read_schedule()

    @cached_property
    def _plan(self) -> _Plan:
        """Return the runs for at most the share of the FLOPs, none longer than the planned run."""
        budget, most = self.share * self.planned_flops, self.planned_flops
        unit = min(budget / 6, most)
        plan = self._build_plan(unit)
        for _ in range(_CORRECTIONS):
            cost = plan.count_flops()
            if cost <= budget and (cost > 0.9 * budget or unit == most):
                break
            unit = min(0.98 * unit * budget / cost, most)  # steps are whole
            plan = self._build_plan(unit)
        self._require_steps(plan)
        return plan

    def _build_plan(self, unit: float) -> _Plan:
        """Return the runs if the longest ones cost so many FLOPs."""
        counted = self._build_probe(unit, {"warmup_steps": 0})
        shortest = min(_count_steps(job) for job in self._build_ladder(unit, counted))
        warmup = {"warmup_steps": self._choose_warmup(shortest)}
        probe = self._build_probe(unit, {**warmup, **_CONSTANT})
        growths = build_mixing_growths(self._schedule) if self._schedule.stages else []
        jobs = self._build_ladder(unit, self._build_probe(unit, {**warmup, **_DECAYING}))
        if growths:
            jobs += probe.build_runs(growths)
        return _Plan(add_shared_prefixes(jobs), probe, growths)

    def _build_ladder(self, unit: float, probe: MixingProbe) -> list[Job]:
        """Return the runs of several lengths, with the settings of a probe."""
        return [
            replace(probe.build_job(name, f"decay-{name}".replace(" ", "-"), schedule, 0), budget=end)
            for name, schedule, end in self._list_schedules(unit)
        ]

    def _list_schedules(self, unit: float) -> Iterator[tuple[str, GrowthSchedule, float]]:
        """Yield name, schedule and relative length of each run that ends with a decay."""
        schedule = self._schedule
        alone = replace(schedule, stages=(), initial_tokens=1)
        target = replace(alone, initial=schedule.target)
        kinds = (
            ((_INITIAL, alone, _INITIAL_ENDS), (_TARGET, target, _ENDS), (_SCHEDULE, schedule, _ENDS))
            if schedule.stages
            else ((_TARGET, target, _LONE_ENDS),)
        )
        for name, whole, ends in kinds:
            for end in ends:
                share = end * unit / self._count_flops(whole)
                tokens = [max(round(share * count), 1) if count else 0 for count in whole.tokens]
                yield name, whole.with_shares(tokens), end

    def _build_probe(self, unit: float, training: Mapping[str, Json]) -> MixingProbe:
        """Return the mixing probe whose target is trained for so many FLOPs, with other training arguments."""
        one_token = replace(self._schedule, initial=self._schedule.target, stages=(), initial_tokens=1)
        tokens = max(1, round(unit / self._count_flops(one_token) / (1 + LARGEST_KAPPA)))
        config = replace(self.config, training={**self.config.training, "lr_span": "run", **training}, evaluation=None)
        return MixingProbe(
            config, self.output_dir, at=(tokens,), lag=tokens, devices=self.devices, workers=self.workers
        )

    def _count_flops(self, schedule: GrowthSchedule) -> float:
        return schedule.flops(get_model_fields(self.config), self.config.data.block_size)

    def _choose_warmup(self, shortest: int) -> int:
        """Return the steps of warm-up of all runs: the planned run's, but at most a tenth of the shortest run."""
        warmup = self.config.training.get("warmup_steps", 0)
        most = max(1, int(_MOST_WARMUP * shortest))
        return most if isinstance(warmup, float) and 0 < warmup < 1 else min(int(warmup), most)

    def _require_steps(self, plan: _Plan) -> None:
        """Refuse runs that are too short to follow a law, or to read a mixing time from."""
        needs = []
        for job in plan.jobs:
            if job.arm:
                counts = [
                    count * span.steps / span.tokens  # not rounded
                    for count, span in zip(job.schedule.tokens, job.preview.spans, strict=True)
                    if span.steps
                ]
                needs += [(job.name, sum(counts), _LEAST_STEPS)]
                needs += [(job.name, count, MIN_EVALUATIONS) for count in counts]
        name, steps, least = max(needs, key=lambda need: need[2] / need[1])
        if steps < least:
            share = math.ceil(1000 * self.share * least / steps * 1.05) / 1000
            remedy = (
                f"raise share to {share:g}, or lower training.batch_tokens"
                if share <= 1
                else "lower training.batch_tokens, or plan a longer run"
            )
            raise RunError(
                f"a share of {self.share:g} of the run's {format_power(self.planned_flops)} FLOPs buys {steps:.0f} "
                f"steps of {name}, and a law needs {least} or more: {remedy}"
            )


class _Plan(NamedTuple):
    """Runs of a calibration, and the mixing probe that some of them belong to."""

    jobs: list[Job]
    probe: MixingProbe
    growths: list[MixingGrowth]

    def count_flops(self) -> float:
        return sum(trial.flops for trial in plan_trials(self.jobs))


def _count_steps(job: Job) -> int:
    return job.preview.spans[-1].end_step


def _measure_jobs(jobs: Sequence[Job], root: Path) -> list[tuple[Job, StagedRun]]:
    """Return finished runs with their losses, each loss once.

    The steps before a decay belong to several runs: only the longest one keeps its losses on the way. Those of the
    mixing probe's target from scratch are those of the target.
    """
    measured = []
    for job in jobs:
        if not job.arm or job.arm == TRUNK:
            continue
        is_ladder = job.arm in (_INITIAL, _TARGET, _SCHEDULE)
        run = measure_staged_run(
            job.config, read_run_result(job, root), experiment=job.arm if is_ladder else "mixing probe"
        )
        if is_ladder and job.budget < 1:
            run = replace(run, stages=(*(replace(stage, losses=()) for stage in run.stages[:-1]), _keep_end(run)))
        measured.append((job, run))
    return measured


def _keep_end(run: StagedRun) -> TrainedStage:
    """Return the last stage with the loss at its end only."""
    return replace(run.stages[-1], losses=run.stages[-1].losses[-1:])


def _compare_with_law(law: GrowthLaw, measured: Sequence[tuple[Job, StagedRun]]) -> Iterator[CalibrationRun]:
    """Yield the runs that end with a decay, measured and by the law."""
    forecasts = law.predict_all([run for _, run in measured])
    for (job, run), forecast in zip(measured, forecasts, strict=True):
        if run.end_loss is not None:
            name = f"{job.arm} ×{job.budget:g}" if job.budget != 1 else job.arm
            tokens = int(sum(stage.tokens for stage in run.stages))
            yield CalibrationRun(name, tokens, job.flops, run.end_loss, round(forecast.loss, 4))
