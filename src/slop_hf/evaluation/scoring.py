"""`evaluate_model`: a model's scores, each from the cache where it is known."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from ..data.tokenizing import vocabulary_of
from ..errors import EvaluationError, GrowthError
from ..growth import checkpoint_directory, no_progress_bars, stored_weights_hash, weights_hash
from ..runs.directory import RunDirectory
from ..runs.records import EvalRecord
from ..training.ranks import Ranks
from . import harness
from .cache import ResultCache, digest_of
from .held_out import LARGEST_BATCH_ON_CPU, HeldOut, perplexity_of
from .settings import EvalSettings
from .tasks import PAPER, PERPLEXITY

#: How long processes wait for one another: answers that are generated take longer in some than in others.
LAUNCH_TIMEOUT = timedelta(days=1)


def evaluate_model(
    model: PreTrainedModel | str | Path,
    tasks: str | Iterable[str] = PAPER,
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
    num_fewshot: int | None = None,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    held_out: HeldOut | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    include_path: str | Path | None = None,
    datasets: str | Path | None = None,
) -> list[EvalRecord]:
    """Score a model on tasks of lm-eval, and measure its perplexity on held-out text.

    Results are kept by the model's weights, its tokenizer, the task and its settings, and lm-eval's version: a second
    call scores nothing. The model and the process's random numbers are left as they are.

    In a launch with several processes (`accelerate launch`) all of them call this, with a directory: each loads the
    model, and they share the documents.

    Args:
        model: a directory or Hub id[@revision]; or a model, which is scored on the device that it is on.
        tasks: "paper" (`PAPER_TASKS`: PIQA, HellaSwag, BBH, LAMBADA, GSM8K), "perplexity", or any tasks and groups of
            lm-eval.
        limit, batch_size, num_fewshot, device, cache_dir, held_out, include_path, datasets: as for `EvalSettings`.
        tokenizer: of a model that is not a directory.

    Returns:
        A record for each task in the order given, that of a group before those of its tasks.

    Raises:
        EvaluationError: an unknown task, data that cannot be had, held-out text of another tokenizer.
        GrowthError: what is no model directory.
    """
    settings = EvalSettings(
        tasks=tuple([tasks] if isinstance(tasks, str) else tasks),
        limit=limit,
        batch_size=batch_size,
        num_fewshot=num_fewshot,
        device=device,
        cache_dir=cache_dir,
        held_out=held_out,
        include_path=include_path,
        datasets=datasets,
    )
    return score_all(Subject(model, device, tokenizer), settings, launched_ranks())


class Subject:
    """A model to score; it is loaded only when something has to be.

    Args:
        model: a directory, a Hub id[@revision], or a model.
        device: to load it to; None, a GPU if there is one.
        tokenizer: None, that in the directory.

    Raises:
        GrowthError: for what is no model directory.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        device: str | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> None:
        self.directory = None if isinstance(model, PreTrainedModel) else _checkpoint(model)
        on = str(model.device) if isinstance(model, PreTrainedModel) else device
        self.device = on or ("cuda" if torch.cuda.is_available() else "cpu")
        self._given, self._tokenizer = model, tokenizer

    @cached_property
    def weights_hash(self) -> str:
        """Of its weights, the same for a directory and for the model loaded from it."""
        if self.directory is not None:
            return stored_weights_hash(self.directory)
        return weights_hash(cast(PreTrainedModel, self._given).named_parameters())

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on its device."""
        if self.directory is None:
            return cast(PreTrainedModel, self._given)
        with no_progress_bars():
            loaded = AutoModelForCausalLM.from_pretrained(self.directory, dtype="auto")
        return cast(PreTrainedModel, loaded.to(self.device))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """Its tokenizer; None where there is none."""
        if self._tokenizer is not None or self.directory is None:
            return self._tokenizer
        try:
            return cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(self.directory))
        except (OSError, ValueError, KeyError):
            return None

    @cached_property
    def vocabulary(self) -> str:
        """A hash of its tokenizer; "" where there is none."""
        return vocabulary_of(self.tokenizer) if isinstance(self.tokenizer, PreTrainedTokenizerFast) else ""


def score_all(subject: Subject, settings: EvalSettings, ranks: Ranks) -> list[EvalRecord]:
    """The records of all tasks, on all ranks; those that are not in the cache are scored, and kept there."""
    results = ResultCache(settings.cache_dir)
    found: list[EvalRecord] = []
    with ExitStack() as stack:
        scorer = _Scorer(subject, settings, ranks, stack)
        for task in settings.tasks:
            ingredients = _ingredients(subject, task, settings)
            known = ranks.from_first(results.load(ingredients) if ranks.is_first else None)
            if known is None:
                known = ranks.from_first(scorer.score(task))
                if ranks.is_first:
                    results.save(ingredients, known)
            found += [replace(record, weights_hash=subject.weights_hash) for record in known]
    return found


def check_tasks(settings: EvalSettings) -> None:
    """Refuse tasks that there are not, before work begins.

    Raises:
        EvaluationError: for an unknown task, or without lm-eval.
    """
    if settings.harness_tasks:
        with harness.task_manager(settings):
            pass


def launched_ranks() -> Ranks:
    """The processes of `accelerate launch`; this one alone where there is no launch."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=LAUNCH_TIMEOUT)
    device = torch.device("cpu") if state.backend == "gloo" else state.device
    return Ranks(state.process_index, state.num_processes, device)


class _Scorer:
    """Scores tasks that are not known; what it takes is made for the first of them.

    Args:
        stack: what has to be put back when all is done.
    """

    def __init__(self, subject: Subject, settings: EvalSettings, ranks: Ranks, stack: ExitStack) -> None:
        self._subject, self._settings, self._ranks, self._stack = subject, settings, ranks, stack

    def score(self, task: str) -> list[EvalRecord]:
        if task == PERPLEXITY:
            return [self._perplexity()]
        return harness.score(self._lm, task, self._manager, self._settings)

    def _perplexity(self) -> EvalRecord:
        held_out, own = self._settings.held_out, self._subject.vocabulary
        assert held_out is not None  # settings see to it
        if held_out.vocabulary and own and held_out.vocabulary != own:
            raise EvaluationError(
                "the held-out text was tokenized by another tokenizer than the model's; prepare it with the model's "
                "(`tokenizer` of the data's config)"
            )
        limit, batch_size = self._settings.limit, self._settings.batch_size
        return perplexity_of(self._model, held_out, limit=limit, batch_size=batch_size, ranks=self._ranks)

    @cached_property
    def _model(self) -> PreTrainedModel:
        model = self._subject.model
        self._stack.enter_context(_evaluating(model))
        return model

    @cached_property
    def _manager(self) -> Any:
        return self._stack.enter_context(harness.task_manager(self._settings))

    @cached_property
    def _lm(self) -> Any:
        subject, tokenizer = self._subject, self._subject.tokenizer
        assert self._manager  # an unknown task is refused before a model is loaded
        if tokenizer is None:
            where = subject.directory or "a model in memory: give it as `tokenizer`"
            raise EvaluationError(f"tasks need the model's tokenizer, and there is none in {where}")
        processes = self._ranks.count
        if processes > 1 and subject.directory is None:
            raise EvaluationError("several processes can score a directory, not a model in memory: save it first")
        source = cast(Path, subject.directory) if processes > 1 else self._model
        return harness.language_model(source, tokenizer, self._batch_size(), subject.device, processes)

    def _batch_size(self) -> int | str:
        """On a CPU a batch that is too large is not refused: the process is killed."""
        chosen, on_cpu = self._settings.batch_size, self._subject.device.startswith("cpu")
        return LARGEST_BATCH_ON_CPU if chosen == "auto" and on_cpu else chosen


def _ingredients(subject: Subject, task: str, settings: EvalSettings) -> dict[str, Any]:
    """All that a score depends on."""
    always = {"weights": subject.weights_hash, "task": task, "limit": settings.limit}
    if task == PERPLEXITY:
        assert settings.held_out is not None
        return {**always, "held_out": settings.held_out.fingerprint}
    given = {name: digest_of(path) for name, path in settings.directories.items()}
    more = {"num_fewshot": settings.num_fewshot, "tokenizer": subject.vocabulary}
    return {**always, **more, "harness": harness.harness_version(), **given}


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _checkpoint(model: str | Path) -> Path:
    directory = checkpoint_directory(model)
    if RunDirectory(directory).exists:
        raise EvaluationError(f"{directory} is a run, not a model: name one of its stages, or use evaluate_run")
    if not (directory / "config.json").is_file():
        raise GrowthError(f"{directory} is neither a run nor a model directory: no schedule.yaml, and no config.json")
    return directory
