"""Checks that all blocks of a run have the same length: its records count tokens by blocks, not by padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..data.order import BlockOrder
from ..data.packing import Block, Blocks, MixedBlocks
from ..errors import DataError

#: Rows to look at, evenly spaced, in a data set that does not expose the lengths of all.
_SAMPLE = 16
_REMEDY = "pack documents into blocks of equal length (`slop_hf.prepare_data` does), or drop shorter ones"


def check_lengths(dataset: MixedBlocks, block_size: int) -> None:
    """Refuse training data with blocks of another length, as far as it can be seen at little cost.

    Raises:
        DataError: with the first such block.
    """
    for part in dataset.parts.values():
        for number, length in _list_lengths(part):
            if length != block_size:
                raise DataError(f"row {number} of train_dataset has {length} tokens, row 0 {block_size}: {_REMEDY}")


def check_collator(collator: Any, block: Block, block_size: int) -> None:
    """Refuse a data collator that makes the blocks of a batch longer or shorter.

    Raises:
        DataError: if it does so to a batch of one block.
    """
    with torch.random.fork_rng(devices=[]):
        check_batch(collator([{"labels": block["input_ids"], **block}]), block_size)


def check_batch(batch: Mapping[str, torch.Tensor], block_size: int) -> None:
    """Refuse a batch that the data collator has padded or truncated.

    Raises:
        DataError: with the lengths.
    """
    length = batch["input_ids"].shape[-1]
    if length != block_size:
        raise DataError(
            f"data_collator makes {length} tokens of a block of {block_size}, and padding would count as training "
            "tokens; leave data_collator out, or take one that keeps the length"
        )


class EqualBlocks(BlockOrder):
    """As `BlockOrder`, but refuses blocks of another length when they are read.

    Raises:
        DataError: on the rank that reads one.
    """

    def __init__(self, dataset: MixedBlocks, first: int, blocks: int, seed: int, block_size: int) -> None:
        super().__init__(dataset, first, blocks, seed)
        self._block_size = block_size

    def __getitems__(self, indices: Sequence[int]) -> list[Block]:
        blocks = super().__getitems__(indices)
        for block in blocks:
            if (length := len(block["input_ids"])) != self._block_size:
                raise DataError(f"train_dataset has a row of {length} tokens, row 0 has {self._block_size}: {_REMEDY}")
        return blocks


def _list_lengths(part: Blocks) -> Iterable[tuple[int, int]]:
    """Yield the numbers and lengths of all rows, or of a sample if they would have to be computed."""
    if (lengths := _read_stored_lengths(part)) is not None:
        return enumerate(lengths)
    count = len(part)
    numbers: Iterable[int] = range(count)
    if not isinstance(part, (list, tuple)):
        numbers = sorted({number * (count - 1) // (_SAMPLE - 1) for number in range(_SAMPLE)})
    return ((number, len(part[number]["input_ids"])) for number in numbers)


def _read_stored_lengths(part: Blocks) -> list[int] | None:
    """Return the length of every row of a `datasets.Dataset`, from its table; None if rows are not stored as such."""
    table: Any = getattr(part, "data", None)
    is_stored = getattr(part, "_indices", None) is None and getattr(part, "_format_type", None) != "custom"
    if not is_stored or "input_ids" not in getattr(table, "column_names", ()):
        return None
    import pyarrow.compute as compute  # comes with datasets
    from pyarrow.lib import ArrowNotImplementedError

    try:
        lengths = compute.list_value_length(table.column("input_ids"))
    except ArrowNotImplementedError:  # not a column of lists
        return None
    extremes = compute.min_max(lengths).as_py()
    rows: list[int] = lengths.to_pylist() if extremes["min"] != extremes["max"] else [extremes["max"]]
    return rows
