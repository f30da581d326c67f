"""SLOP: grow a small pre-trained language model into a large one, one dimension a stage.

Names are loaded on first use, so that planning needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines import from_scratch as from_scratch
    from .cost.hours import CostModel as CostModel
    from .cost.memory import MemoryLimit as MemoryLimit
    from .cost.scaling_law import ScalingLaw as ScalingLaw
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
    from .experiments.config import Experiment as Experiment
    from .experiments.comparison import Comparison as Comparison
    from .experiments.write import compare_arms as compare_arms
    from .growth import GrowthReceipt as GrowthReceipt
    from .growth import find_checkpoint_directory as find_checkpoint_directory
    from .growth import grow_adamw_state as grow_adamw_state
    from .growth import grow_checkpoint as grow_checkpoint
    from .growth import grow_model as grow_model
    from .growth import grow_optimizer_file as grow_optimizer_file
    from .growth import grow_optimizer_state_dict as grow_optimizer_state_dict
    from .growth import plan_checkpoint_growth as plan_checkpoint_growth
    from .hub.callback import PublishCallback as PublishCallback
    from .hub.publish import publish_run as publish_run
    from .hub.publish import publish_stage as publish_stage
    from .hub.fetch import continue_from as continue_from
    from .hub.fetch import fetch_stage as fetch_stage
    from .hub.revision import plan_revision as plan_revision
    from .pipeline import train_run as train_run
    from .planning.explain import explain as explain
    from .planning.planner import SlopPlanner as SlopPlanner
    from .planning.space import ConfigSpace as ConfigSpace
    from .probing.probe import Probe as Probe
    from .report import comparison_table as comparison_table
    from .report import summarise as summarise
    from .report import write_report as write_report
    from .runs.directory import RunDirectory as RunDirectory
    from .runs.records import StageRecord as StageRecord
    from .schedule import GrowthSchedule as GrowthSchedule
    from .schedule import GrowthStage as GrowthStage
    from .training import RunConfig as RunConfig
    from .training import SlopTrainer as SlopTrainer
    from .training import SlopTrainingArguments as SlopTrainingArguments
    from .training import build_trainer as build_trainer
    from .training import calibrate as calibrate
    from .training import preview_run as preview_run

_HOMES = {
    "Comparison": "experiments.comparison",
    "ConfigSpace": "planning.space",
    "CostModel": "cost.hours",
    "DataConfig": "data",
    "EvalSettings": "evaluation.settings",
    "EvaluateStages": "evaluation.runs",
    "Experiment": "experiments.config",
    "GrowthReceipt": "growth",
    "GrowthSchedule": "schedule",
    "GrowthStage": "schedule",
    "MemoryLimit": "cost.memory",
    "Mixture": "data",
    "ModelDims": "dims",
    "Probe": "probing.probe",
    "PublishCallback": "hub.callback",
    "RunConfig": "training",
    "RunDirectory": "runs.directory",
    "ScalingLaw": "cost.scaling_law",
    "SlopError": "errors",
    "SlopPlanner": "planning.planner",
    "SlopTrainer": "training",
    "SlopTrainingArguments": "training",
    "Source": "data",
    "StageRecord": "runs.records",
    "build_trainer": "training",
    "calibrate": "training",
    "checkpoint_directory": "growth",
    "compare_arms": "experiments.write",
    "comparison_table": "report",
    "continued": "hub.fetch",
    "evaluate_model": "evaluation.scoring",
    "evaluate_run": "evaluation.runs",
    "explain": "planning.explain",
    "fetch_stage": "hub.fetch",
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
    "train_run": "pipeline",
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
