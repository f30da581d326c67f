"""Normal random numbers for new entries.

They are drawn on the CPU, from a stream of bits that belongs to one parameter, so that they depend neither on the
order of parameters nor on threads, device or dtype. Drawing is most of the arithmetic of growth, and takes less than
half of the time of `torch.randn`: sixteen random bits choose one of 65,536 equally likely values, the quantiles of the
normal distribution. That is about as many as there are bfloat16 numbers; the largest is 4.3 standard deviations. The
bits are SFC64's, whose stream NumPy promises to keep from release to release.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

#: Entries drawn at a time. Changing it changes the random entries of every growth.
ENTRIES_PER_CHUNK = 2**17


class NormalStream:
    """The random numbers of one parameter.

    Args:
        seed: of the growth.
        name: of the parameter.

    >>> a, b, c = NormalStream(0, "lm_head.weight"), NormalDraws(0, "lm_head.weight"), NormalDraws(1, "lm_head.weight")
    >>> drawn = a.draw([3, 5], 0.0, 1.0)
    >>> torch.equal(drawn, b.draw([3, 5], 0.0, 1.0)), torch.equal(drawn, c.draw([3, 5], 0.0, 1.0))
    (True, False)
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        self._bits = np.random.SFC64(int.from_bytes(digest, "little"))

    def draw(self, shape: Sequence[int], mean: float, std: float) -> torch.Tensor:
        """A float32 tensor on the CPU from N(mean, std)."""
        return self._take(shape, _quantiles(mean, std))

    def fill(self, block: torch.Tensor, mean: float, std: float) -> None:
        """Fill a block of any strides, dtype and device; what is drawn depends on its shape alone."""
        quantiles = _quantiles(mean, std)
        for part in split_into_chunks(block):
            part.copy_(self._take(part.shape, quantiles))

    def _take(self, shape: Sequence[int], quantiles: np.ndarray) -> torch.Tensor:
        count = math.prod(shape)
        indices = self._bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
        return torch.from_numpy(quantiles.take(indices, mode="clip")).view(*shape)


@functools.lru_cache(maxsize=32)
def _quantiles(mean: float, std: float) -> np.ndarray:
    """2^16 equally likely values of N(mean, std), float32; their variance is exact."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    standard = torch.special.ndtri(middles)
    standard /= standard.square().mean().sqrt()  # beyond the last quantiles there would be a little more
    return (standard * std + mean).float().numpy()


def split_into_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a few rows each, small enough to stay in the processor's cache."""
    rows = max(1, ENTRIES_PER_CHUNK * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]
