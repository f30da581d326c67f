"""`grow_checkpoint`: growth from one checkpoint directory to another, one tensor at a time.

First `plan_checkpoint_growth` makes every decision and reads only headers; then the plan is executed.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedConfig

from ..architectures import read_setting
from ..cost.flops import count_parameters
from ..dims import ModelConfig, ModelDims
from ..errors import GrowthError
from ..io.files import list_abandoned, require_absent, require_path, write_directory, write_text
from ..io.hub_address import Address
from ..io.hub_client import read_hub
from ..io.model_errors import explain_load_error
from ..io.network_errors import find_network_error, summarise_error
from ..io.numbers import is_whole_number, require_whole_number
from ..io.serialization import Json, list_versions
from ..io.units import format_bytes
from ..schedule import GrowthStage
from .experts import Utility
from .plan import DEFAULT_NOISE, GrowthPlan, ParameterPlan, plan_growth
from .receipt import RECEIPT_FILE, GrowthProbe, GrowthReceipt
from .safetensors_io import (
    FLOATS,
    INDEX_FILE,
    Shard,
    StoredTensor,
    are_equal_tensors,
    create_shard,
    flush_shard,
    format_index,
    plan_shards,
    read_checkpoint_headers,
    read_tensor,
    write_tensor,
)
from .stacks import split_stacks
from .tensors import ThreadMemory, grow_parameter, start_worker_threads
from .verify import combine_hashes, hash_tensor, probe_checkpoints

#: Files copied unchanged: generation config, tokenizer and chat templates.
COPIED_FILES = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*.model",
)

#: Buffers that older releases of transformers saved and newer ones compute.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attention|attn)\.(bias|masked_bias))$")

_OTHER_FILES_BYTES = 2**16  # config and receipt

#: Memory of the tensors in flight; a tensor that needs more is grown while no other is.
IN_FLIGHT_BYTES = 2**29


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the target is made: read, passed through the step of each growth in turn, written."""

    source: StoredTensor
    target: StoredTensor
    steps: tuple[ParameterPlan, ...]

    @property
    def working_bytes(self) -> int:
        """Memory needed to make it: the old and the new tensor of a step, and a float32 copy of one being centred."""
        sizes = [self.source.numel, *(math.prod(step.new_shape) for step in self.steps)]
        width = FLOATS[self.source.dtype].itemsize
        centring_width = 8 if width < 4 else width
        return max(
            (old + new) * width + (old * centring_width if step.is_centred else 0)
            for old, new, step in zip(sizes, sizes[1:], self.steps, strict=False)
        )


@dataclass(frozen=True)
class CheckpointPlan:
    """The growth of a checkpoint through one or more `growths`. The executor decides nothing.

    Args:
        source: directory or Hub id, as the user gave it.
        directory: local directory of the source.
        target: directory to be made.
        tensors: every tensor of the target, in the order of the files.
        shards: files of weights.
        twins: pairs of tied tensors that the source stores twice; they must be equal.
        copied_files: files to copy unchanged, relative to `directory`.
        free_bytes: free space on the target's disk.
    """

    source: str
    directory: Path
    target: Path
    growths: tuple[GrowthPlan, ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[Shard, ...]
    twins: tuple[tuple[StoredTensor, StoredTensor], ...]
    copied_files: tuple[Path, ...]
    free_bytes: int

    @property
    def old(self) -> ModelDims:
        return self.growths[0].old

    @property
    def new(self) -> ModelDims:
        return self.growths[-1].new

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes the same function as the source, up to rounding."""
        return all(growth.preserves for growth in self.growths)

    @property
    def inits(self) -> dict[str, str]:
        """The init of each operator; if growths use different ones, all of them, such as "stack, interleave"."""
        pairs = dict.fromkeys(pair for growth in self.growths for pair in growth.inits.items())
        return {operator: ", ".join(init for name, init in pairs if name == operator) for operator, _ in pairs}

    @property
    def expert_copies(self) -> tuple[tuple[int, ...], ...] | None:
        """For each layer, the number of copies of each old expert, if utilities have decided; else None."""
        growth = self.growths[-1].experts
        if growth is None or not growth.sources:
            return None
        return tuple(tuple(layer.count(expert) for expert in range(growth.old)) for layer in growth.sources)

    @property
    def parameters(self) -> int:
        return int(count_parameters(self.new, self.growths[-1].config()))

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.target.nbytes for tensor in self.tensors)

    @property
    def needed_bytes(self) -> int:
        """Disk space that the target takes."""
        copied = sum((self.directory / file).stat().st_size for file in self.copied_files)
        index = len(format_index(self.shards)) if len(self.shards) > 1 else 0
        return sum(shard.nbytes for shard in self.shards) + index + copied + _OTHER_FILES_BYTES

    def as_dict(self) -> dict[str, Json]:
        """Return a summary of the plan as plain data."""
        return {
            "from": str(self.old),
            "to": str(self.new),
            "inits": self.inits,
            "stages": [{"to": str(growth.new), "inits": dict(growth.inits)} for growth in self.growths],
            **({"vocab_size": size} if (size := self.growths[-1].vocab_size) else {}),
            **({"num_experts": experts.new} if (experts := self.growths[-1].experts) else {}),
            "preserves": self.preserves,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "shards": {shard.file: shard.nbytes for shard in self.shards},
            "carried": [str(file) for file in self.copied_files],
            "needed_bytes": self.needed_bytes,
            "free_bytes": self.free_bytes,
        }

    def __str__(self) -> str:
        lines = [f"{self.source} {self.old} to {self.target} {self.new}"]
        for number, growth in enumerate(self.growths, start=1):
            inits = ", ".join(f"{operator} by {init}" for operator, init in growth.inits.items())
            new = str(growth.new) if growth.vocab_size is None else f"{growth.vocab_size:,} tokens"
            if growth.experts is not None:
                new = f"{growth.experts.new} experts, {growth.experts.active} of them active"
                new += f", of width {growth.new.intermediate_size}" if growth.experts.shards > 1 else ""
            lines.append(f"  growth {number}: {inits} -> {new}" + ("" if growth.preserves else "  (not exact)"))
        for shard in self.shards:
            lines.append(f"  {shard.file}: {len(shard.tensors)} tensors, {format_bytes(shard.nbytes)}")
        if self.copied_files:
            lines.append(f"  copied unchanged: {', '.join(str(file) for file in self.copied_files)}")
        needed, free = format_bytes(self.needed_bytes), format_bytes(self.free_bytes)
        lines.append(f"  {self.parameters:,} parameters; needs {needed} of disk space, {free} are free")
        return "\n".join(lines)


def plan_checkpoint_growth(
    source: str | Path,
    target: str | Path,
    operator: str | GrowthStage | Sequence[GrowthStage],
    new_dims: int | Mapping[str, int] | ModelDims | None = None,
    *,
    init: str | Mapping[str, str] | None = None,
    seed: int = 0,
    noise: float = DEFAULT_NOISE,
    max_shard_size: int | str = "5GB",
    utility: Utility | None = None,
) -> CheckpointPlan:
    """Decide the growth of a checkpoint, and reject what cannot be done, without reading a weight.

    A source on the Hub is downloaded into the cache. Arguments and errors are as for `grow_checkpoint`.
    """
    if isinstance(source, torch.nn.Module):
        raise GrowthError(f"source must be a directory or a Hub id, got {type(source).__name__}; use grow_model")
    require_path(source, "source", error=GrowthError)
    require_path(target, "target", error=GrowthError)
    target = Path(target)
    require_absent(target, "directory", error=GrowthError)
    directory = find_checkpoint_directory(source)
    growths = _plan_growths(_read_config(directory), operator, new_dims, init, seed, noise, utility)
    stored = split_stacks(read_checkpoint_headers(directory), growths[0].architecture)
    free = _count_free_bytes(target)
    width = min((FLOATS[tensor.dtype].itemsize for tensor in stored.values() if tensor.dtype in FLOATS), default=1)
    _check_space(target, count_parameters(growths[-1].new, growths[-1].config()) * width, free)
    chains: dict[str, tuple[ParameterPlan, ...]] = {}  # parameter of the last model -> its plan in each growth
    for growth in growths:
        pieces = (piece for parameter in growth.parameters() for piece in parameter.pieces)
        chains = {piece.name: (*chains.get(piece.source, ()), piece) for piece in pieces}
    # Several parameters may grow from one; those that take nothing from it may not say how it is stored.
    firsts = sorted((chain[0] for chain in chains.values()), key=lambda parameter: not parameter.takes_nothing)
    sources = _match_sources(directory, growths[0], stored, {parameter.source: parameter for parameter in firsts})
    steps = {chains[name][-1].stored_name: chains[name] for name in sorted(chains, key=_make_natural_key)}
    layouts = {name: (sources[chain[0].source].dtype, chain[-1].new_shape) for name, chain in steps.items()}
    shards = plan_shards(layouts, max_shard_size)
    targets = [tensor for shard in shards for tensor in shard.tensors]
    copied = {path for pattern in COPIED_FILES for path in directory.glob(pattern) if path.is_file()}
    plan = CheckpointPlan(
        source=str(source),
        directory=directory,
        target=target,
        growths=growths,
        tensors=tuple(TensorPlan(sources[steps[t.name][0].source], t, steps[t.name]) for t in targets),
        shards=shards,
        twins=tuple(_find_twins(growths[0], stored)),
        copied_files=tuple(sorted(path.relative_to(directory) for path in copied)),
        free_bytes=free,
    )
    _check_space(target, plan.needed_bytes, free)
    return plan


def _check_space(target: Path, needed: int, free: int) -> None:
    if needed > free:
        raise GrowthError(
            f"{target} takes {format_bytes(needed)}, but its disk has {format_bytes(free)} free; "
            "free some space or choose another"
        )


def find_checkpoint_directory(source: str | Path) -> Path:
    """Return the local directory of a checkpoint; one on the Hub is downloaded, without pickles or code.

    Args:
        source: directory; or Hub id, optionally with a revision (`user/name@stage-1-layer`).

    Raises:
        GrowthError: if the source is neither a directory nor a model that could be downloaded.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    address = None if path.exists() or isinstance(source, Path) else Address.find(source)
    if address is None:
        raise GrowthError(f"{source} is not a model directory: there is no such directory")
    try:
        snapshot = read_hub(
            lambda: snapshot_download(
                address.repo_id,
                revision=address.revision,
                allow_patterns=["config.json", "model*.safetensors", INDEX_FILE, *COPIED_FILES],
                ignore_patterns=["*.bin", "*.py"],
            ),
            f"reading {address}",
        )
    except (OSError, ValueError) as caught:
        raise GrowthError(
            f"{source} is not a directory, and no model of that name could be downloaded from the Hub: "
            f"{summarise_error(find_network_error(caught) or caught)}"
        ) from None
    return Path(snapshot)


def _read_config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        is_adapter = (directory / "adapter_config.json").is_file()
        remedy = ", only an adapter; merge it into its base with merge_and_unload first" if is_adapter else ""
        raise GrowthError(f"{directory} is not a model directory: it has no config.json{remedy}")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, StrictDataclassError) as caught:
        message = f"{directory} is not a checkpoint that transformers can read: {explain_load_error(caught)}"
        raise GrowthError(message) from None


def _plan_growths(
    config: ModelConfig,
    operator: str | GrowthStage | Sequence[GrowthStage],
    new_dims: int | Mapping[str, int] | ModelDims | None,
    init: str | Mapping[str, str] | None,
    seed: int,
    noise: float,
    utility: Utility | None,
) -> tuple[GrowthPlan, ...]:
    """Plan each growth, from the config that the one before it leaves."""
    stages = [operator] if isinstance(operator, (str, GrowthStage)) else operator
    is_valid = isinstance(stages, Sequence) and bool(stages)
    if not is_valid or not (isinstance(operator, str) or all(isinstance(stage, GrowthStage) for stage in stages)):
        kind = type(operator).__name__
        raise GrowthError(f"operator must be a name, a GrowthStage or several GrowthStages, got {kind}")
    if not is_whole_number(seed):
        raise GrowthError(f"seed must be a whole number, got {seed!r}")
    plans: list[GrowthPlan] = []
    for number, stage in enumerate(stages):
        # With the same seed, the new entries that a parameter gets in two growths would begin with the same numbers.
        plans.append(plan_growth(config, stage, new_dims, init=init, seed=seed + number, noise=noise, utility=utility))
        config = plans[-1].config()
    return tuple(plans)


def _match_sources(
    directory: Path, growth: GrowthPlan, stored: Mapping[str, StoredTensor], parameters: Mapping[str, ParameterPlan]
) -> dict[str, StoredTensor]:
    """Return the location of each parameter of the old model; reject files that differ from the axis table."""
    sources: dict[str, StoredTensor] = {}
    family = growth.architecture.model_type
    mismatch = f"unlike the axis table of {family!r}; merge adapters and undo quantisation before growing"
    classes = read_setting(growth.source_config, "architectures") or []
    if others := [name for name in classes if not str(name).endswith(("ForCausalLM", "LMHeadModel"))]:
        mismatch = (
            f"unlike the axis table of {family!r}; it is a {others[0]}, and only causal language models can grow"
        )
    for source, parameter in parameters.items():
        # Early checkpoints of GPT-2 leave out the name of the base model.
        names = (parameter.stored_source, source, source.partition(".")[2])
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise GrowthError(f"{directory} has no {parameter.stored_source}, {mismatch}")
        tensor = stored[name]
        if tensor.shape != parameter.old_shape:
            raise GrowthError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, "
                f"but config.json makes it {list(parameter.old_shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise GrowthError(
                f"{tensor.file}: {name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}; "
                "undo quantisation before growing"
            )
        sources[source] = tensor
    expected = {tensor.name for tensor in sources.values()} | {twin.name for twin, _ in _find_twins(growth, stored)}
    if unexpected := sorted(name for name in stored if name not in expected and not _BUFFERS.search(name)):
        raise GrowthError(f"{directory} has a tensor {unexpected[0]}, {mismatch}")
    return sources


def _find_twins(growth: GrowthPlan, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[StoredTensor, StoredTensor]]:
    """Yield the tensors that the source stores although they are tied, each with the one that it is tied to."""
    untied = set(growth.architecture.rows(growth.source_config))
    for row in growth.architecture.rows(growth.source_config, tied=True):
        name = next((name for name in (row.stored_as, row.name) if name in stored), None)
        if row not in untied and name is not None and row.tied_to is not None and row.tied_to in stored:
            yield stored[name], stored[row.tied_to]


def _count_free_bytes(target: Path) -> int:
    """Return the free space on the target's disk; leftovers of a killed run count as free: growth removes them."""
    parent = next(path for path in target.absolute().parents if path.exists())
    files = [file for path in list_abandoned(target) for file in path.rglob("*")]
    leftover = sum(file.stat().st_size for file in files if file.is_file())
    return shutil.disk_usage(parent).free + leftover


def _make_natural_key(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts names as transformers does, which decides the content of shards: layer 2 before 10."""
    return [(False, int(part), "") if part.isdigit() else (True, 0, part) for part in name.split(".")]


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
    utility: Utility | None = None,
) -> GrowthReceipt:
    """Grow a checkpoint into a new directory, with its tokenizer, generation config and a receipt.

    Safetensors to safetensors, one tensor at a time: it needs the memory of the largest tensor, before and after
    growth, and at least half a GiB. The weights are equal to the result of `grow_model`, bit for bit, each in the
    dtype in which it is stored. The directory is complete or absent; the next run removes what a killed run has left
    (`.NAME.….writing`).

    Args:
        source: local directory, or Hub id[@revision].
        target: directory that does not exist yet.
        operator: as for `grow_model`; or several `GrowthStage`s, applied one after another in one pass over the data.
            The result equals one `grow_model` per stage, with `seed`, `seed + 1` and so on.
        new_dims, init, seed, noise, utility: as for `grow_model`.
        max_shard_size: size of the largest file of weights, in bytes or as "5GB".
        threads: number of threads that read, grow and write; default, one per core, at most 4.
        progress: whether to show a progress bar, if there is a terminal.
        verify: whether to load both models afterwards, measure what changed (`GrowthReceipt.probe`), and fail if a
            growth that should preserve the function does not. This needs the memory of both models.

    Raises:
        GrowthError: if the source cannot be read, is damaged or of an unknown family, the target exists or the disk is
            full, and as for `grow_model`. Whatever can be checked is checked before the first weight is read.

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
    require_whole_number(threads, "threads", error=GrowthError)
    threads = int(threads)  # numpy's integers overflow
    plan = plan_checkpoint_growth(
        source,
        target,
        operator,
        new_dims,
        init=init,
        seed=seed,
        noise=noise,
        max_shard_size=max_shard_size,
        utility=utility,
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
            for file in plan.copied_files:
                (directory / file).parent.mkdir(exist_ok=True)
                shutil.copyfile(plan.directory / file, directory / file)
            receipt = GrowthReceipt(
                source=plan.source,
                operators=tuple(plan.inits),
                inits=plan.inits,
                seed=plan.growths[0].seed,
                noise=plan.growths[0].noise,
                source_dims=plan.old,
                dims=plan.new,
                source_parameters=plan.growths[0].source_parameters,
                parameters=plan.parameters,
                versions=list_versions(),
                preserves=plan.preserves,
                expert_copies=plan.expert_copies,
                source_hash=source_hash,
                probe=_verify(plan, directory) if verify else None,
                bytes_written=plan.weight_bytes,
                seconds=time.perf_counter() - began,
                peak_memory_bytes=measure_peak_memory(),
            )
            receipt.to_json(directory / RECEIPT_FILE)
    except OSError as caught:
        raise GrowthError(f"{plan.target} could not be written: {caught}") from caught
    return receipt


def _verify(plan: CheckpointPlan, directory: Path) -> GrowthProbe:
    """Measure what the growth changed; raise if the function should have been preserved and was not."""
    probe = probe_checkpoints(plan.directory, directory, plan.growths)
    if plan.preserves and not probe.is_exact:
        raise GrowthError(
            f"the growth of {plan.source} has not preserved its function: its logits change by "
            f"{probe.max_logit_change:.1e} of the largest, rounding explains {probe.rounding_floor:.1e}; "
            "nothing was written, please report this"
        )
    return probe


def measure_peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes.

    On Linux `ru_maxrss` includes the memory that the parent had when it started this process, so VmHWM comes first.
    """
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write_weights(plan: CheckpointPlan, directory: Path, threads: int, progress: bool) -> str:
    """Write every file of weights, and the index if there are several; return the hash of the source's weights."""
    for shard in plan.shards:
        create_shard(directory, shard)
    if len(plan.shards) > 1:
        write_text(directory / INDEX_FILE, format_index(plan.shards))
    shards = {shard.file: shard for shard in plan.shards}
    unwritten = Counter(str(tensor.target.file) for tensor in plan.tensors)
    hashes: dict[str, str | None] = {}
    lock = threading.Lock()
    memory = ThreadMemory(IN_FLIGHT_BYTES // (2 * threads))

    with tqdm(total=plan.weight_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar:

        def advance(piece: memoryview) -> None:
            with lock:
                bar.update(len(piece))

        def grow_and_write(tensor: TensorPlan) -> None:
            write_tensor(directory, tensor.target, _grow_tensor(tensor, hashes, lock, memory), advance)
            file = str(tensor.target.file)
            with lock:
                unwritten[file] -= 1
                is_complete = not unwritten[file]
            flusher.flush(shards[file], is_complete=is_complete)

        with _Flusher(directory) as flusher:
            _run_in_threads(plan.tensors, grow_and_write, threads)
    return combine_hashes((name, digest) for name, digest in hashes.items() if digest)


class _Flusher:
    """A thread that brings files to the disk while others grow the next tensors.

    The kernel alone would begin when a tenth of the memory is to be written, and the disk would be idle until then.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pool = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._lock = threading.Lock()

    def flush(self, shard: Shard, *, is_complete: bool) -> None:
        """Flush a shard: if it is complete, in any case, and otherwise if no flush is waiting or running.

        Raises:
            GrowthError: if the flush before has failed.
        """
        with self._lock:
            is_idle = all(flush.done() for flush in self._flushes[-1:])
            if is_idle and self._flushes:
                self._flushes[-1].result()
            if is_idle or is_complete:
                self._flushes.append(self._pool.submit(flush_shard, self._directory, shard))

    def __enter__(self) -> _Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until all shards are on the disk, unless an error ends the growth."""
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for flush in self._flushes:
                flush.result()


def _grow_tensor(
    tensor: TensorPlan, hashes: dict[str, str | None], lock: threading.Lock, memory: ThreadMemory
) -> torch.Tensor:
    """Return the grown tensor, in the thread's memory; hash the source when it is first read."""
    steps, dtype = tensor.steps, FLOATS[tensor.source.dtype]
    if zeroed := [number for number, step in enumerate(steps) if step.zeroed]:  # the result is not read off the source
        value = torch.empty(0, dtype=dtype)
        steps = steps[zeroed[-1] :]
    else:
        value = read_tensor(tensor.source, memory.allocate("read", tensor.source.shape, dtype))
        name = steps[0].source
        with lock:
            is_first = name not in hashes
            hashes.setdefault(name, None)
        if is_first:
            hashes[name] = hash_tensor(value)
    steps = tuple(step for step in steps if not step.is_identity)
    for number, step in enumerate(steps, start=1):
        out = memory.allocate("written", tensor.target.shape, dtype) if number == len(steps) else None
        value = grow_parameter(value, step, out)
    return value


def _run_in_threads(tensors: Sequence[TensorPlan], action: Callable[[TensorPlan], None], threads: int) -> None:
    """Call `action` for all tensors, in order, while those in flight take no more than IN_FLIGHT_BYTES.

    After an error or an interrupt no further call starts; it is raised.
    """
    in_flight: dict[Future[None], int] = {}
    with start_worker_threads(threads) as pool:
        try:
            for tensor in tensors:
                while in_flight and sum(in_flight.values()) + tensor.working_bytes > IN_FLIGHT_BYTES:
                    for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                        future.result()
                        del in_flight[future]
                in_flight[pool.submit(action, tensor)] = tensor.working_bytes
            for future in wait(in_flight, return_when=FIRST_EXCEPTION).done:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
