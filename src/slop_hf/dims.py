"""`ModelDims`: a point in the space of model configurations. `DimsLike`: one such point, or an array of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from .architectures import ARCHITECTURES, Architecture, read_setting
from .errors import DimsError
from .io.numbers import is_whole_number
from .io.record import Record
from .io.serialization import describe_alternatives

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: The config of a model: a transformers config, or the dict of its `config.json`; no torch needed for either.
ModelConfig: TypeAlias = "PreTrainedConfig | Mapping[str, Any]"
#: One integer per structure, shape (structures,).
IntArray: TypeAlias = npt.NDArray[np.int64]
#: The largest size of a dimension; costs of structures are products of a few sizes, and have to be numbers.
LARGEST_SIZE = 2**31 - 1
#: An int for one structure, an array for many.
Size = TypeVar("Size", int, IntArray)
Size_co = TypeVar("Size_co", int, IntArray, covariant=True)

ConfigT = TypeVar("ConfigT")


class DimsLike(Protocol[Size_co]):
    """The sizes of one structure (`ModelDims`), or of many at once (`planning.structures.DimsArray`)."""

    @property
    def hidden_size(self) -> Size_co: ...
    @property
    def intermediate_size(self) -> Size_co: ...
    @property
    def num_hidden_layers(self) -> Size_co: ...
    @property
    def num_attention_heads(self) -> Size_co: ...
    @property
    def num_key_value_heads(self) -> Size_co: ...
    @property
    def head_dim(self) -> Size_co: ...


@dataclass(frozen=True)
class ModelDims(Record, error=DimsError):
    """The sizes that growth can change, under the names of the transformers config.

    Args:
        hidden_size: width h of the residual stream.
        intermediate_size: width f of the feed-forward network.
        num_hidden_layers: depth l; 0 is a model of embeddings, the final norm and the head alone.
        num_attention_heads: number a of query heads.
        num_key_value_heads: number of key/value heads; default, one per query head.
        head_dim: size of a head; default, `hidden_size // num_attention_heads`.

    Raises:
        DimsError: for a structure that transformers could not build or reload.

    >>> dims = ModelDims(768, 2048, 6, 6)
    >>> dims.head_dim, dims.num_key_value_heads
    (128, 6)
    >>> str(dims)
    '(768, 2048, 6, 6)'
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0
    head_dim: int = 0

    def __post_init__(self) -> None:
        # A frozen dataclass sets its own derived defaults through object.__setattr__.
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        self._check_positive(except_for="head_dim")
        if self.hidden_size % self.num_attention_heads:
            raise DimsError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}: "
                "transformers refuses such a config on reload; choose heads that divide the hidden size"
            )
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        self._check_positive()
        if self.num_attention_heads % self.num_key_value_heads:
            raise DimsError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads "
                f"{self.num_key_value_heads}: each key/value head must serve the same number of query heads"
            )
        if self.head_dim % 2:
            raise DimsError(
                f"head_dim {self.head_dim} is odd, rotary embeddings rotate pairs: "
                f"give an even head_dim, or heads that divide hidden_size {self.hidden_size} evenly"
            )

    def _check_positive(self, except_for: str = "") -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == except_for:
                continue
            least, kind = (0, "whole number, 0 or more") if field.name in _MAY_BE_0 else (1, "positive whole number")
            if not is_whole_number(value, least=least):
                raise DimsError(f"{field.name} must be a {kind}, got {value!r}")
            if value > LARGEST_SIZE:
                raise DimsError(f"{field.name} must be at most {LARGEST_SIZE:,}, got {int(value):.4g}")
            object.__setattr__(self, field.name, int(value))  # numpy's integers cannot be written as JSON

    def __str__(self) -> str:
        text = f"({self.hidden_size}, {self.intermediate_size}, {self.num_hidden_layers}, {self.num_attention_heads}"
        if self.num_key_value_heads != self.num_attention_heads:
            text += f", kv {self.num_key_value_heads}"
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            text += f", head_dim {self.head_dim}"
        return text + ")"

    @classmethod
    def from_config(cls, config: ModelConfig) -> ModelDims:
        """Return the dims of a transformers config, or of the dict in a `config.json`.

        Raises:
            DimsError: if a field is missing, or the structure could not be built.

        >>> ModelDims.from_config({"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
        ...                        "num_attention_heads": 4, "num_key_value_heads": 2}).head_dim
        16
        """
        family = _find_family(config)
        read = family.read if family else read_setting
        values = {field.name: read(config, field.name) for field in fields(cls)}
        if family and family.ffn_ratio and values["intermediate_size"] is None and values["hidden_size"]:
            values["intermediate_size"] = family.ffn_ratio * values["hidden_size"]
        missing = [name for name, value in values.items() if value is None and name not in _DERIVED]
        if missing:
            owner = "the config" if isinstance(config, Mapping) else type(config).__name__
            names = ", ".join(map(repr, missing))
            raise DimsError(f"{owner} has no {names}: expected a config with Llama's field names")
        return cls(**{name: value or 0 for name, value in values.items()})

    def to_config(self, base_config: ConfigT, **changes: Any) -> ConfigT:
        """Return a config of `base_config`'s class with these dims and `changes`, otherwise unchanged.

        The constructor builds it, so transformers validates it. `head_dim` is always written if the family has such a
        field, since left out it would silently follow the hidden size. If the depth changes, the pattern of every list
        with an entry per layer (`layer_types`) is repeated; a model without layers has none, and its family's pattern
        is taken.
        """
        settings = base_config.to_dict()  # type: ignore[attr-defined]
        family = _find_family(settings)
        own_names = family.config_fields if family else {}
        grouped = "num_key_value_heads" in settings
        fields_of_family = {*settings, "head_dim"} if grouped else set(settings)
        sizes = {own_names.get(name, name): size for name, size in self.as_dict().items()}
        sizes = {name: size for name, size in sizes.items() if name in fields_of_family}
        for name in family.layer_lists if family else ("layer_types",):
            values = settings.get(name)
            if values is not None and len(values) != self.num_hidden_layers:
                repeated = [values[layer % len(values)] for layer in range(self.num_hidden_layers)] if values else None
                changes.setdefault(name, repeated)
        return type(base_config)(**{**settings, **sizes, **changes})

    def as_dict(self) -> dict[str, int]:
        """Return the fields as config entries."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def replace(self, **changes: int) -> ModelDims:
        """Return a copy with some fields changed; `head_dim` and the key/value heads do not follow them.

        Raises:
            DimsError: for an unknown field, or a structure that could not be built.
        """
        unknown = sorted(set(changes) - {field.name for field in fields(self)})
        if unknown:
            raise DimsError(f"unknown dimension {unknown[0]!r}{describe_alternatives(unknown[0], self.as_dict())}")
        return replace(self, **changes)

    @classmethod
    def parse(cls, text: str) -> ModelDims:
        """Read dims written as `hidden,ffn,layers,heads[,kv_heads[,head_dim]]`, the paper's order.

        Raises:
            DimsError: for any other text, or a structure that could not be built.

        >>> ModelDims.parse("768,2048,6,6").num_hidden_layers
        6
        """
        parts = [part.strip() for part in text.strip("() ").split(",")]
        if not 4 <= len(parts) <= 6 or not all(part.isdigit() for part in parts):
            raise DimsError(f"cannot read dims {text!r}: expected hidden,ffn,layers,heads[,kv_heads[,head_dim]]")
        return cls(*(int(part) for part in parts))


_DERIVED = ("num_key_value_heads", "head_dim")
_MAY_BE_0 = ("num_hidden_layers",)


def _find_family(config: ModelConfig) -> Architecture | None:
    """Return the axis table of a config's family; None if it has none."""
    model_type = read_setting(config, "model_type")
    return ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
