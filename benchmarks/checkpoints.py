"""Checkpoints of random weights to grow, and the disk work that growth is compared with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims
from slop_hf.io.units import format_bytes

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2**30
BLOCK = 2**20 + 1
VOCAB = {"full": 32000, "tiny": 256}


def llama_config(dims: ModelDims, vocab_size: int, dtype: torch.dtype) -> LlamaConfig:
    """Return the config of a Llama with untied embeddings."""
    base = LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=False, max_position_embeddings=2048, dtype=dtype)
    base.architectures = ["LlamaForCausalLM"]
    return dims.to_config(base)


def write_checkpoint(directory: Path, config: LlamaConfig) -> None:
    """Write a checkpoint of random weights with at most one shard in memory.

    Every weight repeats one block of random numbers, from a different offset: drawing billions would take minutes.
    """
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).named_parameters()}
    width = config.dtype.itemsize
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        if groups[-1] and size + shape.numel() * width > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += shape.numel() * width

    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(config.dtype)
    offsets = {name: 12289 * number % BLOCK for number, name in enumerate(shapes)}

    def draw(name: str) -> torch.Tensor:
        count = shapes[name].numel()
        rolled = block.roll(offsets[name])
        return rolled.repeat(-(-count // BLOCK))[:count].view(shapes[name])

    weight_map = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            save_file(dict(zip(group, pool.map(draw, group), strict=True)), directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    total = {"total_size": sum(shape.numel() for shape in shapes.values()) * width}
    (directory / INDEX).write_text(json.dumps({"metadata": total, "weight_map": weight_map}), encoding="utf-8")


def read_and_write(source: Path, target: Path, target_bytes: int) -> None:
    """Read every shard once and write `target_bytes` of it, with safetensors alone: the limit of the disk."""
    target.mkdir()
    shards = sorted(source.glob("*.safetensors"))
    written = files = 0
    for number, shard in enumerate(shards, 1):
        tensors = load_file(shard)
        due = target_bytes * number // len(shards)
        while written < due:
            part = {}
            for name, tensor in tensors.items():
                room = (due - written) // tensor.element_size()
                if not room:
                    break
                part[name] = tensor if tensor.numel() <= room else tensor.flatten()[:room]
                written += part[name].nbytes
            if not part:  # less than one entry is left to write
                break
            save_file(part, target / f"{files}.safetensors")
            files += 1


def iterate_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of a checkpoint with its name."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                yield name, opened.get_tensor(name)


def find_differences(one: Path, other: Path) -> list[str]:
    """Return the names of weights that only one checkpoint has, or whose dtype, shape or values differ."""
    files = {name: file for file in other.glob("*.safetensors") for name in _names(file)}
    names = []
    for name, tensor in iterate_weights(one):
        if name not in files:
            names.append(name)
            continue
        with safe_open(files.pop(name), framework="pt") as opened:
            twin = opened.get_tensor(name)
        if tensor.dtype != twin.dtype or not torch.equal(tensor, twin):
            names.append(name)
    return sorted([*names, *files])


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def require_space(directory: Path, needed: int) -> None:
    """Check that the checkpoints fit on the disk.

    Raises:
        SystemExit: if they do not fit; the message says what to do.
    """
    free = shutil.disk_usage(directory).free
    if free < needed * 1.1:
        raise SystemExit(
            f"the checkpoints need {format_bytes(needed)}, the disk has {format_bytes(free)} free: "
            "name a directory on a larger disk with --workdir"
        )
