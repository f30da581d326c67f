"""What training takes of each device's memory: weights, gradients, AdamW's state and activations.

The state is counted as in Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(2020), section 3, activations in the manner of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022): what each operation keeps for its backward pass, added up over a layer. Their
`s b h (34 + 5 a s / h)` is GPT with dropout and scores; ours is Llama as transformers writes it, with gated ffn, norms
in float32 and attention that keeps no scores.

Functions take one `ModelDims`, or an object of the same attributes that are numpy arrays (`DimsArray`), and then
answer for all structures at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from ..architectures import Architecture, Parameter, architecture_of
from ..errors import PlanError
from .flops import DEFAULT_CONFIG, axis_sizes, count_parameters

Precision = Literal["bf16", "fp32"]

#: Bytes of a parameter's weight, gradient and optimizer state. In bf16 the optimizer holds float32 weights as well.
STATE_BYTES: dict[str, tuple[int, int, int]] = {"bf16": (2, 2, 12), "fp32": (4, 4, 8)}

_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on each device; whole numbers, or arrays of them."""

    parameters: Any
    gradients: Any
    optimizer: Any
    activations: Any

    @property
    def total(self) -> Any:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def training_memory(
    dims: Any,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    zero_stage: int = 0,
    devices: int = 1,
    micro_batch_size: int = 1,
    checkpointing: bool = False,
    precision: Precision = "bf16",
) -> MemoryEstimate:
    """The memory of each device at the peak of a step of AdamW, in bytes.

    A parameter takes 16 bytes: in "bf16", 2 for its weight, 2 for its gradient and 12 for a float32 weight and the
    moments; in "fp32" 4, 4 and 8. Stage 1 of ZeRO shards the optimizer's part over the devices, 2 the gradients too,
    3 the weights too. Activations are those of one micro-batch: what `saved_activations` counts and, on top of it, the
    gradients of the logits (`8v` a token) or of a layer; with checkpointing also one layer computed again.

    Close for Llama, Mistral and Qwen; an approximation for the other families, and too low for what runs without fused
    attention (Gemma 2's soft-capped scores, which transformers computes in full). Not counted: fragmentation,
    communication buffers, the layer that ZeRO-3 gathers, what the optimizer's step holds for a moment, the model's
    buffers, the CUDA context; leave room for them. Matrices are whole on each device. A model of float32 weights that
    autocast trains in bf16 (`bf16=True` of Trainer, without DeepSpeed) takes more: see `saved_activations`.

    Args:
        config: a transformers config, or its dict.
        sequence_length: tokens of a sequence.
        zero_stage: of ZeRO, 0 (nothing is sharded) to 3.
        devices: that the state is sharded over.
        micro_batch_size: sequences on a device at a time.
        checkpointing: whether layers keep nothing but their input and are computed again (`gradient_checkpointing`).
        precision: "bf16" or "fp32".

    Raises:
        PlanError: for a setting that training does not know.

    >>> from slop_hf import ModelDims
    >>> memory = training_memory(ModelDims(4096, 11008, 32, 32), zero_stage=1, devices=8)
    >>> for part in ("parameters", "gradients", "optimizer", "activations", "total"):
    ...     print(f"{part:12}{getattr(memory, part) / 1e9:6.1f} GB")
    parameters    13.5 GB
    gradients     13.5 GB
    optimizer     10.1 GB
    activations   13.1 GB
    total         50.1 GB
    """
    _check(zero_stage, devices, micro_batch_size, precision)
    count = count_parameters(dims, config)
    # ZeRO shards the optimizer first and the weights last.
    shares = [devices if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    parameters, gradients, optimizer = (
        -(-count * size // share) for size, share in zip(STATE_BYTES[precision], shares, strict=True)
    )
    tally = _Tally.of(dims, config, sequence_length, micro_batch_size, precision)
    return MemoryEstimate(parameters, gradients, optimizer, tally.peak(checkpointing))


def saved_activations(
    dims: Any,
    config: Any = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    micro_batch_size: int = 1,
    checkpointing: bool = False,
    precision: Precision = "bf16",
) -> Any:
    """Bytes that autograd keeps between the forward and the backward pass of a micro-batch.

    For Llama, with e bytes an element, hidden size h, query and key/value widths q and k, heads a, ffn f and
    vocabulary v, each token keeps

    * in each layer: `2 (4h + eh)` in the two norms (float32 input, normalised value), `2eh` in what the projections
      read, `e (2q + 2k) + 4a` in attention (queries, keys, values, output, logsumexp) and `4ef` in the ffn (gate,
      silu of it, up, their product); with checkpointing `eh`, the layer's input, in the place of all this;
    * once: `4h + eh` in the last norm, `eh` in what the output projection reads, `4v` log-probabilities;
    * and each position of a sequence `2e` a head's size in the tables of the rotation.

    Attention keeps no scores where a fused kernel runs. In float32 none shares key/value heads: a layer with fewer of
    them than heads keeps `4eq + 4aS` in attention, with S the sequence length.

    Autocast to bf16 from float32 weights keeps about `10h` a token and layer more than "bf16", since the residual
    stream is float32 and every projection keeps a copy of what it reads, and 2 bytes a parameter, the weights in bf16.

    >>> from slop_hf import ModelDims
    >>> dims = ModelDims(1024, 4096, 1, 8)
    >>> a_layer = 2 * (4 + 2 + 2) * 1024 + 2 * 4 * 1024 + 4 * 8 + 4 * 2 * 4096
    >>> once = (4 + 2 + 2) * 1024 + 4 * 32000
    >>> rotary = 2048 * 2 * 2 * 128
    >>> saved_activations(dims) == 2048 * (a_layer + once) + rotary
    True
    """
    _check(0, 1, micro_batch_size, precision)
    return _Tally.of(dims, config, sequence_length, micro_batch_size, precision).saved(checkpointing)


@dataclass(frozen=True)
class MemoryLimit:
    """The memory that there is on each device, and how training uses it.

    Args:
        bytes_per_device: what training may take, less than all of it (see `training_memory` on what is not counted).
        zero_stage, devices, micro_batch_size, checkpointing, precision: see `training_memory`.

    Raises:
        PlanError: for a setting that training does not know.

    >>> from slop_hf import ModelDims
    >>> limit = MemoryLimit(72e9, zero_stage=1, devices=8)
    >>> limit.fits(ModelDims(4096, 11008, 32, 32), {"model_type": "llama", "vocab_size": 32000}, 2048)
    True
    """

    bytes_per_device: float
    zero_stage: int = 0
    devices: int = 1
    micro_batch_size: int = 1
    checkpointing: bool = False
    precision: Precision = "bf16"

    def __post_init__(self) -> None:
        room = self.bytes_per_device
        number = isinstance(room, int | float) and not isinstance(room, bool)
        if not (number and math.isfinite(room) and room > 0):
            raise PlanError(f"bytes_per_device must be a positive number, got {room!r}: give bytes, such as 72e9")
        _check(self.zero_stage, self.devices, self.micro_batch_size, self.precision)

    def estimate(self, dims: Any, config: Any, sequence_length: int) -> MemoryEstimate:
        """What structures take under these settings."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return training_memory(dims, config, sequence_length, **settings)

    def fits(self, dims: Any, config: Any, sequence_length: int) -> Any:
        """Whether structures fit on the device: a bool, or an array of them."""
        return self.estimate(dims, config, sequence_length).total <= self.bytes_per_device

    def explain(self, dims: Any, config: Any, sequence_length: int) -> str:
        """One line: what a structure needs, what there is, and what would make it fit.

        >>> from slop_hf import ModelDims
        >>> config = {"model_type": "llama", "vocab_size": 32000}
        >>> print(MemoryLimit(72e9, devices=8).explain(ModelDims(4096, 11008, 32, 32), config, 2048))
        needs 120.9 GB a device (parameters 13.5, gradients 13.5, optimizer 80.9, activations 13.1), has 72.0;
        zero_stage 1 would make it fit
        """
        need = self.estimate(dims, config, sequence_length)
        parts = ", ".join(f"{field.name} {_gigabytes(getattr(need, field.name))}" for field in fields(need))
        has = f"has {_gigabytes(self.bytes_per_device)}"
        advice = "it fits" if need.total <= self.bytes_per_device else self._remedy(dims, config, sequence_length)
        return f"needs {_gigabytes(need.total)} GB a device ({parts}), {has}; {advice}"

    def _remedy(self, dims: Any, config: Any, sequence_length: int) -> str:
        """Every single change that makes a structure fit, or else all of them together."""
        # Sharding over one device changes nothing.
        stages = [replace(self, zero_stage=stage) for stage in range(self.zero_stage + 1, 4) if self.devices > 1]
        batches = [self.micro_batch_size >> halving for halving in range(1, self.micro_batch_size.bit_length())]
        ways = [
            [] if self.checkpointing else [replace(self, checkpointing=True)],
            stages,
            [replace(self, micro_batch_size=size) for size in batches],
        ]
        fitting = [[limit for limit in way if limit.fits(dims, config, sequence_length)] for way in ways]
        if any(fitting):
            return f"{' or '.join(self._changes(way[0]) for way in fitting if way)} would make it fit"
        all_of_it = replace(
            self,
            checkpointing=True,
            zero_stage=stages[-1].zero_stage if stages else self.zero_stage,
            micro_batch_size=1,
        )
        least = all_of_it.estimate(dims, config, sequence_length).total
        changes = self._changes(all_of_it)
        if changes and least <= self.bytes_per_device:
            return f"{changes} together would make it fit"
        even_with = f" even with {changes} (then {_gigabytes(least)})" if changes else ""
        return (
            f"it would not fit{even_with}: take a smaller structure, shorter sequences or more devices to shard over"
        )

    def _changes(self, other: MemoryLimit) -> str:
        """How another limit's settings differ."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        named = [name if name == "checkpointing" else f"{name} {getattr(other, name)}" for name in changed]
        return " and ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)


@dataclass(frozen=True)
class _Tally:
    """Bytes of one micro-batch's activations, by when they are held.

    Args:
        layers: their number.
        layer_input: what checkpointing keeps of a layer.
        layer: all that a layer keeps.
        recomputed: what a layer that is computed again keeps beside its input.
        layer_gradients: what a layer's backward pass holds on top.
        head: what the last norm, the output projection and the loss keep.
        head_gradients: what the loss holds on top in its backward pass.
        tables: what all layers share, the cosines and sines of the rotary embedding.
    """

    layers: Any
    layer_input: Any
    layer: Any
    recomputed: Any
    layer_gradients: Any
    head: Any
    head_gradients: Any
    tables: Any

    @classmethod
    def of(cls, dims: Any, config: Any, sequence_length: int, micro_batch_size: int, precision: Precision) -> _Tally:
        """The tally of a micro-batch."""
        element = 2 if precision == "bf16" else _FLOAT32
        tokens = micro_batch_size * sequence_length
        family, sizes = architecture_of(config), axis_sizes(dims, config)
        rows = [row for row in family.rows(config) if row.in_layer]
        hidden, logits = element * sizes["hidden"], _FLOAT32 * sizes["vocab"]
        norms = sum(_norm(row, family, sizes, element) for row in rows if row.kind == "norm")
        scores = _scores(dims, sequence_length, precision)
        ffn = element * _ffn_width(rows, sizes)
        layer = norms + _attention(rows, dims, sizes, scores, element) + 2 * ffn
        return cls(
            layers=dims.num_hidden_layers,
            layer_input=tokens * hidden,
            layer=tokens * layer,
            # In float32 the first norm keeps the layer's input itself, not a copy of it in another precision.
            recomputed=tokens * (layer - hidden * (precision == "fp32")),
            # Of what the ffn multiplies, or, once its part and that of the norm before it are free, of two scores.
            layer_gradients=tokens * _larger(ffn + hidden, 2 * scores - 2 * ffn - 3 * hidden),
            head=tokens * (_FLOAT32 * sizes["hidden"] + 2 * hidden + logits),
            # Of the log-probabilities and of the float32 logits. The forward pass holds no more: Trainer lets go of
            # the logits before the backward pass. A loop that keeps the model's outputs has them on top.
            head_gradients=tokens * 2 * logits,
            tables=sequence_length * 2 * element * sizes["head_dim"],
        )

    def saved(self, checkpointing: bool) -> Any:
        """What is held when the forward pass has ended."""
        return self.tables + self.head + self.layers * (self.layer_input if checkpointing else self.layer)

    def peak(self, checkpointing: bool) -> Any:
        """The most that is held in the backward pass: at its beginning, or in the layer that it comes to first.

        The last norm, between these two, holds more only where the vocabulary is hardly larger than the hidden size.
        """
        at_loss = self.head + self.head_gradients
        in_layer = self.layer_gradients + (self.recomputed if checkpointing else 0)
        kept = self.layer_input if checkpointing else self.layer
        return self.tables + self.layers * kept + _larger(at_loss, in_layer)


def _norm(row: Parameter, family: Architecture, sizes: dict[str, Any], element: int) -> Any:
    """Bytes a token that a layer's norm keeps, and what the projections behind it read."""
    if family.norm == "layer":
        return 2 * element * sizes["hidden"]  # its input, the residual stream itself, and its output
    # An RMSNorm of transformers keeps its float32 input, for the square and for the product, and the normalised value
    # for the product with the gain; Gemma's multiplies by the gain before it rounds.
    normalised = _FLOAT32 if family.gain_offset else element
    if row.axes == ("head_dim",):  # of queries or keys, which a rotation reads: that keeps nothing
        return (_FLOAT32 + normalised) * sizes["query" if ".q_norm." in row.name else "key_value"]
    return (_FLOAT32 + normalised + (0 if row.closes else element)) * sizes["hidden"]


def _attention(rows: list[Parameter], dims: Any, sizes: dict[str, Any], scores: Any, element: int) -> Any:
    """Bytes a token of what attention keeps; its output is what the output projection reads."""
    # Values that are a view of a fused projection keep all of it.
    fused = any("fused" in row.axes for row in rows)
    values = sizes["fused" if fused else "key_value"]
    logsumexp = _FLOAT32 * dims.num_attention_heads
    in_kernel = element * (2 * sizes["query"] + sizes["key_value"] + values) + logsumexp
    # Without a kernel: scores, and queries, keys, values and output of the queries' width.
    return (scores == 0) * in_kernel + (scores > 0) * (4 * element * sizes["query"] + scores)


def _scores(dims: Any, sequence_length: int, precision: Precision) -> Any:
    """Bytes a token of a layer's attention scores: none where a fused kernel runs."""
    # transformers has sdpa share key/value heads among queries. On a GPU flash attention can, but knows no float32;
    # the kernel for float32 cannot (up to torch 2.13), and sdpa falls back to plain products.
    plain = (dims.num_key_value_heads < dims.num_attention_heads) & (precision == "fp32")
    return plain * _FLOAT32 * dims.num_attention_heads * sequence_length


def _ffn_width(rows: list[Parameter], sizes: dict[str, Any]) -> Any:
    """Elements a token that enter the ffn's activation and, with a gate, the product; as many leave them."""
    return sum(sizes["ffn"] for row in rows if row.kind == "projection" and row.axes[0] == "ffn")


def _larger(one: Any, other: Any) -> Any:
    larger = np.maximum(one, other)
    return larger if larger.ndim else int(larger)


def _gigabytes(size: float) -> str:
    size = size / 1e9
    return f"{size:.1f}" if size >= 0.1 else f"{size:.2g}"


def _check(zero_stage: int, devices: int, micro_batch_size: int, precision: str) -> None:
    if not (_is_whole(zero_stage) and 0 <= zero_stage <= 3):
        raise PlanError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage!r}")
    for name, value in (("devices", devices), ("micro_batch_size", micro_batch_size)):
        if not (_is_whole(value) and value >= 1):
            raise PlanError(f"{name} must be a whole number of at least 1, got {value!r}")
    if precision not in STATE_BYTES:
        known = " or ".join(map(repr, STATE_BYTES))
        raise PlanError(f"precision must be {known}, got {precision!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
