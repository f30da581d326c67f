"""Saving and loading weights and AdamW's state at a stage boundary, one tensor at a time.

Each rank writes its share of the files, and reads and grows its share of weights and moments; in between, a whole
tensor is on one rank only. Growth, resumption and a change of the number of ranks are the same operation: states are
loaded from a directory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..architectures import get_architecture
from ..errors import GrowthError
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
from .checksums import Checksum, RunningChecksum
from .muon import MOMENTUM
from .states import MOMENT_KEYS, STEP, States

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

#: Weights and moments that a rank reads and grows at the same time.
MOST_THREADS = 4
#: Largest size of the tensors that a rank has read before they are needed; a larger tensor is read alone.
AHEAD_BYTES = 2**28


def save_states(
    states: States, config: PreTrainedConfig, directory: Path, max_shard_size: int | str
) -> dict[str, Checksum]:
    """Write a model's weights, and AdamW's state of the parameters that have one, all ranks together.

    Weights are named and sharded as transformers does, at the precision of the states: under ZeRO-3 they are the
    float32 masters.

    Errors, such as a full disk, are raised on all ranks.

    Args:
        max_shard_size: largest file, such as "2GB".

    Returns:
        The checksums of the files with tensors that this rank has written, by name.
    """
    architecture = get_architecture(config)
    sources: dict[str, tuple[str, str]] = {}
    pieces: dict[str, range] = {}  # name in the checkpoint -> its numbers in the stack that holds it
    layouts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {"model": {}, "optimizer": {}}
    steps, momentum = states.count_steps(), states.list_momentum()
    for name, shape in states.shapes.items():
        dtype_name = DTYPE_NAMES[states.get_dtype(name, WEIGHT)]
        row = architecture.find_row(name)
        weights = [name] if row is None else row.list_stored_names(name, shape[0] if row.is_stacked else 0)
        for number, weight in enumerate(weights):
            sources[weight] = name, WEIGHT
            layouts["model"][weight] = dtype_name, shape
            if row is not None and row.is_stacked:
                piece_shape = (shape[1] // len(row.stored_parts), *shape[2:])
                layouts["model"][weight] = dtype_name, piece_shape
                size = math.prod(piece_shape)
                pieces[weight] = range(number * size, (number + 1) * size)
        for key in (*MOMENT_KEYS, STEP) if name in steps else (MOMENTUM,) if name in momentum else ():
            sources[f"{key}/{name}"] = name, key
            dtype = torch.float32 if key == STEP else states.get_dtype(name, key)
            layouts["optimizer"][f"{key}/{name}"] = DTYPE_NAMES[dtype], () if key == STEP else shape
    model_shards = plan_shards(layouts["model"], max_shard_size)
    shards = [
        *model_shards,
        *(plan_shards(layouts["optimizer"], max_shard_size, "optimizer") if layouts["optimizer"] else ()),
    ]
    written = _write_shards(states, directory, shards, sources, pieces, steps)
    if len(model_shards) > 1 and states.ranks.is_first:
        write_text(directory / INDEX_FILE, format_index(model_shards))
    return written


def _write_shards(
    states: States,
    directory: Path,
    shards: list[Shard],
    sources: Mapping[str, tuple[str, str]],
    pieces: Mapping[str, range],
    steps: Mapping[str, float],
) -> dict[str, Checksum]:
    """Write every shard, each on one rank; in each round, each rank writes one tensor of its shards.

    A rank writes its tensors in the order of its files, so that it can compute their checksums on the way.
    """
    ranks = states.ranks
    own = ranks.select_share(shards)
    checksums = {shard.file: RunningChecksum() for shard in own}
    with ranks.raise_on_all():
        for shard in own:
            create_shard(directory, shard)  # allocates the space: a full disk fails now
            checksums[shard.file].update(shard.header)
    shares = [shards[rank :: ranks.count] for rank in range(ranks.count)]
    queues = [[tensor for shard in share for tensor in shard.tensors] for share in shares]
    failed: Exception | None = None
    for tensors in zip_longest(*queues):
        job: tuple[StoredTensor, torch.Tensor] | None = None
        for owner, tensor in enumerate(tensors):
            if tensor is None:
                continue
            name, key = sources[tensor.name]
            numbers = pieces.get(tensor.name)
            value = torch.tensor(steps[name]) if key == STEP else states.gather(name, key, owner, numbers)
            if owner == ranks.rank and value is not None:
                job = tensor, value if numbers is None else value.view(tensor.shape)
        if job is not None and failed is None:
            try:
                # Once all have gathered, so that the ranks copy and write at the same time.
                write_tensor(directory, *job, checksums[str(job[0].file)].update)
            except Exception as caught:  # continue: the other ranks wait for the rest
                failed = caught
    ranks.raise_any(failed)
    with ranks.raise_on_all():
        for shard in own:
            flush_shard(directory, shard)
    return {file: checksum.finish() for file, checksum in checksums.items()}


def load_states(states: States, reader: GrownStateReader) -> None:
    """Fill a model's weights and AdamW's state from a directory, growing them if the reader grows.

    The reader is the same on all ranks. Parameters whose state it does not find start afresh. Errors are raised on
    all ranks.
    """
    ranks, names = states.ranks, list(states.shapes)
    if missing := sorted(set(names) ^ reader.names):
        raise GrowthError(f"the model's parameters and the stored ones differ, as in {missing[0]}")
    with ranks.raise_on_all():
        steps, momentum = reader.read_steps(), reader.list_momentum()
    if steps or momentum:
        states.make_moments(steps, momentum)
    moments: dict[str, tuple[str, ...]] = dict.fromkeys(steps.keys() & states.count_steps().keys(), MOMENT_KEYS)
    moments |= dict.fromkeys(momentum & set(states.list_momentum()), (MOMENTUM,))
    entries = [(name, key) for name in names for key in (WEIGHT, *moments.get(name, ()))]
    failed: Exception | None = None
    with start_worker_threads(min(torch.get_num_threads(), MOST_THREADS)) as pool:
        pin = ranks.device.type == "cuda"
        futures = _read_ahead(pool, reader, ranks.select_share(entries), states.shapes, pin=pin)
        for number, (name, key) in enumerate(entries):
            owner = number % ranks.count
            value: torch.Tensor | None = None
            if owner == ranks.rank:
                try:
                    value = next(futures).result()
                except Exception as caught:
                    failed = failed or caught
                    value = torch.zeros(states.shapes[name])  # the other ranks wait for a tensor
            states.put(name, key, value, owner)
    ranks.raise_any(failed)
    states.finish()


def _read_ahead(
    pool: ThreadPoolExecutor,
    reader: GrownStateReader,
    entries: Iterable[tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    pin: bool,
) -> Iterator[Future[torch.Tensor]]:
    """Yield what a rank reads, in order; further entries are read meanwhile, as far as `AHEAD_BYTES` allows."""
    waiting: deque[tuple[Future[torch.Tensor], int]] = deque()
    held = 0
    for name, key in entries:
        size = 4 * math.prod(shapes[name])
        while waiting and held + size > AHEAD_BYTES:
            future, taken = waiting.popleft()
            held -= taken
            yield future
            del future  # with its tensor
        waiting.append((pool.submit(reader.read, name, key, reader.allocate(name, key, pin=pin)), size))
        held += size
    while waiting:
        yield waiting.popleft()[0]
