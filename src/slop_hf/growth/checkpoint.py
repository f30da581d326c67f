"""`grow_checkpoint`: growth from a checkpoint directory to another, a tensor at a time."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from ..cost.flops import count_parameters
from ..dims import ModelDims
from ..errors import GrowthError
from ..io.files import write_directory, write_text
from ..io.serialization import list_versions
from ..schedule import GrowthStage
from .checkpoint_plan import CheckpointPlan, TensorPlan, plan_checkpoint_growth
from .plan import DEFAULT_NOISE
from .receipt import RECEIPT_FILE, GrowthProbe, GrowthReceipt
from .safetensors_io import (
    FLOATS,
    INDEX_FILE,
    create_shard,
    are_equal_tensors,
    flush_shard,
    format_index,
    read_tensor,
    write_tensor,
)
from .tensors import ThreadMemory, grow_parameter, start_worker_threads
from .verify import combine_hashes, probe_checkpoints, hash_tensor

#: Memory of the tensors in flight; one that takes more by itself is made alone.
IN_FLIGHT_BYTES = 2**29


def grow_checkpoint(
    source: str | Path,
    target: str | Path,
    operator: str | GrowthStage | Sequence[GrowthStage],
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    noise: float = DEFAULT_NOISE,
    max_shard_size: int | str = "5GB",
    threads: int | None = None,
    progress: bool = True,
    verify: bool = False,
) -> GrowthReceipt:
    """Grow a checkpoint into a new directory, with its tokenizer, generation config and a receipt.

    Safetensors to safetensors, a tensor at a time: the memory that it takes is that of the largest tensor, before and
    after, and at least half a GiB to work in. The weights are those of `grow_model`, bit for bit, each in the dtype
    that it is stored in. The directory is complete or absent; what a killed run leaves beside it (`.NAME.writing`)
    is removed by the next.

    Args:
        source: a local directory or a Hub id[@revision].
        target: a directory that does not exist yet.
        operator: as for `grow_model`; or several `GrowthStage`s, which follow one another in one pass over the data.
            The weights are then those of `grow_model` once for each stage, with `seed`, `seed + 1` and so on.
        new_dims, init, seed, noise: as for `grow_model`.
        max_shard_size: largest file of weights, in bytes or as "5GB".
        threads: that read, grow and write; default, one for each core up to 4.
        progress: show a bar, where there is a terminal to show it.
        verify: load both models when the weights are written, measure what changed (`GrowthReceipt.probe`), and fail
            where a growth that should keep the function does not. This takes the memory of both.

    Raises:
        GrowthError: an unreadable, damaged or unknown source, an existing target, a full disk, and as for
            `grow_model`. Everything that can be is refused before the first weight is read.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    ...                      num_attention_heads=2)
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     LlamaForCausalLM(config).save_pretrained(f"{directory}/small")
    ...     receipt = grow_checkpoint(f"{directory}/small", f"{directory}/large", "ffn", 96, init="preserving")
    >>> str(receipt.dims), receipt.preserves
    ('(32, 96, 2, 2)', True)
    """
    began = time.perf_counter()
    threads = min(4, os.cpu_count() or 1) if threads is None else threads
    if threads < 1:
        raise GrowthError(f"threads must be 1 or more, got {threads}")
    plan = plan_checkpoint_growth(
        source, target, operator, new_dims, init=init, seed=seed, noise=noise, max_shard_size=max_shard_size
    )
    for twin, tensor in plan.twins:
        if not are_equal_tensors(twin, tensor):
            raise GrowthError(
                f"{plan.source} ties its embeddings, but {twin.name} and {tensor.name} differ; "
                "set tie_word_embeddings to false in its config.json, or remove one"
            )
    try:
        with write_directory(plan.target) as directory:
            source_hash = _write_weights(plan, directory, threads, progress)
            plan.growths[-1].config().save_pretrained(directory)
            for file in plan.carried:
                (directory / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(plan.directory / file, directory / file)
            probe = _verified(plan, directory) if verify else None
            receipt = _receipt(plan, seed, source_hash, time.perf_counter() - began, probe)
            write_text(directory / RECEIPT_FILE, receipt.to_json())
    except OSError as caught:
        raise GrowthError(f"{plan.target} could not be written: {caught}") from caught
    return receipt


def _verified(plan: CheckpointPlan, directory: Path) -> GrowthProbe:
    """What a batch of tokens shows of the grown checkpoint.

    Raises:
        GrowthError: where the function should have stayed, and has not.
    """
    probe = probe_checkpoints(plan.directory, directory, plan.growths)
    if all(growth.preserves for growth in plan.growths) and not probe.is_exact:
        raise GrowthError(
            f"{plan.source} has not kept its function: its logits change by {probe.max_logit_change:.1e} of the "
            f"largest, rounding explains {probe.rounding_floor:.1e}; nothing was written, please report this"
        )
    return probe


def _receipt(
    plan: CheckpointPlan, seed: int, source_hash: str, seconds: float, probe: GrowthProbe | None
) -> GrowthReceipt:
    return GrowthReceipt(
        source=plan.source,
        operators=plan.operators,
        inits=plan.inits,
        seed=seed,
        noise=plan.growths[0].noise,
        source_dims=plan.old,
        dims=plan.new,
        source_parameters=count_parameters(plan.old, plan.growths[0].source_config),
        parameters=plan.parameters,
        seconds=seconds,
        versions=list_versions(),
        preserves=all(growth.preserves for growth in plan.growths),
        source_hash=source_hash,
        probe=probe,
        bytes_written=plan.weight_bytes,
        peak_memory_bytes=measure_peak_memory(),
    )


def measure_peak_memory() -> int:
    """Largest resident memory of this process so far.

    Linux counts in `ru_maxrss` also what the parent had when it started this process, so VmHWM comes first.
    """
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write_weights(plan: CheckpointPlan, directory: Path, threads: int, progress: bool) -> str:
    """Write every file of weights, and their index where there are several; returns the hash of the source's."""
    for shard in plan.shards:
        create_shard(directory, shard)
    if len(plan.shards) > 1:
        write_text(directory / INDEX_FILE, format_index(plan.shards))
    shards = {shard.file: shard for shard in plan.shards}
    unwritten = Counter(str(one.target.file) for one in plan.tensors)
    hashes: dict[str, str | None] = {}
    lock = threading.Lock()

    with tqdm(total=plan.weight_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar:

        def advance(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        memory = ThreadMemory(IN_FLIGHT_BYTES // (2 * threads))

        def make(one: TensorPlan) -> None:
            write_tensor(directory, one.target, _grow(one, hashes, lock, memory), advance)
            with lock:
                unwritten[str(one.target.file)] -= 1
                last = not unwritten[str(one.target.file)]
            if last:
                flush_shard(directory, shards[str(one.target.file)])

        _in_threads(plan.tensors, make, threads)
    return combine_hashes((name, digest) for name, digest in hashes.items() if digest)


def _grow(one: TensorPlan, hashes: dict[str, str | None], lock: threading.Lock, memory: ThreadMemory) -> torch.Tensor:
    """The grown tensor, in the thread's memory; the source is hashed when it is first read."""
    steps, dtype = one.steps, FLOATS[one.source.dtype]
    if one.is_read:
        value = read_tensor(one.source, memory.tensor("read", one.source.shape, dtype))
        name = steps[0].source
        with lock:
            is_first = name not in hashes
            hashes.setdefault(name, None)
        if is_first:
            hashes[name] = hash_tensor(value)
    else:
        value = torch.empty(0, dtype=dtype)
        steps = steps[max(i for i, step in enumerate(steps) if step.silent) :]
    growing = [step for step in steps if not step.changes_nothing]
    for number, step in enumerate(growing, start=1):
        out = memory.tensor("written", one.target.shape, dtype) if number == len(growing) else None
        value = grow_parameter(value, step, out)
    return value


class _InFlight:
    """Lets tensors begin while all that are being made take no more than IN_FLIGHT_BYTES."""

    def __init__(self) -> None:
        self._bytes = 0
        self._changed = threading.Condition()
        self.stopped = False

    def enter(self, nbytes: int) -> bool:
        """Wait for room; False once stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self.stopped or not self._bytes or self._bytes + nbytes <= IN_FLIGHT_BYTES)
            self._bytes += nbytes
            return not self.stopped

    def leave(self, nbytes: int) -> None:
        with self._changed:
            self._bytes -= nbytes
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()


def _in_threads(tensors: Sequence[TensorPlan], make: Callable[[TensorPlan], None], threads: int) -> None:
    """Make all tensors, in their order; after an error or an interrupt none begins any more, and it is raised."""
    flight = _InFlight()

    def run(one: TensorPlan) -> None:
        try:
            if not flight.stopped:
                make(one)
        except BaseException:
            flight.stop()
            raise
        finally:
            flight.leave(one.working_bytes)

    with start_worker_threads(threads) as pool:
        try:
            entered = (one for one in tensors if flight.enter(one.working_bytes))
            for future in [pool.submit(run, one) for one in entered]:
                future.result()
        finally:
            flight.stop()
