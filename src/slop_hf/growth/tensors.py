"""Applying axis maps to tensors.

Random entries are drawn on the CPU in float32 from a generator seeded by (seed, parameter name), so that they depend
neither on the order of parameters nor on device or dtype.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product

import torch

from .axes import AxisMap
from .inits import Fill


def grow_tensor(
    tensor: torch.Tensor, maps: Sequence[AxisMap], fill: Fill, generator: torch.Generator | None = None
) -> torch.Tensor:
    """A new tensor with old entries where the maps put them, and new ones drawn from `fill`.

    Args:
        tensor: the old one, shape `[map.old_size for map in maps]`; it is not changed, nor is its storage shared.
        maps: one for each dimension.
        fill: distribution of the new entries.
        generator: CPU generator of the random ones; not needed where `fill.std` is 0.

    Returns:
        Tensor of shape `[map.new_size for map in maps]`, with the dtype and device of the old one.

    >>> grow_tensor(torch.ones(2), [AxisMap.append(2, 3)], Fill(5.0, 0.0))
    tensor([1., 1., 5.])
    """
    if all(axis.is_identity for axis in maps):
        return tensor.detach().clone()
    grown = torch.empty([axis.new_size for axis in maps], dtype=tensor.dtype, device=tensor.device)
    for segments in product(*(axis.segments for axis in maps)):
        new = tuple(slice(start, start + length) for start, _, length in segments)
        if all(old_start is not None for _, old_start, _ in segments):
            old = tuple(slice(start, start + length) for _, start, length in segments if start is not None)
            grown[new] = tensor.detach()[old]
        elif fill.std:
            noise = torch.randn([length for _, _, length in segments], generator=generator)
            grown[new] = noise.mul_(fill.std).add_(fill.mean).to(grown)
        else:
            grown[new] = fill.mean
    return grown


def generator_for(seed: int, name: str) -> torch.Generator:
    """The generator of one parameter's new entries.

    >>> a, b = generator_for(0, "lm_head.weight"), generator_for(0, "lm_head.weight")
    >>> bool((torch.randn(3, generator=a) == torch.randn(3, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
