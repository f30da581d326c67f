"""`Probe`: short trial runs of candidates, ranked by what was measured.

The paper plans by predictions alone, "with restricted trial training" (Section 3.3). A probe is that restricted
training: each candidate is trained briefly, and its held-out loss is measured. The loss right after growth says little
about the final loss, the loss after a short lag much more (Karp et al. 2024, "Landscape-Aware Growing: The Power of a
Little LAG", arXiv 2406.02469); `ProbeReport.growth_agreement` measures whether that holds here.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from pathlib import Path
from typing import get_args

from ..errors import RunError
from ..experiments.collect import PROBE_FILE, read_run_result, sum_cost
from ..experiments.comparison import Cost
from ..experiments.config import check_seeds
from ..experiments.jobs import PREFIXES, RUNS, SEEDS_APART, Job, add_shared_prefixes, find_diverged
from ..experiments.running import JobEndCallback, check_workers, describe_machine, run_jobs
from ..io.files import check_output
from ..io.numbers import is_finite_number, require_whole_number
from ..io.serialization import hash_json, list_versions, to_plain
from ..runs.branch import inherit
from ..runs.directory import RunDirectory
from ..schedule import GrowthSchedule
from ..training.batches import keep_first_stages
from ..training.config import RunConfig, preview_run
from ..training.run_plan import with_inits
from .candidates import Candidate, Start, build_schedule_candidates, get_first_stage
from .report import CandidateResult, ProbeReport, RankBy

#: Share of each stage's tokens that a trial trains if neither a share nor a lag is given.
DEFAULT_SHARE = 0.1


@dataclass(frozen=True)
class PlannedTrial:
    """A trial run to train, or a prefix that several trials share.

    Args:
        stages: names of the stages to train.
        tokens, flops: training of these stages, in whole optimizer steps.
        begins_with: directory of the run whose finished stages it begins with; None if it begins from scratch.
    """

    name: str
    stages: tuple[str, ...]
    tokens: int
    flops: float
    begins_with: str | None = None


@dataclass(frozen=True)
class Probe:
    """Trains candidates briefly from a common start, and ranks them by the measurements.

    Pass it to a planner, or call `run` with candidates of another kind. Trials are runs in a directory: stages that
    several of them share are trained once, and an interrupted probe resumes. Each stage of a trial has a complete
    learning-rate schedule over its own length.

    Args:
        config: config of the run: model, data and training; its schedule and `evaluation` are ignored.
        output_dir: directory of the trials and of `probe.json`.
        lag: number of tokens to train the next stage alone; or
        share: share of its tokens to train every stage. Default: a tenth.
        start: finished stage of a run to continue from, `RUN@STAGE`; by default an initial model, trained once for
            all candidates.
        initial_tokens: tokens of that initial model. Default: the share of its tokens in the schedule, or `lag`.
        by: "utility", decrease of the loss per FLOP; "utility_per_hour", decrease of the perplexity per device hour;
            or "loss", loss at the end.
        seeds: seeds; each candidate is tried once per seed.
        devices, workers, on_job_end: as in `run_experiment`.
        told: earlier name of `on_job_end`.

    Raises:
        RunError: if arguments contradict each other or are out of range, or the start does not exist.

    >>> Probe(RunConfig(), "runs/probe", lag=0)
    Traceback (most recent call last):
    slop_hf.errors.RunError: lag must be a whole number, 1 or more, got 0
    """

    config: RunConfig
    output_dir: str | Path
    _: KW_ONLY
    lag: int | None = None
    share: float | None = None
    start: Start | str | Path | None = None
    initial_tokens: int | None = None
    by: RankBy = "utility"
    seeds: tuple[int, ...] = (0,)
    devices: Sequence[str] = ()
    workers: int = 1
    on_job_end: JobEndCallback | None = None
    told: InitVar[JobEndCallback | None] = None

    def __post_init__(self, told: JobEndCallback | None) -> None:
        if told is not None:
            warnings.warn("Probe(told=…) is now Probe(on_job_end=…)", DeprecationWarning, stacklevel=3)
            object.__setattr__(self, "on_job_end", told)
        if self.lag is not None and self.share is not None:
            raise RunError(
                "a trial is as long as its lag or as a share of its schedule: "
                f"expected one of them, got lag={self.lag} and share={self.share}"
            )
        for name in ("lag", "initial_tokens"):
            if (value := getattr(self, name)) is not None:
                require_whole_number(value, name, error=RunError)
        if self.share is not None and not (is_finite_number(self.share) and 0 < self.share <= 1):
            raise RunError(f"share must be above 0 and at most 1, got {self.share}")
        if self.by not in get_args(RankBy):
            raise RunError(f"by must be one of {', '.join(get_args(RankBy))}, got {self.by!r}")
        check_seeds(self.seeds)
        check_workers(self.devices, self.workers)
        check_output(self.output_dir, "output_dir", RunError, is_directory=True)
        if not self.config.data.held_out:
            raise RunError("a probe measures losses on held-out documents; set data.held_out, such as 0.02")
        if self.start is not None and self.initial_tokens is not None:
            raise RunError("a start is trained already: give either start or initial_tokens")
        if self.lag is None and self.share is None:
            object.__setattr__(self, "share", DEFAULT_SHARE)
        if isinstance(self.start, (str, Path)):
            object.__setattr__(self, "start", Start.parse(self.start))

    def __call__(self, schedules: Sequence[GrowthSchedule], /) -> list[GrowthSchedule]:
        """Try schedules, and return them in the measured order with `probe_…` among their scores.

        Schedules whose trial diverged come last, without these scores.

        Args:
            schedules: schedules from the run's initial structure or from the structure at the start, best first.

        Raises:
            SlopError: as `run`.
        """
        candidates = build_schedule_candidates(schedules, self._start)
        report = self.run(candidates)
        by_name = {candidate.name: schedule for candidate, schedule in zip(candidates, schedules, strict=True)}
        ranked = [result.add_scores(by_name[result.name]) for result in report.results]
        return [*ranked, *(by_name[name] for name in report.diverged)]

    def run(self, candidates: Sequence[Candidate]) -> ProbeReport:
        """Try candidates; the report is also written to `probe.json`.

        Args:
            candidates: two or more candidates with different trials.

        Raises:
            SlopError: if some trial cannot begin (checked before any training), if a trial fails, or if the
                trials of all candidates diverge.
        """
        root, jobs = Path(self.output_dir), self.build_jobs(candidates)
        if self._start is not None and not (prefix := RunDirectory(root / self._start_directory)).exists:
            inherit(self._start.run, prefix, self._start.schedule, name=prefix.path.name)
        run_jobs(jobs, root, devices=self.devices, workers=self.workers, on_job_end=self.on_job_end)
        diverged = find_diverged(jobs, root)
        first = get_first_stage(self._start)
        results, without_result = [], []
        for candidate in candidates:
            trials = [self._build_job(candidate, seed) for seed in self.seeds]
            if diverged & {trial.directory for trial in trials}:
                without_result.append(candidate.name)
                continue
            runs = [read_run_result(trial, root) for trial in trials]
            from_start = [dataclasses.replace(run, stages=run.stages[first - 1 :]) for run in runs]
            results.append(CandidateResult.from_trials(candidate, from_start))
        if not results:
            raise RunError(
                f"the trials of all {len(candidates)} candidates diverged; lower learning_rate, and choose another "
                "output directory"
            )
        by_share = f"{self.share or 0:.3g} of each stage's tokens"
        report = ProbeReport.rank(
            results,
            self.by,
            diverged=tuple(without_result),
            length=by_share if self.lag is None else f"{self.lag:,} tokens of the next stage",
            start="the initial model" if self._start is None else self._start.name,
            cost=sum_trials(jobs, root),
            versions=list_versions(),
            device=describe_machine(),
        )
        report.to_json(root / PROBE_FILE)
        return report

    @property
    def report(self) -> ProbeReport:
        """Report of the last finished probe in the directory; a `RunError` if there is none."""
        return ProbeReport.from_json(Path(self.output_dir) / PROBE_FILE)

    @property
    def ledger(self) -> tuple[Cost, ...]:
        """Cost of the last finished probe, for the ledger of a comparison; empty before one has finished."""
        return (self.report.cost,) if (Path(self.output_dir) / PROBE_FILE).exists() else ()

    def preview(self, candidates: Sequence[Candidate]) -> list[PlannedTrial]:
        """Return what `run` would train, in its order, without training or writing anything.

        Raises:
            SlopError: if some trial could not begin.
        """
        jobs, trials = self.build_jobs(candidates), []
        stages = {job.directory: len(job.schedule.structures) for job in jobs}
        if self._start is not None:
            stages[self._start_directory] = get_first_stage(self._start)
        for job in jobs:
            spans = preview_run(job.config, job.sibling_file(Path(self.output_dir), "preview"))  # a path without a run
            if job.parent is not None:
                spans = spans[stages[job.parent] :]
            trials.append(
                PlannedTrial(
                    job.name,
                    tuple(span.name for span in spans),
                    sum(span.tokens for span in spans),
                    sum(span.flops for span in spans),
                    None if job.parent is None else job.parent.as_posix(),
                )
            )
        return trials

    # ---- From candidates to jobs -------------------------------------------------------------------------------

    def build_jobs(self, candidates: Sequence[Candidate]) -> list[Job]:
        """Return the trial runs, preceded by the prefixes that they share; candidates may share a trial."""
        if len(candidates) < 2:
            raise RunError(f"a probe compares two candidates or more, got {len(candidates)}")
        trials: dict[Path, Job] = {}
        for seed, candidate in itertools.product(self.seeds, candidates):
            job = self._build_job(candidate, seed)
            trials.setdefault(job.directory, job)
        if len(trials) == len(self.seeds):
            instead = "differ" if self.lag is None else "differ in the next stage, or try every stage by a share"
            raise RunError(f"all {len(candidates)} candidates have the same trial; give candidates that {instead}")
        jobs = add_shared_prefixes(list(trials.values()))
        if self._start is not None:
            jobs = self._begin_at_start(jobs)
        return sorted(jobs, key=lambda job: job.seed)

    def build_trial(self, candidate: Candidate) -> GrowthSchedule:
        """Return the schedule of a candidate's trial."""
        first, schedule = get_first_stage(self._start), candidate.schedule
        last = first if self.lag is not None else candidate.stages or len(schedule.stages)
        trial = GrowthSchedule(schedule.initial, schedule.stages[:last], schedule.initial_tokens)
        complete = with_inits(trial, self.config.training.get("growth_init"))
        stages = (*trial.stages[: first - 1], *complete.stages[first - 1 :])
        tokens = [self._count_tokens(number, count, candidate) for number, count in enumerate(trial.tokens)]
        return dataclasses.replace(trial, stages=stages).with_shares(tokens)

    def _count_tokens(self, number: int, count: int, candidate: Candidate) -> int:
        """Return the tokens of one stage of a trial, for a stage with `count` tokens in the candidate's schedule."""
        is_initial = number == 0 and self._start is None
        if number < get_first_stage(self._start) and not is_initial:
            return count  # trained already
        if is_initial and self.initial_tokens is not None:
            return self.initial_tokens
        if is_initial and not count and "pretrained" in self.config.model:
            return 0
        if self.lag is not None:
            return self.lag
        if not count and is_initial:
            raise RunError("the schedule does not train the initial model: give the tokens for it (initial_tokens)")
        if not count:
            raise RunError(
                f"{candidate.name}: {candidate.schedule.stage_name(number)} has no tokens to take a share of; give "
                "its schedule tokens, or a lag"
            )
        return max(1, round(count * (self.share or 0)))

    def _build_job(self, candidate: Candidate, seed: int) -> Job:
        trial, start = self.build_trial(candidate), self._start
        facts = None if start is None else start.facts
        settings = {
            "eval_before_growth": True,
            "eval_after_growth": True,
            "push_to_hub": False,
            "seed": seed,
            "data_seed": seed if facts is None else facts.data_seed,  # a continued run keeps its order of data
            "growth_seed": seed * SEEDS_APART,
        }
        training = keep_first_stages({**self.config.training, **settings}, len(trial.structures))
        training.pop("growth_init", None)  # the trial's stages name their inits, so that stages can be shared
        key = hash_json([to_plain(trial), "" if start is None else start.key])
        directory = Path(RUNS, f"{trial.sequence}-{key[:8]}", f"seed-{seed}")
        config = dataclasses.replace(self.config, training=training, schedule=trial, evaluation=None)
        return Job(candidate.name, 1.0, seed, config, directory)

    def _begin_at_start(self, jobs: Sequence[Job]) -> list[Job]:
        """Leave out prefixes that the start has trained already, and let jobs begin with the start instead."""
        needed = [job for job in jobs if len(job.schedule.structures) > get_first_stage(self._start)]
        directories = {job.directory for job in needed}
        return [
            job if job.parent in directories else dataclasses.replace(job, parent=self._start_directory)
            for job in needed
        ]

    @property
    def _start(self) -> Start | None:
        assert not isinstance(self.start, (str, Path))  # read in __post_init__
        return self.start

    @property
    def _start_directory(self) -> Path:
        assert self._start is not None
        return Path(PREFIXES, f"start-{self._start.key[:8]}")


def sum_trials(jobs: Sequence[Job], root: Path) -> Cost:
    """Return the cost of the trials and their shared prefixes, counting the trials."""
    begun = [job for job in jobs if RunDirectory(root / job.directory).exists]
    return dataclasses.replace(sum_cost("probes", begun, root), count=sum(bool(job.arm) for job in begun))
