"""`StageRecord`, `RunDirectory` and `RunFacts`: what really happened, and where a run keeps it.

    output_dir/
      schedule.yaml                       the plan, as run
      run.json                            what has to be the same whenever it is resumed
      stage-0-initial/                    a stock transformers model, stage.json, trainer_state.json;
                                          evaluations.json once it has been evaluated
      stage-1-layer/ ...                  the same after each stage
      stage-2-ffn.running/checkpoint-N/   Trainer's checkpoints of the stage in training
      report/                             tables and figures

A stage's directory is complete or absent: it is written aside and renamed. `optimizer.safetensors` lies in it until
the next stage has something of its own to resume from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from .dims import ModelDims
from .errors import RunError
from .schedule import GrowthSchedule
from .serialization import parse, read_json, to_json, write_text

SCHEDULE_FILE = "schedule.yaml"
RECORD_FILE = "stage.json"
STATE_FILE = "trainer_state.json"
RUN_FILE = "run.json"
EVAL_FILE = "evaluations.json"
_INCOMPLETE = "the stage is not complete"
OPTIMIZER_STEM = "optimizer"
OPTIMIZER_FILE = f"{OPTIMIZER_STEM}.safetensors"


def perplexity(loss: float) -> float:
    """`exp(loss)` of a loss in nats a token; about 1e304 where a diverged run's would be no float.

    >>> perplexity(0.0), perplexity(1e6) < float("inf")
    (1.0, True)
    """
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class ConsumedTokens:
    """What a stage has trained on of one source: a stretch of the source's own stream.

    The stream holds the source's blocks in passes, each pass in an order of its own (`data.order.StreamOrder`), which
    the source's tokens, `data_seed` and `block_size` determine.

    Args:
        source: its name; `corpus` where there is one only.
        first_token, end_token: of the stretch, counted from the beginning of the run.
        available_tokens: in the source; what is above has been seen before.
        weight: its share of the run's tokens.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    source: str
    first_token: int
    end_token: int
    available_tokens: int
    weight: float

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.end_token - self.first_token


@dataclass(frozen=True)
class StageRecord:
    """What happened in one stage.

    Args:
        stage: its number; 0 is the initial model.
        name: the name of its directory.
        operators: what grew at its beginning.
        dims: its structure.
        parameters: the model's true number of parameters.
        tokens, total_tokens: tokens trained on in this stage, and up to its end.
        first_token: position of its first token in the run's token stream.
        steps, global_step: optimizer steps of this stage, and up to its end.
        flops, total_flops: training FLOPs (`cost.flops_per_token`) of this stage, and up to its end.
        seconds: wall-clock seconds of training, without evaluation and saving.
        devices: processes that shared the work; `seconds * devices / 3600` are device hours.
        train_loss: mean training loss over the stage's last logging interval, in nats a token.
        eval_loss: loss on the held-out data at the end of the stage.
        eval_losses: the same of each source of a mixture; `eval_loss` is their mean by the sources' shares.
        eval_loss_after_growth: the same right after the growth, before training.
        perplexity: `exp(eval_loss)`.
        data: what was trained on, by source.
        data_fingerprint: of all of it, "" where the data has none; and `data_seed`, of its order.
        init: the inits of the growth, by operator.
        growth_seed: the seed that new entries were drawn with.
        growth_noise: on copies, as a share of `initializer_range`; None in records of earlier releases.
        versions: of slop_hf, transformers and torch.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    stage: int
    name: str
    dims: ModelDims
    parameters: int
    tokens: int
    total_tokens: int
    first_token: int
    steps: int
    global_step: int
    flops: float
    total_flops: float
    seconds: float
    operators: tuple[str, ...] = ()
    devices: int = 1
    train_loss: float | None = None
    eval_loss: float | None = None
    eval_loss_after_growth: float | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)
    perplexity: float | None = None
    data: tuple[ConsumedTokens, ...] = ()
    data_fingerprint: str = ""
    data_seed: int | None = None
    init: dict[str, str] = field(default_factory=dict)
    growth_seed: int | None = None
    growth_noise: float | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def device_hours(self) -> float:
        """The hours of its training, times the devices that shared it."""
        return self.seconds * self.devices / 3600

    def to_json(self) -> str:
        """The record as JSON text."""
        return to_json(self)

    @classmethod
    def from_json(cls, path: str | Path) -> StageRecord:
        """Read a record.

        Raises:
            RunError: where the file is not one.
        """
        return parse(cls, read_json(path, missing=_INCOMPLETE, error=RunError), where=str(path), error=RunError)


@dataclass(frozen=True)
class EvalRecord:
    """What a model scored on one task.

    Args:
        task: its name, as the harness has it; `perplexity` for held-out text.
        metrics: value by metric, such as `acc_norm`.
        stderr: standard error by metric, where there is one.
        num_fewshot: examples before each question; None where a task has none of its own.
        documents: how many were scored.
        limit: the most that were asked for; None for all.
        when: `end` of the stage, or `after_growth`, before it was trained.
        weights_hash: of the model's weights.
        harness: what scored it, with its version.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    task: str
    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    num_fewshot: int | None = None
    documents: int | None = None
    limit: int | None = None
    when: str = "end"
    weights_hash: str = ""
    harness: str = ""

    @property
    def key(self) -> tuple[str, int | None, int | None, str]:
        """What a stage has one record of."""
        return self.task, self.limit, self.num_fewshot, self.when


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
            list[EvalRecord], read_json(path, missing=_INCOMPLETE, error=RunError), where=str(path), error=RunError
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
        return list(read_json(path, missing=_INCOMPLETE, error=RunError)["log_history"])


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
        return parse(cls, read_json(path, missing=_INCOMPLETE, error=RunError), where=str(path), error=RunError)

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
