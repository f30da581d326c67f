"""`GrowthReceipt`: the record of a growth, and `GrowthProbe`: its effect, measured on a batch of tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..dims import ModelDims
from ..errors import GrowthError
from ..io.record import Record

RECEIPT_FILE = "growth_receipt.json"
#: Name of the receipt in directories that earlier releases wrote.
_EARLIER_RECEIPT_FILE = "growth.json"

#: A growth counts as exact if its error is at most this many rounding errors of the dtype: both models round.
EXACT_WITHIN = 4.0


@dataclass(frozen=True)
class GrowthProbe(Record, error=GrowthError):
    """The effect of a growth on a batch of tokens.

    Differences of logits are relative to the source's largest logit on the batch.

    Args:
        tokens: number of tokens in the batch.
        max_logit_change: largest |Δlogit|.
        mean_logit_change: mean |Δlogit|.
        loss_change: change of the next-token loss, nats per token.
        rounding_floor: largest |Δlogit| of the source between its dtype and another precision.
        live_share: fraction of the new entries with a gradient on the batch; None if there are no new entries.
        copies_spread: root mean square of the differences between copies of a slot and their mean, divided by the
            root mean square of the weights: 0 if copies are equal, None if there are no copies.
    """

    tokens: int
    max_logit_change: float
    mean_logit_change: float
    loss_change: float
    rounding_floor: float
    live_share: float | None = None
    copies_spread: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the function was preserved, up to rounding; in bf16 that is coarse, and small changes pass."""
        return self.max_logit_change <= EXACT_WITHIN * self.rounding_floor


@dataclass(frozen=True)
class GrowthReceipt(Record, error=GrowthError, if_missing="`slop grow` writes it next to the grown checkpoint"):
    """The record of a growth, stored as `growth_receipt.json` next to the grown checkpoint.

    Args:
        source: directory or Hub id of the model before growth.
        source_dims, dims: structures before and after growth.
        source_parameters, parameters: true numbers of parameters before and after growth.
        seconds: wall-clock time, including reading and writing.
        versions: versions of slop_hf, transformers and torch.
        noise: standard deviation of the noise on copies, as a fraction of `initializer_range`; None in receipts of
            earlier releases.
        preserves: whether these inits preserve the function, up to rounding.
        source_hash: hash of the source's weights (`hash_weights`).
        bytes_written: size of the grown weights.
        peak_memory_bytes: largest resident memory of the process.
        probe: effect on a batch of tokens; None if the growth was not verified.
        expert_copies: for each layer, the number of copies of each old expert, itself included, if utilities have
            decided on them; else None.
    """

    source: str
    operators: tuple[str, ...]
    inits: dict[str, str]
    seed: int
    source_dims: ModelDims
    dims: ModelDims
    source_parameters: int
    parameters: int
    seconds: float
    versions: dict[str, str]
    noise: float | None = None
    preserves: bool = False
    source_hash: str | None = None
    bytes_written: int | None = None
    peak_memory_bytes: int | None = None
    probe: GrowthProbe | None = None
    expert_copies: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> GrowthReceipt:
        """Read the receipt of a grown checkpoint, also if an earlier release wrote it.

        Args:
            directory: directory of the grown checkpoint.

        Raises:
            GrowthError: if the directory has no receipt, or a malformed one.
        """
        path, earlier = (Path(directory) / name for name in (RECEIPT_FILE, _EARLIER_RECEIPT_FILE))
        return cls.from_json(earlier if earlier.exists() and not path.exists() else path)
