"""`EvalSettings`: what to score, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import EvaluationError
from .held_out import HeldOut
from .tasks import PAPER, PERPLEXITY, task_names


@dataclass(frozen=True)
class EvalSettings:
    """What to score, and how.

    Args:
        tasks: `"paper"`, `"perplexity"`, or any tasks and groups of lm-eval; several with commas or as a sequence.
        limit: score the first so many documents of each task, or blocks of each source; None, all.
        batch_size: `"auto"`, the largest that the device has memory for, or a number.
        num_fewshot: solved examples before each question; None, each task's own. Tasks that lm-eval lays down as
            zero-shot stay so.
        device: such as `"cuda"`; None, a GPU if there is one.
        cache_dir: where results are kept; None, `slop_hf/evaluations` in the Hugging Face home.
        held_out: what `perplexity` is measured on.
        include_path: a directory with tasks of your own, as YAML of lm-eval.
        datasets: a directory with the data of tasks, `TASK/SPLIT.jsonl`, used in place of the Hub's.

    Raises:
        EvaluationError: for a value out of its range, and for `perplexity` without `held_out`.
    """

    tasks: str | tuple[str, ...] = PAPER
    limit: int | None = None
    batch_size: int | str = "auto"
    num_fewshot: int | None = None
    device: str | None = None
    cache_dir: str | Path | None = None
    held_out: HeldOut | None = None
    include_path: str | Path | None = None
    datasets: str | Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", task_names(self.tasks))
        _check_count("limit", self.limit, 1)
        _check_count("num_fewshot", self.num_fewshot, 0)
        if self.batch_size != "auto":
            _check_count("batch_size", self.batch_size, 1, "'auto', or ")
        for name, value in self.directories.items():
            if not value.is_dir():
                raise EvaluationError(f"{name} {value}: no such directory")
        if PERPLEXITY in self.tasks and self.held_out is None:
            raise EvaluationError(
                f"{PERPLEXITY} needs text to be measured on: give held-out data (on the command line, "
                "`--data` with a run's or a mixture's file, or `--text` with text files)"
            )

    @property
    def directories(self) -> Mapping[str, Path]:
        """`include_path` and `datasets`, those that are given."""
        given = {"include_path": self.include_path, "datasets": self.datasets}
        return {name: Path(value).expanduser().absolute() for name, value in given.items() if value is not None}

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """Those that lm-eval scores."""
        return tuple(name for name in self.tasks if name != PERPLEXITY)


def _check_count(name: str, value: object, least: int, or_else: str = "") -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise EvaluationError(f"{name} must be {or_else}a whole number of at least {least}, got {value!r}")
