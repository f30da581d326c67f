"""`Job`: one run of an experiment, or a prefix that several runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import RunError, SlopError
from ..io.serialization import Json, hash_json, to_plain
from ..runs.directory import CHECKPOINT, RunDirectory
from ..schedule import GrowthSchedule
from ..training.arguments import ADAMW
from ..training.batches import keep_first_stages
from ..training.config import RatePreview, RunConfig, preview_rates
from ..training.run_plan import with_inits
from ..training.spans import StageSpan
from .arms import build_arm_schedule, get_model_fields
from .config import ArmConfig, Experiment
from .trunks import Trace, find_trunks

#: Folders of a comparison's directory: the runs of its arms, and the prefixes that they share.
RUNS, PREFIXES = "runs", "trunks"
#: Ends of the names of files next to a run's directory: its config, its output, the directory of its prefix.
CONFIG_FILE, LOG_FILE, PREFIX_FILE, BRANCH_FILE = "run.yaml", "log.txt", "trunk", "branch.json"
#: File in the directory of a diverged run.
DIVERGED_FILE = "diverged.txt"
#: Distance between the growth seeds of runs: stage n of a run uses `growth_seed + n`, and no two runs may share one.
SEEDS_APART = 1000
#: Training arguments without effect before the first growth.
_GROWTH_ARGUMENTS = (
    *("carry_optimizer_state", "optimizer_state_at_growth", "new_parameter_rate", "new_parameter_steps"),
    *("rewarm_steps", "growth_noise", "eval_after_growth", "growth_seed"),
)
#: Training arguments that decide on learning rates, and on nothing else.
_RATE_ARGUMENTS = (
    *("learning_rate", "stage_learning_rates", "lr_scheduler_type", "lr_scheduler_kwargs", "lr_span"),
    *("warmup_steps", "rewarm_steps"),
)
#: Intervals that may be shares of all steps of the run.
_INTERVALS = ("logging_steps", "eval_steps", "save_steps")


@dataclass(frozen=True)
class Job:
    """One run to train.

    Args:
        arm: name of the arm; empty for a shared prefix.
        budget: multiple of the scale's budget.
        directory: run directory, relative to the directory of the comparison.
        parent: directory of the shared prefix or trunk that the run begins with; None if it begins from scratch.
        first_step: steps done at the end of the trunk that it begins with; 0 for whole stages or from scratch.
        end_step: step at which a trunk ends; None for a run that is trained to its end.
    """

    arm: str
    budget: float
    seed: int
    config: RunConfig
    directory: Path
    parent: Path | None = None
    first_step: int = 0
    end_step: int | None = None

    @property
    def schedule(self) -> GrowthSchedule:
        return self.config.read_schedule()

    @property
    def name(self) -> str:
        """Arm, budget unless it is 1, and seed, for messages and reports."""
        if not self.arm:
            what = "shared prefix" if self.end_step is None else f"trunk to step {self.end_step:,},"
            return f"{what} {self.directory.name[:8]}, seed {self.seed}"
        return f"{self.arm}{f' ×{self.budget:g}' if self.budget != 1 else ''}, seed {self.seed}"

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run, including its shared prefix; of a trunk, up to its end."""
        if self.end_step is not None:
            return self.count_until(self.end_step)[1]
        return self.schedule.flops(get_model_fields(self.config), self.config.data.block_size)

    @cached_property
    def preview(self) -> RatePreview:
        """The stages in whole steps, and the learning rates."""
        return preview_rates(self.config)

    def count_until(self, step: int) -> tuple[int, float]:
        """Return the tokens and the training FLOPs of the first steps of the run."""
        return self._find_span(step).count_until(step)

    def count_optimizer_flops(self, step: int) -> float:
        """Return the FLOPs of the optimizer in the first steps of the run; 0 for other optimizers than AdamW."""
        return (
            sum(span.count_optimizer_flops(step) for span in self.preview.spans)
            if is_trained_with_adamw(self.config)
            else 0.0
        )

    def find_stage_inside(self, step: int) -> int | None:
        """Return the number of the stage that a step is inside of; None if a stage ends at that step."""
        span = self._find_span(step)
        return None if step == span.end_step else span.number

    def _find_span(self, step: int) -> StageSpan:
        return next(span for span in self.preview.spans if step <= span.end_step)

    def is_finished(self, root: Path) -> bool:
        """Whether the run has been trained to its end, or a trunk to the step at which it ends."""
        run, end = RunDirectory(root / self.directory), self.end_step
        if not run.exists or end is None:
            return run.exists and run.is_finished
        if (stage := self.find_stage_inside(end)) is not None:
            return (run.running_dir(stage) / f"{CHECKPOINT}{end}").is_dir()
        return run.finished_stages >= sum(span.end_step <= end for span in self.preview.spans)

    def continue_as_begun(self, root: Path) -> Job:
        """Return a trunk with the settings that it was begun with, which give the same states up to its end."""
        path = self.sibling_file(root, CONFIG_FILE)
        if self.end_step is None or not (path.exists() and RunDirectory(root / self.directory).exists):
            return self
        return dataclasses.replace(self, config=RunConfig.from_yaml(path))

    def sibling_file(self, root: Path, name: str) -> Path:
        """Return the path of a file next to the run's directory, such as `seed-0.run.yaml`."""
        return (root / self.directory).with_name(f"{self.directory.name}.{name}")


def is_trained_with_adamw(config: RunConfig) -> bool:
    """Whether a run is trained with AdamW, whose FLOPs are counted."""
    return config.training.get("optim", "adamw_torch") in ADAMW


def find_end_rate(config: RunConfig) -> float | None:
    """Return the learning rate that a run ends with, as a share of its peak; None if the config does not say."""
    try:
        return round(preview_rates(config).end_rate, 6)
    except SlopError:
        return None


def build_jobs(experiment: Experiment) -> list[Job]:
    """Return one job per arm, budget and seed, in the order of the arms, without shared prefixes.

    Raises:
        SlopError: if some arm has no schedule, naming the arm.
    """
    if not isinstance(experiment, Experiment):
        raise RunError(
            f"experiment must be an Experiment, got {type(experiment).__name__}: read one with Experiment.from_yaml"
        )
    jobs = []
    for name, arm in experiment.arms.items():
        try:
            jobs += _build_arm_jobs(experiment, name, arm)
        except SlopError as caught:
            raise type(caught)(f"arm {name}: {caught}") from None
    return jobs


def _build_arm_jobs(experiment: Experiment, name: str, arm: ArmConfig) -> list[Job]:
    jobs = []
    for budget in arm.budgets:
        schedule = build_arm_schedule(experiment, arm, budget)
        for seed in arm.seeds or experiment.sizes.seeds:
            directory = Path(RUNS, name, f"x{budget:g}", f"seed-{seed}")
            jobs.append(Job(name, budget, seed, _build_run_config(experiment, arm, schedule, seed), directory))
    return jobs


def count_own_flops(jobs: Sequence[Job]) -> dict[Path, float]:
    """Return the training FLOPs of each job by its directory, without those of the shared prefix it begins with."""
    flops = {job.directory: job.flops for job in jobs}
    return {job.directory: job.flops - flops.get(job.parent, 0.0) if job.parent else job.flops for job in jobs}


def list_unneeded_trunks(jobs: Sequence[Job], ended: set[Path]) -> set[Path]:
    """Return the directories of trunks that no run has still to begin with; runs in `ended` begin no more."""
    unneeded: set[Path] = set()
    for job in reversed(jobs):  # children come after their parents
        if job.end_step is not None:
            children = {child.directory for child in jobs if child.parent == job.directory}
            if children <= ended | unneeded:
                unneeded.add(job.directory)
    return unneeded - ended


def _build_run_config(experiment: Experiment, arm: ArmConfig, schedule: GrowthSchedule, seed: int) -> RunConfig:
    """Return the experiment's config with the changes of an arm and the seeds."""
    seeds = {"seed": seed, "data_seed": seed, "growth_seed": seed * SEEDS_APART}
    training = {**experiment.run.training, **arm.training, **seeds}
    # Inits belong to the stages: a later stage's init must not keep runs from sharing the stages before it.
    schedule = with_inits(schedule, training.pop("growth_init", None))
    return dataclasses.replace(experiment.run, training=training, schedule=schedule)


def find_diverged(jobs: Sequence[Job], root: Path) -> set[Path]:
    """Return the directories of runs that diverged, or whose shared prefix did; it must precede them in `jobs`."""
    diverged: set[Path] = set()
    for job in jobs:
        if (root / job.directory / DIVERGED_FILE).exists() or job.parent in diverged:
            diverged.add(job.directory)
    return diverged


def add_shared_prefixes(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs, preceded by jobs for the steps that two or more of them share, parents before their children.

    Runs with the same settings and seed have the same state, bit for bit, up to the first step at which their
    structures, inits, lengths of stages or learning rates differ, so those steps are trained once. If the
    learning-rate schedule spans the whole run, this may be any step (`trunks`); else only whole stages are shared.
    """
    over_run = [job for job in jobs if _spans_run(job)]
    by_directory = {job.directory: job for job in _branch_off(over_run)}
    trunks = [job for job in by_directory.values() if job.end_step is not None]
    return [*trunks, *_add_whole_stages([by_directory.get(job.directory, job) for job in jobs])]


def _add_whole_stages(jobs: Sequence[Job]) -> list[Job]:
    """Return the jobs, preceded by jobs for the whole stages that two or more of them share, shortest first."""
    sharing: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        for key in _hash_prefixes(job):
            sharing.setdefault(key, []).append(number)
    longest: dict[tuple[int, ...], str] = {}  # jobs that share several prefixes need only the longest
    for key, numbers in sharing.items():
        group = tuple(numbers)
        if len(group) > 1 and _read_length(key) >= _read_length(longest.get(group, "0")):
            longest[group] = key
    prefixes = {key: _build_prefix(jobs[group[0]], key) for group, key in longest.items()}
    shortest_first = [prefixes[key] for key in sorted(prefixes, key=_read_length)]
    return [_set_parent(job, prefixes) for job in (*shortest_first, *jobs)]


def _hash_prefixes(job: Job) -> Iterator[str]:
    """Yield `STAGES-HASH` for each prefix that another run could share; the hash covers all that it depends on."""
    if _spans_run(job):
        return
    for length in range(1, len(job.schedule.structures)):
        if any(job.schedule.tokens[:length]):  # otherwise a pretrained model, and nothing to train
            yield f"{length}-{hash_json(to_plain(_cut_config(job, length)))}"


def _spans_run(job: Job) -> bool:
    return job.config.training.get("lr_span") == "run"


def _branch_off(jobs: Sequence[Job]) -> list[Job]:
    """Return the trunks of some jobs, then the jobs, each with the trunk that it begins with as its parent."""
    traces = [trace_job(job) for job in jobs]
    trunks, parents = find_trunks(traces)
    built: list[Job] = []
    for trunk in trunks:
        job = jobs[trunk.run]
        begins = None if trunk.parent is None else built[trunk.parent].directory
        # The name says which state the trunk ends with. So the trunk is found again when arms are added or removed,
        # wherever it begins and with whichever run's settings it was trained.
        is_inside = job.find_stage_inside(trunk.end) is not None
        digest = hash_json([traces[trunk.run].hash_until(trunk.end), trunk.end, is_inside])
        cut = dataclasses.replace(job, arm="", directory=Path(PREFIXES, digest), end_step=trunk.end)
        built.append(dataclasses.replace(cut, parent=begins, first_step=trunk.begin))
    for job, parent in zip(jobs, parents, strict=True):
        if parent is not None:
            job = dataclasses.replace(job, parent=built[parent].directory, first_step=trunks[parent].end)
        built.append(job)
    return built


def trace_job(job: Job) -> Trace:
    """Return what each step of a run depends on."""
    spans, rates, _ = job.preview
    keys = [hash_json(_list_dependencies(job, span)) for span in spans]
    return Trace(tuple(keys), tuple(np.array(stage, dtype=float) for stage in rates))


def _list_dependencies(job: Job, span: StageSpan) -> Json:
    """Return all that the states of a stage depend on, but for its length and its learning rates."""
    schedule, training = job.schedule, keep_first_stages(job.config.training, span.number + 1)
    left_out = {*_RATE_ARGUMENTS, *(_GROWTH_ARGUMENTS if not span.number else ())}
    training = {name: value for name, value in training.items() if name not in left_out}
    stages = tuple(dataclasses.replace(stage, tokens=0) for stage in schedule.stages[: span.number])
    config = dataclasses.replace(job.config, training=training, schedule=GrowthSchedule(schedule.initial, stages))
    share = any(isinstance(value := training.get(name), float) and value < 1 for name in _INTERVALS)
    dependencies = [to_plain(config), job.preview.spans[-1].end_step if share else None]
    steps = training.get("new_parameter_steps")
    if span.number and isinstance(steps, float) and 0 < steps < 1:  # a share of the stage
        dependencies.append(span.steps)
    return dependencies


def _read_length(key: str) -> int:
    return int(key.partition("-")[0])


def _cut_config(job: Job, length: int) -> RunConfig:
    """Return the config of a run's first stages, without settings that do not affect them."""
    schedule, training = job.schedule, keep_first_stages(job.config.training, length)
    if length == 1:
        training = {name: value for name, value in training.items() if name not in _GROWTH_ARGUMENTS}
    first = GrowthSchedule(schedule.initial, schedule.stages[: length - 1], schedule.initial_tokens)
    return dataclasses.replace(job.config, training=training, schedule=first)


def _build_prefix(job: Job, key: str) -> Job:
    length, _, digest = key.partition("-")
    return Job("", job.budget, job.seed, _cut_config(job, int(length)), Path(PREFIXES, digest))


def _set_parent(job: Job, prefixes: Mapping[str, Job]) -> Job:
    """Return the job with the longest shared prefix that it begins with as its parent."""
    keys = [key for key in _hash_prefixes(job) if key in prefixes]
    return dataclasses.replace(job, parent=prefixes[keys[-1]].directory) if keys else job
