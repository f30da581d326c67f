"""What crosses a boundary between stages: weights and AdamW's state, out to files and in from files.

Both ways go a tensor at a time. Each rank writes its share of the files, reads and grows its share of weights and
moments; in between, a whole tensor lies on one rank only. Growth, resumption and the change from one number of
ranks to another are the same thing: states that enter from a directory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ..architectures import get_architecture
from ..errors import GrowthError, SlopError
from ..growth import WEIGHT, GrownStateReader
from ..growth.safetensors_io import (
    DTYPE_NAMES,
    INDEX_FILE,
    Shard,
    StoredTensor,
    create_shard,
    flush_shard,
    format_index,
    plan_shards,
    write_tensor,
)
from ..growth.tensors import start_worker_threads
from ..io.files import write_text
from .states import MOMENTS, STEP, States

#: Weights and moments that a rank reads and grows at a time.
MOST_THREADS = 4
#: Of those that it has read before they are needed; a larger one is read alone.
AHEAD_BYTES = 2**28


def leave(states: States, config: Any, directory: Path, max_shard_size: int | str) -> list[str]:
    """Write a model's weights, and AdamW's state if it has one, as all ranks together.

    Weights are named and sharded as transformers does, at the precision of the states: under ZeRO-3 they are the
    float32 masters.

    Args:
        states: of the model.
        config: of the model.
        directory: to write into; all ranks see the same.
        max_shard_size: of a file, such as "2GB".

    Returns:
        The files that this rank has written.

    Raises:
        SlopError: on all ranks, for a full disk and the like.
    """
    architecture = get_architecture(config)
    stored = {row.name: row.stored_as or row.name for row in architecture.parameters}
    sources: dict[str, tuple[str, str]] = {}
    layouts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {"model": {}, "optimizer": {}}
    has_moments = states.has_moments()
    for name, shape in states.shapes.items():
        weight = stored.get(name, name)
        sources[weight] = name, WEIGHT
        layouts["model"][weight] = DTYPE_NAMES[states.dtype(name, WEIGHT)], shape
        for key in (*MOMENTS, STEP) if has_moments else ():
            sources[f"{key}/{name}"] = name, key
            dtype = torch.float32 if key == STEP else states.dtype(name, key)
            layouts["optimizer"][f"{key}/{name}"] = DTYPE_NAMES[dtype], () if key == STEP else shape
    weights = plan_shards(layouts["model"], max_shard_size)
    shards = [*weights, *(plan_shards(layouts["optimizer"], max_shard_size, "optimizer") if has_moments else ())]
    written = _write_shards(states, directory, shards, sources)
    if len(weights) > 1 and states.ranks.is_first:
        write_text(directory / INDEX_FILE, format_index(weights))
        written.append(INDEX_FILE)
    return written


def _write_shards(
    states: States, directory: Path, shards: list[Shard], sources: Mapping[str, tuple[str, str]]
) -> list[str]:
    """Write every shard, each on one rank; round by round, each rank writes a tensor of one of its own."""
    ranks = states.ranks
    mine = ranks.mine(shards)
    with ranks.together():
        for shard in mine:
            create_shard(directory, shard)  # takes the space: a full disk is found out now
    queues = [
        [tensor for shard in shards[rank :: ranks.count] for tensor in shard.tensors] for rank in range(ranks.count)
    ]
    failed: Exception | None = None
    step = torch.tensor(states.step if states.has_moments() else 0.0, dtype=torch.float32)
    for tensors in zip_longest(*queues):
        job: tuple[StoredTensor, torch.Tensor] | None = None
        for owner, tensor in enumerate(tensors):
            if tensor is None:
                continue
            name, key = sources[tensor.name]
            value = step if key == STEP else states.whole(name, key, owner)
            if owner == ranks.rank and value is not None:
                job = tensor, value
        if job is not None and failed is None:
            try:
                write_tensor(directory, *job)
            except SlopError as caught:  # go on with what the others wait for
                failed = caught
    ranks.agree(failed)
    with ranks.together():
        for shard in mine:
            flush_shard(directory, shard)
    return [shard.file for shard in mine]


def enter(states: States, stream: GrownStateReader) -> None:
    """Fill a model's weights and AdamW's state from a directory, grown on the way if the stream grows them.

    Args:
        states: of the model; all of its parameters are replaced.
        stream: the directory, on all ranks the same. Without AdamW's state in it, AdamW begins anew.

    Raises:
        SlopError: on all ranks, for files that cannot be read or are of another model.
    """
    ranks, names = states.ranks, list(states.shapes)
    if missing := sorted(set(names) ^ stream.names):
        raise GrowthError(f"the model's parameters and the stored ones differ, as in {missing[0]}")
    step = stream.step
    keys = (WEIGHT, *MOMENTS) if step is not None else (WEIGHT,)
    if step is not None:
        states.make_moments(step)
    entries = [(name, key) for name in names for key in keys]
    failed: Exception | None = None
    with start_worker_threads(min(torch.get_num_threads(), MOST_THREADS)) as pool:
        reading = _ahead(pool, stream, ranks.mine(entries), states.shapes)
        for number, (name, key) in enumerate(entries):
            owner = number % ranks.count
            value: torch.Tensor | None = None
            if owner == ranks.rank:
                try:
                    value = next(reading).result()
                except (SlopError, OSError) as caught:
                    failed = failed or caught
                    value = torch.zeros(states.shapes[name])  # the others wait for something
            states.put(name, key, value, owner)
    ranks.agree(failed)
    states.finish()


def _ahead(
    pool: ThreadPoolExecutor,
    stream: GrownStateReader,
    entries: Iterable[tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[Future[torch.Tensor]]:
    """What a rank reads, in order; later entries are read while one is worked on, as many as `AHEAD_BYTES` allow."""
    waiting: deque[tuple[Future[torch.Tensor], int]] = deque()
    held = 0
    for name, key in entries:
        size = 4 * math.prod(shapes[name])
        while waiting and held + size > AHEAD_BYTES:
            future, taken = waiting.popleft()
            held -= taken
            yield future
            del future  # with its tensor
        waiting.append((pool.submit(stream.read, name, key, stream.room(name, key)), size))
        held += size
    while waiting:
        yield waiting.popleft()[0]
