"""Scales, records that are written after each measurement, and the machine, for all parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from measuring import Record, describe_circumstances

from slop_hf.cost.device_peaks import look_up_peak_flops
from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_json


@dataclass(frozen=True)
class Settings:
    """Settings of a part.

    Args:
        rehearses: whether to run on the CPU at toy size, to see that it works.
        output: file of the record.
        workdir: directory for runs and checkpoints; choose the disk to measure.
        seconds: time limit of the part, after which it is killed.
        text: what "it grows" trains on, as `data.source` of a run; None for its experiment's own.
        cache: directory of tokenized text that was brought along; None for the default one.
    """

    rehearses: bool
    output: Path
    workdir: Path
    seconds: float
    text: str | None = None
    cache: str | None = None

    @property
    def scale(self) -> str:
        """Key of each part's sizes."""
        return "tiny" if self.rehearses else "full"

    @property
    def is_gpu(self) -> bool:
        return not self.rehearses


@dataclass
class PartRecord:
    """The record of a part, written again after each measurement, so that an interruption loses one measurement."""

    path: Path
    content: Record = field(default_factory=dict)

    @classmethod
    def begin(cls, settings: Settings, part: str) -> PartRecord:
        """Write the circumstances of a part."""
        command = f"python benchmarks/gpu/run.py {part}" + (" --rehearse" if settings.rehearses else "")
        circumstances = describe_circumstances(settings.scale, 1, command)
        circumstances["versions"] |= {
            "accelerate": version("accelerate"),
            "cuda": torch.version.cuda,
        }
        record = cls(settings.output, {**circumstances, "device": describe_device(settings), "goals": []})
        record.write()
        return record

    def add(self, goals: list[Record] | None = None, **measured: Any) -> None:
        """Add measurements and goals, and write the record."""
        self.content |= measured
        self.content["goals"] += goals or []
        self.write()

    def write(self) -> None:
        goals = self.content.pop("goals")
        self.content["goals"] = goals  # last, as in other records
        write_text(self.path, to_json(self.content))


def describe_device(settings: Settings) -> Record:
    """Return the device's name, memory and peak in bf16; a CPU has neither of the two."""
    if not settings.is_gpu:
        return {"name": "CPU", "memory_bytes": None, "peak_flops": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "peak_flops": look_up_peak_flops(properties.name, "bf16"),
    }


def wait_for_device(settings: Settings) -> None:
    if settings.is_gpu:
        torch.cuda.synchronize()
