"""The hash of a checkpoint's weights, read a tensor at a time."""

from __future__ import annotations

from pathlib import Path

from ..growth import weights_hash
from ..growth.safetensors_io import read_checkpoint, read_tensor


def hash_of_weights(directory: Path) -> str:
    """The hash of the weights in a directory (`growth.weights_hash`), in one file or several.

    Raises:
        GrowthError: where there are none, or files that are corrupt.
    """
    stored = read_checkpoint(directory)
    return weights_hash((name, read_tensor(tensor)) for name, tensor in stored.items())
