"""Records of finished stages: what was trained, on which data, and with which evaluation results."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..dims import ModelDims
from ..errors import RunError
from ..io.record import Record

#: Remedy for a file that a finished stage should have.
INCOMPLETE = "the stage is not complete"

#: Name of the held-out loss in a run's log and in the metrics of an evaluation.
EVAL_LOSS = "eval_loss"

#: Values of `EvalRecord.when`: after the stage's training, or between its growth and its training.
END_OF_STAGE, AFTER_GROWTH = "end", "after_growth"


def compute_perplexity(loss: float) -> float:
    """Return `exp(loss)` of a loss in nats per token, at most about 1e304: a diverged loss would overflow.

    >>> compute_perplexity(0.0), compute_perplexity(1e6) < float("inf")
    (1.0, True)
    """
    return math.exp(min(loss, 700.0))


@dataclass(frozen=True)
class ConsumedTokens(Record, error=RunError, if_missing=INCOMPLETE):
    """The tokens of one source that a stage trained on: a range of the source's own token stream.

    The stream repeats the source's blocks, reshuffled in every pass (`data.order.StreamOrder`); the source's tokens,
    `data_seed` and `block_size` determine it.

    Args:
        source: name of the source; `corpus` if there is only one.
        first_token, end_token: the range, counted from the beginning of the run.
        available_tokens: size of the source; a range beyond it repeats tokens.
        weight: the source's share of the run's tokens.
    """

    source: str
    first_token: int
    end_token: int
    available_tokens: int
    weight: float

    @property
    def tokens(self) -> int:
        return self.end_token - self.first_token


@dataclass(frozen=True)
class StageRecord(Record, error=RunError, if_missing=INCOMPLETE):
    """Record of one finished stage, stored as `stage.json`.

    Args:
        stage: number of the stage; 0 is the initial model.
        name: name of its directory.
        operators: dimensions that grew at its beginning.
        dims: structure of its model.
        parameters: true number of parameters of its model.
        tokens, total_tokens: tokens trained on in this stage, and in all stages up to its end.
        first_token: position of its first token in the run's token stream.
        steps, global_step: optimizer steps of this stage, and of all stages up to its end.
        flops, total_flops: training FLOPs (`cost.flops_per_token`) of this stage, and of all stages up to its end.
        seconds: wall-clock training time, without evaluation and saving.
        devices: number of processes that shared the work; `seconds * devices / 3600` are device hours.
        train_loss: mean training loss over the stage's last logging interval, in nats per token.
        eval_loss: held-out loss at the end of the stage, in nats per token.
        eval_losses: held-out loss per source of a mixture; `eval_loss` is their mean, weighted by the sources' shares.
        eval_loss_after_growth: held-out loss after the growth, before training.
        perplexity: `exp(eval_loss)`.
        data: tokens trained on, per source.
        data_fingerprint: fingerprint of the training data; "" for data without one.
        data_seed: seed of the order of the data.
        init: initialisation of the new entries, per operator.
        growth_seed: seed that new entries were drawn with.
        growth_noise: noise on copies, as a fraction of `initializer_range`; None in records of earlier releases.
        versions: versions of slop-hf, transformers and torch.
    """

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
        """Training time in hours, times the number of devices."""
        return self.seconds * self.devices / 3600


@dataclass(frozen=True)
class EvalRecord(Record, error=RunError, if_missing=INCOMPLETE):
    """Scores of a model on one task.

    Args:
        task: name of the task in lm-eval, or `perplexity` for held-out text.
        metrics: value per metric, such as `acc_norm`.
        stderr: standard error per metric, if it has one.
        num_fewshot: solved examples before each question; None for a group whose tasks differ, and for held-out text.
        documents: number of scored documents (blocks, for held-out text).
        limit: largest number of documents asked for; None for all.
        when: `end` of the stage, or `after_growth`, before the grown model was trained.
        weights_hash: hash of the model's weights.
        harness: name and version of the program that scored the model.
    """

    task: str
    metrics: dict[str, float]
    stderr: dict[str, float] = field(default_factory=dict)
    num_fewshot: int | None = None
    documents: int | None = None
    limit: int | None = None
    when: str = END_OF_STAGE
    weights_hash: str = ""
    harness: str = ""

    @property
    def key(self) -> tuple[str, int | None, int | None, str]:
        """Task, limit, number of examples and moment; a stage keeps one record per key."""
        return self.task, self.limit, self.num_fewshot, self.when
