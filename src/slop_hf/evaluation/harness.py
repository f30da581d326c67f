"""lm-eval: its tasks, and a model's scores on them. The only file that imports it."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from ..runs.records import EvalRecord
from ..training.random_state import random_state, set_random_state
from .settings import EvalSettings
from .tasks import PAPER, PERPLEXITY

# Of the standard errors that have no closed form, such as a perplexity's.
BOOTSTRAPS = 1000
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")


def harness_version() -> str:
    """Of lm-eval.

    Raises:
        EvaluationError: where it is not installed.
    """
    _require()
    return version("lm-eval")


@contextmanager
def task_manager(settings: EvalSettings) -> Iterator[Any]:
    """lm-eval's `TaskManager` with the tasks of `include_path`, and with tasks moved to the data in `datasets`.

    Raises:
        EvaluationError: where lm-eval is not installed, a task is unknown, or `datasets` holds data of an unknown one.
    """
    _require()
    from lm_eval.tasks import TaskManager

    given = settings.directories
    with tempfile.TemporaryDirectory(prefix="slop-hf-tasks-") as folder:
        paths = [path for name, path in given.items() if name == "include_path"]
        own = TaskManager(include_path=[str(path) for path in paths], include_defaults=False)
        known = {**_stock_tasks(), **own.task_index}
        if "datasets" in given:
            _move_tasks(given["datasets"], known, Path(folder))
            paths.append(Path(folder))
            own = TaskManager(include_path=[str(path) for path in paths], include_defaults=False)
        for name, entry in _stock_tasks().items():
            own.task_index.setdefault(name, entry)
        _check_known(settings.harness_tasks, own.task_index)
        yield own


def language_model(
    model: PreTrainedModel | Path,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    device: str,
    processes: int = 1,
) -> Any:
    """lm-eval's view of a model.

    Args:
        model: on its device; or a directory, of which each process of `accelerate launch` then loads a copy, and all
            of them share the documents.
        tokenizer: of the model.
        batch_size: a number or "auto".
        device: of a model that has to be loaded.
        processes: of the launch.

    Raises:
        EvaluationError: for a launch that lm-eval would not share the documents out in.
    """
    from lm_eval.models.huggingface import HFLM

    pretrained = str(model) if isinstance(model, Path) else model
    with _undisturbed():
        lm = HFLM(pretrained=pretrained, tokenizer=tokenizer, batch_size=batch_size, device=device)
    # It counts processes by their number on their own machine, and lets each score everything where there is one GPU.
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes > 1 and not lm.world_size == processes == on_machine:
        raise EvaluationError(
            "lm-eval shares documents out over several GPUs of one machine only: start a process for each of them, "
            "or a single process"
        )
    return lm


def score(lm: Any, task: str, manager: Any, settings: EvalSettings) -> list[EvalRecord]:
    """What a model scores on a task, or on a group and each of its tasks.

    Args:
        lm: made by `language_model`.
        task: its name.
        manager: made by `task_manager`.
        settings: `limit` and `num_fewshot` are used.

    Returns:
        The record of the task itself first; of a launch with several processes, on the first alone.

    Raises:
        EvaluationError: where its data cannot be had.
    """
    import lm_eval

    with _undisturbed():
        try:
            results = lm_eval.simple_evaluate(
                lm,
                tasks=[task],
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                task_manager=manager,
                bootstrap_iters=BOOTSTRAPS,
                log_samples=False,
            )
        except (OSError, ValueError) as caught:
            raise EvaluationError(f"{task} cannot be scored: {_remedy(caught)}") from caught
    if results is None:
        return []
    rows = results["results"]
    order = sorted(rows, key=lambda name: name != task)  # the group before its tasks
    return [_record(name, rows[name], results, settings) for name in order]


def _record(name: str, row: Mapping[str, Any], results: Mapping[str, Any], settings: EvalSettings) -> EvalRecord:
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, _, chosen = key.partition(",")
        if key in _NO_METRIC or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # a standard error that could not be told is the text N/A
        kept = errors if metric.endswith("_stderr") else metrics
        label = metric.removesuffix("_stderr")
        kept[label if chosen in ("", "none") else f"{label},{chosen}"] = float(value)
    shots = {results["n-shot"].get(one) for one in [*results.get("group_subtasks", {}).get(name, ()), name]} - {None}
    return EvalRecord(
        name,
        metrics,
        errors,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        documents=row.get("sample_len"),
        limit=settings.limit,
        harness=f"lm-eval {harness_version()}",
    )


def _move_tasks(data: Path, known: Mapping[str, Any], folder: Path) -> None:
    """Write tasks that include the known ones, and read `data/TASK/SPLIT.jsonl` in place of their data."""
    for place in sorted(path for path in data.iterdir() if path.is_dir()):
        _check_known([place.name], known)
        files = {path.stem: str(path) for path in sorted(place.glob("*.jsonl"))}
        if not files:
            raise EvaluationError(f"{place} has no data: expected a file for each split, such as validation.jsonl")
        task = {
            "include": str(known[place.name].yaml_path),
            "task": place.name,
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        (folder / f"{place.name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def _check_known(names: Iterable[str], known: Mapping[str, Any]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists all of them;"
            raise EvaluationError(
                f"lm-eval {harness_version()} has no task {name!r}: {hint} {PAPER!r} and {PERPLEXITY!r} are ours, "
                "tasks of your own come with include_path"
            )


def _remedy(caught: Exception) -> str:
    reason = str(caught).strip().partition("\n")[0] or type(caught).__name__
    if not isinstance(caught, OSError):
        return reason
    return (
        f"{reason}; its data has to be in the Hugging Face cache or on a reachable Hub, "
        "or in TASK/SPLIT.jsonl of a directory named as `datasets` (on the command line, --datasets)"
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """lm-eval seeds random numbers, prints, warns of what is meant, and starts processes for standard errors."""
    before, parallel = random_state(), os.environ.get("DISABLE_MULTIPROC")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"  # a fork of a process with CUDA or threads may hang
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        set_random_state(before)
        logger.setLevel(level)
        if parallel is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = parallel


@cache
def _stock_tasks() -> dict[str, Any]:
    """Those that come with lm-eval; it reads thousands of files for them."""
    from lm_eval.tasks import TaskManager

    return dict(TaskManager().task_index)


def _require() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as caught:
        raise EvaluationError(
            "tasks of lm-eval need the package lm-eval: pip install 'slop-hf[eval]'; perplexity does without"
        ) from caught
