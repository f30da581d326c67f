"""`PublishCallback`: publishing of a run's stages while it trains."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial

from huggingface_hub import HfApi
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import HubError
from ..io.hub_address import check_repository
from ..io.network_errors import summarise_error
from ..io.retry import RetryPolicy
from ..io.serialization import Json
from ..runs.directory import RunDirectory
from ..training.callbacks import StageCallback
from ..training.ranks import Ranks
from .access import HubUnreachable
from .publish import Published, Publisher

logger = logging.get_logger(__name__)

STRATEGIES = ("every_save", "end")
#: Seconds to wait after a stopped run: a cluster gives little time, and the rest can be sent later.
STOPPED_PATIENCE = 20.0


class PublishCallback(StageCallback):
    """Publishes each finished stage in a background thread: training neither waits for it nor fails because of it.

    A failed stage is retried with backoff, again after each later stage, and at the end. Whatever could not be sent
    stays in the run's directory; the resumed run or `slop publish` sends it later, and skips what has arrived.

        with PublishCallback("user/name") as publishing:
            SlopTrainer(..., callbacks=[publishing]).train()

    The end of the block waits for unfinished uploads.

    Args:
        repo_id: repository, such as `user/name`; default, the name of the run's directory, for the token's user.
        private: whether the repository is private if it has to be created.
        base_model: model on the Hub that the run started from, for the cards' metadata.
        strategy: `every_save` to publish each stage when it has finished, `end` to publish all at the end.
        api: client of the Hub; None for `huggingface_hub`'s default, with the token that it finds.
        retries: how often transient failures are retried; None for the default policy.
        patience: longest wait for unfinished uploads at the end of a run, in seconds.

    Raises:
        HubError: if the strategy is unknown, or the repository's name is not valid.
    """

    publishes = True  # `SlopTrainer` calls the other callbacks first, and accepts `push_to_hub`

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
                f"hub_strategy {strategy!r}: only finished stages are published, no checkpoints; "
                f"expected one of {', '.join(STRATEGIES)}"
            )
        if repo_id is not None:
            check_repository(repo_id)
        if base_model is not None:
            check_repository(base_model, "base_model")
        self.repo_id, self.strategy, self.patience = repo_id, strategy, patience
        self._make_publisher = partial(Publisher, private=private, base_model=base_model, api=api, retries=retries)
        self._publisher: Publisher | None = None
        self._is_working = False
        self._waiting: set[int] = set()  # stages to send, the one being sent included
        self._changed = threading.Condition()
        self.published: dict[int, tuple[Published, ...]] = {}
        self.failed: dict[int, str] = {}

    @classmethod
    def from_arguments(cls, training: Mapping[str, Json], *, base_model: str | None = None) -> PublishCallback:
        """Return the callback that Trainer's own arguments `hub_model_id`, `hub_token` and `hub_strategy` ask for.

        The repository is private unless `hub_private_repo` is false.
        """
        return cls(
            training.get("hub_model_id"),
            private=training.get("hub_private_repo") is not False,
            base_model=base_model,
            strategy=str(training.get("hub_strategy", "every_save")),
            api=HfApi(token=training.get("hub_token")),
        )

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._prepare(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Queue the stages that finished before, if the run is resumed."""
        self._prepare(args)
        self._start()
        if self.strategy == "every_save":
            self._queue_finished_stages()

    def on_stage_written(self, run: RunDirectory, stage: int, ranks: Ranks) -> None:
        if self.strategy == "every_save":
            self._queue_finished_stages()

    def finish(self) -> str | None:
        """Publish the remaining stages and wait for them. It never raises.

        Returns:
            A summary of what was published and what was not; None if this process publishes nothing.
        """
        if self._publisher is None or not self._publisher.run.exists:
            return None
        self._start()
        self._queue_finished_stages()
        with self._changed:
            patience = self.patience if self._publisher.run.is_finished else min(self.patience, STOPPED_PATIENCE)
            self._changed.wait_for(lambda: not self._waiting, timeout=patience)
        return self._summarise(self._publisher)

    def __enter__(self) -> PublishCallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and (summary := self.finish()):
            (logger.warning if self.failed or self._waiting else logger.info)(summary)

    def _prepare(self, args: TrainingArguments) -> None:
        """Create the publisher, on the first process only."""
        if self._publisher is None and args.process_index == 0:
            run = RunDirectory(args.output_dir)
            self._publisher = self._make_publisher(run, self.repo_id or run.path.resolve().name)

    def _start(self) -> None:
        if self._publisher is not None and not self._is_working:
            self._is_working = True
            # A daemon: a program that ends in an error does not wait for an upload whose outcome nobody would see.
            threading.Thread(target=self._work, args=(self._publisher,), name="slop-publish", daemon=True).start()

    def _queue_finished_stages(self) -> None:
        if self._publisher is not None and self._publisher.run.exists:
            with self._changed:
                self._waiting |= set(range(self._publisher.run.finished_stages)) - self.published.keys()
                self._changed.notify_all()

    def _work(self, publisher: Publisher) -> None:
        try:
            publisher.open()
        except Exception as caught:  # a warning now is better than one at the end of a stage, when it is tried again
            logger.warning(f"stages cannot be published yet: {summarise_error(caught)}")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                number = min(self._waiting)
            is_unreachable = False
            try:
                self.published[number] = publisher.publish(number)
                self.failed.pop(number, None)
            except Exception as caught:  # whatever it is, training continues
                self.failed[number] = summarise_error(caught)
                logger.warning(f"could not publish stage {number}: {self.failed[number]}")
                is_unreachable = isinstance(caught, HubUnreachable)
            with self._changed:
                if is_unreachable:  # the attempts would fail for the other stages too
                    self.failed |= dict.fromkeys(self._waiting, self.failed[number])
                    self._waiting.clear()
                self._waiting.discard(number)
                self._changed.notify_all()

    def _summarise(self, publisher: Publisher) -> str:
        names = publisher.run.schedule.stage_names
        done = ", ".join(names[number] for number in sorted(self.published))
        lines = [f"published to {publisher.repo_id}: {done or 'nothing'}"]
        for number in sorted(self.failed.keys() | self._waiting):
            lines.append(f"not published: {names[number]} ({self.failed.get(number, 'still being sent')})")
        if len(lines) > 1:
            lines.append(
                f"unpublished stages stay in {publisher.run.path}; "
                f"`slop publish` with --to {publisher.repo_id} sends them"
            )
        return "\n".join(lines)
