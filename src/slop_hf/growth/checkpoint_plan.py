"""`plan_checkpoint_growth`: every decision about growing a checkpoint on disk, before a weight is read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ..cost.flops import count_parameters
from ..dims import ModelDims
from ..errors import GrowthError
from ..io.hub_address import Address
from ..schedule import GrowthStage
from .plan import DEFAULT_NOISE, GrowthPlan, ParameterPlan, plan_growth
from .safetensors_io import FLOATS, Shard, StoredTensor, format_index, plan_shards, read_checkpoint_headers

#: Files that growth does not change: generation config, tokenizer and chat templates.
CARRIED = (
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
_FROM_HUB = ("config.json", "model*.safetensors", "model.safetensors.index.json", *CARRIED)

#: Buffers that older releases of transformers saved and newer ones compute.
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|attention\.(bias|masked_bias))$")

_OTHER_FILES_BYTES = 2**16  # config and receipt


@dataclass(frozen=True)
class TensorPlan:
    """How one tensor of the target comes about: read, pulled through each growth in turn, written.

    Args:
        source: where the old one lies.
        target: where the new one goes.
        steps: its parameter's plan in each growth.
    """

    source: StoredTensor
    target: StoredTensor
    steps: tuple[ParameterPlan, ...]

    @property
    def is_read(self) -> bool:
        """Whether anything of the source is in it: a silent layer is zero whatever it was before."""
        return not any(step.silent for step in self.steps)

    @property
    def working_bytes(self) -> int:
        """Memory that making it takes: a step's old and new tensor, and an old one that is centred in float32."""
        sizes = [self.source.numel, *(_numel(axis.new_size for axis in step.maps) for step in self.steps)]
        width = FLOATS[self.source.dtype].itemsize
        float32 = 8 if width < 4 else width
        return max(
            (old + new) * width + (old * float32 if step.centre else 0)
            for old, new, step in zip(sizes, sizes[1:], self.steps, strict=False)
        )


@dataclass(frozen=True)
class CheckpointPlan:
    """One growth of a checkpoint through one or more `growths`; the executor chooses nothing.

    Args:
        source: the directory or Hub id that was asked for.
        directory: where it lies.
        target: the directory to be made.
        growths: the growths, in order.
        tensors: every tensor of the target, in the order of the files.
        shards: the files of weights, with the place of every tensor.
        twins: tensors that the source holds twice, because they are tied; they must be equal.
        carried: files that go along unchanged, relative to `directory`.
        free_bytes: on the target's disk.
    """

    source: str
    directory: Path
    target: Path
    growths: tuple[GrowthPlan, ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[Shard, ...]
    twins: tuple[tuple[StoredTensor, StoredTensor], ...]
    carried: tuple[Path, ...]
    free_bytes: int

    @property
    def old(self) -> ModelDims:
        """The structure before."""
        return self.growths[0].old

    @property
    def new(self) -> ModelDims:
        """The structure after."""
        return self.growths[-1].new

    @property
    def operators(self) -> tuple[str, ...]:
        """What grows, in order; an operator that several growths use comes once."""
        return tuple(self.inits)

    @property
    def inits(self) -> dict[str, str]:
        """The init of each operator; where growths differ, all of them, such as "stack, interleave"."""
        found: dict[str, list[str]] = {}
        for growth in self.growths:
            for operator, init in growth.inits.items():
                if init not in found.setdefault(operator, []):
                    found[operator].append(init)
        return {operator: ", ".join(inits) for operator, inits in found.items()}

    @property
    def parameters(self) -> int:
        """Parameters of the grown model."""
        return int(count_parameters(self.new, self.growths[-1].config()))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the grown weights."""
        return sum(tensor.target.nbytes for tensor in self.tensors)

    @property
    def needed_bytes(self) -> int:
        """Disk space that the target takes."""
        carried = sum((self.directory / file).stat().st_size for file in self.carried)
        index = len(format_index(self.shards)) if len(self.shards) > 1 else 0
        return sum(shard.nbytes for shard in self.shards) + index + carried + _OTHER_FILES_BYTES

    def as_dict(self) -> dict[str, Any]:
        """The plan in short, as plain data."""
        return {
            "from": str(self.old),
            "to": str(self.new),
            "inits": self.inits,
            "stages": [{"to": str(growth.new), "inits": dict(growth.inits)} for growth in self.growths],
            "preserves": all(growth.preserves for growth in self.growths),
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "shards": {shard.file: shard.nbytes for shard in self.shards},
            "carried": [str(file) for file in self.carried],
            "needed_bytes": self.needed_bytes,
            "free_bytes": self.free_bytes,
        }

    def __str__(self) -> str:
        lines = [f"{self.source} {self.old} to {self.target} {self.new}"]
        for number, growth in enumerate(self.growths, start=1):
            inits = ", ".join(f"{operator} by {init}" for operator, init in growth.inits.items())
            lines.append(f"  growth {number}: {inits} -> {growth.new}" + ("" if growth.preserves else "  (not exact)"))
        lines += [f"  {shard.file}: {len(shard.tensors)} tensors, {_size(shard.nbytes)}" for shard in self.shards]
        if self.carried:
            lines.append(f"  as they are: {', '.join(str(file) for file in self.carried)}")
        lines.append(f"  {self.parameters:,} parameters; {_size(self.needed_bytes)} of {_size(self.free_bytes)} free")
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
) -> CheckpointPlan:
    """Decide the growth of a checkpoint, and refuse what cannot be done, without reading a weight.

    A source on the Hub is fetched for it. Arguments and errors are those of `grow_checkpoint`.
    """
    target = Path(target)
    if target.exists() or target.is_symlink():
        raise GrowthError(f"{target} exists already; choose a new directory, nothing is overwritten")
    directory = find_checkpoint_directory(source)
    config = _read_config(directory)
    growths = _plan_growths(config, operator, new_dims, init, seed, noise)
    stored = read_checkpoint_headers(directory)
    chains = _chains(growths)
    sources = _match(directory, growths[0], stored, {chain[0].source: chain[0] for chain in chains.values()})
    shapes = {
        chain[-1].stored_name: (sources[chain[0].source].dtype, tuple(axis.new_size for axis in chain[-1].maps))
        for _, chain in sorted(chains.items(), key=lambda item: _natural(item[0]))
    }
    shards = plan_shards(shapes, max_shard_size)
    by_name = {chain[-1].stored_name: chain for chain in chains.values()}
    places = [place for shard in shards for place in shard.tensors]
    plan = CheckpointPlan(
        source=str(source),
        directory=directory,
        target=target,
        growths=growths,
        tensors=tuple(
            TensorPlan(sources[by_name[place.name][0].source], place, by_name[place.name]) for place in places
        ),
        shards=shards,
        twins=tuple(_twins(growths[0], stored)),
        carried=_carried(directory),
        free_bytes=_free_bytes(target),
    )
    if plan.needed_bytes > plan.free_bytes:
        raise GrowthError(
            f"{target} takes {_size(plan.needed_bytes)}, but its disk has {_size(plan.free_bytes)} free; "
            "free some space or choose another disk"
        )
    return plan


def find_checkpoint_directory(source: str | Path) -> Path:
    """The directory of a checkpoint; one on the Hub is fetched into the cache, without pickles or code.

    Args:
        source: a directory; or a Hub id, also with a revision (`user/name@stage-1-layer`).

    Raises:
        GrowthError: for what is neither a directory nor a model that could be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    address = None if path.exists() or isinstance(source, Path) else Address.find(source)
    if address is None:
        raise GrowthError(f"{source} is not a model directory: there is no such directory")
    try:
        fetched = snapshot_download(
            address.repo_id,
            revision=address.revision,
            allow_patterns=list(_FROM_HUB),
            ignore_patterns=["*.bin", "*.py"],
        )
        return Path(fetched)
    except (OSError, ValueError) as caught:
        raise GrowthError(
            f"{source} is not a directory, and no model of that name could be fetched from the Hub: "
            f"{_first_line(caught)}"
        ) from None


def _read_config(directory: Path) -> Any:
    if not (directory / "config.json").is_file():
        raise GrowthError(f"{directory} is not a model directory: it has no config.json")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, StrictDataclassError) as caught:
        message = f"{directory} is not a checkpoint that transformers can read: {_first_line(caught)}"
        raise GrowthError(message) from None


def _plan_growths(
    config: Any,
    operator: str | GrowthStage | Sequence[GrowthStage],
    new_dims: int | Mapping[str, int] | ModelDims | None,
    init: str | Mapping[str, str] | None,
    seed: int,
    noise: float,
) -> tuple[GrowthPlan, ...]:
    """The plan of each growth, from the config that the one before leaves."""
    stages: Sequence[Any] = [operator] if isinstance(operator, (str, GrowthStage)) else operator
    one_name = isinstance(operator, str)
    if not (isinstance(stages, Sequence) and stages and all(one_name or isinstance(s, GrowthStage) for s in stages)):
        raise GrowthError(f"operator must be a name, a GrowthStage or several of them, got {operator!r}")
    plans: list[GrowthPlan] = []
    for number, stage in enumerate(stages):
        # With one seed for all, the new entries that a parameter gets in two growths would begin with equal numbers.
        plans.append(plan_growth(config, stage, new_dims, init=init, seed=seed + number, noise=noise))
        config = plans[-1].config()
    return tuple(plans)


def _chains(growths: Sequence[GrowthPlan]) -> dict[str, tuple[ParameterPlan, ...]]:
    """For every parameter of the last model its plan in each growth."""
    chains: dict[str, tuple[ParameterPlan, ...]] = {}
    for growth in growths:
        chains = {parameter.name: (*chains.get(parameter.source, ()), parameter) for parameter in growth.parameters()}
    return chains


def _match(
    directory: Path,
    growth: GrowthPlan,
    stored: Mapping[str, StoredTensor],
    parameters: Mapping[str, ParameterPlan],
) -> dict[str, StoredTensor]:
    """Where each parameter of the old model lies; what the table does not describe is refused."""
    sources: dict[str, StoredTensor] = {}
    for source, parameter in parameters.items():
        name = next((name for name in (parameter.stored_source, source) if name in stored), None)
        if name is None:
            raise GrowthError(
                f"{directory} has no {parameter.stored_source}, unlike the axis table of "
                f"{growth.architecture.model_type!r}; merge adapters and undo quantisation before growing"
            )
        tensor, shape = stored[name], tuple(axis.old_size for axis in parameter.maps)
        if tensor.shape != shape:
            raise GrowthError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise GrowthError(
                f"{tensor.file}: {name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}; "
                "undo quantisation before growing"
            )
        sources[source] = tensor
    known = {tensor.name for tensor in sources.values()} | {twin.name for twin, _ in _twins(growth, stored)}
    strays = sorted(name for name in stored if name not in known and not _BUFFERS.search(name))
    if strays:
        raise GrowthError(
            f"{directory} has a tensor {strays[0]}, unlike the axis table of {growth.architecture.model_type!r}; "
            "merge adapters and undo quantisation before growing"
        )
    return sources


def _twins(growth: GrowthPlan, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[StoredTensor, StoredTensor]]:
    """Tensors that the source holds although they are tied, each with the one that it is tied to."""
    own = set(growth.architecture.rows(growth.source_config))
    for row in growth.architecture.rows(growth.source_config, tied=True):
        name = next((name for name in (row.stored_as, row.name) if name in stored), None)
        if row not in own and name is not None and row.tied_to is not None and row.tied_to in stored:
            yield stored[name], stored[row.tied_to]


def _carried(directory: Path) -> tuple[Path, ...]:
    files = {path for pattern in CARRIED for path in directory.glob(pattern) if path.is_file()}
    return tuple(sorted(path.relative_to(directory) for path in files))


def _free_bytes(target: Path) -> int:
    """Free space on the target's disk; what a killed run has left beside it is removed before it is needed."""
    parent = next(path for path in target.absolute().parents if path.exists())
    leftover = target.with_name(f".{target.name}.writing")  # as `write_directory` names it
    taken = sum(path.stat().st_size for path in leftover.rglob("*") if path.is_file())
    return shutil.disk_usage(parent).free + taken


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts names as transformers does, which decides what a file holds: layer 2 before layer 10."""
    return [(False, int(part), "") if part.isdigit() else (True, 0, part) for part in name.split(".")]


def _numel(sizes: Iterator[int]) -> int:
    numel = 1
    for size in sizes:
        numel *= size
    return numel


def _size(nbytes: float) -> str:
    units = ("B", "kB", "MB", "GB", "TB")
    power = next((power for power in range(len(units)) if nbytes < 1000 ** (power + 1)), len(units) - 1)
    return f"{nbytes / 1000**power:.4g} {units[power]}"


def _first_line(caught: Exception) -> str:
    said = getattr(caught, "server_message", None) or str(caught)  # of the Hub's errors the first line is a status
    return next(iter(said.strip().splitlines()), type(caught).__name__)
