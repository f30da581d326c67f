"""SLOP: grow a small pre-trained language model into a large one, one dimension a stage.

Names are loaded on first use, so that planning needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines import from_scratch as from_scratch
    from .data import DataConfig as DataConfig
    from .data import Mixture as Mixture
    from .data import Source as Source
    from .data import prepare_data as prepare_data
    from .dims import ModelDims as ModelDims
    from .errors import SlopError as SlopError
    from .evaluation.runs import EvaluateStages as EvaluateStages
    from .evaluation.runs import evaluate_run as evaluate_run
    from .evaluation.scoring import evaluate_model as evaluate_model
    from .evaluation.settings import EvalSettings as EvalSettings
    from .experiments.comparing import compare_arms as compare_arms
    from .experiments.config import Experiment as Experiment
    from .experiments.probe import Probe as Probe
    from .experiments.record import Comparison as Comparison
    from .explanation import explain as explain
    from .growth import GrowthReceipt as GrowthReceipt
    from .growth import checkpoint_directory as checkpoint_directory
    from .growth import grow_adamw_state as grow_adamw_state
    from .growth import grow_checkpoint as grow_checkpoint
    from .growth import grow_model as grow_model
    from .growth import grow_optimizer_file as grow_optimizer_file
    from .growth import grow_optimizer_state_dict as grow_optimizer_state_dict
    from .growth import plan_checkpoint_growth as plan_checkpoint_growth
    from .hours import CostModel as CostModel
    from .hub.callback import PublishCallback as PublishCallback
    from .hub.publish import publish_run as publish_run
    from .hub.publish import publish_stage as publish_stage
    from .hub.reading import continued as continued
    from .hub.reading import fetch_stage as fetch_stage
    from .hub.revision import plan_revision as plan_revision
    from .memory import MemoryLimit as MemoryLimit
    from .planner import SlopPlanner as SlopPlanner
    from .records import RunDirectory as RunDirectory
    from .records import StageRecord as StageRecord
    from .report import comparison_table as comparison_table
    from .report import summarise as summarise
    from .report import write_report as write_report
    from .scaling import ScalingLaw as ScalingLaw
    from .schedule import GrowthSchedule as GrowthSchedule
    from .schedule import GrowthStage as GrowthStage
    from .space import ConfigSpace as ConfigSpace
    from .training import RunConfig as RunConfig
    from .training import SlopTrainer as SlopTrainer
    from .training import SlopTrainingArguments as SlopTrainingArguments
    from .training import build_trainer as build_trainer
    from .training import calibrate as calibrate
    from .training import preview_run as preview_run

_HOMES = {
    "Comparison": "experiments.record",
    "ConfigSpace": "space",
    "CostModel": "hours",
    "DataConfig": "data",
    "EvalSettings": "evaluation.settings",
    "EvaluateStages": "evaluation.runs",
    "Experiment": "experiments.config",
    "GrowthReceipt": "growth",
    "GrowthSchedule": "schedule",
    "GrowthStage": "schedule",
    "MemoryLimit": "memory",
    "Mixture": "data",
    "ModelDims": "dims",
    "Probe": "experiments.probe",
    "PublishCallback": "hub.callback",
    "RunConfig": "training",
    "RunDirectory": "records",
    "ScalingLaw": "scaling",
    "SlopError": "errors",
    "SlopPlanner": "planner",
    "SlopTrainer": "training",
    "SlopTrainingArguments": "training",
    "Source": "data",
    "StageRecord": "records",
    "build_trainer": "training",
    "calibrate": "training",
    "checkpoint_directory": "growth",
    "compare_arms": "experiments.comparing",
    "comparison_table": "report",
    "continued": "hub.reading",
    "evaluate_model": "evaluation.scoring",
    "evaluate_run": "evaluation.runs",
    "explain": "explanation",
    "fetch_stage": "hub.reading",
    "from_scratch": "baselines",
    "grow_adamw_state": "growth",
    "grow_checkpoint": "growth",
    "grow_model": "growth",
    "grow_optimizer_file": "growth",
    "grow_optimizer_state_dict": "growth",
    "plan_checkpoint_growth": "growth",
    "plan_revision": "hub.revision",
    "prepare_data": "data",
    "preview_run": "training",
    "publish_run": "hub.publish",
    "publish_stage": "hub.publish",
    "summarise": "report",
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
