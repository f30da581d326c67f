"""Axis tables: for each model family, which axes every parameter lies on, and what it does along them.

Growth, parameter counts and FLOPs are all read off these tables, so a new family is a new table.
Axes and their sizes, from `ModelDims`:

    hidden     h   hidden_size, the residual stream
    ffn        f   intermediate_size
    query      q   num_attention_heads * head_dim
    key_value  k   num_key_value_heads * head_dim
    fused      3q  query, key and value of one head after the other (GPT-NeoX)
    head_dim   d   one head
    vocab      v   vocab_size (growth never changes it)

Weights are stored as `torch.nn.Linear` stores them: (written axis, read axis).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ArchitectureError

Axis = Literal["hidden", "ffn", "query", "key_value", "fused", "head_dim", "vocab"]
Kind = Literal["embedding", "projection", "norm", "bias", "norm_bias"]
Role = Literal["write", "read", "norm"]
LAYER = "{layer}"


@dataclass(frozen=True)
class Parameter:
    """One row of an axis table.

    Args:
        name: its name in the state dict; `{layer}` stands for the index of a decoder layer.
        axes: the axis of each of its dimensions, outermost first.
        kind: "projection" for the weights that take part in a matrix product; they read their last axis.
        when: the config flag that the parameter exists under; None, always.
        tied_to: the parameter whose storage it shares when `tie_word_embeddings` is set.
        stored_as: its name in checkpoints (and in models of older releases), where that is another one.
        closes: whether it is a norm behind a branch, the last thing before the residual stream.
        part: which of attention's inputs it makes, for the rules of rotary embeddings.
    """

    name: str
    axes: tuple[Axis, ...]
    kind: Kind
    when: str | None = None
    tied_to: str | None = None
    stored_as: str | None = None
    closes: bool = False
    part: Literal["query", "key", "value"] | None = None

    @property
    def in_layer(self) -> bool:
        """Whether every decoder layer has one."""
        return LAYER in self.name

    @property
    def reads(self) -> int | None:
        """The dimension along which it reads; None for what only writes."""
        return len(self.axes) - 1 if self.kind == "projection" else None

    def role(self, dimension: int) -> Role:
        """What it does along a dimension: writes the axis, reads it, or scales it as a norm's gain."""
        if self.kind == "norm":
            return "norm"
        return "read" if dimension == self.reads else "write"


@dataclass(frozen=True)
class Architecture:
    """A model family: its `model_type` in transformers, its table, and where it differs from Llama.

    Args:
        model_type: as in the config.
        parameters: the rows, in any order.
        norm: "rms", or "layer" for LayerNorm, which also takes the mean away.
        norm_eps: the config field of the norms' epsilon.
        gain_offset: what is added to a stored gain before it is used (Gemma stores gain - 1).
        scaled_embedding: whether embeddings are multiplied by sqrt(hidden_size).
        scale_follows_head_dim: whether attention divides by sqrt(head_dim), not by a field of its own.
        own_head_dim: whether the config can hold a head_dim other than hidden_size / num_attention_heads.
    """

    model_type: str
    parameters: tuple[Parameter, ...]
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: str = "rms_norm_eps"
    gain_offset: float = 0.0
    scaled_embedding: bool = False
    scale_follows_head_dim: bool = True
    own_head_dim: bool = True

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

    def live_name(self, name: str) -> str:
        """The table's name of a parameter that goes by `name` in a checkpoint or an older release."""
        return next((row.name for row in self.parameters if row.stored_as == name), name)

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return any(row.kind == "norm" and row.axes == ("head_dim",) for row in self.parameters)


def setting(config: Any, name: str, default: Any = None) -> Any:
    """A field of a transformers config, or of its dict."""
    return config.get(name, default) if isinstance(config, Mapping) else getattr(config, name, default)


def _layer(name: str, axes: tuple[Axis, ...], kind: Kind = "projection", **more: Any) -> Parameter:
    return Parameter(f"model.layers.{LAYER}.{name}", axes, kind, **more)


def _norm(name: str, axis: Axis = "hidden", *, closes: bool = False) -> Parameter:
    return _layer(f"{name}.weight", (axis,), "norm", closes=closes)


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


def _qkv_biases(when: str | None) -> tuple[Parameter, ...]:
    return (
        _layer("self_attn.q_proj.bias", ("query",), "bias", when=when, part="query"),
        _layer("self_attn.k_proj.bias", ("key_value",), "bias", when=when, part="key"),
        _layer("self_attn.v_proj.bias", ("key_value",), "bias", when=when, part="value"),
    )


_OUTPUT_BIAS = _layer("self_attn.o_proj.bias", ("hidden",), "bias", when="attention_bias")
_FFN_BIASES = (
    _layer("mlp.gate_proj.bias", ("ffn",), "bias", when="mlp_bias"),
    _layer("mlp.up_proj.bias", ("ffn",), "bias", when="mlp_bias"),
    _layer("mlp.down_proj.bias", ("hidden",), "bias", when="mlp_bias"),
)

LLAMA = Architecture("llama", (*_CORE, *_PRE_NORMS, *_qkv_biases("attention_bias"), _OUTPUT_BIAS, *_FFN_BIASES))

MISTRAL = Architecture("mistral", (*_CORE, *_PRE_NORMS))

QWEN2 = Architecture("qwen2", (*_CORE, *_PRE_NORMS, *_qkv_biases(None)))

QWEN3 = Architecture(
    "qwen3",
    (
        *_CORE,
        *_PRE_NORMS,
        _norm("self_attn.q_norm", "head_dim"),
        _norm("self_attn.k_norm", "head_dim"),
        *_qkv_biases("attention_bias"),
        _OUTPUT_BIAS,
    ),
)

GEMMA2 = Architecture(
    "gemma2",
    (
        *_CORE,
        _norm("input_layernorm"),
        _norm("post_attention_layernorm", closes=True),
        _norm("pre_feedforward_layernorm"),
        _norm("post_feedforward_layernorm", closes=True),
        *_qkv_biases("attention_bias"),
        _OUTPUT_BIAS,
    ),
    gain_offset=1.0,
    scaled_embedding=True,
    scale_follows_head_dim=False,
)


def _neox(name: str, axes: tuple[Axis, ...], kind: Kind = "projection", when: str | None = None) -> Parameter:
    return Parameter(f"gpt_neox.layers.{LAYER}.{name}", axes, kind, when)


GPT_NEOX = Architecture(
    "gpt_neox",
    (
        Parameter("gpt_neox.embed_in.weight", ("vocab", "hidden"), "embedding"),
        _neox("input_layernorm.weight", ("hidden",), "norm"),
        _neox("input_layernorm.bias", ("hidden",), "norm_bias"),
        _neox("post_attention_layernorm.weight", ("hidden",), "norm"),
        _neox("post_attention_layernorm.bias", ("hidden",), "norm_bias"),
        _neox("attention.query_key_value.weight", ("fused", "hidden")),
        _neox("attention.query_key_value.bias", ("fused",), "bias", when="attention_bias"),
        _neox("attention.dense.weight", ("hidden", "query")),
        _neox("attention.dense.bias", ("hidden",), "bias", when="attention_bias"),
        _neox("mlp.dense_h_to_4h.weight", ("ffn", "hidden")),
        _neox("mlp.dense_h_to_4h.bias", ("ffn",), "bias"),
        _neox("mlp.dense_4h_to_h.weight", ("hidden", "ffn")),
        _neox("mlp.dense_4h_to_h.bias", ("hidden",), "bias"),
        Parameter("gpt_neox.final_layer_norm.weight", ("hidden",), "norm"),
        Parameter("gpt_neox.final_layer_norm.bias", ("hidden",), "norm_bias"),
        Parameter(
            "lm_head.weight",
            ("vocab", "hidden"),
            "projection",
            tied_to="gpt_neox.embed_in.weight",
            stored_as="embed_out.weight",
        ),
    ),
    norm="layer",
    norm_eps="layer_norm_eps",
    own_head_dim=False,
)

ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table for table in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GPT_NEOX)
}


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
