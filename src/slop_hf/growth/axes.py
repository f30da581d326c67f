"""Axis maps: for each slot of a grown axis, the old slot that it comes from, or "new".

One map per axis determines the grown weights, the optimizer's moments and the config. The names of the axes are those
of the axis tables (`architectures.py`); docs/growth.md explains the idea with a worked example.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..architectures import JOINED_AXES, Axis
from ..dims import ModelDims
from ..errors import GrowthError


class Segment(NamedTuple):
    """Consecutive slots of a grown axis that come from consecutive old slots, or are all new.

    Args:
        old: old slot that the first slot comes from; None if the slots are new.
        copies: number of slots, over the whole axis, that come from each of these old slots.
        operator: operator that added the slots, if they are new.
    """

    start: int
    length: int
    old: int | None
    copies: int = 1
    operator: str = ""


@dataclass(frozen=True)
class AxisMap:
    """The origin of every slot of a grown axis.

    A map is stored as a few segments, from the first slot to the last without a gap, because tensors are copied and
    filled block by block: one block for each combination of segments, one per dimension. `parts` are the maps of the
    axes that a joined axis consists of, and empty for all others.

    >>> AxisMap.append(2, 4, "ffn").source
    [0, 1, None, None]
    >>> AxisMap.tile(2, 5, "ffn").segments[0]
    Segment(start=0, length=1, old=0, copies=3, operator='')
    """

    old_size: int
    segments: tuple[Segment, ...]
    parts: tuple[AxisMap, ...] = ()

    @classmethod
    def join(cls, parts: Sequence[AxisMap]) -> AxisMap:
        """Put axes one after another, as a fused weight does; `parts` keeps their own maps.

        >>> AxisMap.join([AxisMap.append(2, 3, "mha"), AxisMap.identity(1)]).source
        [0, 1, None, 2]
        """
        segments: list[Segment] = []
        start = old_start = 0
        for part in parts:
            for segment in part.segments:
                old = None if segment.old is None else segment.old + old_start
                segments.append(segment._replace(start=segment.start + start, old=old))
            start, old_start = start + part.new_size, old_start + part.old_size
        return cls(old_start, tuple(segments), tuple(parts))

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        """Keep every slot where it is."""
        return cls(size, (Segment(0, size, 0),))

    @classmethod
    def cut(cls, size: int, parts: int, number: int) -> AxisMap:
        """Keep one of several parts of equal size, and leave out the other slots.

        >>> AxisMap.cut(6, 3, 1).source
        [2, 3]
        """
        length = size // parts
        return cls(size, (Segment(0, length, number * length),))

    @classmethod
    def renew(cls, old_size: int, new_size: int, operator: str) -> AxisMap:
        """Take no old slot: all slots are new."""
        return cls(old_size, (Segment(0, new_size, None, 1, operator),))

    def renew_all(self, operator: str) -> AxisMap:
        """Return a map between the same sizes, and with the same parts, that takes no old slot."""
        if self.parts:
            return AxisMap.join([part.renew_all(operator) for part in self.parts])
        return AxisMap.renew(self.old_size, self.new_size, operator)

    @classmethod
    def append(cls, old_size: int, new_size: int, operator: str) -> AxisMap:
        """Put new slots after the old ones."""
        new = Segment(old_size, new_size - old_size, None, 1, operator)
        return cls(old_size, (Segment(0, old_size, 0), *([new] if new_size > old_size else [])))

    @classmethod
    def tile(cls, old_size: int, new_size: int, operator: str, *, whole: bool = False) -> AxisMap:
        """Repeat the old slots: new slot j is a copy of old slot `j mod old_size`.

        With `whole`, only complete repetitions are copies; the slots after the last one are new.
        """
        end = new_size // old_size * old_size if whole else new_size
        source = [slot % old_size if slot < end else None for slot in range(new_size)]
        return cls.from_source(source, old_size, operator)

    @classmethod
    def from_source(cls, source: Sequence[int | None], old_size: int, operator: str, unit: int = 1) -> AxisMap:
        """Build the map from the old slot of each new one (None: new).

        Args:
            source: old unit of each new unit.
            unit: consecutive slots that an entry of `source` stands for, such as the head_dim slots of a head.
        """
        copies = Counter(source)
        segments: list[Segment] = []
        for index, old in enumerate(source):
            start, slot, count = index * unit, None if old is None else old * unit, 1 if old is None else copies[old]
            if segments and _continues(segments[-1], slot, count):
                segments[-1] = segments[-1]._replace(length=segments[-1].length + unit)
            else:
                segments.append(Segment(start, unit, slot, count, operator if old is None else ""))
        return cls(old_size, tuple(segments))

    def grow_units(self, unit: AxisMap) -> AxisMap:
        """Return this map with every `unit.old_size` slots grown by `unit`: a map of heads, and one within each head.

        A new head stays new as a whole.
        """
        if unit.is_identity:
            return self
        segments: list[Segment] = []
        for segment in self.segments:
            for number in range(segment.length // unit.old_size):
                start = (segment.start // unit.old_size + number) * unit.new_size
                if segment.old is None:
                    segments.append(Segment(start, unit.new_size, None, 1, segment.operator))
                    continue
                for part in unit.segments:
                    old = None if part.old is None else segment.old + number * unit.old_size + part.old
                    copies = 1 if old is None else segment.copies
                    segments.append(Segment(start + part.start, part.length, old, copies, part.operator))
        return AxisMap(self.old_size, tuple(segments))

    @property
    def new_size(self) -> int:
        return self.segments[-1].start + self.segments[-1].length

    @property
    def is_identity(self) -> bool:
        """Whether every slot stays where it is and none is added."""
        if self.parts:
            return all(part.is_identity for part in self.parts)
        return self.segments == (Segment(0, self.old_size, 0),)

    @property
    def max_copies(self) -> int:
        """The largest number of slots that come from one old slot."""
        return max(segment.copies for segment in self.segments)

    @property
    def has_even_copies(self) -> bool:
        """Whether equally many slots come from each old slot, whatever the number of new ones."""
        return len({segment.copies for segment in self.segments if segment.old is not None}) <= 1

    @property
    def source(self) -> list[int | None]:
        """The old slot of each slot; None for a new one."""
        return [
            None if segment.old is None else segment.old + i
            for segment in self.segments
            for i in range(segment.length)
        ]

    @cached_property
    def originals(self) -> AxisMap:
        """This map with every copy of an old slot after the first one as a new slot; the numbers of copies stay.

        >>> AxisMap.tile(2, 5, "ffn").originals.source
        [0, 1, None, None, None]
        """
        if self.max_copies == 1:
            return self
        if self.parts:
            return AxisMap.join([part.originals for part in self.parts])
        seen: set[int] = set()
        segments: list[Segment] = []
        for segment in self.segments:
            for i in range(segment.length):
                old = None if segment.old is None or segment.old + i in seen else segment.old + i
                seen |= set() if old is None else {old}
                copies = 1 if old is None else segment.copies
                if segments and _continues(segments[-1], old, copies):
                    segments[-1] = segments[-1]._replace(length=segments[-1].length + 1)
                else:
                    segments.append(Segment(segment.start + i, 1, old, copies, segment.operator))
        return AxisMap(self.old_size, tuple(segments))

    @property
    def new_slots(self) -> list[int]:
        """The new slots: those without a source."""
        return [slot for slot, old in enumerate(self.source) if old is None]


#: Inits of width whose additional slots are copies.
COPIES = ("copy", "rms_copy")


def _continues(segment: Segment, slot: int | None, copies: int) -> bool:
    """Whether a slot from old slot `slot` (None: new) belongs to the segment before it."""
    if segment.old is None or slot is None:
        return segment.old is None and slot is None
    return segment.copies == copies and segment.old + segment.length == slot


def build_axis_maps(old: ModelDims, new: ModelDims, inits: Mapping[str, str]) -> dict[Axis, AxisMap]:
    """Build the map of every axis except the vocabulary and the positions, which growth leaves alone.

    The init of each operator decides whether additional slots are copies or new. Raises a `GrowthError` if query heads
    would be separated from the key/value head that they attend with.
    """
    map_ffn = AxisMap.tile if inits.get("ffn") in COPIES else AxisMap.append
    ffn = map_ffn(old.intermediate_size, new.intermediate_size, "ffn")
    hidden = AxisMap.append(old.hidden_size, new.hidden_size, "hidden")
    if inits.get("hidden") == "copy":
        # If slots were copied unequally often, no norm gain could restore the residual stream.
        hidden = AxisMap.tile(old.hidden_size, new.hidden_size, "hidden", whole=True)
    elif inits.get("hidden") == "rms_copy":
        hidden = AxisMap.tile(old.hidden_size, new.hidden_size, "hidden")
    head = _build_head_map(old.head_dim, new.head_dim, spread=inits.get("head_dim") == "spread")
    queries, keys = _find_head_sources(old, new, copy=inits.get("mha") in COPIES)

    def map_heads(source: Sequence[int | None], count: int, parts: int = 1) -> AxisMap:
        unit = old.head_dim * parts
        return AxisMap.from_source(source, count * unit, "mha", unit)

    maps: dict[Axis, AxisMap] = {
        "hidden": hidden,
        "ffn": ffn,
        "query": map_heads(queries, old.num_attention_heads).grow_units(head),
        "key_value": map_heads(keys, old.num_key_value_heads).grow_units(head),
        "fused": map_heads(queries, old.num_attention_heads, parts=3),
        "head_dim": head,
    }
    return {**maps, **{name: AxisMap.join([maps[axis] for axis, _ in parts]) for name, parts in JOINED_AXES.items()}}


def _find_head_sources(old: ModelDims, new: ModelDims, *, copy: bool) -> tuple[list[int | None], list[int | None]]:
    """Return the old query head of each new query head, and the old key/value head of each new key/value head.

    With g query heads per key/value head, transformers lets query head i attend with key/value head i // g. Old query
    head j of group k therefore moves from k * g + j to k * g' + j; appended at the end, it would attend with other
    keys. New key/value heads come last, together with their groups. If the groups become smaller, each part of an old
    group gets a copy of the key/value head that the group shared.
    """
    group = old.num_attention_heads // old.num_key_value_heads
    new_group = new.num_attention_heads // new.num_key_value_heads
    split = 1
    if new_group < group:
        split, remainder = divmod(group, new_group)
        if remainder or new.num_key_value_heads < old.num_key_value_heads * split:
            raise GrowthError(
                f"growing from {group} to {new_group} query heads per key/value head would separate query heads from "
                f"their keys; keep num_key_value_heads at {old.num_key_value_heads}, or split each group into equal "
                "parts"
            )
        group = new_group
    old_groups = old.num_key_value_heads * split
    queries: list[int | None] = []
    keys: list[int | None] = []
    for k in range(new.num_key_value_heads):
        is_old_group = k < old_groups
        keys.append(k % old_groups // split if is_old_group or copy else None)
        for j in range(new_group):
            is_old = is_old_group and j < group
            queries.append(k % old_groups * group + j % group if is_old or copy else None)
    return queries, keys


def _build_head_map(old: int, new: int, *, spread: bool) -> AxisMap:
    """Build the map within a head. Rotary embeddings rotate slots (i, i + d/2) together, at the frequency of pair i.

    By default pairs keep their index, and `rope_theta` is changed to keep their frequencies. With `spread`, pair i of
    d/2 becomes pair m * i of m * d/2, which already has its frequency.
    """
    if old == new:
        return AxisMap.identity(old)
    factor, remainder = divmod(new, old)
    if spread and remainder:
        raise GrowthError(f"init 'spread' needs a whole multiple of head_dim {old}, got {new}; 'preserving' takes any")
    step = factor if spread else 1
    source: list[int | None] = [None] * new
    for i in range(old // 2):
        source[step * i], source[step * i + new // 2] = i, i + old // 2
    return AxisMap.from_source(source, old, "head_dim")
