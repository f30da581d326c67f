"""Axis tables: for each model family, which axes every parameter lies on.

Growth, parameter counts and FLOPs are all read off these tables, so a new family is a new table.
Axes and their sizes, from `ModelDims`:

    hidden     h   hidden_size
    ffn        f   intermediate_size
    query      q   num_attention_heads * head_dim
    key_value  k   num_key_value_heads * head_dim
    vocab      v   vocab_size (growth never changes it)

Weights are stored as transformers stores them: (output, input).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ArchitectureError

Axis = Literal["hidden", "ffn", "query", "key_value", "vocab"]
Kind = Literal["embedding", "projection", "norm", "bias"]
LAYER = "{layer}"


@dataclass(frozen=True)
class Parameter:
    """One row of an axis table.

    Args:
        name: its name in the state dict; `{layer}` stands for the index of a decoder layer.
        axes: the axis of each of its dimensions, outermost first.
        kind: "projection" for the weights that take part in a matrix product.
        when: the config flag that the parameter exists under; None, always.
        tied_to: the parameter whose storage it shares when `tie_word_embeddings` is set.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Kind
    when: str | None = None
    tied_to: str | None = None

    @property
    def in_layer(self) -> bool:
        """Whether every decoder layer has one."""
        return LAYER in self.name


@dataclass(frozen=True)
class Architecture:
    """A model family: its `model_type` in transformers and its table."""

    model_type: str
    parameters: tuple[Parameter, ...]

    def rows(self, config: Any, *, tied: bool = False) -> Iterator[Parameter]:
        """The parameters that a model with this config (object or dict) has.

        Args:
            config: a transformers config, or its dict.
            tied: also yield those that share another's storage (they still take part in a matrix product).
        """
        for row in self.parameters:
            is_tied = row.tied_to is not None and setting(config, "tie_word_embeddings", False)
            if (tied or not is_tied) and (row.when is None or setting(config, row.when, False)):
                yield row


def _layer(name: str, axes: tuple[Axis, ...], kind: Kind = "projection", when: str | None = None) -> Parameter:
    return Parameter(f"model.layers.{LAYER}.{name}", axes, kind, when)


LLAMA = Architecture(
    model_type="llama",
    parameters=(
        Parameter("model.embed_tokens.weight", ("vocab", "hidden"), "embedding"),
        _layer("input_layernorm.weight", ("hidden",), "norm"),
        _layer("self_attn.q_proj.weight", ("query", "hidden")),
        _layer("self_attn.k_proj.weight", ("key_value", "hidden")),
        _layer("self_attn.v_proj.weight", ("key_value", "hidden")),
        _layer("self_attn.o_proj.weight", ("hidden", "query")),
        _layer("self_attn.q_proj.bias", ("query",), "bias", when="attention_bias"),
        _layer("self_attn.k_proj.bias", ("key_value",), "bias", when="attention_bias"),
        _layer("self_attn.v_proj.bias", ("key_value",), "bias", when="attention_bias"),
        _layer("self_attn.o_proj.bias", ("hidden",), "bias", when="attention_bias"),
        _layer("post_attention_layernorm.weight", ("hidden",), "norm"),
        _layer("mlp.gate_proj.weight", ("ffn", "hidden")),
        _layer("mlp.up_proj.weight", ("ffn", "hidden")),
        _layer("mlp.down_proj.weight", ("hidden", "ffn")),
        _layer("mlp.gate_proj.bias", ("ffn",), "bias", when="mlp_bias"),
        _layer("mlp.up_proj.bias", ("ffn",), "bias", when="mlp_bias"),
        _layer("mlp.down_proj.bias", ("hidden",), "bias", when="mlp_bias"),
        Parameter("model.norm.weight", ("hidden",), "norm"),
        Parameter("lm_head.weight", ("vocab", "hidden"), "projection", tied_to="model.embed_tokens.weight"),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {table.model_type: table for table in (LLAMA,)}


def setting(config: Any, name: str, default: Any = None) -> Any:
    """A field of a transformers config, or of its dict."""
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def architecture_of(config: Any) -> Architecture:
    """The table of a config's family.

    Raises:
        ArchitectureError: for a family without a table.

    >>> architecture_of({"model_type": "llama"}).model_type
    'llama'
    """
    model_type = setting(config, "model_type")
    if model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ArchitectureError(
            f"no axis table for model_type {model_type!r} (supported: {known}); "
            "to add a family, write its table in slop_hf/architectures.py (CONTRIBUTING.md says how)"
        )
    return ARCHITECTURES[model_type]
