"""`evaluate_run`: the scores of a run's stages; `EvaluateStages`: the same while it trains."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from transformers.utils import logging

from ..data import prepare_data
from ..errors import RunError
from ..growth import grow_checkpoint
from ..growth.plan import DEFAULT_NOISE
from ..report.summary import marginal_utility
from ..runs.directory import RECORD_FILE, RunDirectory
from ..runs.records import EvalRecord, StageRecord
from ..training.callbacks import StageCallback
from ..training.config import RunConfig, StageEvaluation
from ..training.launch import no_zero_init
from ..training.ranks import Ranks
from .held_out import HeldOut
from .scoring import Subject, check_tasks, launched_ranks, score_all
from .settings import EvalSettings
from .tasks import PERPLEXITY, task_names

logger = logging.get_logger(__name__)

END, AFTER_GROWTH = "end", "after_growth"


def evaluate_run(
    run: str | Path | RunDirectory,
    settings: EvalSettings,
    *,
    stages: Sequence[int] | None = None,
    after_growth: bool = False,
) -> dict[int, list[EvalRecord]]:
    """Score the finished stages of a run, and write the records into the stages' directories.

    `evaluations.json` keeps what a stage scored on other tasks, or with other limits and examples.

    Args:
        run: its directory.
        settings: what to score, and how.
        stages: their numbers; None, all that have finished.
        after_growth: score each grown model also as it was before it was trained. It is grown again, from the
            directory of the stage before, with the same bits.

    Returns:
        The records of each stage, those after growth first.

    Raises:
        RunError: where there is no run, or a stage has not finished.
        EvaluationError: as for `evaluate_model`.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    chosen = stages_to_score(run, stages)
    check_tasks(settings)
    return {number: _evaluate_stage(run, number, settings, after_growth, launched_ranks()) for number in chosen}


def stages_to_score(run: RunDirectory, stages: Sequence[int] | None = None) -> Sequence[int]:
    """The numbers of the stages that are asked for, or of all that have finished.

    Raises:
        RunError: where there is no run, or a stage has not finished.
    """
    finished = run.finished_stages
    if not finished:
        raise RunError(f"{run.path} has no finished stage to evaluate: let `slop train` finish its first one")
    for number in (chosen := range(finished) if stages is None else stages):
        if not 0 <= number < finished:
            raise RunError(f"stage {number} of {run.path} has not finished; finished are 0 to {finished - 1}")
    return chosen


class EvaluateStages(StageCallback):
    """Scores every stage of a run when it has been written, and the grown models before they were trained.

    The first rank scores, from the stage's directory, and the others wait: raise `ddp_timeout` where that takes longer
    than half an hour. Its device holds the model in training and the one that is scored; `device="cpu"` in the
    settings spares it. What fails does not stop the run: a warning says what, and `slop eval` scores the stage later.

    It works in one process, under DistributedDataParallel and under ZeRO-3 alike, and does not touch the model in
    training.

    Args:
        settings: what to score, and how.
        after_growth: score each grown model also as it was before it was trained.

    Raises:
        EvaluationError: for an unknown task.
    """

    def __init__(self, settings: EvalSettings, *, after_growth: bool = False) -> None:
        check_tasks(settings)
        self.settings, self.after_growth = settings, after_growth

    @classmethod
    def of_run(cls, config: RunConfig) -> EvaluateStages | None:
        """The callback that a run's section `evaluation` asks for, None where it asks for none.

        Perplexity is measured on the held-out part of the run's own data, which are prepared if they are not.

        Raises:
            EvaluationError: as for `check_evaluation`, and where no block of the data is held out.
        """
        if config.evaluation is None:
            return None
        wanted = PERPLEXITY in task_names(config.evaluation.tasks)
        held_out = HeldOut.of_corpus(prepare_data(config.data)) if wanted else None
        return cls(_settings_of(config.evaluation, held_out), after_growth=config.evaluation.after_growth)

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        """Score a stage."""
        try:
            if ranks.is_first:
                with no_zero_init():
                    _evaluate_stage(run, stage, self.settings, self.after_growth, Ranks())
        except Exception as caught:  # whatever it is, a training run of days is worth more
            again = f"`slop eval {run.path} --stage {stage}`"
            logger.warning(f"stage {stage} was not evaluated ({caught}); {again} does it later")
        finally:
            ranks.wait()


def check_evaluation(config: RunConfig) -> None:
    """Refuse a section `evaluation` that names unknown tasks or settings, before the run's data are prepared.

    Raises:
        EvaluationError: saying what is wrong with it.
    """
    if config.evaluation is not None:
        check_tasks(_settings_of(config.evaluation, HeldOut({}, None, "")))  # the text does not matter yet


def _settings_of(asked: StageEvaluation, held_out: HeldOut | None) -> EvalSettings:
    given = asdict(asked)
    del given["after_growth"]
    return EvalSettings(**given, held_out=held_out)


def _evaluate_stage(
    run: RunDirectory, number: int, settings: EvalSettings, after_growth: bool, ranks: Ranks
) -> list[EvalRecord]:
    records: list[EvalRecord] = []
    if after_growth and number:
        with _grown(run, number, ranks) as directory:
            records += _scored(directory, settings, ranks, AFTER_GROWTH)
    records += _scored(run.stage_dir(number), settings, ranks, END)
    if ranks.is_first:
        run.add_evaluations(number, records)
    return records


def _scored(directory: Path, settings: EvalSettings, ranks: Ranks, when: str) -> list[EvalRecord]:
    found = score_all(Subject(directory, settings.device), settings, ranks)
    return [replace(record, when=when) for record in found]


@contextmanager
def _grown(run: RunDirectory, number: int, ranks: Ranks) -> Iterator[Path]:
    """The model that a stage began with, grown once more from the stage before it."""
    record = StageRecord.from_json(run.stage_dir(number) / RECORD_FILE)
    stage = run.schedule.stages[number - 1]
    if record.init:
        stage = replace(stage, init=dict(record.init))
    target = run.path / f".after-growth-{number}"
    with ranks.together():
        if ranks.is_first:
            shutil.rmtree(target, ignore_errors=True)  # what a killed run left
            noise = DEFAULT_NOISE if record.growth_noise is None else record.growth_noise
            seed = record.growth_seed or 0
            grow_checkpoint(run.stage_dir(number - 1), target, stage, seed=seed, noise=noise, progress=False)
    try:
        yield target
        ranks.wait()
    finally:
        if ranks.is_first:
            shutil.rmtree(target, ignore_errors=True)


def utility_of(run: RunDirectory, records: Mapping[int, Sequence[EvalRecord]]) -> float | None:
    """Marginal utility (Eq. 2) of a run by exact perplexities; None where a stage has none, or took no time.

    Args:
        run: for the hours.
        records: of each stage.
    """
    stages = run.records()
    found = {
        number: record.metrics["perplexity"]
        for number, of_stage in records.items()
        for record in of_stage
        if record.task == PERPLEXITY and record.when == END
    }
    hours = [stage.device_hours for stage in stages[1:]]
    if len(found) < len(stages) or not hours or min(hours) <= 0:
        return None
    return marginal_utility([found[number] for number in range(len(stages))], hours)
