"""`EvalSettings`: which tasks to score, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..errors import EvaluationError
from ..training.config import EvalOptions
from .cache import ResultCache
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
        EvaluationError: if a value is out of its range, this machine has no such device, a directory is missing or
            cannot be written, or `perplexity` is asked for without `held_out`.
    """

    tasks: str | tuple[str, ...] = PAPER
    cache_dir: str | Path | None = None
    held_out: HeldOut | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", list_task_names(self.tasks))
        for name in ("include_path", "datasets", "cache_dir"):
            if not isinstance(value := getattr(self, name), (str, os.PathLike, type(None))):
                raise EvaluationError(f"{name} must be the path of a directory, got {value!r}")
        super().__post_init__()
        if self.device is not None:
            check_device(self.device)
        ResultCache(self.cache_dir)  # refuses a directory that cannot be written
        if not isinstance(self.held_out, (HeldOut, type(None))):
            raise EvaluationError(
                f"held_out must be a HeldOut, got {type(self.held_out).__name__}: make one with HeldOut.from_texts or "
                "HeldOut.from_corpus"
            )
        if PERPLEXITY in self.tasks and self.held_out is None:
            raise EvaluationError(
                f"{PERPLEXITY} is measured on held-out text, got none: give it (on the command line, "
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


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    >>> check_device("gpu")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    slop_hf.errors.EvaluationError: device 'gpu': this machine has no such device; choose one of cpu...
    """
    try:
        parsed = torch.device(device) if isinstance(device, str) else None
        if parsed is None or parsed.type == "meta":
            exists = False
        elif parsed.type == "cuda":  # an index only: making a tensor would take memory of the device
            exists = (parsed.index or 0) < torch.cuda.device_count()
        else:
            exists = torch.empty(0, device=parsed).numel() == 0
    except Exception:  # each backend has its own errors
        exists = False
    if not exists:
        names = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        names += ["mps"] * torch.backends.mps.is_available()
        raise EvaluationError(f"device {device!r}: this machine has no such device; choose one of {', '.join(names)}")
