"""Structures part of the way between two others, on sizes that load."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..dims import ModelDims

_FFN_MULTIPLE = 256


def part_way(before: ModelDims, initial: ModelDims, target: ModelDims, number: int, count: int) -> ModelDims:
    """The structure after growth `number` of `count` by even parts, in no dimension below `before`.

    >>> small = ModelDims(768, 2048, 6, 6)
    >>> str(part_way(small, small, ModelDims(2816, 7680, 8, 22), 1, 3))
    '(1536, 4096, 7, 12)'
    """
    heads = _even_part(initial.num_attention_heads, target.num_attention_heads, number, count)
    part = _fraction(initial.num_attention_heads, heads, target.num_attention_heads, number / count)
    wanted = {name: size + part * (target.as_dict()[name] - size) for name, size in initial.as_dict().items()}

    def distance(dims: ModelDims) -> float:
        return sum(abs(size - wanted[name]) / target.as_dict()[name] for name, size in dims.as_dict().items())

    nearest = min(_widths(before, initial, target, wanted["hidden_size"], wanted["head_dim"]), key=distance)
    part = _fraction(initial.hidden_size, nearest.hidden_size, target.hidden_size, part)
    ffn = initial.intermediate_size + part * (target.intermediate_size - initial.intermediate_size)
    step = math.gcd(initial.intermediate_size, target.intermediate_size)
    step = _FFN_MULTIPLE if step % _FFN_MULTIPLE == 0 else step
    return nearest.replace(
        intermediate_size=_multiple(ffn, step, before.intermediate_size, target.intermediate_size),
        num_hidden_layers=_even_part(initial.num_hidden_layers, target.num_hidden_layers, number, count),
    )


def _widths(
    before: ModelDims, initial: ModelDims, target: ModelDims, wanted_hidden: float, wanted_head_dim: float
) -> Iterator[ModelDims]:
    """Structures that load between the widths of `before` and the target; `before` is one of them."""
    tied = all(dims.num_attention_heads * dims.head_dim == dims.hidden_size for dims in (initial, target))
    unit = math.gcd(initial.hidden_size, target.hidden_size, initial.head_dim, target.head_dim)
    head_dims = range(before.head_dim, target.head_dim + 1, 2)
    nearest_head_dim = min(head_dims, key=lambda size: abs(size - wanted_head_dim))
    for heads in range(before.num_attention_heads, target.num_attention_heads + 1):
        if tied:
            pairs = [(heads * head_dim, head_dim) for head_dim in head_dims]
        else:
            step = math.lcm(heads, unit)
            pairs = [(_multiple(wanted_hidden, step, before.hidden_size, target.hidden_size), nearest_head_dim)]
        for hidden, head_dim in pairs:
            if before.hidden_size <= hidden <= target.hidden_size:
                for kv_heads in _key_value_heads(heads, before, initial, target):
                    yield before.replace(
                        hidden_size=hidden,
                        num_attention_heads=heads,
                        num_key_value_heads=kv_heads,
                        head_dim=head_dim,
                    )


def _key_value_heads(heads: int, before: ModelDims, initial: ModelDims, target: ModelDims) -> list[int]:
    """What `heads` query heads can share; as many of them each as at both ends, where these agree."""
    between = range(before.num_key_value_heads, target.num_key_value_heads + 1)
    groups = {dims.num_attention_heads // dims.num_key_value_heads for dims in (initial, target)}
    return [kv for kv in between if heads % kv == 0 and (len(groups) > 1 or heads // kv in groups)]


def _even_part(start: int, stop: int, number: int, count: int) -> int:
    """Where growth `number` of `count` ends: 6 to 12 in four is 8, 10, 11, 12."""
    whole, over = divmod(stop - start, count)
    return start + whole * number + min(number, over)


def _fraction(start: int, size: int, stop: int, otherwise: float) -> float:
    return (size - start) / (stop - start) if stop > start else otherwise


def _multiple(wanted: float, step: int, low: int, high: int) -> int:
    """The multiple of `step` nearest to `wanted` between `low` and `high`; one out of bounds where there is none."""
    return step * max(-(-low // step), min(round(wanted / step), high // step))
