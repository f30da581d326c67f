"""`evaluate_run`: scores of a run's finished stages; `EvaluateStages`: scores of each stage while the run trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from ..data import prepare_data
from ..growth import grow_checkpoint
from ..growth.plan import DEFAULT_NOISE
from ..report.summary import compute_marginal_utility
from ..runs.directory import RECORD_FILE, RunDirectory
from ..runs.records import AFTER_GROWTH, END_OF_STAGE, EvalRecord, StageRecord
from ..training.callbacks import StageCallback
from ..training.config import RunConfig
from ..training.launch import disable_zero_init
from ..training.ranks import Ranks
from .held_out import HeldOut
from .scoring import EvaluatedModel, check_tasks, get_launched_ranks, score_tasks
from .settings import EvalSettings
from .tasks import PERPLEXITY, list_task_names

logger = logging.get_logger(__name__)


def evaluate_run(
    run: str | Path | RunDirectory,
    settings: EvalSettings,
    *,
    stages: Sequence[int] | None = None,
    after_growth: bool = False,
) -> dict[int, list[EvalRecord]]:
    """Score the finished stages of a run, and write the records into the stages' directories.

    `evaluations.json` keeps a stage's scores on other tasks, and with other limits and numbers of examples.

    Args:
        run: directory of the run.
        settings: tasks to score, and how.
        stages: numbers of the stages; None for all finished ones.
        after_growth: whether to score each grown model also before it is trained. It is grown again from the directory
            of the stage before, with the same bits.

    Returns:
        The records of each stage, by its number; those after growth come first.

    Raises:
        RunError: if there is no run, or a stage has not finished.
        EvaluationError: as for `evaluate_model`.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    numbers = run.select_stages(stages)
    check_tasks(settings)
    ranks = get_launched_ranks()
    return {number: _evaluate_stage(run, number, settings, after_growth, ranks) for number in numbers}


class EvaluateStages(StageCallback):
    """Scores each stage of a run when it has finished, and on request each grown model before it is trained.

    The first rank scores, from the stage's directory, and the others wait for it as long as it takes. Its device holds
    the model in training and the scored one at once, unless the settings have `device="cpu"`. A failure does not stop
    the run: it is logged, and `slop eval` can score the stage later. If the process is killed, the resumed run scores
    the stage again, as far as its scores are not in the cache of results.

    Works in one process, under DistributedDataParallel and under ZeRO-3, and leaves the model in training unchanged.

    Raises:
        EvaluationError: if a task is unknown, or lm-eval is needed and not installed.
    """

    def __init__(self, settings: EvalSettings, *, after_growth: bool = False) -> None:
        check_tasks(settings)
        self.settings, self.after_growth = settings, after_growth

    @classmethod
    def of_run(cls, config: RunConfig) -> EvaluateStages | None:
        """Return the callback that the section `evaluation` of a run asks for; None if there is no such section.

        Perplexity is measured on the held-out part of the run's own data, prepared on the first call.
        """
        if config.evaluation is None:
            return None
        needs_text = PERPLEXITY in list_task_names(config.evaluation.tasks)
        held_out = HeldOut.from_corpus(prepare_data(config.data)) if needs_text else None
        settings = EvalSettings.from_options(config.evaluation, held_out)
        return cls(settings, after_growth=config.evaluation.after_growth)

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        try:
            if ranks.is_first:
                with disable_zero_init():
                    _evaluate_stage(run, stage, self.settings, self.after_growth, Ranks())
        except Exception as caught:  # whatever it is, a training run of days is worth more
            remedy = f"`slop eval {run.path} --stage {stage}` can do it later"
            logger.warning(f"stage {stage} was not evaluated ({caught}); {remedy}")
        ranks.wait_without_timeout(f"to score stage {stage}")


def check_evaluation(config: RunConfig) -> None:
    """Refuse a section `evaluation` with unknown tasks or wrong values, before the run's data is prepared."""
    if config.evaluation is not None:
        no_text = HeldOut({}, None, "")  # the text itself does not matter yet
        check_tasks(EvalSettings.from_options(config.evaluation, no_text))


def compute_run_utility(run: RunDirectory, records: Mapping[int, Sequence[EvalRecord]]) -> float | None:
    """Compute the marginal utility (Eq. 2) of a run from exact perplexities, as perplexity per device hour.

    `records` holds the scores of each stage by its number. None if a stage has no perplexity, or took no time.
    """
    stages = run.records()
    perplexities = {
        number: record.metrics["perplexity"]
        for number, scores in records.items()
        for record in scores
        if record.task == PERPLEXITY and record.when == END_OF_STAGE
    }
    hours = [stage.device_hours for stage in stages[1:]]
    if len(perplexities) < len(stages) or not hours or min(hours) <= 0:
        return None
    return compute_marginal_utility([perplexities[number] for number in range(len(stages))], hours)


def _evaluate_stage(
    run: RunDirectory, number: int, settings: EvalSettings, after_growth: bool, ranks: Ranks
) -> list[EvalRecord]:
    def score(directory: Path, when: str) -> list[EvalRecord]:
        records = score_tasks(EvaluatedModel(directory, settings.device), settings, ranks)
        return [replace(record, when=when) for record in records]

    records: list[EvalRecord] = []
    if after_growth and number:
        with _regrow(run, number, ranks) as directory:
            records += score(directory, AFTER_GROWTH)
    records += score(run.stage_dir(number), END_OF_STAGE)
    if ranks.is_first:
        run.add_evaluations(number, records)
    return records


@contextmanager
def _regrow(run: RunDirectory, number: int, ranks: Ranks) -> Iterator[Path]:
    """Yield a directory with the model that a stage began with, grown again from the stage before."""
    record = StageRecord.from_json(run.stage_dir(number) / RECORD_FILE)
    stage = run.schedule.stages[number - 1]
    stage = replace(stage, init=record.init or stage.init)
    target = run.path / f".after-growth-{number}"
    with ranks.raise_on_all():
        if ranks.is_first:
            shutil.rmtree(target, ignore_errors=True)  # left by a killed process
            noise = DEFAULT_NOISE if record.growth_noise is None else record.growth_noise
            seed = record.growth_seed or 0
            grow_checkpoint(run.stage_dir(number - 1), target, stage, seed=seed, noise=noise, progress=False)
    try:
        yield target
        ranks.wait()
    finally:
        if ranks.is_first:
            shutil.rmtree(target, ignore_errors=True)
