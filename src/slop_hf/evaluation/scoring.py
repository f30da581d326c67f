"""`evaluate_model`: the scores of a model, taken from the cache if it has them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from ..data.tokenizing import hash_vocabulary
from ..errors import EvaluationError, GrowthError
from ..growth import find_checkpoint_directory, hash_stored_weights, hash_weights, hide_progress_bars
from ..io.model_errors import explain_load_error
from ..io.serialization import Json
from ..runs.directory import RunDirectory
from ..runs.records import EvalRecord
from ..training.ranks import Ranks
from . import lm_eval
from .cache import ResultCache, hash_directory
from .held_out import LARGEST_BATCH_ON_CPU, measure_perplexity
from .settings import EvalSettings, check_device
from .tasks import PAPER, PERPLEXITY

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

logger = logging.get_logger(__name__)

#: Longest wait of processes for one another: generated answers take longer in some processes than in others.
LAUNCH_TIMEOUT = timedelta(days=1)


def evaluate_model(
    model: PreTrainedModel | str | Path,
    tasks: str | Iterable[str] | EvalSettings = PAPER,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> list[EvalRecord]:
    """Score a model on tasks of lm-eval, and measure its perplexity on held-out text.

    Results are cached by the model's weights, its tokenizer, the task and its settings, and lm-eval's version: the
    same call scores nothing the second time. The model and the process's random state are left unchanged.

    In a launch of several processes (`accelerate launch`), all of them make this call, with a directory: each loads
    the model, and they share the documents.

        evaluate_model("runs/tiny/stage-1-layer", "piqa,hellaswag", limit=100)

    Args:
        model: directory or Hub id[@revision] of a model; or a loaded model, scored on its own device.
        tasks: "paper" (`PAPER_TASKS`: PIQA, HellaSwag, BBH, LAMBADA, GSM8K), "perplexity", or any tasks and groups of
            lm-eval; or settings that name them.
        tokenizer: tokenizer of the model; default, the one in its directory.
        options: further fields of `EvalSettings`: limit, batch_size, num_fewshot, device, cache_dir, held_out,
            include_path, datasets.

    Returns:
        One record per task, in the given order; a group's record comes before its tasks' records.

    Raises:
        EvaluationError: if a task is unknown, its data cannot be loaded, or the held-out text was tokenized by another
            tokenizer.
        GrowthError: if there is no such model.
    """
    if isinstance(tasks, EvalSettings):
        settings = replace(tasks, **options)
    else:
        settings = EvalSettings(tasks, **options)  # type: ignore[arg-type]  # it makes a tuple of any iterable
    return score_tasks(EvaluatedModel(model, settings.device, tokenizer), settings, get_launched_ranks())


class EvaluatedModel:
    """A model to score, with the arguments of `evaluate_model`. It is loaded only when something has to be scored.

    The default `device` to load it to is a GPU if there is one.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        device: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        if isinstance(model, PreTrainedModel):
            device = str(model.device)
        elif device is not None:
            check_device(device)
        self.directory = None if isinstance(model, PreTrainedModel) else _find_checkpoint(model)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._tokenizer = model, tokenizer
        self.tokenizer_fault = ""  # why the directory's tokenizer cannot be loaded

    @property
    def name(self) -> str:
        """The end of the directory's path, for messages."""
        return "the model" if self.directory is None else self.directory.name

    @cached_property
    def weights_hash(self) -> str:
        """Hash of the weights, the same for a directory and for the model loaded from it."""
        if self.directory is not None:
            return hash_stored_weights(self.directory)
        return hash_weights(cast(PreTrainedModel, self._model).named_parameters())

    @cached_property
    def model(self) -> PreTrainedModel:
        if self.directory is None:
            return cast(PreTrainedModel, self._model)
        logger.info("loading %s", self.name)
        with hide_progress_bars():
            try:
                loaded, found = AutoModelForCausalLM.from_pretrained(
                    self.directory, dtype="auto", trust_remote_code=False, output_loading_info=True
                )
            except (OSError, ValueError, KeyError) as caught:
                raise EvaluationError(
                    f"{self.directory} cannot be loaded ({explain_load_error(caught)}); give a checkpoint of a stock "
                    "transformers model"
                ) from None
        if missing := sorted(found["missing_keys"]):  # transformers would score random numbers
            raise EvaluationError(
                f"{self.directory} lacks {len(missing)} of the model's weights, such as {missing[0]}: save or "
                "download it again"
            )
        return cast(PreTrainedModel, loaded.to(self.device))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        if self._tokenizer is not None or self.directory is None:
            return self._tokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as caught:
            self.tokenizer_fault = explain_load_error(caught)
            return None
        return cast(PreTrainedTokenizerFast, tokenizer)

    @cached_property
    def vocabulary(self) -> str:
        """Hash of the tokenizer; "" without one."""
        return hash_vocabulary(self.tokenizer) if isinstance(self.tokenizer, PreTrainedTokenizerFast) else ""


def score_tasks(model: EvaluatedModel, settings: EvalSettings, ranks: Ranks) -> list[EvalRecord]:
    """Return the records of all tasks, on all ranks. Only tasks missing in the cache are scored."""
    cache = ResultCache(settings.cache_dir)
    results: list[EvalRecord] = []
    with ExitStack() as stack:
        scorer = _Scorer(model, settings, ranks, stack)
        for task in settings.tasks:
            ingredients = _list_ingredients(model, task, settings)
            records = ranks.from_first(cache.load(ingredients) if ranks.is_first else None)
            if records is None:
                logger.info("scoring %s on %s", model.name, task)
                records = ranks.from_first(scorer.score(task))
                if ranks.is_first:
                    cache.save(ingredients, records)
            results += [replace(record, weights_hash=model.weights_hash) for record in records]
    return results


def check_tasks(settings: EvalSettings) -> None:
    """Refuse unknown tasks, and tasks of lm-eval if it is not installed, before any work begins."""
    if not isinstance(settings, EvalSettings):
        raise EvaluationError(
            f"settings must be EvalSettings, got {type(settings).__name__}: such as EvalSettings('piqa', limit=100)"
        )
    if settings.lm_eval_tasks:
        with lm_eval.open_task_manager(settings):
            pass


def get_launched_ranks() -> Ranks:
    """Return the processes of `accelerate launch`; this process alone without a launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LAUNCH_TIMEOUT)
    device = torch.device("cpu") if state.backend == "gloo" else state.device
    return Ranks(state.process_index, state.num_processes, device)


class _Scorer:
    """Scores tasks, building what they need (the model, lm-eval's tasks) when the first of them needs it.

    `stack` closes what was opened when all tasks are done.
    """

    def __init__(self, subject: EvaluatedModel, settings: EvalSettings, ranks: Ranks, stack: ExitStack) -> None:
        self._subject, self._settings, self._ranks, self._stack = subject, settings, ranks, stack

    def score(self, task: str) -> list[EvalRecord]:
        if task != PERPLEXITY:
            return lm_eval.score_task(self._lm, task, self._manager, self._settings)
        held_out, vocabulary = self._settings.held_out, self._subject.vocabulary
        assert held_out is not None  # EvalSettings checks it
        if held_out.vocabulary and vocabulary and held_out.vocabulary != vocabulary:
            raise EvaluationError(
                "the held-out text was tokenized by another tokenizer than the model's; prepare it with the model's "
                "(`tokenizer` of the data's config)"
            )
        limit, batch_size = self._settings.limit, self._settings.batch_size
        return [measure_perplexity(self._model, held_out, limit=limit, batch_size=batch_size, ranks=self._ranks)]

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = self._subject.model
        self._stack.callback(model.train, model.training)  # as it was before
        return model.eval()

    @cached_property
    def _manager(self) -> TaskManager:
        return self._stack.enter_context(lm_eval.open_task_manager(self._settings))

    @cached_property
    def _lm(self) -> HFLM:
        subject, tokenizer = self._subject, self._subject.tokenizer
        assert self._manager  # refuses an unknown task before the model is loaded
        if tokenizer is None:
            if subject.directory is None:
                raise EvaluationError(
                    "tasks need the model's tokenizer, which a model in memory lacks: give it as `tokenizer`"
                )
            fault = subject.tokenizer_fault
            raise EvaluationError(f"tasks need the model's tokenizer; {subject.directory} has none to load ({fault})")
        processes = self._ranks.count
        if processes > 1 and subject.directory is None:
            raise EvaluationError("several processes can score a directory, not a model in memory: save it first")
        source = cast(Path, subject.directory) if processes > 1 else self._model
        batch_size = self._settings.batch_size
        if batch_size == "auto" and subject.device.startswith("cpu"):
            batch_size = LARGEST_BATCH_ON_CPU  # a CPU process with too large a batch is killed: nothing can be tried
        return lm_eval.build_language_model(source, tokenizer, batch_size, subject.device, processes)


def _list_ingredients(model: EvaluatedModel, task: str, settings: EvalSettings) -> dict[str, Json]:
    """Return everything that a score depends on."""
    ingredients = {"weights": model.weights_hash, "task": task, "limit": settings.limit}
    if task == PERPLEXITY:
        assert settings.held_out is not None
        return {**ingredients, "held_out": settings.held_out.fingerprint}
    return {
        **ingredients,
        "num_fewshot": settings.num_fewshot,
        "tokenizer": model.vocabulary,
        "harness": lm_eval.get_lm_eval_version(),
        **{name: hash_directory(path) for name, path in settings.directories.items()},
    }


def _find_checkpoint(model: str | Path) -> Path:
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):
        got = repr(model) if isinstance(model, (str, int, type(None))) else type(model).__name__
        raise EvaluationError(f"model must be a transformers model, a directory or a Hub id, got {got}")
    directory = find_checkpoint_directory(model)
    if RunDirectory(directory).exists:
        raise EvaluationError(f"{directory} is a run, not a model: name one of its stages, or use evaluate_run")
    if not (directory / "config.json").is_file():
        raise GrowthError(f"{directory} is neither a run nor a model directory: no schedule.yaml, and no config.json")
    return directory
