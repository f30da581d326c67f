"""Scores on tasks of lm-eval. The only file that imports it."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from accelerate.utils import patch_environment
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from ..io.network_errors import get_first_line
from ..io.serialization import Json
from ..runs.records import EvalRecord
from ..training.random_state import get_random_state, set_random_state
from .settings import EvalSettings
from .tasks import PAPER, PERPLEXITY

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

logger = logging.getLogger(__name__)

#: Bootstrap samples for standard errors without a closed form, such as a perplexity's.
BOOTSTRAPS = 1000
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")


def get_lm_eval_version() -> str:
    """Return the version of lm-eval; an `EvaluationError` says that it is not installed."""
    _require_lm_eval()
    return version("lm-eval")


@contextmanager
def open_task_manager(settings: EvalSettings) -> Iterator[TaskManager]:
    """Yield lm-eval's `TaskManager` with the tasks of `include_path`, and with the data in `datasets` in place.

    An `EvaluationError` names an unknown task, or a directory in `datasets` that is not named like a task.
    """
    _require_lm_eval()
    from lm_eval.tasks import TaskManager

    directories = dict(settings.directories)
    datasets = directories.pop("datasets", None)
    with tempfile.TemporaryDirectory(prefix="slop-hf-tasks-") as folder:
        paths = [str(path) for path in directories.values()]
        manager = TaskManager(include_path=paths, include_defaults=False)
        if datasets is not None:
            _write_moved_tasks(datasets, {**_list_stock_tasks(), **manager.task_index}, Path(folder))
            manager = TaskManager(include_path=[*paths, folder], include_defaults=False)
        for name, entry in _list_stock_tasks().items():
            manager.task_index.setdefault(name, entry)
        for name in settings.lm_eval_tasks:
            _check_is_known(name, manager.task_index)
        yield manager


def build_language_model(
    model: PreTrainedModel | Path,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | str,
    device: str,
    processes: int = 1,
) -> HFLM:
    """Return lm-eval's wrapper of a model on its device.

    If `model` is a directory, each of the `processes` of `accelerate launch` loads a copy to `device`, and they share
    the documents.
    """
    from lm_eval.models.huggingface import HFLM

    pretrained = str(model) if isinstance(model, Path) else model
    with _contain_side_effects():
        lm = HFLM(
            pretrained=pretrained,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=device,
            trust_remote_code=False,
        )
    # lm-eval counts the processes of its own machine, and with a single GPU each process would score everything.
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if processes > 1 and not lm.world_size == processes == on_machine:
        raise EvaluationError(
            "lm-eval shares documents only among several GPUs of one machine: start one process per GPU, "
            "or a single process"
        )
    return lm


def score_task(lm: HFLM, task: str, manager: TaskManager, settings: EvalSettings) -> list[EvalRecord]:
    """Score a model on a task, or on a group and each of its tasks; return the record of `task` itself first.

    If several processes share the work, only the first process gets records.
    """
    import lm_eval

    with _contain_side_effects():
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
            raise EvaluationError(f"{task} cannot be scored: {_explain_failure(caught)}") from caught
    if results is None:
        return []
    order = sorted(results["results"], key=lambda name: name != task)  # the group before its tasks
    return [_make_record(name, results, settings) for name in order]


def _make_record(name: str, results: Mapping[str, Json], settings: EvalSettings) -> EvalRecord:
    row = results["results"][name]
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, _, variant = key.partition(",")
        if key in _NO_METRIC or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue  # an unknown standard error is the text N/A
        target = errors if metric.endswith("_stderr") else metrics
        label = metric.removesuffix("_stderr")
        target[label if variant in ("", "none") else f"{label},{variant}"] = float(value)
    tasks = [*results.get("group_subtasks", {}).get(name, ()), name]
    shots = {results["n-shot"].get(task) for task in tasks} - {None}
    return EvalRecord(
        name,
        metrics,
        errors,
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        documents=row.get("sample_len"),
        limit=settings.limit,
        harness=f"lm-eval {get_lm_eval_version()}",
    )


def _write_moved_tasks(datasets: Path, known: Mapping[str, Entry], folder: Path) -> None:
    """Write tasks that include the known ones but read `datasets/TASK/SPLIT.jsonl` as their data."""
    for directory in sorted(path for path in datasets.iterdir() if path.is_dir()):
        name = directory.name
        _check_is_known(name, known)
        files = {path.stem: str(path) for path in sorted(directory.glob("*.jsonl"))}
        if not files:
            raise EvaluationError(f"{directory} has no data: expected a file per split, such as validation.jsonl")
        task: dict[str, Json] = {"include": str(known[name].yaml_path), "task": name, "tag": None}
        task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def _check_is_known(name: str, known: Collection[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, [PAPER, PERPLEXITY, *known], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists all of them;"
        raise EvaluationError(
            f"lm-eval {get_lm_eval_version()} has no task {name!r}: {hint} {PAPER!r} and {PERPLEXITY!r} are ours, "
            "and include_path adds tasks of your own"
        )


def _explain_failure(caught: Exception) -> str:
    reason = get_first_line(caught)
    if not isinstance(caught, OSError):
        return reason
    return (
        f"{reason}; its data must be in the Hugging Face cache or on a reachable Hub, "
        "or in TASK/SPLIT.jsonl of a directory named as `datasets` (on the command line, --datasets)"
    )


@contextmanager
def _contain_side_effects() -> Iterator[None]:
    """Contain lm-eval's side effects: seeding, printing, warnings, forked bootstrap workers, a report on the machine.

    The report, which we drop, lists all installed packages; that takes seconds.
    """
    from lm_eval import evaluator

    add_report = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None
    before, their_logger = get_random_state(), logging.getLogger("lm_eval")
    level = their_logger.level
    their_logger.setLevel(logging.ERROR)
    try:
        # A fork of a process with CUDA or threads may hang.
        with redirect_stdout(sys.stderr), patch_environment(DISABLE_MULTIPROC="1"):
            yield
    finally:
        evaluator.add_env_info = add_report
        set_random_state(before)
        their_logger.setLevel(level)


@cache
def _list_stock_tasks() -> dict[str, Entry]:
    """Return the tasks that come with lm-eval; it reads thousands of files to find them."""
    from lm_eval.tasks import TaskManager

    logger.info("reading lm-eval's list of tasks")
    return dict(TaskManager().task_index)


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as caught:
        raise EvaluationError(
            "tasks of lm-eval need the package lm-eval: pip install 'slop-hf[eval]'; perplexity does without it"
        ) from caught
