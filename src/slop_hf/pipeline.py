"""`train_run`: a whole run in one call, with the evaluation and the publishing that its config asks for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerState
from transformers.utils import logging

from .evaluation.runs import EvaluateStages, check_evaluation
from .hub.callback import PublishCallback
from .hub.fetch import FetchedStage, continue_from, fetch_stage
from .io.hub_address import Address
from .runs.directory import RunDirectory
from .runs.launches import RunLaunches
from .runs.lock import require_unlocked
from .schedule import GrowthSchedule
from .training.config import RunConfig, build_trainer

logger = logging.get_logger(__name__)


def train_run(
    config: RunConfig,
    output_dir: str | Path,
    *,
    schedule: GrowthSchedule | str | None = None,
    from_stage: FetchedStage | str | None = None,
    scratch: bool = False,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    report: Callable[[str], None] | None = None,
) -> RunDirectory:
    """Train a run to its end, and evaluate and publish its stages as its config says.

    Each stage is scored when it has finished if the config has a section `evaluation`, and is then published with its
    scores if `training.push_to_hub` is true. If scoring or publishing fails, a message says so and training continues.
    SIGTERM stops a run early, with its state saved: `run.is_finished` says whether stages are missing. Ctrl-C does the
    same, and then raises `KeyboardInterrupt`, without waiting for uploads; the resumed run sends them.

    Under a launcher such as torchrun or `accelerate launch`, every process makes the same call.

        config = RunConfig.from_yaml("recipes/grow_tiny.yaml")
        run = train_run(config, "runs/tiny", resume=True)
        write_report([run.path])

    Args:
        config: schedule, model, data, training arguments and evaluation.
        output_dir: run directory; it must not hold a run unless `resume` is set.
        schedule: growth schedule, or the path of its YAML file, that replaces the config's.
        from_stage: published stage to begin with, or its address such as `user/name@stage-2-ffn`. The run takes its
            model and tokenizer, and the rest of its schedule unless the config or `schedule` has another one.
        scratch: whether to train the schedule's target from random weights with the same FLOPs instead.
        resume: whether to resume a run in `output_dir`; without one there, a new run begins.
        callbacks: callbacks of `Trainer`, or `StageCallback`s, to add. With a `PublishCallback` among them, it alone
            publishes.
        report: function to call with a line about what was published; by default the line is logged.

    Returns:
        The run directory.

    Raises:
        SlopError: if the run cannot begin (checked before training), or if its loss diverges.
    """
    directory = RunDirectory(output_dir)
    if int(os.environ.get("RANK", "0")) == 0:  # the first rank of a launch locks the directory before the others
        require_unlocked(output_dir)
    is_resumed = resume and directory.exists  # before the first process creates it
    stage = fetch_stage(from_stage) if isinstance(from_stage, str) else from_stage
    config = config.with_schedule(schedule) if stage is None else continue_from(config, stage, schedule)
    check_evaluation(config)
    publishing = _build_publishers(config, callbacks)
    trainer = build_trainer(
        config, output_dir, scratch=scratch, callbacks=[RecordLaunch(directory, config), *callbacks, *publishing]
    )
    if (evaluating := EvaluateStages.of_run(config)) is not None:
        trainer.add_callback(evaluating)
    if stage is not None and trainer.is_world_process_zero() and not directory.exists:
        stage.origin.save(directory)
    trainer.train(resume_from_checkpoint=is_resumed)
    for publisher in publishing:
        if summary := publisher.finish():
            (report or logger.info)(summary)
    return directory


class RecordLaunch(TrainerCallback):
    """Writes down the command, the time and the data of a launch when its training begins."""

    def __init__(self, run: RunDirectory, config: RunConfig) -> None:
        self.run, self.config, self._is_recorded = run, config, False

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._is_recorded or not state.is_world_process_zero:  # a run has this event in every stage
            return
        self._is_recorded = True
        sources = self.config.data.sources
        places = {name: ", ".join(source.places) for name, source in sources.items()}
        data = [place if len(places) == 1 else f"{name}: {place}" for name, place in places.items()]
        (RunLaunches.load(self.run) or RunLaunches()).add(sys.argv, data).save(self.run)


def _build_publishers(config: RunConfig, callbacks: Sequence[TrainerCallback]) -> list[PublishCallback]:
    """Return the callback that `push_to_hub` asks for, unless one of the callbacks publishes already."""
    if not config.training.get("push_to_hub") or any(getattr(callback, "publishes", False) for callback in callbacks):
        return []
    pretrained = config.model.get("pretrained")
    base_model = None  # the cards do not name a directory, such as a fetched stage's
    if pretrained is not None and not Path(pretrained).exists():
        base_model = Address.parse(pretrained).repo_id
    return [PublishCallback.from_arguments(config.training, base_model=base_model)]
