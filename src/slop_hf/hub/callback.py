"""`PublishCallback`: publishes a run's stages while it trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import HubError
from ..io.network_errors import summarize_error
from ..io.retry import RetryPolicy
from ..runs.directory import RunDirectory
from ..training.callbacks import StageCallback
from ..training.ranks import Ranks
from .access import HubUnreachable
from .publish import Published, Publisher

logger = logging.get_logger(__name__)

STRATEGIES = ("every_save", "end")
STOPPED_PATIENCE = 20.0  # seconds, where a run was stopped: a cluster gives little time, and what is left can wait


class PublishCallback(StageCallback):
    """Publishes each stage when it has finished, in a thread of its own; training neither waits nor fails by it.

    What fails is tried again with waits in between, then after each later stage, and once more at the end. What could
    not be sent stays in the run's directory: a resumed run, or `slop publish`, sends it later, and leaves alone what
    is there.

        with PublishCallback("user/name") as publishing:
            SlopTrainer(..., callbacks=[publishing]).train()

    Leaving the block waits for what is still on its way.

    Args:
        repo_id: such as `user/name`; default, the name of the run's directory, for the token's user.
        private: whether the repository is private if it has to be made.
        base_model: for the cards' metadata, the model on the Hub that the run began with.
        strategy: `every_save`, each stage when it has finished, or `end`, all at the end.
        api: the Hub's client; default, that of `huggingface_hub`, with the token that it finds.
        retries: how often failures are tried again.
        patience: seconds to wait at the end of a run for what is on its way.

    Raises:
        HubError: for an unknown strategy.
    """

    publishes = True  # `SlopTrainer` lets others finish with a stage first, and sees that `push_to_hub` is seen to

    def __init__(
        self,
        repo_id: str | None = None,
        *,
        private: bool = True,
        base_model: str | None = None,
        strategy: str = "every_save",
        api: HfApi | None = None,
        retries: RetryPolicy | None = None,
        patience: float = 3600.0,
    ) -> None:
        if strategy not in STRATEGIES:
            raise HubError(
                f"hub_strategy {strategy!r}: finished stages are published, no checkpoints; "
                f"expected one of {', '.join(STRATEGIES)}"
            )
        self.repo_id, self.strategy, self.patience = repo_id, strategy, patience
        self._options: dict[str, Any] = {"private": private, "base_model": base_model, "api": api, "retries": retries}
        self._publisher: Publisher | None = None
        self._is_working = False
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._waiting: set[int] = set()
        self._changed = threading.Condition()
        self.published: dict[int, tuple[Published, ...]] = {}
        self.failed: dict[int, str] = {}

    @classmethod
    def from_arguments(cls, training: Mapping[str, Any], *, base_model: str | None = None) -> PublishCallback:
        """The callback that Trainer's own arguments ask for: `hub_model_id`, `hub_private_repo`, `hub_token`,
        `hub_strategy`. A repository is private unless `hub_private_repo` is false.
        """
        return cls(
            training.get("hub_model_id"),
            private=training.get("hub_private_repo") is not False,
            base_model=base_model,
            strategy=str(training.get("hub_strategy", "every_save")),
            api=HfApi(token=training.get("hub_token")),
        )

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._meet(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run begins, or goes on: stages that had finished are handed over."""
        self._meet(args)
        self._start()
        if self.strategy == "every_save":
            self._look()

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        """A stage has finished."""
        if self.strategy == "every_save":
            self._look()

    def finish(self) -> str | None:
        """Publish what is left and wait for it; what has come of it, in words, None where this process publishes none.

        It never raises.
        """
        if self._publisher is None or not self._publisher.run.exists:
            return None
        self._start()
        self._look()
        with self._changed:
            patience = self.patience if self._publisher.run.is_finished else min(self.patience, STOPPED_PATIENCE)
            self._changed.wait_for(lambda: not self._waiting, timeout=patience)
        return self._summary(self._publisher)

    def __enter__(self) -> PublishCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and (summary := self.finish()):
            (logger.warning if self.failed or self._waiting else logger.info)(summary)

    def _meet(self, args: TrainingArguments) -> None:
        """Begin to work for a run, on its first process."""
        if self._publisher is None and args.process_index == 0:
            run = RunDirectory(args.output_dir)
            self._publisher = Publisher(run, self.repo_id or run.path.resolve().name, **self._options)

    def _start(self) -> None:
        if self._publisher is not None and not self._is_working:
            self._is_working = True
            # A daemon: where the program ends in an error, nobody waits for an upload, of which nothing would be seen.
            threading.Thread(target=self._work, args=(self._publisher,), name="slop-publish", daemon=True).start()

    def _look(self) -> None:
        """Hand over the stages that have finished and are neither published nor on their way."""
        if self._publisher is not None and self._publisher.run.exists:
            with self._changed:
                finished = set(range(self._publisher.run.finished_stages))
                for number in sorted(finished - self._waiting - self.published.keys()):
                    self._waiting.add(number)
                    self._queue.put(number)

    def _work(self, publisher: Publisher) -> None:
        try:
            publisher.open()
        except Exception as caught:  # better known now than at the end of a stage; it is tried again then
            logger.warning(f"stages cannot be published yet: {summarize_error(caught)}")
        while True:
            number = self._queue.get()
            try:
                self.published[number] = publisher.publish(number)
                self.failed.pop(number, None)
            except Exception as caught:  # whatever it is, training goes on
                self.failed[number] = summarize_error(caught)
                logger.warning(f"could not publish stage {number}: {self.failed[number]}")
                if isinstance(caught, HubUnreachable):
                    self._give_up(self.failed[number])
            with self._changed:
                self._waiting.discard(number)
                self._changed.notify_all()

    def _give_up(self, reason: str) -> None:
        """For now: what has just failed for one stage, after many attempts, would for all that wait."""
        while not self._queue.empty():
            number = self._queue.get()
            self.failed[number] = reason
            with self._changed:
                self._waiting.discard(number)

    def _summary(self, publisher: Publisher) -> str:
        names = publisher.run.schedule.stage_names
        done = ", ".join(names[number] for number in sorted(self.published))
        lines = [f"published to {publisher.repo_id}: {done or 'nothing'}"]
        for number in sorted(self.failed.keys() | self._waiting):
            lines.append(f"not published: {names[number]} ({self.failed.get(number, 'still on its way')})")
        if len(lines) > 1:
            lines.append(f"it stays in {publisher.run.path}; `slop publish` with --to {publisher.repo_id} sends it")
        return "\n".join(lines)
