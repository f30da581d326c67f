"""`RunDirectory`: the files of a run.

    output_dir/
      schedule.yaml                       the growth schedule
      run.json                            the facts that must not change when the run is resumed
      settings.json                       the settings that may change, with the steps from which they hold
      launches.json                       when `train_run` was called, with which command and data
      stage-0-initial/                    a stock transformers model, stage.json, trainer_state.json, callbacks.json;
                                          evaluations.json once it has been evaluated
      stage-1-layer/ ...                  the same for each stage
      stage-2-ffn.running/checkpoint-N/   Trainer's checkpoints of the stage in training
      report/                             tables and figures
      .lock/                              the processes that write into the directory (`runs.lock`)

A stage's directory is complete or absent: it is written under a temporary name and renamed. It keeps
`optimizer.safetensors` until the next stage has a checkpoint to resume from.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from typing_extensions import Self

from ..errors import RunError
from ..io.files import write_text
from ..io.record import Record
from ..io.serialization import Json, parse, read_json, to_json
from ..schedule import GrowthSchedule
from .records import INCOMPLETE, EvalRecord, StageRecord

SCHEDULE_FILE = "schedule.yaml"
RECORD_FILE = "stage.json"
STATE_FILE = "trainer_state.json"
EVAL_FILE = "evaluations.json"
RUNNING = ".running"  # end of the name of a directory of a stage in training
CHECKPOINT = "checkpoint-"  # beginning of the name of a checkpoint's directory, before its step
OPTIMIZER_STEM = "optimizer"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"
_CHECKPOINT_NAME = re.compile(rf"{CHECKPOINT}([0-9]+)")


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, whether it is in training, finished or about to begin."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def exists(self) -> bool:
        """Whether the directory holds a run."""
        return (self.path / SCHEDULE_FILE).is_file()

    @cached_property
    def schedule(self) -> GrowthSchedule:
        """The schedule of the run; a `RunError` if the directory holds no run."""
        if not self.exists:
            raise RunError(
                f"{self.path} is not a run: it has no {SCHEDULE_FILE}; give the output directory of `slop train`"
            )
        return GrowthSchedule.from_yaml(self.path / SCHEDULE_FILE)

    def stage_dir(self, number: int) -> Path:
        """Return the directory of a finished stage."""
        return self.path / self.schedule.stage_name(number)

    def optimizer_files(self, number: int) -> list[Path]:
        """Return the files of AdamW's state at the end of a finished stage; none if it has been removed."""
        return sorted(self.stage_dir(number).glob(f"{OPTIMIZER_STEM}*.safetensors"))

    def running_dir(self, number: int) -> Path:
        """Return the directory of a stage in training, which holds its checkpoints."""
        return self.path / f"{self.schedule.stage_name(number)}{RUNNING}"

    @property
    def whole_stages(self) -> int:
        """Number of finished stages before the first one that is missing, whatever comes after it."""
        names = self.schedule.stage_names
        return next((n for n, name in enumerate(names) if not (self.path / name / RECORD_FILE).is_file()), len(names))

    @property
    def finished_stages(self) -> int:
        """Number of finished stages, the initial one included; they come first and without a gap.

        Raises:
            RunError: if the directory of a stage is not whole, or is missing although there are later ones.
        """
        count, names = self.whole_stages, self.schedule.stage_names
        if count == len(names):
            return count
        missing, back = self.path / names[count], f"`slop rollback {self.path} --to-stage {count - 1}`"
        later = [path for n in range(count + 1, len(names)) for path in (self.stage_dir(n), self.running_dir(n))]
        if present := next((path.name for path in later if path.is_dir()), None):
            remedy = f"or {back} and train from there" if count else "or begin another run"
            raise RunError(
                f"{missing} is missing or not whole, but {present} is there; restore it from a copy, {remedy}"
            )
        if missing.exists():
            raise RunError(f"{missing} is not a finished stage: it has no {RECORD_FILE}; move it away")
        return count

    @property
    def is_finished(self) -> bool:
        """Whether every stage has finished."""
        return self.finished_stages == len(self.schedule.structures)

    def select_stages(self, numbers: Sequence[int] | None = None, *, allow_gap: bool = False) -> Sequence[int]:
        """Return the given stage numbers, or the numbers of all finished stages.

        Args:
            allow_gap: whether stages before a missing one may be selected although there are later ones.

        Raises:
            RunError: if there is no run, no stage has finished, or one of the given stages has not.
        """
        finished = self.whole_stages if allow_gap else self.finished_stages
        if not finished:
            raise RunError(f"{self.path} has no finished stage yet: let `slop train` finish its first one")
        numbers = range(finished) if numbers is None else numbers
        for number in numbers:
            if not 0 <= number < finished:
                raise RunError(f"{self.path} has no finished stage {number}: choose one from 0 to {finished - 1}")
        return numbers

    def records(self) -> list[StageRecord]:
        """Return the records of the finished stages, in order."""
        return [StageRecord.from_json(self.stage_dir(number) / RECORD_FILE) for number in range(self.finished_stages)]

    def evaluations(self, number: int) -> list[EvalRecord]:
        """Return the scores of a finished stage; empty if it was not evaluated."""
        path = self.stage_dir(number) / EVAL_FILE
        if not path.exists():
            return []
        content = read_json(path, if_missing=INCOMPLETE, error=RunError)
        return parse(list[EvalRecord], content, where=str(path), error=RunError)

    def add_evaluations(self, number: int, records: Sequence[EvalRecord]) -> Path:
        """Add scores to a finished stage, and return their file; a record replaces one with the same `key`."""
        by_key = {record.key: record for record in [*self.evaluations(number), *records]}
        return write_text(self.stage_dir(number) / EVAL_FILE, to_json(list(by_key.values())))

    def history(self) -> list[dict[str, Json]]:
        """Return the log of all finished stages.

        Entries hold `step`, `stage`, `tokens` and `train_flops` (all counted over the run) and `loss` or `eval_loss`.
        """
        if not self.finished_stages:
            return []
        path = self.stage_dir(self.finished_stages - 1) / STATE_FILE
        state = read_json(path, if_missing=INCOMPLETE, error=RunError)
        history = state.get("log_history") if isinstance(state, dict) else None
        if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
            raise RunError(f"{path} has no log_history: {INCOMPLETE}")
        return history


def list_checkpoints(run: RunDirectory, stage: int) -> list[Path]:
    """Return the checkpoints of a stage in training, newest first; copies under other names are not among them."""
    paths = [path for path in run.running_dir(stage).glob(f"{CHECKPOINT}*") if _CHECKPOINT_NAME.fullmatch(path.name)]
    paths = [path for path in paths if path.is_dir()]
    return sorted(paths, key=parse_step, reverse=True)


def parse_step(path: Path) -> int:
    """Return the global step of a checkpoint, from the name of its directory."""
    return int(path.name.removeprefix(CHECKPOINT))


def find_newest_model(run: RunDirectory) -> Path:
    """Return the directory of a run's newest model: its newest checkpoint, or else its last finished stage.

    Raises:
        RunError: if there is no run, or it has saved no model yet.
    """
    finished = run.finished_stages
    checkpoints = list_checkpoints(run, finished) if finished < len(run.schedule.stage_names) else []
    if not checkpoints and not finished:
        raise RunError(f"{run.path} has no model yet: let `slop train` save its first checkpoint or finish a stage")
    return checkpoints[0] if checkpoints else run.stage_dir(finished - 1)


class RunFile(Record):
    """A record in a run's directory, under the same name in every run."""

    file_name: ClassVar[str]

    def save(self, run: RunDirectory) -> None:
        self.to_json(run.path / self.file_name)

    @classmethod
    def load(cls, run: RunDirectory) -> Self | None:
        """Read the record of a run; return None if the run has none."""
        path = run.path / cls.file_name
        return cls.from_json(path) if path.exists() else None


@dataclass(frozen=True)
class RunFacts(RunFile, error=RunError, if_missing=INCOMPLETE):
    """Facts that must not change when a run is resumed: with others it would be another run. Stored as `run.json`.

    Those of a run that an earlier release began, or that continues another run, may be unknown; they are completed
    when it is resumed.

    Args:
        block_size: tokens per training block.
        blocks: number of blocks of the training data.
        blocks_per_step: blocks per optimizer step, for each stage.
        data_seed: seed of the order of the blocks.
        run_id: name of the run for experiment trackers; "" until it has begun.
        data: fingerprint of the data and its mixture; "" for data without one.
        vocabulary: hash of the tokenizer; "" without one.
        frozen: names of the initial model's frozen parameters.
        sample: hash of a sample of the blocks, for data without a fingerprint.
        seed: seed of the initial weights and of dropout.
        growth_seed, growth_noise: arguments of all growths; None if unknown.
        growth_init: init of stages that have none in the schedule; None for the default, or if unknown.
        carry_optimizer_state: whether AdamW's moments grow with the weights; None if unknown. The next fact says more;
            earlier releases read and wrote this one alone.
        optimizer_state_at_growth: "new", "carried" or "kept"; None if unknown.
        optimizer: name of the optimizer; "adamw" for all kinds with AdamW's state.
        dtype: type of the weights that the optimizer updates.
        model: settings of the initial model's config that growth does not change.
    """

    file_name = "run.json"

    block_size: int
    blocks: int
    blocks_per_step: tuple[int, ...]
    data_seed: int
    run_id: str = ""
    data: str = ""
    vocabulary: str = ""
    frozen: tuple[str, ...] = ()
    sample: str = ""
    seed: int | None = None
    growth_seed: int | None = None
    growth_noise: float | None = None
    growth_init: dict[str, str] | str | None = None
    carry_optimizer_state: bool | None = None
    optimizer: str = ""
    dtype: str = ""
    model: dict[str, Json] = field(default_factory=dict)
    optimizer_state_at_growth: str | None = None

    def __post_init__(self) -> None:
        if self.optimizer_state_at_growth is None and self.carry_optimizer_state is not None:
            state = "carried" if self.carry_optimizer_state else "new"
            object.__setattr__(self, "optimizer_state_at_growth", state)  # a frozen dataclass

    @property
    def knows_growth(self) -> bool:
        """Whether the arguments of growth are known."""
        return self.growth_seed is not None

    def batches(self, stages: int) -> tuple[int, ...]:
        """Return `blocks_per_step` for a schedule of `stages` stages; stages new to the run take the last value."""
        return (*self.blocks_per_step[:stages], *self.blocks_per_step[-1:] * (stages - len(self.blocks_per_step)))

    def check(self, given: RunFacts, run: RunDirectory) -> None:
        """Refuse to resume a run with data or arguments that give other facts."""
        if self.vocabulary and given.vocabulary and self.vocabulary != given.vocabulary:
            raise RunError(
                f"{run.path} was begun with another tokenizer, and a vocabulary cannot change between stages; "
                f"resume with the tokenizer in {run.stage_dir(0)} (`tokenizer` in the data), or begin another run"
            )
        for name, remedy in _REMEDIES.items():
            before, now = getattr(self, name), getattr(given, name)
            if before not in (None, "") and now not in (None, "") and before != now:
                begun = f"{run.path} was begun with {name} {before}, not {now}"
                raise RunError(f"{begun}; {remedy}, or choose another output directory")
        for name, before in self.model.items():
            if not _agree(before, given.model.get(name, before)):
                raise RunError(
                    f"{run.path} was begun with a model whose {name} is {before}, not {given.model[name]}; "
                    "resume with the same model settings, or choose another output directory"
                )
        if (self.data and given.data and self.data != given.data) or (
            self.sample and given.sample and self.sample != given.sample
        ):
            raise RunError(
                f"{run.path} was begun with other documents, or other weights of its mixture; "
                "resume with the same data, or choose another output directory"
            )
        if differing := sorted(set(self.frozen) ^ set(given.frozen)):
            begun, now = ("frozen", "trained") if differing[0] in self.frozen else ("trained", "frozen")
            raise RunError(
                f"{run.path} was begun with {differing[0]} {begun}, not {now}; "
                "set requires_grad of each parameter as it was, or choose another output directory"
            )

    def forget_choices(self) -> RunFacts:
        """Return the facts of another run on the same data, which has its own seeds, growths and optimizer."""
        return replace(
            self,
            seed=None,
            growth_seed=None,
            growth_noise=None,
            growth_init=None,
            carry_optimizer_state=None,
            optimizer_state_at_growth=None,
            optimizer="",
        )

    def complete(self, given: RunFacts) -> RunFacts:
        """Return the facts with those of a resumption for the unknown ones."""
        unknown = {name for name in _COMPLETED if getattr(self, name) in (None, "", {})}
        if not self.knows_growth:
            unknown.add("growth_init")
        return replace(self, **{name: getattr(given, name) for name in unknown})


def _agree(before: Json, now: Json) -> bool:
    """Whether settings are equal, in what both have: another release of transformers may know more of them."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(_agree(value, now.get(name, value)) for name, value in before.items())
    return bool(before == now)


#: Facts that a resumption must share, with what to do about others.
_REMEDIES = {
    **dict.fromkeys(("block_size", "blocks", "data_seed"), "resume with the same data and seeds"),
    **dict.fromkeys(("seed", "growth_seed", "growth_noise"), "resume with the same value"),
    "optimizer_state_at_growth": "resume with the same value",
    "optimizer": "resume with the same optimizer",
    "dtype": "resume with weights of the same type",
}
_COMPLETED = (
    *("sample", "seed", "growth_seed", "growth_noise", "carry_optimizer_state", "optimizer_state_at_growth"),
    *("optimizer", "dtype", "model"),
)
