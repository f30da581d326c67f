"""`StageTrainer`: transformers' Trainer for one stage of a run, on the run's axes of steps, tokens and FLOPs."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer, set_seed
from transformers.utils import logging

from ..data.packing import MixedBlocks
from ..errors import RunError
from ..growth import GrownStateReader
from ..runs.directory import RunDirectory, RunFacts
from ..runs.records import compute_perplexity
from .arguments import SlopTrainingArguments
from .batches import find_largest_divisor
from .checkpoints import list_checkpoints
from .divergence import Soundness
from .learning_rate import restore, stage_scheduler
from .random_state import set_random_state
from .ranks import Ranks
from .saving import keep_callback_states, save_checkpoint
from .spans import StageSpan
from .state_io import enter
from .states import Setup
from .run_timer import Pace

logger = logging.get_logger(__name__)


class StageTrainer(Trainer):
    """What `SlopTrainer` makes of `Trainer`'s own steps.

    It relies on private methods of `Trainer` (`_init_training_state`, `_prepare_for_training`, `_save_checkpoint`,
    `_load_rng_state`, `_maybe_log_save_evaluate`); `tests/training` fails where a release of transformers changes
    what they do.
    """

    args: SlopTrainingArguments
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    run: RunDirectory
    ranks: Ranks
    facts: RunFacts
    blocks: MixedBlocks
    spans: tuple[StageSpan, ...]
    _span: StageSpan  # in training
    _setup: Setup
    _pace: Pace
    _soundness: Soundness
    _entering: GrownStateReader | None = None  # what the model that is being prepared is to be filled from
    _resumed: dict[str, Any]  # what a checkpoint keeps beside states
    _random: list[dict[str, Any]]
    _losses: dict[str, Any] | None = None  # of the stage so far, where it is resumed
    _first_step = 0  # of this call of `train`; later ones may begin where a checkpoint ended

    # ---- A model for each stage --------------------------------------------------------------------------------

    def _release(self) -> None:
        """Let go of the model in training and all that belongs to it, so that the next one has its memory."""
        wrapped = self.model_wrapped
        with _without_collecting():  # while all is still held here, for a third of a second
            self.accelerator.free_memory()
        self.model = self.model_wrapped = self.deepspeed = None
        self.optimizer = self.lr_scheduler = None
        for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
            setattr(self.callback_handler, name, None)
        self._setup.release(wrapped)
        del wrapped
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.args.torch_compile:
            torch.compiler.reset()  # what was compiled is of no use for other shapes, and would count against a limit
            logger.info(f"{self._span.name} will be compiled anew")

    def _take(self, model: PreTrainedModel) -> None:
        """Make `model` the one in training."""
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = model
        self.callback_handler.model = model

    # ---- Beginning ---------------------------------------------------------------------------------------------

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Begin a stage where the one before ended, so that steps and logs count over the run."""
        before = self.state
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            self.state.global_step = self._span.first_step
            self.state.total_flos = before.total_flos
            self.state.num_input_tokens_seen = before.num_input_tokens_seen
            self.state.log_history = list(before.log_history)
        self.state.max_steps = self.spans[-1].end_step
        self._first_step = self.state.global_step
        done = self._first_step - self._span.first_step
        return 0, done * self.args.gradient_accumulation_steps

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Fill the prepared model and its fresh optimizer from the directory that they are to come from."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._setup.prepared(self.model_wrapped)
        entering, self._entering = self._entering, None
        if entering is not None:
            enter(self._setup.states(self), entering)
        resumed, self._resumed = self._resumed, {}
        self._random, self._losses = resumed.get("random", []), resumed.get("losses")
        if resume_from_checkpoint is not None:
            restore(self.lr_scheduler, resumed["scheduler"])
            if resumed.get("scaler"):
                self.accelerator.scaler.load_state_dict(resumed["scaler"])
        elif self._span.growth is not None and self.eval_dataset is not None and self.args.eval_after_growth:
            self.evaluate()
        set_seed(self.args.seed + self._span.number)
        self._pace.begin(self._span, self.state.global_step, resumed.get("seconds", 0.0))
        return prepared

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The stage's scheduler, by `lr_span` and `rewarm_steps`."""
        if self.lr_scheduler is None:
            own = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = stage_scheduler(self.args, cast(Any, own), self._span, self.spans[-1].end_step)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: states enter once model and optimizer are prepared."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each rank goes on with its own random numbers and sums of losses; other ranks begin with new ones."""
        if len(self._random) == self.ranks.count:
            set_random_state(self._random[self.ranks.rank])
        elif self._random:
            set_seed(self.args.seed + self._span.number + self.state.global_step)
        if self._losses is not None:  # Trainer begins its means of losses anew just before it calls this
            pending, own = self._losses["pending"], self.ranks.rank
            same = len(pending) == self.ranks.count
            self._tr_loss.fill_(pending[own] if same else math.fsum(pending) / len(pending))
            self._total_loss_scalar, self._globalstep_last_logged = self._losses["total"], self._losses["logged"]
            self._losses = None

    # ---- Steps -------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; watches for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        self._soundness.watch(loss)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, but stops where the loss has not been finite, before that is logged or saved."""
        if self.control.should_log or self.control.should_save:
            self._check_soundness(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _check_soundness(self, grad_norm: Any = None) -> None:
        number = self._span.number
        newest = list_checkpoints(self.run, number) or ([self.run.stage_dir(number - 1)] if number else [])
        # A loss scale that is too high makes gradients infinite; such a step is skipped.
        self._soundness.check(None if self.accelerator.scaler else grad_norm, newest[0] if newest else None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of the stage in training."""
        self.store_flos()
        keep_callback_states(self)
        scaler = self.accelerator.scaler
        resumption = {
            "seconds": self._pace.stage_seconds,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": {
                "total": self._total_loss_scalar,
                "logged": self._globalstep_last_logged,
                "pending": self.ranks.all_gather(float(self._tr_loss)),
            },
        }
        with self._pace.paused():
            save_checkpoint(
                self.run,
                self._span.number,
                resumption,
                self._setup.states(self),
                self.model,
                self.processing_class,
                self.state,
                self.args.max_shard_size,
                self.args.save_total_limit,
            )
        if len(list_checkpoints(self.run, self._span.number)) > 1:  # the newest may turn out to be corrupt
            self._drop_optimizer_state(self._span.number - 1)

    def _drop_optimizer_state(self, number: int) -> None:
        """Remove a stage's optimizer state, where the next stage has enough of its own to resume from."""
        if number >= 0 and self.ranks.is_first and not self.args.keep_optimizer_states:
            for path in self.run.optimizer_files(number):
                path.unlink()

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, with a `perplexity` beside each loss, and left out of the stage's seconds.

        Of several data sets, by name, each has its loss, and `eval_loss` is their mean by the shares that the sources
        of these names have in the mixture; where it has no such sources, the plain mean.

        The loss is the mean over all blocks, on any number of ranks: these are given whole batches only, where
        `Trainer` would fill up the last ones with blocks that it has seen, and count them in.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        given = self.args.per_device_eval_batch_size
        single = self.eval_dataset[data] if isinstance(data, str) else data
        if self.ranks.count > 1 and hasattr(single, "__len__") and not isinstance(single, dict):
            self.args.per_device_eval_batch_size = find_largest_divisor(len(single), given)
        try:
            with self._pace.paused():
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.args.per_device_eval_batch_size = given
        if isinstance(data, dict):
            together = {f"{metric_key_prefix}_loss": self._mean_over_sources(metrics, data, metric_key_prefix)}
            self.log(together)
            metrics |= together
        return metrics

    def _mean_over_sources(self, metrics: dict[str, float], names: Iterable[str], prefix: str) -> float:
        weights = {name: self.blocks.weights.get(name, 0.0) for name in names}
        if not any(weights.values()):
            weights = dict.fromkeys(weights, 1.0)
        losses = {name: metrics[f"{prefix}_{name}_loss"] for name in weights}
        return math.fsum(weights[name] * losses[name] for name in weights) / math.fsum(weights.values())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; adds stage, tokens, FLOPs, speed and perplexities, and counts epochs over the corpus."""
        tokens, flops = self._span.at_step(self.state.global_step)
        logs.update({"stage": self._span.number, "tokens": tokens, "train_flops": flops})
        if "loss" in logs:
            logs.update(self._pace.measure(self._span, self.state.global_step))
        for name in [name for name in logs if name.startswith("eval_") and name.endswith("loss")]:
            logs[name.removesuffix("loss") + "perplexity"] = compute_perplexity(logs[name])
        if "train_runtime" in logs:
            done = self.state.global_step - self._first_step
            logs["train_steps_per_second"] = round(done / logs["train_runtime"], 3)
            logs["train_samples_per_second"] = round(done * self._span.blocks_per_step / logs["train_runtime"], 3)
            # Over all of the stage, where Trainer divides by the steps of this call.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._span.first_step, 1)
        self.state.epoch = tokens / (len(self.blocks) * self.facts.block_size)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of a batch by `cost.flops_per_token`, the number that planner and report use."""
        return round(inputs["input_ids"].numel() * self._span.flops / max(self._span.tokens, 1))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: a callback publishes finished stages, where `push_to_hub` asks for it."""

    def push_to_hub(self, *args: Any, **kwargs: Any) -> str:
        """Not supported: what is in training is no finished stage.

        Raises:
            RunError: with what publishes those.
        """
        raise RunError(
            "the trainer pushes nothing itself; use `slop_hf.publish_stage`, or `slop publish RUN --to NAME`"
        )

    def _get_output_dir(self, trial: Any) -> str:
        """Where the stage in training keeps its checkpoints."""
        return str(Path(self.run.running_dir(self._span.number)))


@contextmanager
def _without_collecting() -> Iterator[None]:
    """A block in which `gc.collect` looks at what the block has made only."""
    if gc.get_freeze_count():  # somebody else's, which `unfreeze` would undo
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
