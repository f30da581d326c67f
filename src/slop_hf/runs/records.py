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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..dims import ModelDims
from ..errors import RunError
from ..io.serialization import parse, read_json, to_json

_INCOMPLETE = "the stage is not complete"


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
        return parse(cls, read_json(path, if_missing=_INCOMPLETE, error=RunError), where=str(path), error=RunError)


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
