"""Axis tables: for every parameter of a model family, the axis that each of its dimensions lies on.

This is the one description of a family. Growth, parameter counts and FLOPs are all derived from these tables, so
supporting another family means writing another table; no code changes.

The axes and their sizes, as functions of `ModelDims`:

    hidden     h   hidden_size: the residual stream
    ffn        f   intermediate_size
    query      q   num_attention_heads * head_dim
    key_value  k   num_key_value_heads * head_dim
    fused      3q  query, key and value of one head, then the next head's (GPT-NeoX)
    head_dim   d   one head
    vocab      v   vocab_size; growth never changes it

Weight matrices are listed as `torch.nn.Linear` stores them: (axis written, axis read).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from .dims import ModelConfig
from .errors import ArchitectureError

Axis = Literal["hidden", "ffn", "query", "key_value", "fused", "head_dim", "vocab"]
Kind = Literal["embedding", "projection", "norm", "bias", "norm_bias"]
Role = Literal["write", "read", "norm"]
LAYER = "{layer}"


@dataclass(frozen=True)
class Parameter:
    """One row of an axis table.

    Args:
        name: name in the state dict; `{layer}` stands for the index of a decoder layer.
        axes: axis of each dimension, outermost first.
        kind: "projection" for the weights of a matrix product, which read their last axis; the other kinds only write.
        exists_if: config flag that must be set for the parameter to exist; None if it always exists.
        tied_to: parameter whose storage this one shares if `tie_word_embeddings` is set.
        stored_as: name in checkpoints (and in models of older releases), if it differs from `name`.
        is_post_norm: whether it is the gain of a norm at the end of a branch, just before the residual stream.
        part: input of the attention that it produces; rotary embeddings treat queries and keys specially.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Kind
    exists_if: str | None = None
    tied_to: str | None = None
    stored_as: str | None = None
    is_post_norm: bool = False
    part: Literal["query", "key", "value"] | None = None

    @property
    def is_in_layer(self) -> bool:
        """Whether every decoder layer has this parameter."""
        return LAYER in self.name

    @property
    def read_dimension(self) -> int | None:
        """The dimension along which the parameter reads its input; None if it only writes."""
        return len(self.axes) - 1 if self.kind == "projection" else None

    def role(self, dimension: int) -> Role:
        """Return what the parameter does along a dimension: write the axis, read it, or scale it as a norm's gain."""
        if self.kind == "norm":
            return "norm"
        return "read" if dimension == self.read_dimension else "write"


@dataclass(frozen=True)
class Architecture:
    """A model family: its axis table, and how its forward pass differs from Llama's.

    Args:
        parameters: rows of the table, in any order.
        norm: "rms" for RMSNorm; "layer" for LayerNorm, which also subtracts the mean.
        norm_eps: config field that holds the epsilon of the norms.
        gain_offset: constant added to a stored gain before it is used (Gemma stores gain - 1).
        scales_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        scale_follows_head_dim: whether attention scores are divided by sqrt(head_dim), and not by a config field.
        has_own_head_dim: whether the config can hold a head_dim other than hidden_size / num_attention_heads.
    """

    model_type: str
    parameters: tuple[Parameter, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    gain_offset: float = 0.0
    scales_embedding: bool = False
    scale_follows_head_dim: bool = True
    has_own_head_dim: bool = True

    def rows(self, config: ModelConfig, *, tied: bool = False) -> Iterator[Parameter]:
        """Yield the rows of the parameters that a model with this config has.

        With `tied`, also those that share another's storage (they take part in a matrix product too).
        """
        for row in self.parameters:
            is_tied = row.tied_to is not None and read_setting(config, "tie_word_embeddings", False)
            exists = row.exists_if is None or read_setting(config, row.exists_if, False)
            if exists and (tied or not is_tied):
                yield row

    def canonical_name(self, name: str) -> str:
        """Return the table's name of a parameter, given its name in a checkpoint or in an older release."""
        return next((row.name for row in self.parameters if row.stored_as == name), name)

    @property
    def has_head_norms(self) -> bool:
        """Whether the queries and keys of each head are normalised."""
        return any(row.kind == "norm" and row.axes == ("head_dim",) for row in self.parameters)


def read_setting(config: ModelConfig, name: str, default: Any = None) -> Any:
    """Return a field of a transformers config, or of its dict; `default` if the config has no such field."""
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def _layer(name: str, axes: tuple[Axis, ...], kind: Kind = "projection", **more: Any) -> Parameter:
    return Parameter(f"model.layers.{LAYER}.{name}", axes, kind, **more)


def _norm(name: str, axis: Axis = "hidden", *, is_post_norm: bool = False) -> Parameter:
    return _layer(f"{name}.weight", (axis,), "norm", is_post_norm=is_post_norm)


_EMBEDDING = Parameter("model.embed_tokens.weight", ("vocab", "hidden"), "embedding")
_FINAL_NORM = Parameter("model.norm.weight", ("hidden",), "norm")
_HEAD = Parameter("lm_head.weight", ("vocab", "hidden"), "projection", tied_to="model.embed_tokens.weight")
_ATTENTION = (
    _layer("self_attn.q_proj.weight", ("query", "hidden"), part="query"),
    _layer("self_attn.k_proj.weight", ("key_value", "hidden"), part="key"),
    _layer("self_attn.v_proj.weight", ("key_value", "hidden"), part="value"),
    _layer("self_attn.o_proj.weight", ("hidden", "query")),
)
_GATED_FFN = (
    _layer("mlp.gate_proj.weight", ("ffn", "hidden")),
    _layer("mlp.up_proj.weight", ("ffn", "hidden")),
    _layer("mlp.down_proj.weight", ("hidden", "ffn")),
)
_PRE_NORMS = (_norm("input_layernorm"), _norm("post_attention_layernorm"))
_CORE = (_EMBEDDING, *_ATTENTION, *_GATED_FFN, _FINAL_NORM, _HEAD)


def _biases(rows: tuple[Parameter, ...], exists_if: str | None) -> tuple[Parameter, ...]:
    """Return the biases of weights: each has the axis that its weight writes."""
    names = [row.name.replace(".weight", ".bias") for row in rows]
    return tuple(
        replace(row, name=name, axes=row.axes[:1], kind="bias", exists_if=exists_if)
        for row, name in zip(rows, names, strict=True)
    )


_ATTENTION_BIASES = _biases(_ATTENTION, "attention_bias")

LLAMA = Architecture("llama", (*_CORE, *_PRE_NORMS, *_ATTENTION_BIASES, *_biases(_GATED_FFN, "mlp_bias")))

MISTRAL = Architecture("mistral", (*_CORE, *_PRE_NORMS))

QWEN2 = Architecture("qwen2", (*_CORE, *_PRE_NORMS, *_biases(_ATTENTION[:3], None)))  # not of the output projection

QWEN3 = Architecture(
    "qwen3",
    (
        *_CORE,
        *_PRE_NORMS,
        _norm("self_attn.q_norm", "head_dim"),
        _norm("self_attn.k_norm", "head_dim"),
        *_ATTENTION_BIASES,
    ),
)

GEMMA2 = Architecture(
    "gemma2",
    (
        *_CORE,
        _norm("input_layernorm"),
        _norm("post_attention_layernorm", is_post_norm=True),
        _norm("pre_feedforward_layernorm"),
        _norm("post_feedforward_layernorm", is_post_norm=True),
        *_ATTENTION_BIASES,
    ),
    gain_offset=1.0,
    scales_embedding=True,
    scale_follows_head_dim=False,
)


def _neox(name: str, axes: tuple[Axis, ...], kind: Kind = "projection", exists_if: str | None = None) -> Parameter:
    return Parameter(f"gpt_neox.layers.{LAYER}.{name}", axes, kind, exists_if)


GPT_NEOX = Architecture(
    "gpt_neox",
    (
        Parameter("gpt_neox.embed_in.weight", ("vocab", "hidden"), "embedding"),
        _neox("input_layernorm.weight", ("hidden",), "norm"),
        _neox("input_layernorm.bias", ("hidden",), "norm_bias"),
        _neox("post_attention_layernorm.weight", ("hidden",), "norm"),
        _neox("post_attention_layernorm.bias", ("hidden",), "norm_bias"),
        _neox("attention.query_key_value.weight", ("fused", "hidden")),
        _neox("attention.query_key_value.bias", ("fused",), "bias", exists_if="attention_bias"),
        _neox("attention.dense.weight", ("hidden", "query")),
        _neox("attention.dense.bias", ("hidden",), "bias", exists_if="attention_bias"),
        _neox("mlp.dense_h_to_4h.weight", ("ffn", "hidden")),
        _neox("mlp.dense_h_to_4h.bias", ("ffn",), "bias"),
        _neox("mlp.dense_4h_to_h.weight", ("hidden", "ffn")),
        _neox("mlp.dense_4h_to_h.bias", ("hidden",), "bias"),
        Parameter("gpt_neox.final_layer_norm.weight", ("hidden",), "norm"),
        Parameter("gpt_neox.final_layer_norm.bias", ("hidden",), "norm_bias"),
        replace(_HEAD, tied_to="gpt_neox.embed_in.weight", stored_as="embed_out.weight"),
    ),
    norm="layer",
    norm_eps="layer_norm_eps",
    has_own_head_dim=False,
)

ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table for table in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT_NEOX)
}


def get_architecture(config: ModelConfig) -> Architecture:
    """Return the axis table of a config's family; raise an `ArchitectureError` if it has none.

    >>> get_architecture({"model_type": "llama"}).model_type
    'llama'
    """
    model_type = read_setting(config, "model_type")
    if model_type not in ARCHITECTURES:
        raise ArchitectureError(
            f"no axis table for model_type {model_type!r} (supported: {', '.join(ARCHITECTURES)}); "
            "to add a family, write its table in slop_hf/architectures.py (see CONTRIBUTING.md)"
        )
    return ARCHITECTURES[model_type]
