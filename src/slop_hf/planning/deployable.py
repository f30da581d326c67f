"""Structures that users deploy: heads a power of two or three times one, sizes in multiples of 128."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

from ..architectures import get_architecture
from ..dims import ModelConfig, ModelDims

#: Numbers of heads: powers of two, and three times one. Tensor parallelism divides them.
HEADS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
#: Divisor of hidden and ffn sizes; a smaller model than this has multiples of 16.
MULTIPLE, SMALL_MULTIPLE = 128, 16
#: Hidden size / layers of models from scratch, and their most layers.
ASPECTS = (24, 170)
MOST_LAYERS = 128
#: Factors that layers and ffn grow by.
_FACTORS = (Fraction(5, 4), Fraction(4, 3), Fraction(3, 2), Fraction(2))
#: Head size of models without an example: that of models from this hidden size on, and below it.
_LARGE, _HEAD_DIMS = 2048, (64, 128)
#: From this many layers on, a model's depth is a multiple of 4, else of 2.
_DEEP = 16


def round_size(size: float | Fraction) -> int:
    """Return the next size that is a multiple of 128, or of 16 below 128.

    >>> round_size(2730.7), round_size(40)
    (2816, 48)
    """
    multiple = MULTIPLE if size > MULTIPLE else SMALL_MULTIPLE
    return math.ceil(size / multiple - 1e-9) * multiple


def round_layers(layers: float | Fraction) -> int:
    """Return the nearest usual depth: multiples of 4 from 16 layers on, of 2 from 4 on.

    >>> [round_layers(layers) for layers in (3.2, 10.9, 32.1, 37.4)]
    [3, 10, 32, 36]
    """
    multiple = 4 if layers >= _DEEP else 2 if layers >= 4 else 1
    return max(1, round(layers / multiple) * multiple)


def list_shapes(config: ModelConfig, like: ModelDims | None = None) -> list[ModelDims]:
    """List structures of all sizes to train from scratch.

    Args:
        config: config of the family.
        like: structure whose head size, query heads per key/value head and ratio of ffn to hidden they have.
    """
    rows = get_architecture(config).rows(config)
    is_gated = sum(row.kind == "projection" and row.axes[0] == "ffn" for row in rows) > 1
    ratio = Fraction(8, 3) if is_gated else Fraction(4)
    group, head_dim = 1, 0
    if like is not None:
        ratio = Fraction(like.intermediate_size, like.hidden_size)
        group, head_dim = like.num_attention_heads // like.num_key_value_heads, like.head_dim
    shapes = []
    for hidden, heads in _list_widths(like):
        if heads % group:
            continue
        fewest, most = (max(2, round(hidden / aspect)) for aspect in reversed(ASPECTS))
        for layers in sorted({round_layers(layers) for layers in range(fewest, min(most, MOST_LAYERS) + 1)}):
            shapes.append(ModelDims(hidden, round_size(ratio * hidden), layers, heads, heads // group, head_dim))
    return shapes


def _list_widths(like: ModelDims | None) -> Iterator[tuple[int, int]]:
    """Yield hidden sizes with their heads."""
    for heads in HEADS:
        if like is not None:
            hidden, remainder = divmod(like.hidden_size * heads, like.num_attention_heads)
            if not remainder and hidden % SMALL_MULTIPLE == 0 and (hidden < MULTIPLE or hidden % MULTIPLE == 0):
                yield hidden, heads
            continue
        for head_dim in _HEAD_DIMS:
            hidden = heads * head_dim
            if (hidden >= _LARGE) == (head_dim == _HEAD_DIMS[1]) and (hidden < MULTIPLE or hidden % MULTIPLE == 0):
                yield hidden, heads


def list_larger(start: ModelDims) -> list[ModelDims]:
    """List structures that a model could grow to: deeper, with a larger ffn, wider, and deeper and wider.

    Depth and ffn grow by 5/4 to 2, width to the next one or two numbers of heads. Head size and query heads per
    key/value head stay.

    >>> [dims.num_hidden_layers for dims in list_larger(ModelDims(1024, 4096, 24, 16))[:3]]
    [32, 36, 48]
    """
    layers = start.num_hidden_layers
    depths = sorted({round_layers(layers * factor) for factor in _FACTORS} - set(range(layers + 1)))
    deeper = [start.replace(num_hidden_layers=depth) for depth in depths]
    larger_ffn = [
        start.replace(intermediate_size=round_size(start.intermediate_size * factor)) for factor in _FACTORS[2:]
    ]
    wider = []
    for heads in [number for number in HEADS if number > start.num_attention_heads][:2]:
        if scaled := _scale_width(start, heads):
            wider.append(scaled)
    both = [dims.replace(num_hidden_layers=depth) for dims in wider for depth in depths]
    return list(dict.fromkeys([*deeper, *larger_ffn, *wider, *both]))


def _scale_width(dims: ModelDims, heads: int) -> ModelDims | None:
    """Return a structure with other heads, and widths in proportion; None unless these are usual widths."""
    hidden, remainder = divmod(dims.hidden_size * heads, dims.num_attention_heads)
    kv_heads, odd = divmod(heads * dims.num_key_value_heads, dims.num_attention_heads)
    if remainder or odd or not kv_heads or hidden % SMALL_MULTIPLE or hidden % heads:
        return None
    ffn = round_size(Fraction(dims.intermediate_size, dims.hidden_size) * hidden)
    return ModelDims(hidden, ffn, dims.num_hidden_layers, heads, kv_heads, dims.head_dim)


def list_smaller(target: ModelDims) -> list[ModelDims]:
    """List structures that could grow to a target: fewer layers, narrower, and both.

    >>> [str(dims) for dims in list_smaller(ModelDims(1024, 4096, 24, 16))[:3]]
    ['(1024, 4096, 6, 16)', '(1024, 4096, 12, 16)', '(1024, 4096, 16, 16)']
    """
    layers = target.num_hidden_layers
    depths = sorted({round_layers(layers / factor) for factor in (4, 2, Fraction(3, 2))} - {layers})
    depths = [depth for depth in depths if depth < layers]
    shallow = [target.replace(num_hidden_layers=depth) for depth in depths]
    narrow = []
    for heads in reversed([number for number in HEADS if number < target.num_attention_heads][-2:]):
        if scaled := _scale_width(target, heads):
            narrow.append(scaled.replace(intermediate_size=min(scaled.intermediate_size, target.intermediate_size)))
    both = [dims.replace(num_hidden_layers=depth) for dims in narrow for depth in depths]
    return list(dict.fromkeys([*shallow, *narrow, *both]))


def list_ways(small: ModelDims, target: ModelDims) -> list[tuple[ModelDims, ...]]:
    """List the paths between two structures: at once, depth before the rest or after it, and in two steps of depth.

    >>> small = ModelDims(64, 128, 4, 2)
    >>> [len(path) for path in list_ways(small, small.replace(num_hidden_layers=8))]
    [2, 3]
    """
    paths: list[tuple[ModelDims, ...]] = [(small, target)]
    before, after = small.num_hidden_layers, target.num_hidden_layers
    deeper, wider = small.replace(num_hidden_layers=after), target.replace(num_hidden_layers=before)
    if before < after and deeper != target:
        paths += [(small, deeper, target), (small, wider, target)]
    middle = round_layers(math.sqrt(before * after))
    if before < middle < after and deeper == target:
        paths.append((small, small.replace(num_hidden_layers=middle), target))
    return paths


def list_paths_to(target: ModelDims) -> list[tuple[ModelDims, ...]]:
    """List the paths from smaller structures to a target."""
    return [path for small in list_smaller(target) for path in list_ways(small, target)]


def list_paths_from(start: ModelDims, targets: Sequence[ModelDims]) -> list[tuple[ModelDims, ...]]:
    """List the paths from a structure to targets."""
    return [path for target in targets for path in list_ways(start, target)]
