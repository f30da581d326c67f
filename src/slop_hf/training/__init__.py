"""Training through a schedule."""

from .arguments import SlopTrainingArguments
from .config import RunConfig, build_trainer, preview_run
from .spans import StageSpan, stage_spans
from .trainer import SlopTrainer

__all__ = [
    "RunConfig",
    "SlopTrainer",
    "SlopTrainingArguments",
    "StageSpan",
    "build_trainer",
    "preview_run",
    "stage_spans",
]
