"""The order of training blocks over a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset


class BlockOrder(Dataset[dict[str, Any]]):
    """A stretch of a run's endless stream of blocks: every block once in each pass over the corpus, shuffled.

    The block at position `i` of the stream is `dataset[permutation(i // n)[i % n]]` with one permutation a pass,
    seeded by (seed, pass). The stream depends on nothing else, so that a stage continues where the one before ended
    and no block comes twice within a pass.

    Args:
        dataset: map-style, of `n` blocks; each a mapping with `input_ids`.
        first: position of the first block of this stretch in the stream.
        blocks: its length.
        seed: of the permutations.

    >>> stream = BlockOrder([{"input_ids": [i]} for i in range(4)], first=2, blocks=4, seed=0)
    >>> sorted(BlockOrder(stream.dataset, 0, 4, seed=0)[i]["input_ids"][0] for i in range(4))
    [0, 1, 2, 3]
    """

    def __init__(self, dataset: Any, first: int, blocks: int, seed: int) -> None:
        self.dataset = dataset
        self.first = first
        self.blocks = blocks
        self.seed = seed
        self._count = len(dataset)
        self._pass = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.blocks:
            raise IndexError(index)
        number, position = divmod(self.first + index, self._count)
        if number != self._pass:
            self._permutation = np.random.default_rng((self.seed, number)).permutation(self._count)
            self._pass = number
        example = self.dataset[int(self._permutation[position])]
        # Causal models shift the labels themselves.
        return example if "labels" in example else {**example, "labels": example["input_ids"]}
