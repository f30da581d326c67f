"""Axis maps: for each new slot of an axis, the old slot that it comes from, or "new".

From one map per axis follow the grown weights, the optimizer's moments and the config alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..architectures import Axis
from ..dims import ModelDims
from ..errors import GrowthError


class Run(NamedTuple):
    """A run of consecutive slots of a grown axis.

    `old` is the old slot that its first slot comes from, None for new slots; `copies` says how many slots in all come
    from each of these old ones, and `operator` who added new ones.
    """

    start: int
    length: int
    old: int | None
    copies: int = 1
    operator: str = ""


@dataclass(frozen=True)
class AxisMap:
    """Where the slots of a grown axis come from.

    Args:
        old_size: slots before.
        runs: of slots after, from the first to the last without a gap.

    >>> AxisMap.append(2, 4, "ffn").source
    [0, 1, None, None]
    >>> AxisMap.tile(2, 5, "ffn").runs[0]
    Run(start=0, length=1, old=0, copies=3, operator='')
    """

    old_size: int
    runs: tuple[Run, ...]

    @classmethod
    def identity(cls, size: int) -> AxisMap:
        """Every slot where it was."""
        return cls(size, (Run(0, size, 0),))

    @classmethod
    def append(cls, old_size: int, new_size: int, operator: str) -> AxisMap:
        """Old slots first, new slots behind them."""
        return cls.of(old_size, [*range(old_size), *[None] * (new_size - old_size)], operator)

    @classmethod
    def tile(cls, old_size: int, new_size: int, operator: str, *, whole: bool = False) -> AxisMap:
        """Old slots over and over: new slot j is a copy of `j mod old_size`.

        With `whole`, only whole repetitions are copies, and the rest is new.
        """
        end = new_size // old_size * old_size if whole else new_size
        return cls.of(old_size, [slot % old_size if slot < end else None for slot in range(new_size)], operator)

    @classmethod
    def of(cls, old_size: int, source: Sequence[int | None], operator: str, unit: int = 1) -> AxisMap:
        """The map of a list of sources, each standing for `unit` consecutive slots (a head for its head_dim)."""
        copies = Counter(source)
        runs: list[Run] = []
        for index, old in enumerate(source):
            start, slot, many = index * unit, None if old is None else old * unit, 1 if old is None else copies[old]
            if runs and _continues(runs[-1], slot, many):
                runs[-1] = runs[-1]._replace(length=runs[-1].length + unit)
            else:
                runs.append(Run(start, unit, slot, many, operator if old is None else ""))
        return cls(old_size, tuple(runs))

    def inside(self, unit: AxisMap) -> AxisMap:
        """This map with each stretch of `unit.old_size` old slots grown by `unit`: heads, and what is in a head.

        New stretches stay new as a whole.
        """
        if unit.is_identity:
            return self
        runs: list[Run] = []
        for run in self.runs:
            for number in range(run.length // unit.old_size):
                start = (run.start // unit.old_size + number) * unit.new_size
                if run.old is None:
                    runs.append(Run(start, unit.new_size, None, 1, run.operator))
                    continue
                for part in unit.runs:
                    old = None if part.old is None else run.old + number * unit.old_size + part.old
                    copies = 1 if old is None else run.copies
                    runs.append(Run(start + part.start, part.length, old, copies, part.operator))
        return AxisMap(self.old_size, tuple(runs))

    @property
    def new_size(self) -> int:
        """Slots after."""
        return self.runs[-1].start + self.runs[-1].length

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return self.runs == (Run(0, self.old_size, 0),)

    @property
    def most_copies(self) -> int:
        """The largest number of slots that come from one old slot."""
        return max(run.copies for run in self.runs)

    @property
    def source(self) -> list[int | None]:
        """The old slot of each new one; None for a new one."""
        return [None if run.old is None else run.old + i for run in self.runs for i in range(run.length)]


def _continues(run: Run, slot: int | None, copies: int) -> bool:
    if run.old is None or slot is None:
        return run.old is None and slot is None
    return run.copies == copies and run.old + run.length == slot


def build_axis_maps(old: ModelDims, new: ModelDims, inits: Mapping[str, str]) -> dict[Axis, AxisMap]:
    """The maps of all axes but the vocabulary, which growth leaves alone.

    Args:
        old, new: structures before and after.
        inits: the init of each operator; it decides whether new slots are copies.

    Raises:
        GrowthError: where query heads would have to leave their key/value head.
    """
    copies_ffn = inits.get("ffn") == "copy"
    ffn = (AxisMap.tile if copies_ffn else AxisMap.append)(old.intermediate_size, new.intermediate_size, "ffn")
    hidden = AxisMap.append(old.hidden_size, new.hidden_size, "hidden")
    if inits.get("hidden") == "copy":
        # A residual stream whose slots are copied unequally often cannot be repaired by any gain.
        hidden = AxisMap.tile(old.hidden_size, new.hidden_size, "hidden", whole=True)
    head = _head_map(old.head_dim, new.head_dim, spread=inits.get("head_dim") == "spread")
    queries, keys = _head_sources(old, new, copy=inits.get("mha") == "copy")

    def heads(source: Iterable[int | None], count: int, parts: int = 1) -> AxisMap:
        unit = old.head_dim * parts
        return AxisMap.of(count * unit, list(source), "mha", unit)

    return {
        "hidden": hidden,
        "ffn": ffn,
        "query": heads(queries, old.num_attention_heads).inside(head),
        "key_value": heads(keys, old.num_key_value_heads).inside(head),
        "fused": heads(queries, old.num_attention_heads, parts=3),
        "head_dim": head,
    }


def _head_sources(old: ModelDims, new: ModelDims, *, copy: bool) -> tuple[list[int | None], list[int | None]]:
    """The old query and key/value head of each new one.

    transformers lets query head i attend with key/value head i // g, g being the query heads per key/value head. So
    old head (k, j) of group k goes to k * g' + j, and new key/value heads come behind with whole groups of theirs;
    query heads appended at the end would attend with the wrong keys. A smaller group gives each of its parts a copy of
    the key/value head that they shared.
    """
    group = old.num_attention_heads // old.num_key_value_heads
    new_group = new.num_attention_heads // new.num_key_value_heads
    split = 1
    if new_group < group:
        split, remainder = divmod(group, new_group)
        if remainder or new.num_key_value_heads < old.num_key_value_heads * split:
            raise GrowthError(
                f"growing from {group} to {new_group} query heads per key/value head would part query heads from "
                f"their keys; keep num_key_value_heads at {old.num_key_value_heads}, or give each group whole parts"
            )
        group = new_group
    old_groups = old.num_key_value_heads * split
    queries: list[int | None] = []
    keys: list[int | None] = []
    for k in range(new.num_key_value_heads):
        known = k < old_groups
        keys.append(k % old_groups // split if known or copy else None)
        for j in range(new_group):
            is_old = known and j < group
            queries.append(k % old_groups * group + j % group if is_old or copy else None)
    return queries, keys


def _head_map(old: int, new: int, *, spread: bool) -> AxisMap:
    """The map within a head. Rotary embeddings turn slots (i, i + d/2) together, at the frequency of pair i.

    Pairs keep their index, and `rope_theta` is changed to keep their frequencies; with `spread` pair i becomes pair
    m * i of m times as many, which has its frequency already.
    """
    if old == new:
        return AxisMap.identity(old)
    factor, remainder = divmod(new, old)
    if spread and remainder:
        raise GrowthError(f"init 'spread' takes a whole multiple of head_dim {old}, got {new}; 'preserving' takes any")
    step = factor if spread else 1
    source: list[int | None] = [None] * new
    for i in range(old // 2):
        source[step * i], source[step * i + new // 2] = i, i + old // 2
    return AxisMap.of(old, source, "head_dim")
