"""Stacks of experts: one parameter in memory, one tensor per matrix of an expert in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ..architectures import Architecture
from ..dims import ModelConfig
from ..errors import GrowthError
from .safetensors_io import FLOATS, StoredTensor, read_tensor


@dataclass(frozen=True)
class StoredStack:
    """A stack in a checkpoint.

    Args:
        name: name of the parameter in the state dict.
        pieces: stored tensors, in the order of `Parameter.list_stored_names`.
        parts: number of tensors per expert.
    """

    name: str
    pieces: tuple[StoredTensor, ...]
    parts: int

    @property
    def dtype(self) -> str:
        return self.pieces[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        written, *read = self.pieces[0].shape
        return (len(self.pieces) // self.parts, written * self.parts, *read)


def select_piece(stack: torch.Tensor, number: int, parts: int) -> torch.Tensor:
    """Return a view of a stack's tensor that a checkpoint holds on its own.

    Args:
        stack: tensor, shape (experts, written, read).
        number: index of the tensor in `Parameter.list_stored_names`.
        parts: number of tensors per expert.

    >>> select_piece(torch.arange(8).view(2, 4, 1), 3, 2).flatten()
    tensor([6, 7])
    """
    expert, part = divmod(number, parts)
    return stack[expert].chunk(parts)[part]


def split_stacks(stored: Mapping[str, StoredTensor], architecture: Architecture) -> dict[str, StoredTensor]:
    """Return the tensors of a checkpoint, with each stack that it holds whole as the tensors of its experts.

    transformers writes stacks whole if it is asked to keep its own names (`save_original_format=False`).
    """
    if not architecture.has_experts:
        return dict(stored)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        row = architecture.find_row(name)
        if row is None or not row.is_stacked or len(tensor.shape) != len(row.axes):
            tensors[name] = tensor
            continue
        experts, written, *read = tensor.shape
        names = row.list_stored_names(name, experts)
        shape, nbytes = (written // len(row.stored_parts), *read), tensor.nbytes // max(1, len(names))
        for number, piece in enumerate(names):
            begin = tensor.begin + number * nbytes
            tensors[piece] = replace(tensor, name=piece, shape=shape, begin=begin, nbytes=nbytes)
    return tensors


def find_parameters(
    stored: Mapping[str, StoredTensor], architecture: Architecture, config: ModelConfig
) -> dict[str, StoredTensor | StoredStack]:
    """Return the tensors of a checkpoint by the name of the parameter; those of experts as stacks, if none is missing.

    Raises:
        GrowthError: if the tensors of a stack differ in dtype or shape.
    """
    tensors, stacks = split_stacks(stored, architecture), {}
    experts = architecture.read(config, "num_experts") if architecture.has_experts else 0
    rows = [row for row in architecture.rows(config) if row.is_stacked]
    for layer in range(architecture.read(config, "num_hidden_layers") if rows else 0):
        for row in rows:
            name = row.name_in_layer(layer)
            names = row.list_stored_names(name, experts)
            if not all(piece in tensors for piece in names):
                continue
            stack = StoredStack(name, tuple(tensors.pop(piece) for piece in names), len(row.stored_parts))
            if odd := [t.name for t in stack.pieces if (t.dtype, t.shape) != (stack.dtype, stack.pieces[0].shape)]:
                raise GrowthError(
                    f"{odd[0]} has another dtype or shape than {stack.pieces[0].name}; save the model again"
                )
            stacks[name] = stack
    return {**{architecture.canonical_name(name): tensor for name, tensor in tensors.items()}, **stacks}


def read_parameter(stored: StoredTensor | StoredStack, out: torch.Tensor | None = None) -> torch.Tensor:
    """Read a tensor or a stack into `out`, or else into a new tensor, and return it."""
    if isinstance(stored, StoredTensor):
        return read_tensor(stored, out)
    value = torch.empty(stored.shape, dtype=FLOATS[stored.dtype]) if out is None else out
    for number, piece in enumerate(stored.pieces):
        read_tensor(piece, select_piece(value, number, stored.parts))
    return value
