"""`Job`: one run of an experiment, or a prefix that several runs share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError, SlopError
from ..io.serialization import Json, hash_json, to_plain
from ..schedule import GrowthSchedule
from ..training.batches import PER_STAGE
from ..training.config import RunConfig
from ..training.run_plan import with_inits
from .arms import build_arm_schedule, get_model_fields
from .config import ArmConfig, Experiment

#: Folders of a comparison's directory: the runs of its arms, and the prefixes that they share.
RUNS, PREFIXES = "runs", "trunks"
#: Ends of the names of files next to a run's directory: its config, its output, the directory of its prefix.
CONFIG_FILE, LOG_FILE, PREFIX_FILE = "run.yaml", "log.txt", "trunk"
#: File in the directory of a diverged run.
DIVERGED_FILE = "diverged.txt"
#: Distance between the growth seeds of runs: stage n of a run uses `growth_seed + n`, and no two runs may share one.
SEEDS_APART = 1000
#: Training arguments without effect before the first growth.
_GROWTH_ARGUMENTS = ("carry_optimizer_state", "rewarm_steps", "growth_noise", "eval_after_growth", "growth_seed")


@dataclass(frozen=True)
class Job:
    """One run to train.

    Args:
        arm: name of the arm; empty for a shared prefix.
        budget: multiple of the scale's budget.
        directory: run directory, relative to the directory of the comparison.
        parent: directory of the shared prefix that the run begins with; None if it begins from scratch.
    """

    arm: str
    budget: float
    seed: int
    config: RunConfig
    directory: Path
    parent: Path | None = None

    @property
    def schedule(self) -> GrowthSchedule:
        return self.config.read_schedule()

    @property
    def name(self) -> str:
        """Arm, budget unless it is 1, and seed, for messages and reports."""
        if not self.arm:
            return f"shared prefix {self.directory.name[:8]}, seed {self.seed}"
        return f"{self.arm}{f' ×{self.budget:g}' if self.budget != 1 else ''}, seed {self.seed}"

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run, including its shared prefix."""
        return self.schedule.flops(get_model_fields(self.config), self.config.data.block_size)

    def sibling_file(self, root: Path, name: str) -> Path:
        """Return the path of a file next to the run's directory, such as `seed-0.run.yaml`."""
        return (root / self.directory).with_name(f"{self.directory.name}.{name}")


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
    """Return the jobs, preceded by jobs for the prefixes that two or more of them share, shortest first.

    Runs whose first stages have the same settings, structures, tokens, inits and seed get the same weights from them,
    bit for bit, so those stages are trained once. If the learning-rate schedule spans the whole run, a stage depends
    on those after it, and nothing is shared.
    """
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
    if job.config.training.get("lr_span") == "run":
        return
    for length in range(1, len(job.schedule.structures)):
        if any(job.schedule.tokens[:length]):  # otherwise a pretrained model, and nothing to train
            yield f"{length}-{hash_json(to_plain(_cut_config(job, length)))}"


def _read_length(key: str) -> int:
    return int(key.partition("-")[0])


def _cut_config(job: Job, length: int) -> RunConfig:
    """Return the config of a run's first stages, without settings that do not affect them."""
    schedule, training = job.schedule, keep_first_stages(job.config.training, length)
    if length == 1:
        training = {name: value for name, value in training.items() if name not in _GROWTH_ARGUMENTS}
    first = GrowthSchedule(schedule.initial, schedule.stages[: length - 1], schedule.initial_tokens)
    return dataclasses.replace(job.config, training=training, schedule=first)


def keep_first_stages(training: Mapping[str, Json], count: int) -> dict[str, Json]:
    """Return training arguments for the first `count` stages: lists with one value per stage are cut.

    >>> keep_first_stages({"stage_learning_rates": [3e-3, 2e-3, 1e-3], "batch_tokens": [64]}, 2)
    {'stage_learning_rates': [0.003, 0.002], 'batch_tokens': [64]}
    """
    per_stage = {name: training[name] for name in PER_STAGE if isinstance(training.get(name), (list, tuple))}
    return {**training, **{name: list(values[:count]) for name, values in per_stage.items()}}


def _build_prefix(job: Job, key: str) -> Job:
    length, _, digest = key.partition("-")
    return Job("", job.budget, job.seed, _cut_config(job, int(length)), Path(PREFIXES, digest))


def _set_parent(job: Job, prefixes: Mapping[str, Job]) -> Job:
    """Return the job with the longest shared prefix that it begins with as its parent."""
    keys = [key for key in _hash_prefixes(job) if key in prefixes]
    return dataclasses.replace(job, parent=prefixes[keys[-1]].directory) if keys else job
