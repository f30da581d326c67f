"""`GrowthReceipt`: what a growth did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..dims import ModelDims
from ..serialization import to_json

RECEIPT_FILE = "growth.json"


@dataclass(frozen=True)
class GrowthReceipt:
    """What a growth did, kept as `growth.json` beside the grown checkpoint.

    Args:
        source: the model it began with.
        operators: what grew.
        inits: the init of each operator.
        seed: of the random entries.
        source_dims, dims: structures before and after.
        source_parameters, parameters: true numbers of parameters before and after.
        seconds: wall-clock seconds, reading and writing included.
        versions: of slop_hf, transformers and torch.
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

    def to_json(self) -> str:
        """The receipt as JSON text."""
        return to_json(self)
