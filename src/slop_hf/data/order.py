"""The order of training blocks over a whole run: which block of which source comes at a position of the stream.

Any position can be computed alone: a run resumes at any block at once, on any number of ranks and workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ..dims import IntArray
from ..runs.records import ConsumedTokens
from .packing import Block, Blocks, MixedBlocks

Words: TypeAlias = npt.NDArray[np.uint64]

#: Positions computed at a time; more if a source has a smaller share than 1 / ROUND.
ROUND = 4096
_FEISTEL_ROUNDS = 4


class StreamOrder:
    """An endless, shuffled stream of blocks drawn from several weighted sources.

    The stream is cut into rounds of `R` positions. After `n` rounds, a source with share `w` has contributed `w n R`
    blocks, rounded by largest remainders; within a round the sources come in random order. Every pass over a source
    contains each of its blocks once, in an order that differs between passes: a Feistel network (Luby and Rackoff
    1988) on the numbers below a power of 4, applied until the result is below the number of blocks, keyed by
    (seed, source, pass). The stream depends on the shares, the numbers of blocks and the seed alone. Its memory is
    constant.

    Args:
        counts: blocks of each source.
        weights: shares of the sources, which add up to 1.
        seed: random seed.

    >>> order = StreamOrder([4, 2], [0.75, 0.25], seed=0)
    >>> sources, blocks = order.locate(np.arange(8))
    >>> sorted(blocks[sources == 0][:4].tolist())
    [0, 1, 2, 3]
    >>> order.count_before(order.round_size).tolist() == [0.75 * order.round_size, 0.25 * order.round_size]
    True
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(counts) == len(weights) and min(counts) > 0
        self.counts = np.asarray(counts, dtype=np.int64)
        self.weights = np.asarray(weights, dtype=np.float64)
        self.seed = seed
        # With at least one block of each source per round, no source contributes fewer blocks in more rounds.
        self.round_size = max(ROUND, int(np.ceil(1 / self.weights.min())))
        self._round = lru_cache(maxsize=2)(self._compute_round)

    def __reduce__(self) -> tuple[type[StreamOrder], tuple[object, ...]]:
        return StreamOrder, (self.counts, self.weights, self.seed)  # the cache of rounds cannot be pickled

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Return the source and the block at each position; positions of a few rounds at a time are fastest."""
        if len(positions):  # a batch usually lies within a round
            number = int(positions[0]) // self.round_size
            within = positions - number * self.round_size
            if within.min() >= 0 and within.max() < self.round_size:
                sources, blocks = self._round(number)
                return sources[within], blocks[within]
        numbers, within = np.divmod(positions, self.round_size)
        all_sources, all_blocks = np.empty((2, len(positions)), dtype=np.int64)
        for number in np.unique(numbers):
            here = numbers == number
            sources, blocks = self._round(int(number))
            all_sources[here], all_blocks[here] = sources[within[here]], blocks[within[here]]
        return all_sources, all_blocks

    def count_before(self, position: int) -> IntArray:
        """Return the number of blocks of each source before a position."""
        number, within = divmod(position, self.round_size)
        before = self._count_after_rounds(number)
        if not within:
            return before
        sources, _ = self._round(number)
        return before + np.bincount(sources[:within], minlength=len(self.counts))

    def _count_after_rounds(self, number: int) -> IntArray:
        quotas = self.weights * (number * self.round_size)
        whole = np.floor(quotas).astype(np.int64)
        missing = number * self.round_size - int(whole.sum())
        # A stable sort: if remainders are equal, the first sources get the missing blocks.
        whole[np.argsort(whole - quotas, kind="stable")[:missing]] += 1
        return whole

    def _compute_round(self, number: int) -> tuple[IntArray, IntArray]:
        before = self._count_after_rounds(number)
        sources = np.repeat(np.arange(len(self.counts)), self._count_after_rounds(number + 1) - before)
        if len(self.counts) > 1:
            np.random.default_rng((self.seed, number)).shuffle(sources)
        blocks = np.empty(self.round_size, dtype=np.int64)
        for source, count in enumerate(self.counts):
            here = np.flatnonzero(sources == source)
            passes, within = np.divmod(before[source] + np.arange(len(here)), count)
            blocks[here] = _permute(within, int(count), _draw_keys(self.seed, source, passes))
        return sources, blocks


def _draw_keys(seed: int, source: int, passes: IntArray) -> Words:
    """Draw a random word for each pass over a source."""
    first = np.random.SeedSequence((seed, source)).generate_state(1, np.uint64)
    return _mix(first + passes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(words: Words) -> Words:
    """Map words one-to-one to words that look random (the finalizer of SplitMix64, Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _permute(numbers: IntArray, count: int, keys: Words) -> IntArray:
    """Map each number below `count` by the permutation that its key selects."""
    half = np.uint64(max(1, -(-(count - 1).bit_length() // 2)))
    mask = (np.uint64(1) << half) - np.uint64(1)
    permuted, walking = numbers.astype(np.uint64), np.arange(len(numbers))
    while len(walking):  # on average, at most 4 in 5 stay too large
        left, right = permuted[walking] >> half, permuted[walking] & mask
        for number in range(_FEISTEL_ROUNDS):
            word = _mix((right + np.uint64(number << 40)) ^ keys[walking])
            left, right = right, left ^ (word & mask)
        permuted[walking] = (left << half) | right
        walking = walking[permuted[walking] >= count]
    return permuted.astype(np.int64)


class BlockOrder(Dataset[Block]):
    """A stretch of a run's stream of blocks, for a DataLoader; stages are consecutive stretches of the same stream.

    Args:
        dataset: blocks of all sources.
        first, blocks: position of the first block in the stream, and number of blocks.
        seed: seed of the stream.

    >>> rows = MixedBlocks.wrap([{"input_ids": [i]} for i in range(4)])
    >>> stream = BlockOrder(rows, first=2, blocks=4, seed=0)
    >>> sorted(BlockOrder(stream.dataset, 0, 4, seed=0)[i]["input_ids"][0] for i in range(4))
    [0, 1, 2, 3]
    """

    def __init__(self, dataset: MixedBlocks, first: int, blocks: int, seed: int) -> None:
        self.dataset = dataset
        self.first = first
        self.blocks = blocks
        self.order = _make_order(dataset, seed)
        self._parts = list(dataset.parts.values())

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> Block:
        if not 0 <= index < self.blocks:
            raise IndexError(index)
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Block]:
        """The blocks of a batch, for torch's DataLoader."""
        sources, blocks = self.order.locate(np.asarray(indices, dtype=np.int64) + self.first)
        if len(self._parts) == 1:
            return _read(self._parts[0], blocks.tolist())
        examples: list[Block] = [{}] * len(indices)
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            batch = _read(self._parts[source], blocks[places].tolist())
            for place, example in zip(places.tolist(), batch, strict=True):
                examples[place] = example
        return examples


def _read(part: Blocks, blocks: list[int]) -> list[Block]:
    examples = part.__getitems__(blocks) if hasattr(part, "__getitems__") else [part[block] for block in blocks]
    # Causal models shift the labels themselves.
    return [example if "labels" in example else {**example, "labels": example["input_ids"]} for example in examples]


def _make_order(dataset: MixedBlocks, seed: int) -> StreamOrder:
    return StreamOrder([len(part) for part in dataset.parts.values()], list(dataset.weights.values()), seed)


def count_consumed_tokens(
    dataset: MixedBlocks, seed: int, block_size: int, first: int, blocks: int
) -> tuple[ConsumedTokens, ...]:
    """Return the range of tokens of each source in a stretch of the stream, as for `BlockOrder`."""
    order = _make_order(dataset, seed)
    before, after = (order.count_before(position) * block_size for position in (first, first + blocks))
    return tuple(
        ConsumedTokens(name, int(begin), int(end), int(count) * block_size, float(weight))
        for (name, weight), begin, end, count in zip(dataset.weights.items(), before, after, order.counts, strict=True)
    )


def list_first_batches(dataset: MixedBlocks, blocks: int, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the first blocks of a run's stream, each as a batch of one: tensors of shape `[1, length]`.

    Args:
        dataset: blocks of all sources.
        blocks: number of batches; above the number of blocks, blocks are repeated as in a run.
        seed: seed of the stream.

    >>> rows = MixedBlocks.wrap([{"input_ids": torch.tensor([3, 4])}])
    >>> next(list_first_batches(rows, 1))
    {'input_ids': tensor([[3, 4]]), 'labels': tensor([[3, 4]])}
    """
    order = BlockOrder(dataset, 0, blocks, seed)
    for number in range(blocks):
        yield {name: torch.as_tensor(values)[None] for name, values in order[number].items()}
