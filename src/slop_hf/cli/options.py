"""Options that several commands have, and parsing of options' values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..cost.memory import MemoryLimit
from ..errors import RunError
from ..io.serialization import Json, parse_yaml

_HARDWARE = "Hardware"


def make_option(panel: str, *names: str, **settings: Any) -> Any:
    """Return a typer option that `--help` lists in a panel of its command."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value of the YAML file: training.learning_rate=1e-3")
]
Devices = Annotated[str, typer.Option(help="CUDA devices to spread the runs over, such as 0,1,2,3.")]
Run = Annotated[Path, typer.Argument(help="Run directory.")]
Workers = Annotated[int, typer.Option(min=1, help="Parallel runs on CPUs; each gets its share of the cores.")]

# Memory of a device, in the panel "Hardware" of `slop plan`, `slop advise` and `slop upscale`.
DeviceMemory = Annotated[
    float | None,
    make_option(_HARDWARE, help="Bytes per device, e.g. 80e9; models that need more are left out or refused."),
]
MemoryDevices = Annotated[int, make_option(_HARDWARE, help="Number of devices that share the training state.")]
ZeroStage = Annotated[int, make_option(_HARDWARE, help="ZeRO stage, 0 to 3.")]
MicroBatchSize = Annotated[int, make_option(_HARDWARE, help="Sequences per device in a forward pass.")]
Checkpointing = Annotated[
    bool, make_option(_HARDWARE, "--checkpointing", help="Recompute activations (gradient checkpointing).")
]
PrecisionName = Annotated[str, make_option(_HARDWARE, help="'bf16' or 'fp32'.")]


def build_memory_limit(
    device_memory: float | None, zero: int, devices: int, micro_batch_size: int, checkpointing: bool, precision: str
) -> MemoryLimit:
    """Return the limit that these options describe; without `device_memory`, every model fits.

    Raises:
        PlanError: for a value out of range.
    """
    room = 1e18 if device_memory is None else device_memory
    return MemoryLimit(room, zero, devices, micro_batch_size, checkpointing, precision)  # type: ignore[arg-type]


def split_list(text: str) -> tuple[str, ...]:
    """Split the value of an option at its commas.

    >>> split_list("layer, ffn")
    ('layer', 'ffn')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_seeds(text: str) -> tuple[int, ...]:
    """Read the value of `--seeds`.

    >>> read_seeds("0,1")
    (0, 1)
    """
    seeds = split_list(text)
    if not seeds or len(set(seeds)) < len(seeds) or not all(seed.isdecimal() for seed in seeds):
        raise RunError(f"--seeds must be different whole numbers, 0 or more, such as 0,1,2, got {text!r}")
    return tuple(map(int, seeds))


def read_changes(changes: Sequence[str] | None) -> dict[str, Json]:
    """Read the values of `--set key=value` as overrides for `RunConfig.from_yaml`; values are YAML.

    >>> read_changes(["training.learning_rate=1e-3", "data.source=[a.txt, b.txt]"])
    {'training.learning_rate': 0.001, 'data.source': ['a.txt', 'b.txt']}
    """
    pairs = [change.partition("=") for change in changes or ()]
    for key, equals, _ in pairs:
        if not equals or not key.strip("."):
            raise RunError(f"--set {key}{equals}: expected key=value, such as training.learning_rate=1e-3")
    return {key: parse_yaml(value, where=f"--set {key}", error=RunError) for key, _, value in pairs}
