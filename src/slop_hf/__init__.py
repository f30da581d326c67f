"""SLOP: grow a small pre-trained language model into a large one, one dimension a stage.

Names are loaded on first use, so that planning needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines import from_scratch as from_scratch
    from .data import DataConfig as DataConfig
    from .data import prepare_data as prepare_data
    from .dims import ModelDims as ModelDims
    from .errors import SlopError as SlopError
    from .growth import grow_adamw_state as grow_adamw_state
    from .growth import grow_model as grow_model
    from .planner import SlopPlanner as SlopPlanner
    from .records import RunDirectory as RunDirectory
    from .records import StageRecord as StageRecord
    from .report import write_report as write_report
    from .schedule import GrowthSchedule as GrowthSchedule
    from .schedule import GrowthStage as GrowthStage
    from .space import ConfigSpace as ConfigSpace
    from .training import SlopTrainer as SlopTrainer
    from .training import SlopTrainingArguments as SlopTrainingArguments

_HOMES = {
    "ConfigSpace": "space",
    "DataConfig": "data",
    "GrowthSchedule": "schedule",
    "GrowthStage": "schedule",
    "ModelDims": "dims",
    "RunDirectory": "records",
    "SlopError": "errors",
    "SlopPlanner": "planner",
    "SlopTrainer": "training",
    "SlopTrainingArguments": "training",
    "StageRecord": "records",
    "from_scratch": "baselines",
    "grow_adamw_state": "growth",
    "grow_model": "growth",
    "prepare_data": "data",
    "write_report": "report",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'slop_hf' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
