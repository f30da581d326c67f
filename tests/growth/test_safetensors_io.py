"""The reader and writer of safetensors files, compared with the safetensors library."""

import errno
import json
import os
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from slop_hf.errors import GrowthError
from slop_hf.growth import safetensors_io
from slop_hf.growth.safetensors_io import (
    allocate_space,
    are_equal_tensors,
    copy_through_buffers,
    create_shard,
    flush_shard,
    format_index,
    plan_shards,
    read_checkpoint_headers,
    read_header,
    read_tensor,
    write_tensor,
)

TENSORS = {
    "b.weight": torch.randn(5, 3),
    "a.weight": torch.randn(4, 7).bfloat16(),
    "ä": torch.randn(2, 2, 2).half(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
}
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def write(directory, tensors=TENSORS, max_shard_size="5GB"):
    directory.mkdir(exist_ok=True)
    shards = plan_shards({n: (NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()}, max_shard_size)
    for shard in shards:
        create_shard(directory, shard)
        for tensor in shard.tensors:
            write_tensor(directory, tensor, tensors[tensor.name])
        flush_shard(directory, shard)
    return shards


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def test_writes_what_the_library_writes(tmp_path):
    (shard,) = write(tmp_path)
    save_file(TENSORS, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert (tmp_path / "model.safetensors").stat().st_size == shard.nbytes


def test_pieces_are_reported_in_order(tmp_path):
    value = torch.arange(3 * 2**18, dtype=torch.float32)  # 3 MiB
    (shard,) = plan_shards({"a": ("F32", tuple(value.shape))}, "1GB")
    create_shard(tmp_path, shard)
    pieces = []
    write_tensor(tmp_path, shard.tensors[0], value, lambda piece: pieces.append(bytes(piece)))
    assert len(pieces) == 3
    assert shard.header + b"".join(pieces) == (tmp_path / shard.file).read_bytes()


class Backend:
    """Stands in for torch.cuda: notes what its streams and events are asked for."""

    def __init__(self):
        self.log = []

    def Stream(self, device):
        return self

    def current_stream(self, device):
        return "current"

    def wait_stream(self, stream):
        self.log.append(f"wait for {stream}")

    def stream(self, stream):
        self.log.append("copy")
        return nullcontext()

    def record_event(self):
        return self

    def synchronize(self):
        self.log.append("synchronize")


@pytest.mark.parametrize("length", [1, 4, 8, 9, 23])
def test_a_part_is_used_while_the_next_one_is_copied(length):
    """Buffers are filled in turns, and none while it is being used."""
    backend, flat = Backend(), torch.arange(length, dtype=torch.uint8)
    buffers = [torch.empty(4, dtype=torch.uint8) for _ in range(2)]
    parts = []
    for part in copy_through_buffers(flat, buffers, backend):
        parts.append(bytes(part.tolist()))
        backend.log.append("use")
    assert b"".join(parts) == bytes(range(length)) and len(parts) == -(-length // 4)
    turns = ["copy", "synchronize", "use"] * (len(parts) - 1) + ["synchronize", "use"]
    assert backend.log == ["wait for current", "copy", *turns, "synchronize"]


def test_copies_have_ended_when_the_caller_stops_early():
    backend = Backend()
    parts = copy_through_buffers(torch.zeros(12), [torch.empty(4), torch.empty(4)], backend)
    next(parts)
    parts.close()
    assert backend.log[-2:] == ["synchronize", "synchronize"]


def test_reads_what_the_library_writes(tmp_path):
    others = {"mask": torch.tensor([True]), "count": torch.arange(3), "byte": torch.zeros(3, dtype=torch.uint8)}
    save_file({**TENSORS, **others}, tmp_path / "file")
    header = read_header(tmp_path / "file")
    assert header.keys() == TENSORS.keys() | others.keys() and header["count"].dtype == "I64"
    assert all(torch.equal(read_tensor(header[name]), value) for name, value in TENSORS.items())


def test_shards_and_index(tmp_path):
    shards = write(tmp_path, max_shard_size=80)
    (tmp_path / "model.safetensors.index.json").write_text(format_index(shards))
    assert [shard.file for shard in shards] == [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    stored = read_checkpoint_headers(tmp_path)
    assert all(torch.equal(read_tensor(stored[name]), value) for name, value in TENSORS.items())
    assert load_file(tmp_path / shards[0].file).keys() == {"b.weight"}
    assert json.loads(format_index(shards))["metadata"] == {"total_parameters": 52, "total_size": 60 + 56 + 16 + 8}


@pytest.mark.parametrize("size", ["5 apples", "5", "-1GB", 0, -5, None, 2.5e9j])
def test_malformed_sizes(size):
    with pytest.raises(GrowthError, match="max_shard_size must be"):
        plan_shards({"a": ("F32", (2,))}, size)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "header would take 0 of its 0 bytes"),
        (b"1234567", "of its 7 bytes"),
        (file_of({"a": ENTRY}, bytes(7)), "has 76 bytes, but its header describes 77"),
        (file_of({"a": ENTRY}, bytes(9)), "but its header describes"),
        (file_of({"a": ENTRY}, bytes(8), length=2**62), "header would take"),
        (file_of(b"{not json", bytes(8)), "header is not valid"),
        (file_of(b"[1, 2]", bytes(8)), "header is not valid"),
        (file_of(b"\xff\xfe{}", bytes(8)), "header is not valid"),
        (file_of({"a": 5}, bytes(8)), "header is not valid"),
        (file_of({"a": {**ENTRY, "shape": [3]}}, bytes(8)), r"shape \[3\] has 8 bytes"),
        (file_of({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), r"a has shape \[-2\]"),
        (file_of({"a": {**ENTRY, "dtype": "F31"}}, bytes(8)), "the unknown dtype 'F31'"),
        (file_of({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(8)), "header is not valid"),
        (file_of({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), "a begins at byte"),
        (file_of({"a": ENTRY, "b": ENTRY}, bytes(8)), "b begins at byte"),
        (file_of(b'{"a":%s,"a":%s}' % ((json.dumps(ENTRY).encode(),) * 2), bytes(8)), "a name appears twice"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_files(tmp_path, content, fault):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(GrowthError, match=fault) as caught:
        read_header(tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)


def test_a_file_that_shrinks_while_being_read(tmp_path):
    write(tmp_path)
    header = read_header(tmp_path / "model.safetensors")
    last = max(header.values(), key=lambda tensor: tensor.begin)
    os.truncate(tmp_path / "model.safetensors", last.begin + last.nbytes - 4)
    with pytest.raises(GrowthError, match=r"model\.safetensors: ended \d+ bytes early"):
        read_tensor(last)


@pytest.mark.parametrize(
    ("index", "fault"),
    [
        ("{", "is not an index"),
        ("[]", "is not an index"),
        ('{"weight_map": {}}', "is not an index"),
        ('{"weight_map": {"a": 5}}', "is not an index"),
        ('{"weight_map": {"a": "../model-1.safetensors"}}', "outside of its directory"),
        ('{"weight_map": {"a": "model-9.safetensors"}}', "has no model-9.safetensors, a shard"),
        ('{"weight_map": {"no": "model-1.safetensors"}}', "model-1.safetensors has no no, unlike"),
    ],
)
def test_damaged_indexes(tmp_path, index, fault):
    save_file(TENSORS, tmp_path / "model-1.safetensors")
    with pytest.raises(GrowthError, match=r"has shards but no model\.safetensors\.index\.json"):
        read_checkpoint_headers(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(GrowthError, match=fault):
        read_checkpoint_headers(tmp_path)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(GrowthError, match="has no weights: expected"):
        read_checkpoint_headers(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(GrowthError, match="save it with save_pretrained"):
        read_checkpoint_headers(tmp_path)


def test_equal_tensors(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(3), "c": torch.zeros(3), "d": torch.ones(3, 1)}, tmp_path / "file")
    header = read_header(tmp_path / "file")
    assert [are_equal_tensors(header["a"], header[name]) for name in "bcd"] == [True, False, False]


def test_file_systems_that_cannot_reserve(tmp_path, monkeypatch):
    """Their files have the same bytes, and nothing is written before its time."""

    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    write(tmp_path / "reserved")
    monkeypatch.setattr(safetensors_io, "allocate_space", unsupported)
    write(tmp_path / "not")
    files = [tmp_path / name / "model.safetensors" for name in ("reserved", "not")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(load_file(files[0])["b.weight"], TENSORS["b.weight"])
    (shard,) = plan_shards({"large": ("F32", (2**20,))}, "1GB")
    create_shard(tmp_path, shard)
    assert (tmp_path / shard.file).stat().st_size > 2**22 > 512 * (tmp_path / shard.file).stat().st_blocks


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux'")
def test_space_is_reserved_by_the_system_call(tmp_path, monkeypatch):
    """glibc's posix_fallocate writes to every block where the file system cannot reserve space."""
    monkeypatch.setattr(os, "posix_fallocate", None)
    with (tmp_path / "file").open("wb") as file:
        allocate_space(file.fileno(), 2**22)
    assert (tmp_path / "file").stat().st_size == 2**22 <= 512 * (tmp_path / "file").stat().st_blocks
    with (tmp_path / "file").open("rb") as file, pytest.raises(OSError, match="Bad file descriptor"):
        allocate_space(file.fileno(), 2**22)


def test_no_file_is_overwritten(tmp_path):
    (shard,) = write(tmp_path)
    with pytest.raises(GrowthError, match="File exists"):
        create_shard(tmp_path, shard)
