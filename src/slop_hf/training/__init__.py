"""Training through a schedule."""

from .arguments import SlopTrainingArguments
from .calibration import StepTimes, calibrate
from .config import RunConfig, build_trainer, preview_run
from .spans import StageSpan, stage_spans
from .trainer import SlopTrainer

__all__ = [
    "RunConfig",
    "SlopTrainer",
    "SlopTrainingArguments",
    "StageSpan",
    "StepTimes",
    "build_trainer",
    "calibrate",
    "preview_run",
    "stage_spans",
]
