"""Training through a schedule."""

from .arguments import SlopTrainingArguments
from .trainer import SlopTrainer

__all__ = ["SlopTrainer", "SlopTrainingArguments"]
