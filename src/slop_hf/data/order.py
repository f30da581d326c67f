"""The order of training blocks over a whole run: which block of which source comes at a position of the stream.

Any position can be asked for by itself: a run goes on at any block at once, on any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from ..runs.records import ConsumedTokens
from .config import ONLY

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

#: Positions whose places are worked out at a time; more where a source has a smaller share than one in so many.
ROUND = 4096
_FEISTEL_ROUNDS = 4


class StreamOrder:
    """The endless stream of blocks of several sources, each with its share, shuffled.

    The stream is cut into rounds of `R` positions. After `n` rounds source `s` of share `w` has given `w n R` blocks,
    rounded by largest remainders; within a round the sources come in random order. The blocks of a source come each
    once in every pass over it, in an order of their own for each pass: a Feistel network (Luby and Rackoff 1988) on
    the numbers below a power of 4, walked until it falls below the number of blocks, keyed by (seed, source, pass).
    The stream depends on shares, numbers of blocks and the seed alone, and takes no memory for any of them.

    Args:
        counts: blocks of each source.
        weights: shares of the sources, which add up to 1.
        seed: of all that is random.

    >>> order = StreamOrder([4, 2], [0.75, 0.25], seed=0)
    >>> sources, blocks = order.places(np.arange(8))
    >>> sorted(blocks[sources == 0][:4].tolist())
    [0, 1, 2, 3]
    >>> order.given(order.round_size).tolist() == [0.75 * order.round_size, 0.25 * order.round_size]
    True
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(counts) == len(weights) and min(counts) > 0
        self.counts = np.asarray(counts, dtype=np.int64)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.seed = seed
        # With one block of each source at least in a round, no source gives fewer in more rounds.
        self.round_size = max(ROUND, int(np.ceil(1 / self.weights.min())))
        self._round = lru_cache(maxsize=2)(self._work_out)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_round"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._round = lru_cache(maxsize=2)(self._work_out)

    def places(self, positions: Ints) -> tuple[Ints, Ints]:
        """Sources and blocks at positions; those of a few rounds at a time are fastest."""
        if len(positions):  # a batch lies within a round, as a rule
            number = int(positions[0]) // self.round_size
            within = positions - number * self.round_size
            if within.min() >= 0 and within.max() < self.round_size:
                sources, blocks = self._round(number)
                return sources[within], blocks[within]
        numbers, within = np.divmod(positions, self.round_size)
        found = np.empty((2, len(positions)), dtype=np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            sources, blocks = self._round(int(number))
            found[0, here], found[1, here] = sources[within[here]], blocks[within[here]]
        return found[0], found[1]

    def given(self, position: int) -> Ints:
        """How many blocks each source has given before a position."""
        number, within = divmod(position, self.round_size)
        before = self._after_rounds(number)
        if not within:
            return before
        sources, _ = self._round(number)
        return before + np.bincount(sources[:within], minlength=len(self.counts))

    def _after_rounds(self, number: int) -> Ints:
        quotas = self.weights * (number * self.round_size)
        whole = np.floor(quotas).astype(np.int64)
        missing = number * self.round_size - int(whole.sum())
        # A stable sort: where remainders are equal, the first sources take what is left.
        whole[np.argsort(whole - quotas, kind="stable")[:missing]] += 1
        return whole

    def _work_out(self, number: int) -> tuple[Ints, Ints]:
        before = self._after_rounds(number)
        sources = np.repeat(np.arange(len(self.counts)), self._after_rounds(number + 1) - before)
        if len(self.counts) > 1:
            np.random.default_rng((self.seed, number)).shuffle(sources)
        blocks = np.empty(self.round_size, dtype=np.int64)
        for source, count in enumerate(self.counts):
            here = np.flatnonzero(sources == source)
            passes, within = np.divmod(before[source] + np.arange(len(here)), count)
            blocks[here] = _shuffled(within, int(count), _keys(self.seed, source, passes))
        return sources, blocks


def _keys(seed: int, source: int, passes: Ints) -> Words:
    """A random word for each pass over a source."""
    first = np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)
    return _mix(first + passes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(words: Words) -> Words:
    """Each word to another that looks random, no two to the same (the finalizer of SplitMix64, Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _shuffled(numbers: Ints, count: int, keys: Words) -> Ints:
    """Where each number below `count` goes under the permutation that its key stands for."""
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    found, walking = numbers.astype(np.uint64), np.arange(len(numbers))
    while len(walking):  # at most 4 in 5 walk on, on average
        left, right = found[walking] >> half, found[walking] & mask
        for number in range(_FEISTEL_ROUNDS):
            word = _mix((right + np.uint64(number << 40)) ^ keys[walking])
            left, right = right, left ^ (word & mask)
        found[walking] = (left << half) | right
        walking = walking[found[walking] >= count]
    return found.astype(np.int64)


class BlockOrder(Dataset[dict[str, Any]]):
    """A stretch of a run's stream of blocks, for a DataLoader.

    Stages are stretches of the same stream: each goes on where the one before ended.

    Args:
        dataset: map-style, each example a mapping with `input_ids`; a `MixedBlocks` has several sources.
        first: position of the first block of this stretch in the stream.
        blocks: its length.
        seed: of the stream.

    >>> stream = BlockOrder([{"input_ids": [i]} for i in range(4)], first=2, blocks=4, seed=0)
    >>> sorted(BlockOrder(stream.dataset, 0, 4, seed=0)[i]["input_ids"][0] for i in range(4))
    [0, 1, 2, 3]
    """

    def __init__(self, dataset: Any, first: int, blocks: int, seed: int) -> None:
        self.dataset = dataset
        self.first = first
        self.blocks = blocks
        self.order = stream_order(dataset, seed)
        self._parts = parts_of(dataset)

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.blocks:
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The blocks of a batch at once, as torch's DataLoader asks for them."""
        sources, blocks = self.order.places(np.asarray(indices, dtype=np.int64) + self.first)
        if len(self._parts) == 1:
            return _read(self._parts[0], blocks.tolist())
        here: dict[int, list[int]] = {}
        for place, source in enumerate(sources.tolist()):
            here.setdefault(source, []).append(place)
        examples: list[dict[str, Any]] = [{}] * len(indices)
        for source, places in here.items():
            for place, example in zip(places, _read(self._parts[source], blocks[places].tolist()), strict=True):
                examples[place] = example
        return examples


def _read(part: Any, blocks: list[int]) -> list[dict[str, Any]]:
    examples = part.__getitems__(blocks) if hasattr(part, "__getitems__") else [part[block] for block in blocks]
    # Causal models shift the labels themselves.
    return [one if "labels" in one else {**one, "labels": one["input_ids"]} for one in examples]


def parts_of(dataset: Any) -> list[Any]:
    """The data of each source; a dataset that knows of no sources is one."""
    parts = getattr(dataset, "parts", None)
    return [dataset] if parts is None else list(parts.values())


def stream_order(dataset: Any, seed: int) -> StreamOrder:
    """The order of a dataset's blocks, by the shares of its sources."""
    parts = parts_of(dataset)
    weights = dataset.weights if getattr(dataset, "parts", None) is not None else {"": 1.0}
    return StreamOrder([len(part) for part in parts], list(weights.values()), seed)


def consumed(dataset: Any, seed: int, block_size: int, first: int, blocks: int) -> tuple[ConsumedTokens, ...]:
    """Which tokens of each source a stretch of the stream holds.

    Args:
        dataset, seed, first, blocks: as for `BlockOrder`.
        block_size: tokens of a block.
    """
    order = stream_order(dataset, seed)
    names = list(getattr(dataset, "parts", {ONLY: dataset}))
    before, after = (order.given(position) * block_size for position in (first, first + blocks))
    return tuple(
        ConsumedTokens(name, int(begin), int(end), int(count) * block_size, float(weight))
        for name, begin, end, count, weight in zip(names, before, after, order.counts, order.weights, strict=True)
    )
