"""Safetensors files, read and written one tensor at a time.

Files are read and written with plain system calls, because memory-mapped pages would count as memory of the process.
A file consists of

    8 bytes   length n of the header, little endian
    n bytes   JSON: dtype, shape and data_offsets [begin, end) by name; padded with spaces to a multiple of 8
    the rest  the bytes of the tensors, without gaps

Every function opens the file itself, so any number of threads can work on the same file.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import GrowthError
from ..io.files import flush_to_disk
from ..io.numbers import is_finite_number, is_whole_number
from ..io.serialization import Json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

#: The dtypes that growth computes with, in the order in which safetensors writes them to a file (widest first).
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in FLOATS.items()}
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_PIECE_BYTES = 2**20  # writing a GiB to ext4 in pieces of 16 MiB takes four times as long
#: Size of each of the two pinned buffers through which a GPU's tensor reaches a file: one is filled while the other is
#: written. Copying one takes a fraction of a millisecond, a hundred times as long as starting the copy.
_BUFFER_BYTES = 2**23

#: Dtype as safetensors spells it, such as "BF16", and shape.
TensorLayout: TypeAlias = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class StoredTensor:
    """Location and layout of a tensor in a file.

    Args:
        dtype: dtype as safetensors spells it, such as "BF16".
        begin: offset of the first byte in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A file to be written: its name, its first bytes (up to the tensors), and the location of each tensor."""

    file: str
    header: bytes
    tensors: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def read_checkpoint_headers(directory: Path) -> dict[str, StoredTensor]:
    """Return the location of every tensor of a checkpoint, in one file or in shards; only headers are read.

    Raises a `GrowthError` if there are no safetensors or no index, or if a shard is missing, truncated or corrupt.
    """
    if (single := directory / SINGLE_FILE).is_file():
        return read_header(single)
    index = directory / INDEX_FILE
    if not index.is_file():
        raise GrowthError(_explain_missing_weights(directory))
    weight_map = _read_index(index)
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise GrowthError(f"{directory} has no {missing[0]}, a shard that its {INDEX_FILE} lists; download it again")
    headers = {file: read_header(directory / file) for file in files}
    for name, file in weight_map.items():
        if name not in headers[file]:
            raise GrowthError(f"{directory / file} has no {name}, unlike {INDEX_FILE}; download both again")
    return {name: headers[file][name] for name, file in weight_map.items()}


def _explain_missing_weights(directory: Path) -> str:
    if any(directory.glob("model-*.safetensors")):
        return f"{directory} has shards but no {INDEX_FILE}, which lists their tensors; download it again"
    if any(directory.glob("pytorch_model*")):
        return (
            f"{directory} has its weights only as pytorch_model.bin, a pickle, which could run code; "
            "load the model with transformers and save it with save_pretrained, as safetensors, first"
        )
    return f"{directory} has no weights: expected {SINGLE_FILE}, or shards with {INDEX_FILE}"


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        valid = bool(weight_map) and all(isinstance(file, str) and file for file in weight_map.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise GrowthError(f"{path} is not an index: expected JSON with a weight_map from tensor to file")
    for file in weight_map.values():
        if Path(file).name != file or file == "..":
            raise GrowthError(f"{path} names the file {file!r} outside of its directory")
    return dict(weight_map)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the location of every tensor of a safetensors file; raise if it is truncated or violates the format."""
    with name_file_in_errors(path), path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(_read(file, 8), "little") if size >= 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise _report_corruption(path, f"its header would take {length} of its {size} bytes")
        try:
            header = json.loads(_read(file, length), object_pairs_hook=_refuse_repeated_names)
            header.pop("__metadata__", None)
            entries = [_parse_entry(path, name, entry, 8 + length) for name, entry in header.items()]
        except GrowthError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as caught:
            raise _report_corruption(path, f"its header is not valid ({type(caught).__name__}: {caught})") from None
    end = 8 + length
    for tensor in sorted(entries, key=lambda tensor: (tensor.begin, tensor.nbytes)):
        if tensor.begin != end:
            raise _report_corruption(path, f"{tensor.name} begins at byte {tensor.begin}, expected {end}")
        end += tensor.nbytes
    if end != size:
        raise _report_corruption(path, f"it has {size} bytes, but its header describes {end}")
    return {tensor.name: tensor for tensor in entries}


def _parse_entry(path: Path, name: str, entry: Mapping[str, Json], data: int) -> StoredTensor:
    """Return one tensor of a header; the bytes of the tensors begin at byte `data` of the file."""
    dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(is_whole_number(number, least=0) for number in (*shape, begin, end)):
        raise _report_corruption(path, f"{name} has shape {list(shape)} and offsets {begin} to {end}")
    if dtype not in _BITS:
        raise GrowthError(f"{path}: {name} has the unknown dtype {dtype!r}; known: {', '.join(_BITS)}")
    if (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _report_corruption(path, f"{name} of dtype {dtype} and shape {list(shape)} has {end - begin} bytes")
    return StoredTensor(name, path, dtype, shape, data + begin, end - begin)


def _refuse_repeated_names(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a name appears twice")
    return entries


def _report_corruption(path: Path, fault: str) -> GrowthError:
    return GrowthError(f"{path} is truncated or corrupt: {fault}; download it again")


def read_tensor(tensor: StoredTensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor of one of the dtypes in `FLOATS` into `out`, or else into a new tensor, and return it."""
    value = torch.empty(tensor.shape, dtype=FLOATS[tensor.dtype]) if out is None else out
    with name_file_in_errors(tensor.file), tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.begin)
        _read_into(file, _view_bytes(value))
    return value


def are_equal_tensors(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with (
        name_file_in_errors(one.file),
        one.file.open("rb", buffering=0) as file,
        other.file.open("rb", buffering=0) as other_file,
    ):
        file.seek(one.begin)
        other_file.seek(other.begin)
        parts = (min(_PIECE_BYTES, one.nbytes - start) for start in range(0, one.nbytes, _PIECE_BYTES))
        return all(_read(file, length) == _read(other_file, length) for length in parts)


def plan_shards(
    tensors: Mapping[str, TensorLayout], max_shard_size: int | str, stem: str = "model"
) -> tuple[Shard, ...]:
    """Distribute tensors over files, named and filled as transformers does it.

    Args:
        tensors: dtype and shape by name; the files are filled in this order.
        max_shard_size: largest number of bytes of tensors per file, or a size such as "5GB"; a larger tensor gets a
            file to itself.
        stem: first part of the file names.

    >>> shards = plan_shards({"a": ("F32", (2, 3)), "b": ("BF16", (4,))}, 24)
    >>> [(shard.file, shard.tensors[0].begin, shard.nbytes) for shard in shards]
    [('model-00001-of-00002.safetensors', 96, 120), ('model-00002-of-00002.safetensors', 96, 104)]
    """
    sizes = {name: _count_bytes(layout) for name, layout in tensors.items()}
    try:
        split = split_state_dict_into_shards_factory(
            sizes,
            get_storage_size=lambda size: size,
            filename_pattern=stem + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        valid = isinstance(max_shard_size, str) or is_finite_number(max_shard_size, least=1)
    except (ValueError, TypeError):
        valid = False
    if not valid or str(max_shard_size).lstrip().startswith("-"):
        raise GrowthError(f"max_shard_size must be a number of bytes or a size such as '5GB', got {max_shard_size!r}")
    return tuple(
        plan_shard(file, {name: tensors[name] for name in names}) for file, names in split.filename_to_tensors.items()
    )


def plan_shard(file: str, tensors: Mapping[str, TensorLayout]) -> Shard:
    """Lay out one file, in the order in which the safetensors library writes tensors."""
    order = list(FLOATS)
    entries: dict[str, Json] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, layout in sorted(tensors.items(), key=lambda item: (order.index(item[1][0]), item[0])):
        end = begin + _count_bytes(layout)
        entries[name] = {"dtype": layout[0], "shape": layout[1], "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    del entries["__metadata__"]
    header = len(text).to_bytes(8, "little") + text
    stored = (_parse_entry(Path(file), name, entry, len(header)) for name, entry in entries.items())
    return Shard(file, header, tuple(stored))


def _count_bytes(layout: TensorLayout) -> int:
    dtype, shape = layout
    return math.prod(shape) * _BITS[dtype] // 8


def format_index(shards: tuple[Shard, ...]) -> str:
    """Return the index of a checkpoint with several files, as JSON text."""
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    parameters, nbytes = sum(tensor.numel for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": nbytes},
        "weight_map": {tensor.name: str(tensor.file) for tensor in tensors},
    }
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def create_shard(directory: Path, shard: Shard) -> None:
    """Write a shard's header and reserve the space of its tensors, so that a full disk is noticed now."""
    path = directory / shard.file
    with name_file_in_errors(path), path.open("xb", buffering=0) as file:
        _reserve(file, shard.nbytes)
        _write(file, memoryview(shard.header))


def _reserve(file: BinaryIO, nbytes: int) -> None:
    try:
        allocate_space(file.fileno(), nbytes)
    except OSError as caught:
        if caught.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # the file system cannot reserve space
            raise
        file.truncate(nbytes)


def allocate_space(descriptor: int, nbytes: int) -> None:
    """Reserve the first bytes of a file by Linux' fallocate(2).

    Not by posix_fallocate: where the file system cannot reserve space, as on NFS, glibc's would write to every block.

    Raises:
        OSError: if the disk is full, or the system or the file system cannot reserve space.
    """
    library: Any = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if not hasattr(library, "fallocate64"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while library.fallocate64(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
        if (code := ctypes.get_errno()) != errno.EINTR:
            raise OSError(code, os.strerror(code))


def write_tensor(
    directory: Path,
    tensor: StoredTensor,
    value: torch.Tensor,
    on_written: Callable[[memoryview], object] = lambda piece: None,
) -> None:
    """Write a tensor to its location in a created shard.

    Args:
        value: tensor on the CPU or any other device; a GPU's is copied through pinned memory while it is written.
        on_written: function to call with each piece written, in order; the piece is valid during the call.
    """
    assert (tuple(value.shape), value.dtype) == (tensor.shape, FLOATS[tensor.dtype]), tensor.name
    path = directory / tensor.file
    with name_file_in_errors(path), path.open("r+b", buffering=0) as file:
        file.seek(tensor.begin)
        for part in _copy_to_host(value.detach().contiguous().reshape(-1).view(torch.uint8)):
            view = _view_bytes(part)
            for start in range(0, len(view), _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                _write(file, piece)
                on_written(piece)


def _copy_to_host(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a vector of bytes in parts in host memory, each valid until the next one is taken."""
    if flat.device.type != "cuda" or not len(flat):
        yield flat.cpu()
        return
    size = min(_BUFFER_BYTES, len(flat))
    buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]  # torch keeps them for reuse
    yield from copy_through_buffers(flat, buffers, torch.cuda)


def copy_through_buffers(flat: torch.Tensor, buffers: Sequence[torch.Tensor], backend: Any) -> Iterator[torch.Tensor]:
    """Yield a vector in parts, each copied into a buffer; the next part is on its way while the caller uses one.

    Args:
        flat: vector on a device.
        buffers: vectors of one length in pinned memory, used in turns. A part is valid until the next one is taken.
        backend: torch.cuda, or a module with the same streams.
    """
    stream = backend.Stream(flat.device)
    stream.wait_stream(backend.current_stream(flat.device))  # which may be computing the vector
    copies: deque[tuple[torch.Tensor, Any]] = deque()
    try:
        for number, part in enumerate(flat.split(len(buffers[0]))):
            buffer = buffers[number % len(buffers)][: len(part)]
            with backend.stream(stream):
                buffer.copy_(part, non_blocking=True)
            copies.append((buffer, stream.record_event()))
            if len(copies) == len(buffers):
                yield _wait_for_copy(copies.popleft())
        while copies:
            yield _wait_for_copy(copies.popleft())
    finally:
        stream.synchronize()  # the caller may have stopped early, and may free the vector


def _wait_for_copy(copy: tuple[torch.Tensor, Any]) -> torch.Tensor:
    buffer, event = copy
    event.synchronize()
    return buffer


def flush_shard(directory: Path, shard: Shard) -> None:
    with name_file_in_errors(directory / shard.file):
        flush_to_disk(directory / shard.file)


@contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a GrowthError that names the file and, for a full disk, the remedy."""
    try:
        yield
    except OSError as caught:
        is_full = caught.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "; free some space or choose another disk" if is_full else ""
        raise GrowthError(f"{path}: {caught.strerror or caught}{remedy}") from caught


def _view_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, which share its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _read(file: BinaryIO, length: int) -> bytearray:
    buffer = bytearray(length)
    _read_into(file, memoryview(buffer))
    return buffer


def _read_into(file: BinaryIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        if not (count := file.readinto(view[done:])):  # type: ignore[attr-defined]
            raise OSError(errno.EIO, f"ended {len(view) - done} bytes early: truncated while being read")
        done += count


def _write(file: BinaryIO, view: memoryview) -> None:
    while len(view):
        view = view[file.write(view) :]
