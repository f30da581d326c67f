"""`GrowthReceipt`: what a growth did, and `GrowthProbe`: what a batch of tokens showed of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..dims import ModelDims
from ..io.serialization import to_json

RECEIPT_FILE = "growth.json"

#: A growth counts as exact while its error is within so many times the rounding error of the dtype: both models round.
EXACT_WITHIN = 4.0


@dataclass(frozen=True)
class GrowthProbe:
    """What a probe batch shows of a growth.

    Logit differences are relative to the largest logit of the source on the batch.

    Args:
        tokens: of the batch.
        max_logit_change, mean_logit_change: |Δlogit|, largest and mean.
        loss_change: change of the next-token loss, nats a token.
        rounding_floor: largest |Δlogit| of the source between its dtype and another precision.
        live_share: share of the new entries that have a gradient on the batch; None where there are none.
        copies_spread: root mean square of the differences between copies of one slot and their mean, over that of the
            weights; 0 is tied, None is without copies.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    tokens: int
    max_logit_change: float
    mean_logit_change: float
    loss_change: float
    rounding_floor: float
    live_share: float | None = None
    copies_spread: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the function stayed, up to rounding; in bf16 that is coarse, and small changes pass."""
        return self.max_logit_change <= EXACT_WITHIN * self.rounding_floor


@dataclass(frozen=True)
class GrowthReceipt:
    """What a growth did, kept as `growth.json` beside the grown checkpoint.

    Args:
        source: the model it began with.
        operators: what grew.
        inits: the init of each operator.
        seed: of the random entries.
        noise: on copies, as a share of `initializer_range`; None in receipts of earlier releases.
        source_dims, dims: structures before and after.
        source_parameters, parameters: true numbers of parameters before and after.
        seconds: wall-clock seconds, reading and writing included.
        versions: of slop_hf, transformers and torch.
        preserves: whether these inits keep the function, up to rounding.
        source_hash: of the source's weights (`weights_hash`).
        bytes_written: size of the grown weights.
        peak_memory_bytes: largest resident memory of the process.
        probe: what a batch of tokens showed; None where the growth was not verified.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

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

    def to_json(self) -> str:
        """The receipt as JSON text."""
        return to_json(self)
