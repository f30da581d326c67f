"""Memory of training on each device: weights, gradients, the optimizer's state and activations.

The state is counted as in Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(2020), section 3, activations in the manner of Korthikanti et al., "Reducing Activation Recomputation in Large
Transformer Models" (2022): the tensors that each operation keeps for its backward pass, added up over a layer. Their
`s b h (34 + 5 a s / h)` is for GPT with dropout and stored scores; ours is for Llama as transformers writes it, with a
gated ffn, norms in float32 and attention that stores no scores.

Functions take one structure (`ModelDims`) or many at once (`DimsArray`), and answer with ints or with arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from operator import add
from typing import Generic, Literal, get_args

import numpy as np
import numpy.typing as npt

from ..architectures import Architecture, Parameter, get_architecture
from ..dims import LARGEST_SIZE, DimsLike, ModelConfig, ModelDims, Size
from ..errors import PlanError
from ..io.numbers import is_positive_number, is_whole_number, require_whole_number
from ..io.units import format_bytes
from .flops import (
    DEFAULT_CONFIG,
    compute_axis_sizes,
    count_active_experts,
    count_layer_matrices,
    count_parameters,
)

Precision = Literal["bf16", "fp32"]
OptimizerName = Literal["adamw", "muon"]

#: Bytes per parameter of weight, gradient and AdamW's state. In bf16 the optimizer holds float32 weights as well.
BYTES_PER_PARAMETER: dict[str, tuple[int, int, int]] = {"bf16": (2, 2, 12), "fp32": (4, 4, 8)}

_FLOAT32 = 4


@dataclass(frozen=True)
class MemoryEstimate(Generic[Size]):
    """Bytes per device: ints for one structure, arrays for many."""

    parameters: Size
    gradients: Size
    optimizer: Size
    activations: Size

    @property
    def total(self) -> Size:
        """Sum of the four parts."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def estimate_training_memory(
    dims: DimsLike[Size],
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    zero_stage: int = 0,
    devices: int = 1,
    micro_batch_size: int = 1,
    checkpointing: bool = False,
    precision: Precision = "bf16",
    optimizer: OptimizerName = "adamw",
) -> MemoryEstimate[Size]:
    """Estimate the bytes that each device holds at the peak of an optimizer step.

    A parameter takes 16 bytes: in "bf16", 2 for its weight, 2 for its gradient and 12 for a float32 weight and AdamW's
    moments; in "fp32" 4, 4 and 8. Muon has one moment instead of two for the matrices of the layers, 4 bytes less, and
    leaves the rest to AdamW. All are taken to be trained; a frozen one needs its weight only. ZeRO stage 1 shards
    the optimizer state over the devices, stage 2 also the gradients, stage 3 also the weights. Activations belong
    to one micro-batch: the bytes that `count_saved_activations` counts, plus the gradients of the logits (`8v` per
    token) or of one layer, and with checkpointing one recomputed layer.

    The estimate is close for Llama, Mistral and Qwen, an approximation for the other families, and too low without
    fused attention (transformers computes Gemma 2's soft-capped scores in full) and, by up to a factor of two, for
    GPT-2, whose activation is written out in single operations. Not counted: fragmentation,
    communication buffers, the layer that ZeRO-3 gathers, temporaries of the optimizer step, the model's buffers and
    the CUDA context; leave room for them. Tensor parallelism is not considered. A model with float32 weights under
    bf16 autocast (Trainer's `bf16=True` without DeepSpeed) takes more: see `count_saved_activations`.

    Args:
        dims: one structure or many.
        config: model config, for family and vocabulary.
        sequence_length: tokens per sequence.
        zero_stage: ZeRO stage, from 0 (nothing is sharded) to 3.
        devices: number of devices that share the state.
        micro_batch_size: sequences per device in one forward pass.
        checkpointing: whether layers keep only their input and are computed again (`gradient_checkpointing`).
        precision: "bf16" or "fp32".
        optimizer: "adamw" or "muon".

    Raises:
        PlanError: for an unknown precision, optimizer or ZeRO stage, or a number below 1.

    >>> from slop_hf import ModelDims
    >>> memory = estimate_training_memory(ModelDims(4096, 11008, 32, 32), zero_stage=1, devices=8)
    >>> for part in ("parameters", "gradients", "optimizer", "activations", "total"):
    ...     print(f"{part:12}{getattr(memory, part) / 1e9:6.1f} GB")
    parameters    13.5 GB
    gradients     13.5 GB
    optimizer     10.1 GB
    activations   13.1 GB
    total         50.1 GB
    """
    _check(zero_stage, devices, micro_batch_size, precision, optimizer)
    require_whole_number(sequence_length, "sequence_length", most=LARGEST_SIZE, error=PlanError)
    count = count_parameters(dims, config)
    sizes = [count * size for size in BYTES_PER_PARAMETER[precision]]
    if optimizer == "muon":
        sizes[-1] -= _FLOAT32 * count_layer_matrices(dims, config)
    # ZeRO shards the optimizer first and the weights last.
    shares = [devices if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    parameters, gradients, state = (-(-size // share) for size, share in zip(sizes, shares, strict=True))
    tally = _Tally.of(dims, config, sequence_length, micro_batch_size, precision)
    return MemoryEstimate(parameters, gradients, state, tally.peak(checkpointing))


def count_saved_activations(
    dims: DimsLike[Size],
    config: ModelConfig = DEFAULT_CONFIG,
    sequence_length: int = 2048,
    *,
    micro_batch_size: int = 1,
    checkpointing: bool = False,
    precision: Precision = "bf16",
) -> Size:
    """Count the bytes that autograd keeps between the forward and the backward pass of a micro-batch.

    For Llama, with e bytes per element, hidden size h, query and key/value widths q and k, heads a, ffn f and
    vocabulary v, each token keeps

    * in each layer: `2 (4h + eh)` in the two norms (float32 input, normalised value), `2eh` in the inputs of the
      projections, `e (2q + 2k) + 4a` in attention (queries, keys, values, output, logsumexp) and `4ef` in the ffn
      (gate, silu of it, up, their product); with checkpointing only `eh`, the layer's input;
    * once: `4h + eh` in the last norm, `eh` in the input of the output projection, `4v` in log-probabilities.

    With k active experts of E, `4ef` becomes `4efk`, and routing keeps `2ehk + 4E`: the input and the output of each
    active expert, and the probabilities.

    Each position of a sequence keeps `2e` times the head size in the rotary tables.

    A fused attention kernel keeps no scores. In float32 no kernel shares key/value heads: a layer with fewer of them
    than query heads keeps `4eq + 4aS` in attention, with S the sequence length.

    bf16 autocast from float32 weights keeps about `10h` more per token and layer than "bf16", since the residual
    stream is float32 and every projection keeps a copy of its input, and 2 bytes per parameter for weights in bf16.

    >>> from slop_hf import ModelDims
    >>> dims = ModelDims(1024, 4096, 1, 8)
    >>> a_layer = 2 * (4 + 2 + 2) * 1024 + 2 * 4 * 1024 + 4 * 8 + 4 * 2 * 4096
    >>> once = (4 + 2 + 2) * 1024 + 4 * 32000
    >>> rotary = 2048 * 2 * 2 * 128
    >>> count_saved_activations(dims) == 2048 * (a_layer + once) + rotary
    True
    """
    _check(0, 1, micro_batch_size, precision)
    require_whole_number(sequence_length, "sequence_length", most=LARGEST_SIZE, error=PlanError)
    return _Tally.of(dims, config, sequence_length, micro_batch_size, precision).saved(checkpointing)


@dataclass(frozen=True)
class MemoryLimit:
    """Memory available per device, and the training settings that use it.

    Args:
        bytes_per_device: bytes that training may take; less than the device has, since
            `estimate_training_memory` does not count everything.
        zero_stage, devices, micro_batch_size, checkpointing, precision, optimizer: see `estimate_training_memory`.

    Raises:
        PlanError: for an unknown precision, optimizer or ZeRO stage, or a number below 1.

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
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        if not is_positive_number(self.bytes_per_device):
            raise PlanError(
                f"bytes_per_device must be a positive number, got {self.bytes_per_device!r}: give bytes, such as 72e9"
            )
        _check(self.zero_stage, self.devices, self.micro_batch_size, self.precision, self.optimizer)

    def estimate(self, dims: DimsLike[Size], config: ModelConfig, sequence_length: int) -> MemoryEstimate[Size]:
        """Estimate the memory of structures under these settings."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return estimate_training_memory(dims, config, sequence_length, **settings)

    def fits(self, dims: DimsLike[Size], config: ModelConfig, sequence_length: int) -> bool | npt.NDArray[np.bool_]:
        """Whether structures fit on the device: a bool for one, an array for many."""
        return self.estimate(dims, config, sequence_length).total <= self.bytes_per_device

    def explain(self, dims: ModelDims, config: ModelConfig, sequence_length: int) -> str:
        """Explain in one line what a structure needs, what the device has, and which settings would make it fit.

        >>> from slop_hf import ModelDims
        >>> config = {"model_type": "llama", "vocab_size": 32000}
        >>> print(MemoryLimit(72e9, devices=8).explain(ModelDims(4096, 11008, 32, 32), config, 2048))
        needs 121 GB per device (parameters 13.5 GB, gradients 13.5 GB, optimizer 80.9 GB, activations 13.1 GB), has
        72 GB; zero_stage 1 would make it fit
        """
        need = self.estimate(dims, config, sequence_length)
        parts = ", ".join(f"{field.name} {format_bytes(getattr(need, field.name))}" for field in fields(need))
        has = f"has {format_bytes(self.bytes_per_device)}"
        advice = "it fits" if need.total <= self.bytes_per_device else self._remedy(dims, config, sequence_length)
        return f"needs {format_bytes(need.total)} per device ({parts}), {has}; {advice}"

    def _remedy(self, dims: ModelDims, config: ModelConfig, sequence_length: int) -> str:
        """Name every single change that makes a structure fit, or else all of them together."""
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
        even_with = f" even with {changes} (then {format_bytes(least)})" if changes else ""
        return (
            f"it would not fit{even_with}: take a smaller structure, shorter sequences or more devices to shard over"
        )

    def _changes(self, other: MemoryLimit) -> str:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != getattr(other, field.name)]
        named = [name if name == "checkpointing" else f"{name} {getattr(other, name)}" for name in changed]
        return " and ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)


@dataclass(frozen=True)
class _Tally(Generic[Size]):
    """Bytes of one micro-batch's activations, by the time at which they are held.

    Args:
        layers: number of layers.
        layer_input: bytes that checkpointing keeps per layer.
        layer: bytes that a layer keeps without checkpointing.
        recomputed: bytes that a layer computed again keeps in addition to its input.
        layer_gradients: bytes that a layer's backward pass holds on top.
        head: bytes that the last norm, the output projection and the loss keep.
        head_gradients: bytes that the loss holds on top in its backward pass.
        tables: bytes that all layers share: cosines and sines of the rotary embedding.
    """

    layers: Size
    layer_input: Size
    layer: Size
    recomputed: Size
    layer_gradients: Size
    head: Size
    head_gradients: Size
    tables: Size

    @classmethod
    def of(
        cls,
        dims: DimsLike[Size],
        config: ModelConfig,
        sequence_length: int,
        micro_batch_size: int,
        precision: Precision,
    ) -> _Tally[Size]:
        element = 2 if precision == "bf16" else _FLOAT32
        tokens = micro_batch_size * sequence_length
        family, sizes = get_architecture(config), compute_axis_sizes(dims, config)
        rows = [row for row in family.rows(config) if row.is_in_layer]
        hidden, logits = element * sizes["hidden"], _FLOAT32 * sizes["vocab"]
        norms = sum(_norm(row, family, sizes, element) for row in rows if row.kind == "norm")
        scores = _scores(dims, sequence_length, precision)
        ffn = element * _ffn_width(rows, sizes, config)
        routing = _routing(sizes, config, element)
        layer = norms + _attention(rows, dims, sizes, scores, element) + 2 * ffn + routing
        return cls(
            layers=dims.num_hidden_layers,
            layer_input=tokens * hidden,
            layer=tokens * layer,
            # In float32 the first norm keeps the layer's input itself, not a copy of it in another precision.
            recomputed=tokens * (layer - hidden * (precision == "fp32")),
            # Gradients of the ffn's product; or of two scores, once the ffn and the norm before it are freed.
            layer_gradients=tokens * _larger(ffn + hidden, 2 * scores - 2 * ffn - 3 * hidden),
            head=tokens * (_FLOAT32 * sizes["hidden"] + 2 * hidden + logits),
            # Gradients of the log-probabilities and of the float32 logits. Trainer frees the logits before the
            # backward pass; a loop that keeps the model's outputs holds them in addition.
            head_gradients=tokens * 2 * logits,
            tables=sequence_length * 2 * element * sizes["head_dim"],
        )

    def saved(self, checkpointing: bool) -> Size:
        """Bytes held at the end of the forward pass."""
        return self.tables + self.head + self.layers * (self.layer_input if checkpointing else self.layer)

    def peak(self, checkpointing: bool) -> Size:
        """Most bytes held during the backward pass: at its beginning, or in the first layer that it reaches.

        The last norm, between these two, holds more only if the vocabulary is hardly larger than the hidden size.
        """
        at_loss = self.head + self.head_gradients
        in_layer = self.layer_gradients + (self.recomputed if checkpointing else 0)
        per_layer = self.layer_input if checkpointing else self.layer
        return self.tables + self.layers * per_layer + _larger(at_loss, in_layer)


def _norm(row: Parameter, family: Architecture, sizes: Mapping[str, Size], element: int) -> Size:
    """Bytes per token that a layer's norm keeps, with the inputs of the projections behind it."""
    if family.norm == "layer":
        return 2 * element * sizes["hidden"]  # its input, the residual stream itself, and its output
    # An RMSNorm of transformers keeps its float32 input, for the square and for the product, and the normalised value
    # for the product with the gain; Gemma's multiplies by the gain before it rounds.
    normalised = _FLOAT32 if family.gain_offset else element
    if row.axes != ("hidden",):  # of queries or keys, which a rotation reads: that keeps nothing
        return (_FLOAT32 + normalised) * sizes["query" if ".q_norm." in row.name else "key_value"]
    return (_FLOAT32 + normalised + (0 if row.is_post_norm else element)) * sizes["hidden"]


def _attention(
    rows: list[Parameter], dims: DimsLike[Size], sizes: Mapping[str, Size], scores: Size, element: int
) -> Size:
    """Bytes per token that attention keeps; its output is the input of the output projection."""
    # Values viewed from a fused projection keep all of it.
    fused = next((axis for row in rows for axis in row.axes if axis in ("fused", "query_key_value")), None)
    values = sizes[fused or "key_value"]
    logsumexp = _FLOAT32 * dims.num_attention_heads
    in_kernel = element * (2 * sizes["query"] + sizes["key_value"] + values) + logsumexp
    # Without a kernel: scores, and queries, keys, values and output of the queries' width.
    return (scores == 0) * in_kernel + (scores > 0) * (4 * element * sizes["query"] + scores)


def _scores(dims: DimsLike[Size], sequence_length: int, precision: Precision) -> Size:
    """Bytes per token of a layer's attention scores; 0 if a fused kernel runs."""
    # transformers lets sdpa share key/value heads among queries. Flash attention supports that, but not float32;
    # the float32 kernel does not support it (up to torch 2.13), and sdpa falls back to plain products.
    plain = (dims.num_key_value_heads < dims.num_attention_heads) & (precision == "fp32")
    return plain * _FLOAT32 * dims.num_attention_heads * sequence_length


def _ffn_width(rows: list[Parameter], sizes: Mapping[str, Size], config: ModelConfig) -> Size:
    """Elements per token that enter the ffn's activation and, with a gate, the product; as many leave them."""
    written = [(row, row.axes[row.write_dimension]) for row in rows if row.kind == "projection"]
    copies = {row: count_active_experts(config) if row.is_stacked else 1 for row, _ in written}
    return reduce(add, (copies[row] * sizes[axis] for row, axis in written if axis in ("ffn", "gate_up")))


def _routing(sizes: Mapping[str, Size], config: ModelConfig, element: int) -> Size | int:
    """Bytes per token that routing keeps: the input and the output of each active expert, and all probabilities."""
    if "experts" not in sizes:
        return 0
    return 2 * element * count_active_experts(config) * sizes["hidden"] + _FLOAT32 * sizes["experts"]


def _larger(left: Size, right: Size) -> Size:
    return np.maximum(left, right) if isinstance(left, np.ndarray) else max(left, right)


def _check(zero_stage: int, devices: int, micro_batch_size: int, precision: str, optimizer: str = "adamw") -> None:
    if not (is_whole_number(zero_stage, least=0) and zero_stage <= 3):
        raise PlanError(f"zero_stage must be 0, 1, 2 or 3, got {zero_stage!r}")
    for name, value in (("devices", devices), ("micro_batch_size", micro_batch_size)):
        require_whole_number(value, name, most=LARGEST_SIZE, error=PlanError)
    if precision not in BYTES_PER_PARAMETER:
        known = " or ".join(map(repr, BYTES_PER_PARAMETER))
        raise PlanError(f"precision must be {known}, got {precision!r}")
    if optimizer not in get_args(OptimizerName):
        raise PlanError(f"optimizer must be {' or '.join(map(repr, get_args(OptimizerName)))}, got {optimizer!r}")
