"""The runs that an experiment consists of, and the prefixes that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..io.serialization import hash_json, to_plain
from ..schedule import GrowthSchedule
from ..training import RunConfig
from ..training.arguments import PER_STAGE

RUNS, PREFIXES = "runs", "trunks"
CONFIG_FILE, LOG_FILE, PREFIX_FILE = "run.yaml", "log.txt", "trunk"
DIVERGED_FILE = "diverged.txt"  # in the directory of a run


#: Training arguments that matter only once a model has been grown.
_OF_GROWTH = ("carry_optimizer_state", "rewarm_steps", "growth_noise", "eval_after_growth", "growth_seed")


#: Growth seeds of one run are `growth_seed + stage`: those of different runs must not meet.
SEEDS_APART = 1000


@dataclass(frozen=True)
class Job:
    """One run of a comparison, or a trunk: the beginning that several runs have in common.

    Args:
        arm: its name; "" for a trunk.
        budget: multiple of the scale's.
        seed: of weights, data order and growth.
        config: the run, with its schedule.
        place: of its directory in the comparison's.
        parent: the place of the trunk that it begins with; None where it begins alone.
    """

    arm: str
    budget: float
    seed: int
    config: RunConfig
    place: Path
    parent: Path | None = None

    @property
    def schedule(self) -> GrowthSchedule:
        """Its schedule."""
        return self.config.read_schedule()

    @property
    def name(self) -> str:
        """What to call it: arm, budget where that is another one, seed."""
        share = f" ×{self.budget:g}" if self.budget != 1 else ""
        return f"{self.arm}{share}, seed {self.seed}" if self.arm else f"trunk {self.place.name[:8]}, seed {self.seed}"


def find_diverged(runs: Sequence[Job], root: Path) -> set[Path]:
    """The places of runs that have diverged, or cannot begin, as their trunk has.

    Args:
        runs: each after its trunk.
        root: the directory that their places are in.
    """
    found: set[Path] = set()
    for run in runs:
        if (root / run.place / DIVERGED_FILE).exists() or run.parent in found:
            found.add(run.place)
    return found


def beside(root: Path, run: Job, name: str) -> Path:
    """A file beside the directory of a run, such as `seed-0.run.yaml`."""
    return (root / run.place).with_name(f"{run.place.name}.{name}")


def add_shared_prefixes(runs: Sequence[Job]) -> list[Job]:
    """The runs, and before them the trunks that two or more of them begin with, shortest first.

    Stages from the initial one on that have the same settings, structures, tokens, inits and seed give the same
    weights, bit for bit, and need no training twice. Under a learning rate that spans the run, a stage depends on
    those after it, and nothing is shared.
    """
    beginnings: dict[str, list[tuple[int, Job]]] = {}
    for number, run in enumerate(runs):
        for length, key in _beginnings(run):
            beginnings.setdefault(f"{length}-{key}", []).append((number, run))
    shared = {key: found for key, found in beginnings.items() if len(found) > 1}
    trunks = {key: _trunk(key, found[0][1]) for key, found in _longest_only(shared).items()}
    in_order = sorted(trunks.items(), key=lambda item: len(item[1].schedule.structures))
    placed = [_on_trunk(run, key, trunks) for key, run in in_order]
    return placed + [_on_trunk(run, "", trunks) for run in runs]


def _beginnings(run: Job) -> Iterator[tuple[int, str]]:
    """For each number of stages that could be shared with another run: what decides their weights."""
    if run.config.training.get("lr_span") == "run":
        return
    for length in range(1, len(run.schedule.structures)):
        if not any(run.schedule.tokens[:length]):
            continue  # a pretrained model: there is nothing to train once
        yield length, hash_json(to_plain(_beginning(run, length)))


def _beginning(run: Job, length: int) -> RunConfig:
    """The first stages of a run, and no setting that does not reach them."""
    schedule, training = run.schedule, keep_first_stages(run.config.training, length)
    if length == 1:
        training = {name: value for name, value in training.items() if name not in _OF_GROWTH}
    first = GrowthSchedule(schedule.initial, schedule.stages[: length - 1], schedule.initial_tokens)
    return dataclasses.replace(run.config, training=training, schedule=first)


def keep_first_stages(training: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Training arguments with those that are given stage by stage cut to the first so many.

    >>> keep_first_stages({"stage_learning_rates": [3e-3, 2e-3, 1e-3], "batch_tokens": [64]}, 2)
    {'stage_learning_rates': [0.003, 0.002], 'batch_tokens': [64]}
    """
    by_stage = {name: training[name] for name in PER_STAGE if isinstance(training.get(name), (list, tuple))}
    return {**training, **{name: list(values[:count]) for name, values in by_stage.items()}}


def _longest_only(shared: dict[str, list[tuple[int, Job]]]) -> dict[str, list[tuple[int, Job]]]:
    """Without beginnings that are shared by just the runs which share a longer one."""
    longest: dict[tuple[int, ...], str] = {}
    for key, found in shared.items():
        group = tuple(number for number, _ in found)
        if group not in longest or _length(key) > _length(longest[group]):
            longest[group] = key
    return {key: shared[key] for key in longest.values()}


def _length(key: str) -> int:
    return int(key.split("-")[0])


def _trunk(key: str, run: Job) -> Job:
    return Job("", run.budget, run.seed, _beginning(run, _length(key)), Path(PREFIXES, key.partition("-")[2]))


def _on_trunk(run: Job, own: str, trunks: dict[str, Job]) -> Job:
    """The run with the longest trunk that it begins with."""
    keys = [f"{length}-{key}" for length, key in _beginnings(run)]
    fitting = [key for key in keys if key in trunks and key != own]
    return dataclasses.replace(run, parent=trunks[fitting[-1]].place) if fitting else run
