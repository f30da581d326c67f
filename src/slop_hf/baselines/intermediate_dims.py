"""Structures between two others, on sizes that transformers can load."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..dims import ModelDims

_FFN_MULTIPLE = 256


def interpolate_dims(before: ModelDims, initial: ModelDims, target: ModelDims, number: int, count: int) -> ModelDims:
    """Return the structure after growth `number` (from 1) of `count` even growths, with no size below `before`'s.

    Args:
        before: structure to grow.
        initial, target: structures before the first growth and after the last.

    >>> small = ModelDims(768, 2048, 6, 6)
    >>> str(interpolate_dims(small, small, ModelDims(2816, 7680, 8, 22), 1, 3))
    '(1536, 4096, 7, 12)'
    """
    heads = _split_evenly(initial.num_attention_heads, target.num_attention_heads, number, count)
    fraction = _compute_fraction(initial.num_attention_heads, heads, target.num_attention_heads, number / count)
    wanted = {name: size + fraction * (target.as_dict()[name] - size) for name, size in initial.as_dict().items()}

    def compute_distance(dims: ModelDims) -> float:
        return sum(abs(size - wanted[name]) / target.as_dict()[name] for name, size in dims.as_dict().items())

    widths = _list_widths(before, initial, target, wanted["hidden_size"], wanted["head_dim"])
    nearest = min(widths, key=compute_distance)
    fraction = _compute_fraction(initial.hidden_size, nearest.hidden_size, target.hidden_size, fraction)
    ffn = initial.intermediate_size + fraction * (target.intermediate_size - initial.intermediate_size)
    step = math.gcd(initial.intermediate_size, target.intermediate_size)
    step = _FFN_MULTIPLE if step % _FFN_MULTIPLE == 0 else step
    return nearest.replace(
        intermediate_size=_round_to_multiple(ffn, step, before.intermediate_size, target.intermediate_size),
        num_hidden_layers=_split_evenly(initial.num_hidden_layers, target.num_hidden_layers, number, count),
    )


def _list_widths(
    before: ModelDims, initial: ModelDims, target: ModelDims, wanted_hidden: float, wanted_head_dim: float
) -> Iterator[ModelDims]:
    """Yield loadable structures between the widths of `before` and the target, including `before`'s."""
    fills_hidden = all(dims.num_attention_heads * dims.head_dim == dims.hidden_size for dims in (initial, target))
    unit = math.gcd(initial.hidden_size, target.hidden_size, initial.head_dim, target.head_dim)
    head_dims = range(before.head_dim, target.head_dim + 1, 2)
    nearest_head_dim = min(head_dims, key=lambda size: abs(size - wanted_head_dim))
    for heads in range(before.num_attention_heads, target.num_attention_heads + 1):
        if fills_hidden:
            pairs = [(heads * head_dim, head_dim) for head_dim in head_dims]
        else:
            step = math.lcm(heads, unit)
            hidden = _round_to_multiple(wanted_hidden, step, before.hidden_size, target.hidden_size)
            pairs = [(hidden, nearest_head_dim)]
        for hidden, head_dim in pairs:
            if before.hidden_size <= hidden <= target.hidden_size:
                for kv_heads in _list_kv_heads(heads, before, initial, target):
                    yield ModelDims(
                        hidden, before.intermediate_size, before.num_hidden_layers, heads, kv_heads, head_dim
                    )


def _list_kv_heads(heads: int, before: ModelDims, initial: ModelDims, target: ModelDims) -> list[int]:
    """Return the key/value heads that `heads` query heads can share, in groups as at both ends if these agree."""
    between = range(before.num_key_value_heads, target.num_key_value_heads + 1)
    groups = {dims.num_attention_heads // dims.num_key_value_heads for dims in (initial, target)}
    return [kv for kv in between if heads % kv == 0 and (len(groups) > 1 or heads // kv in groups)]


def _split_evenly(start: int, stop: int, number: int, count: int) -> int:
    """Return the size after growth `number` of `count`, larger growths first: 6 to 12 in four is 8, 10, 11, 12."""
    step, remainder = divmod(stop - start, count)
    return start + step * number + min(number, remainder)


def _compute_fraction(start: int, size: int, stop: int, default: float) -> float:
    return (size - start) / (stop - start) if stop > start else default


def _round_to_multiple(wanted: float, step: int, low: int, high: int) -> int:
    """Return the multiple of `step` nearest to `wanted` between `low` and `high`; out of bounds if it is outside."""
    return step * max(-(-low // step), min(round(wanted / step), high // step))
