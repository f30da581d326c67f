"""`Probe`: short trial training of what a planner proposes, which puts it into the order of what was measured.

The paper plans by predictions alone, "with restricted trial training" (Section 3.3). Trials are the restricted
training: each candidate is trained for a little, and its held-out loss measured. The loss right after a growth says
little of what comes of it, the one after a short lag much more (Karp et al. 2024, "Landscape-Aware Growing: The Power
of a Little LAG", arXiv 2406.02469): `ProbeReport.growth_agreement` tells whether that holds here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, get_args

from ..errors import RunError
from ..experiments.collect import sum_cost, read_run_result
from ..experiments.jobs import RUNS, SEEDS_APART, PREFIXES, Job, beside, find_diverged, keep_first_stages, add_shared_prefixes
from ..experiments.comparison import PROBE_FILE, Cost, RunResult
from ..experiments.running import ProgressCallback, describe_machine, run_jobs
from ..io.serialization import hash_json, list_versions, to_plain
from ..runs.branch import inherit
from ..runs.directory import RunDirectory
from ..schedule import GrowthSchedule
from ..training import RunConfig, preview_run
from ..training.checks import with_inits
from .candidates import Candidate, Start, get_first_stage, build_schedule_candidates
from .report import CandidateResult, ProbeReport, RankBy

#: Share of its tokens that each stage is tried for where neither share nor lag is given.
DEFAULT_SHARE = 0.1


@dataclass(frozen=True)
class PlannedTrial:
    """Training that a probe would do: a trial, or a beginning that several trials have in common.

    Args:
        name: of the candidate that it is of, or of the beginning.
        stages: names of the stages that are trained.
        tokens, flops: of their training, in whole optimizer steps.
        begins_with: place of what was trained or finished before; None for nothing.
    """

    name: str
    stages: tuple[str, ...]
    tokens: int
    flops: float
    begins_with: str | None = None


@dataclass(frozen=True)
class Probe:
    """Trains candidates for a little from a common start, and puts them into the order of what was measured.

    Give it to a planner, or its own `run` candidates of another kind. Trials are runs in a directory: what several
    have in common is trained once, and a probe that was killed goes on where it stopped. Each stage of a trial has a
    whole learning-rate schedule, as short as the stage.

    Args:
        config: the run: model, data, training; its schedule and `evaluation` do not count.
        output_dir: where trials and `probe.json` lie.
        lag: try the first stage alone, for so many tokens; or
        share: try every stage, for this share of its tokens. Default: a tenth.
        start: a finished stage of a run to go on from, `RUN@STAGE`; default, an initial model that is trained first,
            once for all candidates.
        initial_tokens: of that training. Default: the share of what the schedule gives it, or as many as `lag`.
        by: "utility", the loss that a FLOP takes away; "utility_per_hour", the perplexity that a device hour takes
            away; or "loss", the one at the end.
        seeds: each candidate is tried once with each.
        devices, workers, told: as in `run_experiment`.

    Raises:
        RunError: for values that mean nothing, and a start that is none.

    >>> Probe(RunConfig(), "runs/probe", lag=0)
    Traceback (most recent call last):
    slop_hf.errors.RunError: lag must be 1 token or more, got 0
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
    told: ProgressCallback | None = None

    def __post_init__(self) -> None:
        if self.lag is not None and self.share is not None:
            raise RunError("a trial is as long as its lag or as a share of its schedule: give one of them")
        for name in ("lag", "initial_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise RunError(f"{name} must be 1 token or more, got {value}")
        if self.share is not None and not 0 < self.share <= 1:
            raise RunError(f"share must be above 0 and at most 1, got {self.share}")
        if self.by not in get_args(RankBy):
            raise RunError(f"by must be one of {', '.join(get_args(RankBy))}, got {self.by!r}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise RunError(f"seeds must be one or more different numbers, got {list(self.seeds)}")
        if not self.config.data.held_out:
            raise RunError("a probe measures losses on held-out documents; set data.held_out, such as 0.02")
        if self.start is not None and self.initial_tokens is not None:
            raise RunError("a start is trained already: give either start or initial_tokens")
        if self.lag is None and self.share is None:
            object.__setattr__(self, "share", DEFAULT_SHARE)
        if isinstance(self.start, (str, Path)):
            object.__setattr__(self, "start", Start.of(self.start))

    def __call__(self, schedules: Sequence[GrowthSchedule], /) -> list[GrowthSchedule]:
        """Try schedules, best first, and give them back in the measured order with `probe_…` among their scores.

        Those whose trial diverged come last, without.

        Args:
            schedules: from the run's initial structure, or from the one at the start.

        Raises:
            SlopError: as `run`.
        """
        candidates = build_schedule_candidates(schedules, self._start)
        report = self.run(candidates)
        lost = [schedule for one, schedule in zip(candidates, schedules, strict=True) if one.name in report.diverged]
        return [*(one.scored(schedules[one.rank - 1]) for one in report.results if one.rank is not None), *lost]

    def run(self, candidates: Sequence[Candidate]) -> ProbeReport:
        """Try candidates; the report is written to `probe.json` too.

        Args:
            candidates: two or more that differ in what is tried of them.

        Raises:
            SlopError: for what cannot be tried, before anything is; where a trial fails; and where all diverge.
        """
        root, jobs = Path(self.output_dir), self.jobs(candidates)
        if self._start is not None and not (place := RunDirectory(root / self._start_place)).exists:
            inherit(self._start.run, place, self._start.schedule, name=place.path.name)
        run_jobs(jobs, root, devices=self.devices, workers=self.workers, told=self.told)
        measured = self._measured(candidates, jobs, root)
        report = ProbeReport.of(
            [self._result(candidate, root) for candidate in measured],
            self.by,
            diverged=tuple(one.name for one in candidates if one not in measured),
            length=self._length,
            start="the initial model" if self._start is None else self._start.name,
            cost=self._cost(jobs, root),
            versions=list_versions(),
            device=describe_machine(),
        )
        report.save(root / PROBE_FILE)
        return report

    @property
    def report(self) -> ProbeReport:
        """What came out of the last run in the directory.

        Raises:
            RunError: where none has ended.
        """
        return ProbeReport.load(Path(self.output_dir) / PROBE_FILE)

    @property
    def ledger(self) -> tuple[Cost, ...]:
        """What that has cost, for the ledger of a comparison; nothing before a run has ended."""
        return (self.report.cost,) if (Path(self.output_dir) / PROBE_FILE).exists() else ()

    def preview(self, candidates: Sequence[Candidate]) -> list[PlannedTrial]:
        """What `run` would train, in its order, without training or writing anything.

        Raises:
            SlopError: for what cannot be tried.
        """
        jobs, found = self.jobs(candidates), []
        begun = {job.place: len(job.schedule.structures) for job in jobs}
        if self._start is not None:
            begun[self._start_place] = get_first_stage(self._start)
        for job in jobs:
            spans = preview_run(job.config, beside(Path(self.output_dir), job, "preview"))  # a place that is free
            own = spans[begun[job.parent] :] if job.parent is not None else spans
            tokens, flops = sum(span.tokens for span in own), sum(span.flops for span in own)
            before = None if job.parent is None else job.parent.as_posix()
            found.append(PlannedTrial(job.name, tuple(span.name for span in own), tokens, flops, before))
        return found

    # ---- From candidates to runs -------------------------------------------------------------------------------

    def jobs(self, candidates: Sequence[Candidate]) -> list[Job]:
        """The runs that trials consist of, what several have in common before them; candidates may share one.

        Raises:
            RunError: where there is nothing to compare.
        """
        if len(candidates) < 2:
            raise RunError(f"a probe compares two candidates or more, got {len(candidates)}")
        trials: dict[Path, Job] = {}
        for seed in self.seeds:
            for candidate in candidates:
                job = self._job(candidate, seed)
                trials.setdefault(job.place, job)
        if len(trials) == len(self.seeds):
            instead = "differ" if self.lag is None else "grow otherwise at once, or share, which tries every stage"
            raise RunError(f"all {len(candidates)} candidates have the same trial; give some that {instead}")
        jobs = add_shared_prefixes(list(trials.values()))
        if self._start is not None:
            jobs = self._on_start(jobs)
        return sorted(jobs, key=lambda job: job.seed)

    def trial(self, candidate: Candidate) -> GrowthSchedule:
        """The schedule of a candidate's trial.

        Raises:
            RunError: where a stage has no tokens to take a share of.
        """
        first, schedule = get_first_stage(self._start), candidate.schedule
        last = first if self.lag is not None else candidate.stages or len(schedule.stages)
        tried = GrowthSchedule(schedule.initial, schedule.stages[:last], schedule.initial_tokens)
        complete = with_inits(tried, self.config.training.get("growth_init"))
        stages = (*tried.stages[: first - 1], *complete.stages[first - 1 :])
        counts = [self._tokens(number, count, candidate) for number, count in enumerate(tried.tokens)]
        return dataclasses.replace(tried, stages=stages).with_shares(counts)

    def _tokens(self, number: int, count: int, candidate: Candidate) -> int:
        """Tokens of a stage of a trial, of which the candidate's schedule has `count`."""
        if number < get_first_stage(self._start):
            return self._initial_tokens(count) if self._start is None else count
        if self.lag is not None:
            return self.lag
        if not count:
            raise RunError(
                f"{candidate.name}: {candidate.schedule.stage_name(number)} has no tokens to take a share of; give "
                "its schedule tokens, or a lag"
            )
        return max(1, round(count * (self.share or 0)))

    def _initial_tokens(self, count: int) -> int:
        if self.initial_tokens is not None:
            return self.initial_tokens
        if not count and "pretrained" in self.config.model:
            return 0
        if self.lag is not None:
            return self.lag
        if not count:
            raise RunError("the schedule does not train the initial model: say for how many tokens (initial_tokens)")
        return max(1, round(count * (self.share or 0)))

    def _job(self, candidate: Candidate, seed: int) -> Job:
        trial = self.trial(candidate)
        settings = {"eval_before_growth": True, "eval_after_growth": True, "push_to_hub": False}
        training = keep_first_stages({**self.config.training, **settings, **self._seeds(seed)}, len(trial.structures))
        training.pop("growth_init", None)  # the trial's stages name theirs, so that those with the same are shared
        key = hash_json([to_plain(trial), self._start.key if self._start is not None else ""])
        place = Path(RUNS, f"{trial.sequence}-{key[:8]}", f"seed-{seed}")
        config = dataclasses.replace(self.config, training=training, schedule=trial, evaluation=None)
        return Job(candidate.name, 1.0, seed, config, place)

    def _seeds(self, seed: int) -> dict[str, Any]:
        facts = None if self._start is None else self._start.facts
        data_seed = seed if facts is None else facts.data_seed  # a run's data go on in its order
        return {"seed": seed, "data_seed": data_seed, "growth_seed": seed * SEEDS_APART}

    def _on_start(self, jobs: Sequence[Job]) -> list[Job]:
        """Jobs that begin with the start, and no trunks of what is trained already."""
        own = [job for job in jobs if len(job.schedule.structures) > get_first_stage(self._start)]
        places = {job.place for job in own}
        return [job if job.parent in places else dataclasses.replace(job, parent=self._start_place) for job in own]

    @property
    def _start(self) -> Start | None:
        assert not isinstance(self.start, (str, Path))
        return self.start

    @property
    def _start_place(self) -> Path:
        assert self._start is not None
        return Path(PREFIXES, f"start-{self._start.key[:8]}")

    # ---- What came out of them ---------------------------------------------------------------------------------

    def _measured(self, candidates: Sequence[Candidate], jobs: Sequence[Job], root: Path) -> list[Candidate]:
        """Those whose trials have come to an end with every seed."""
        lost = find_diverged(jobs, root)
        found = [one for one in candidates if not lost & {self._job(one, seed).place for seed in self.seeds}]
        if not found:
            raise RunError(
                f"the trials of all {len(candidates)} candidates diverged; lower learning_rate, and choose another "
                "output directory"
            )
        return found

    def _result(self, candidate: Candidate, root: Path) -> CandidateResult:
        return CandidateResult.of(candidate, [self._grown(self._job(candidate, seed), root) for seed in self.seeds])

    def _grown(self, job: Job, root: Path) -> RunResult:
        """A trial from the stage on that all begin with."""
        result = read_run_result(job, root)
        return dataclasses.replace(result, stages=result.stages[get_first_stage(self._start) - 1 :])

    def _cost(self, jobs: Sequence[Job], root: Path) -> Cost:
        begun = [job for job in jobs if RunDirectory(root / job.place).exists]
        return dataclasses.replace(sum_cost("probes", begun, root), count=sum(bool(job.arm) for job in begun))

    @property
    def _length(self) -> str:
        if self.lag is not None:
            return f"{self.lag:,} tokens of the next stage"
        return f"{self.share:.3g} of each stage's tokens"
