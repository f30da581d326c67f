"""Trunks: the steps that several runs have in common, found from what each step of a run depends on.

Under a learning rate that stays constant for most of the run, runs of different lengths and runs that grow at
different moments are the same run for a long time. They form a tree: a trunk is trained once, and its last state is
where the runs that share it branch off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from ..io.serialization import Json, hash_json

#: A trunk must be at least this share of the shortest run that would begin with it.
MIN_TRUNK_SHARE = 0.01


@dataclass(frozen=True, eq=False)
class Trace:
    """Settings on which the states of a run depend, step by step.

    Args:
        keys: hash of each stage's settings, structures and growths, and of all that comes before it; not of the
            stage's length and learning rates.
        rates: learning rate at each step of each stage, arrays of shape (steps,).
    """

    keys: tuple[str, ...]
    rates: tuple[NDArray[np.float64], ...]

    @property
    def ends(self) -> list[int]:
        """Number of steps done at the end of each stage."""
        return list(accumulate(map(len, self.rates)))

    def hash_until(self, step: int) -> str:
        """Return a hash of all that the state after the first steps depends on."""
        parts: list[Json] = []
        for key, rates, end in zip(self.keys, self.rates, self.ends, strict=True):
            parts += [key, rates[: step - end + len(rates)].tolist()]
            if end >= step:
                break
        return hash_json(parts)


@dataclass(frozen=True)
class Trunk:
    """Steps that several runs share.

    Args:
        run: number of a run that it belongs to, and whose settings it is trained with.
        begin, end: numbers of steps done before it, and at its end.
        parent: number of the trunk that it branches off from; None if it begins from scratch.
    """

    run: int
    begin: int
    end: int
    parent: int | None


def count_common_steps(one: Trace, other: Trace) -> int:
    """Return the number of first steps after which two runs have the same state, bit for bit.

    >>> short, long = [Trace(("a",), (np.array(rates),)) for rates in ([1.0, 1.0, 0.5], [1.0, 1.0, 1.0, 0.5])]
    >>> count_common_steps(short, long)
    2
    """
    count = 0
    for key, other_key, rates, other_rates in zip(one.keys, other.keys, one.rates, other.rates, strict=False):
        if key != other_key:
            break
        length = min(len(rates), len(other_rates))
        differing = np.flatnonzero(rates[:length] != other_rates[:length])
        count += int(differing[0]) if len(differing) else length
        if len(differing) or len(rates) != len(other_rates):
            break
    return count


def find_trunks(traces: Sequence[Trace]) -> tuple[list[Trunk], list[int | None]]:
    """Find the trunks of some runs.

    Returns:
        The trunks, parents before their children, and for each run the number of the trunk that it branches off
        from; None if it shares nothing.
    """
    trunks: list[Trunk] = []
    parents: list[int | None] = [None] * len(traces)
    groups: list[tuple[list[int], int | None]] = [(list(range(len(traces))), None)] if traces else []
    while groups:
        members, parent = groups.pop()
        if len(members) == 1:
            parents[members[0]] = parent
            continue
        begin = 0 if parent is None else trunks[parent].end
        common = min(_count_with_first(traces, members))
        run, end = _choose_end(traces, members, common)
        if end - begin > max(1.0, MIN_TRUNK_SHARE * min(traces[member].ends[-1] for member in members)):
            trunks.append(Trunk(run, begin, end, parent))
            parent = len(trunks) - 1
        groups += [(group, parent) for group in reversed(_part(traces, members, common))]
    return trunks, parents


def _count_with_first(traces: Sequence[Trace], members: Sequence[int]) -> list[int]:
    first = traces[members[0]]
    return [first.ends[-1], *(count_common_steps(first, traces[member]) for member in members[1:])]


def _choose_end(traces: Sequence[Trace], members: Sequence[int], common: int) -> tuple[int, int]:
    """Return the run whose settings a trunk is trained with, and the step at which it ends.

    No checkpoint is written at the last step of a stage. So if a stage ends there in some runs and continues in
    others, the trunk ends a step earlier.
    """
    ending = [common in traces[member].ends for member in members]
    is_mixed = any(ending) and not all(ending)
    return members[ending.index(False) if is_mixed else 0], common - is_mixed


def _part(traces: Sequence[Trace], members: Sequence[int], common: int) -> list[list[int]]:
    """Part runs into groups that share more steps than all of them do."""
    groups: list[list[int]] = []
    for member in members:
        for group in groups:
            if count_common_steps(traces[group[0]], traces[member]) > common:
                group.append(member)
                break
        else:
            groups.append([member])
    return groups
