"""Where a run keeps what happened: `RunDirectory` and `RunFacts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from ..errors import RunError
from ..io.files import write_text
from ..io.serialization import parse, read_json, to_json
from ..schedule import GrowthSchedule
from .records import _INCOMPLETE, EvalRecord, StageRecord

SCHEDULE_FILE = "schedule.yaml"
RECORD_FILE = "stage.json"
STATE_FILE = "trainer_state.json"
RUN_FILE = "run.json"
EVAL_FILE = "evaluations.json"
OPTIMIZER_STEM = "optimizer"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"


@dataclass(frozen=True)
class RunDirectory:
    """A run on disk, for those who resume it and those who report on it."""

    path: Path

    def __init__(self, path: str | Path) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def exists(self) -> bool:
        """Whether a run lies here."""
        return (self.path / SCHEDULE_FILE).is_file()

    @cached_property
    def schedule(self) -> GrowthSchedule:
        """The schedule of the run.

        Raises:
            RunError: where there is no run.
        """
        if not self.exists:
            raise RunError(
                f"{self.path} is not a run: it has no {SCHEDULE_FILE}; give the output directory of `slop train`"
            )
        return GrowthSchedule.from_yaml(self.path / SCHEDULE_FILE)

    def stage_dir(self, number: int) -> Path:
        """Where a finished stage lies."""
        return self.path / self.schedule.stage_name(number)

    def optimizer_files(self, number: int) -> list[Path]:
        """AdamW's state of a finished stage: one file, several, or none any more."""
        return sorted(self.stage_dir(number).glob(f"{OPTIMIZER_STEM}*.safetensors"))

    def running_dir(self, number: int) -> Path:
        """Where a stage in training keeps its checkpoints."""
        return self.path / f"{self.schedule.stage_name(number)}.running"

    @property
    def finished_stages(self) -> int:
        """How many stages have finished, the initial one counted; they come first and without a gap."""
        names = self.schedule.stage_names
        return next((n for n, name in enumerate(names) if not (self.path / name).is_dir()), len(names))

    @property
    def is_finished(self) -> bool:
        """Whether every stage has."""
        return self.finished_stages == len(self.schedule.structures)

    def records(self) -> list[StageRecord]:
        """The records of the finished stages, in order."""
        return [StageRecord.from_json(self.stage_dir(number) / RECORD_FILE) for number in range(self.finished_stages)]

    def evaluations(self, number: int) -> list[EvalRecord]:
        """What a finished stage scored; empty where it was not evaluated.

        Raises:
            RunError: where the file is not one of evaluations.
        """
        path = self.stage_dir(number) / EVAL_FILE
        if not path.exists():
            return []
        return parse(
            list[EvalRecord], read_json(path, if_missing=_INCOMPLETE, error=RunError), where=str(path), error=RunError
        )

    def add_evaluations(self, number: int, records: Sequence[EvalRecord]) -> Path:
        """Write what a finished stage scored beside what it scored before.

        A record takes the place of an earlier one of the same task, limit, examples and moment.

        Raises:
            RunError: where the file that is there is not one of evaluations.
        """
        kept = {one.key: one for one in self.evaluations(number)}
        kept |= {one.key: one for one in records}
        return write_text(self.stage_dir(number) / EVAL_FILE, to_json(list(kept.values())))

    def history(self) -> list[dict[str, Any]]:
        """The log of all finished stages on one axis.

        Entries hold `step`, `stage`, `tokens` and `train_flops` (all counted over the run) beside `loss` or
        `eval_loss`.
        """
        if not self.finished_stages:
            return []
        path = self.stage_dir(self.finished_stages - 1) / STATE_FILE
        return list(read_json(path, if_missing=_INCOMPLETE, error=RunError)["log_history"])


@dataclass(frozen=True)
class RunFacts:
    """What must be the same whenever a run is resumed, or it would see other data.

    Args:
        block_size: tokens of a training block.
        blocks: of the training data.
        blocks_per_step: of an optimizer step, in each stage.
        data_seed: of their order.
        data: the fingerprint of the data with its mixture; "" where it has none.
        vocabulary: a hash of the tokenizer; "" where there is none.
        run_id: a name for the tools that follow the run; "" until it has begun.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    block_size: int
    blocks: int
    blocks_per_step: tuple[int, ...]
    data_seed: int
    run_id: str = ""
    data: str = ""
    vocabulary: str = ""

    def batches(self, stages: int) -> tuple[int, ...]:
        """`blocks_per_step` of a schedule of so many stages; those that the run did not have take its last one's."""
        return (*self.blocks_per_step[:stages], *self.blocks_per_step[-1:] * (stages - len(self.blocks_per_step)))

    def save(self, run: RunDirectory) -> None:
        """Write it into a run's directory."""
        write_text(run.path / RUN_FILE, to_json(self))

    @classmethod
    def load(cls, run: RunDirectory) -> RunFacts | None:
        """That of a run; None for a run of a release that wrote none.

        Raises:
            RunError: for a file that is none.
        """
        path = run.path / RUN_FILE
        if not path.exists():
            return None
        return parse(cls, read_json(path, if_missing=_INCOMPLETE, error=RunError), where=str(path), error=RunError)

    def check(self, given: RunFacts, run: RunDirectory) -> None:
        """Refuse to resume with other data.

        Raises:
            RunError: naming what differs.
        """
        if self.vocabulary and given.vocabulary and self.vocabulary != given.vocabulary:
            raise RunError(
                f"{run.path} was begun with another tokenizer: its vocabulary cannot change or grow between stages; "
                f"resume with the one in {run.stage_dir(0)} (`tokenizer` in the data), or begin another run"
            )
        for name in ("block_size", "blocks", "data_seed"):
            if getattr(self, name) != getattr(given, name):
                raise RunError(
                    f"{run.path} was begun with {name} {getattr(self, name)}, not {getattr(given, name)}; "
                    "resume with the same data and seeds, or choose another output directory"
                )
        if self.data and given.data and self.data != given.data:
            raise RunError(
                f"{run.path} was begun with other documents, or other weights of its mixture; "
                "resume with the same data, or choose another output directory"
            )
