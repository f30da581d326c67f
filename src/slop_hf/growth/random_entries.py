"""Normal random numbers for new entries: one stream per seed and parameter name.

The numbers of a parameter are drawn on the CPU from a bit stream that belongs to it, so they do not depend on the
order of parameters, on threads, on the device or on the dtype. Drawing is most of the arithmetic of growth. It takes
less than half the time of `torch.randn`: sixteen random bits select one of 65,536 equally likely values, the quantiles
of the normal distribution. bfloat16 has about as many numbers; the largest value is 4.3 standard deviations. The bits
come from SFC64, whose stream NumPy promises to keep from release to release.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

#: Entries drawn at once. Changing it changes the random entries of every growth.
ENTRIES_PER_CHUNK = 2**17


class NormalStream:
    """The random numbers of one parameter, from the seed of the growth and the parameter's name.

    >>> draw = lambda seed: NormalStream(seed, "lm_head.weight").draw([3, 5], 0.0, 1.0)
    >>> torch.equal(draw(0), draw(0)), torch.equal(draw(0), draw(1))
    (True, False)
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        self._bits = np.random.SFC64(int.from_bytes(digest, "little"))

    def draw(self, shape: Sequence[int], mean: float, std: float) -> torch.Tensor:
        """Return a float32 CPU tensor drawn from N(mean, std^2)."""
        return self._take(shape, _compute_quantiles(mean, std))

    def fill(self, block: torch.Tensor, mean: float, std: float) -> None:
        """Fill a block of any strides, dtype and device; the numbers depend on its shape alone."""
        quantiles = _compute_quantiles(mean, std)
        for part in split_into_chunks(block):
            part.copy_(self._take(part.shape, quantiles))

    def _take(self, shape: Sequence[int], quantiles: npt.NDArray[np.float32]) -> torch.Tensor:
        count = math.prod(shape)
        indices = self._bits.random_raw(-(-count // 4)).view(np.uint16)[:count]
        return torch.from_numpy(quantiles.take(indices, mode="clip")).view(*shape)


@functools.lru_cache(maxsize=32)
def _compute_quantiles(mean: float, std: float) -> npt.NDArray[np.float32]:
    """Return 2^16 equally likely values of N(mean, std^2); their variance is exact."""
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    standard = torch.special.ndtri(middles)
    standard /= standard.square().mean().sqrt()  # the tails beyond the last quantiles are missing: a little variance
    return (standard * std + mean).float().numpy()


def split_into_chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield views of a few rows each, small enough to stay in the processor's cache."""
    rows = max(1, ENTRIES_PER_CHUNK * len(tensor) // max(tensor.numel(), 1))
    for start in range(0, len(tensor), rows):
        yield tensor[start : start + rows]
