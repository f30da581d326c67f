"""`EvalSettings`: which tasks to score, and how."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from ..errors import EvaluationError
from ..training.config import EvalOptions
from .held_out import HeldOut
from .tasks import PAPER, PERPLEXITY, list_task_names


@dataclass(frozen=True)
class EvalSettings(EvalOptions):
    """Which tasks to score, and how: the options of a run's section `evaluation`, the held-out text and the cache.

    Args:
        tasks: `"paper"`, `"perplexity"`, or any tasks and groups of lm-eval; several as a comma-separated string or a
            sequence.
        limit: largest number of documents per task, or of blocks per source; the first ones are scored. None for all.
        num_fewshot: solved examples before each question; None for each task's own number. Tasks that lm-eval defines
            as zero-shot stay zero-shot.
        batch_size: documents per batch; `"auto"` for as many as the device has memory for.
        device: device to load a model to, such as `"cuda"`; None for a GPU if there is one.
        include_path: directory with tasks of your own, in lm-eval's YAML.
        datasets: directory with data of tasks as `TASK/SPLIT.jsonl`, used instead of the Hub's.
        cache_dir: directory of the cache of results; None for `slop_hf/evaluations` in the Hugging Face home.
        held_out: text that `perplexity` is measured on.

    Raises:
        EvaluationError: if a value is out of its range, or `perplexity` is asked for without `held_out`.
    """

    tasks: str | tuple[str, ...] = PAPER
    cache_dir: str | Path | None = None
    held_out: HeldOut | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", list_task_names(self.tasks))
        super().__post_init__()
        if PERPLEXITY in self.tasks and self.held_out is None:
            raise EvaluationError(
                f"{PERPLEXITY} needs text to be measured on: give held-out data (on the command line, "
                "`--data` with a run's or a mixture's file, or `--text` with text files)"
            )

    @classmethod
    def from_options(cls, options: EvalOptions, held_out: HeldOut | None) -> EvalSettings:
        """Return the settings with the options of a run's section `evaluation`."""
        shared = {option.name: getattr(options, option.name) for option in fields(EvalOptions)}
        return cls(**shared, held_out=held_out)

    @property
    def lm_eval_tasks(self) -> tuple[str, ...]:
        """The tasks that lm-eval scores."""
        return tuple(name for name in self.tasks if name != PERPLEXITY)
