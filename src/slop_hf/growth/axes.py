"""Axis maps: for each new slot of an axis, the old slot that it comes from, or "new".

From one map per axis follow the grown weights, the optimizer's moments and the config alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..architectures import Axis
from ..dims import ModelDims
from ..errors import GrowthError


@dataclass(frozen=True)
class AxisMap:
    """Where the slots of a grown axis come from, as runs of consecutive slots.

    Args:
        old_size, new_size: slots before and after.
        runs: `(new start, old start, length)` of each block of old slots, by rising new start.

    >>> AxisMap(4, 7, ((0, 0, 2), (3, 2, 2))).source
    [0, 1, None, 2, 3, None, None]
    """

    old_size: int
    new_size: int
    runs: tuple[tuple[int, int, int], ...]

    @classmethod
    def append(cls, old_size: int, new_size: int) -> AxisMap:
        """Old slots first, new slots behind them."""
        return cls(old_size, new_size, ((0, 0, old_size),))

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.runs == ((0, 0, self.new_size),)

    @property
    def segments(self) -> list[tuple[int, int | None, int]]:
        """The whole new axis as `(new start, old start or None for new slots, length)`."""
        segments: list[tuple[int, int | None, int]] = []
        end = 0
        for new_start, old_start, length in self.runs:
            if new_start > end:
                segments.append((end, None, new_start - end))
            segments.append((new_start, old_start, length))
            end = new_start + length
        if end < self.new_size:
            segments.append((end, None, self.new_size - end))
        return segments

    @property
    def source(self) -> list[int | None]:
        """The old slot of each new one; None for a new one."""
        return [
            None if old_start is None else old_start + offset
            for _, old_start, length in self.segments
            for offset in range(length)
        ]


def axis_maps(old: ModelDims, new: ModelDims) -> dict[Axis, AxisMap]:
    """The maps of all axes but the vocabulary, which growth leaves alone.

    Raises:
        GrowthError: where query heads would have to leave their key/value head.
    """
    query, key_value = _head_maps(old, new)
    return {
        "hidden": AxisMap.append(old.hidden_size, new.hidden_size),
        "ffn": AxisMap.append(old.intermediate_size, new.intermediate_size),
        "query": query,
        "key_value": key_value,
    }


def _head_maps(old: ModelDims, new: ModelDims) -> tuple[AxisMap, AxisMap]:
    """Maps of the query and key/value axes, in slots of head_dim.

    transformers lets query head i attend with key/value head i // g, g being the query heads per key/value head. So
    old head (k, j) of group k goes to k * g' + j, and new key/value heads come behind with whole groups of theirs;
    query heads appended at the end would attend with the wrong keys.
    """
    size = old.head_dim
    old_group = old.num_attention_heads // old.num_key_value_heads
    new_group = new.num_attention_heads // new.num_key_value_heads
    if new_group < old_group:
        raise GrowthError(
            f"growing from {old_group} to {new_group} query heads per key/value head would part query heads from "
            f"their keys; keep num_key_value_heads at {old.num_key_value_heads}, or grow both in proportion"
        )
    if new_group == old_group:
        query = AxisMap.append(old.num_attention_heads * size, new.num_attention_heads * size)
    else:
        runs = [
            (group * new_group * size, group * old_group * size, old_group * size)
            for group in range(old.num_key_value_heads)
        ]
        query = AxisMap(old.num_attention_heads * size, new.num_attention_heads * size, tuple(runs))
    return query, AxisMap.append(old.num_key_value_heads * size, new.num_key_value_heads * size)
