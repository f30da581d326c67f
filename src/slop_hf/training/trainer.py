"""`SlopTrainer`: transformers' Trainer over the stages of a growth schedule."""

from __future__ import annotations

import gc
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerState, default_data_collator, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..data.order import BlockOrder
from ..errors import RunError
from ..growth import StateStream, no_progress_bars, plan_growth
from ..records import STATE_FILE, RunDirectory
from ..schedule import GrowthSchedule
from .arguments import SlopTrainingArguments
from .batches import blocks_per_step, stage_batches
from .boundary import enter
from .callbacks import StageEnd
from .checkpoints import checkpoints, read_resume, set_random_state
from .checks import check_blocks, check_growths, check_launch, check_model, with_inits
from .learning_rate import restore, stage_scheduler
from .preemption import StopOnSignal
from .ranks import Ranks
from .recording import MAX_EXPONENT, RunFacts, stage_record
from .resuming import Position, begin, resume
from .saving import save_checkpoint, save_stage
from .soundness import Soundness
from .spans import StageSpan, stage_spans
from .states import Setup, WholeSetup

logger = logging.get_logger(__name__)


class SlopTrainer(Trainer):
    """Trains a model through a growth schedule: each stage for its tokens, weights and AdamW's moments grown between.

    It is a `transformers.Trainer`: callbacks, `report_to`, `compute_metrics` and `processing_class` work as they do
    there, and `on_train_begin` and `on_train_end` come once a stage. `state.global_step`, the log history and every
    logged entry's `tokens` and `train_flops` count over the whole run; `stage` says where.

    It runs in one process, in several that each hold the model (DistributedDataParallel), or under DeepSpeed ZeRO-3,
    where no rank ever holds a whole model: what crosses a boundary goes through the stage's files, a parameter at a
    time. Files are those of `records.RunDirectory`; checkpoints inside a stage follow `save_steps`, and can be resumed
    from with another number of processes. After SIGTERM a checkpoint is saved and training stops.

    Args:
        model: the initial model, with the schedule's initial dims.
        args: the training arguments.
        schedule: the stages, with their tokens.
        train_dataset: map-style, of blocks of equal length with `input_ids`. The trainer shuffles it, and shows no
            block twice within a pass over it.
        kwargs: as for `transformers.Trainer`.

    Raises:
        RunError, DataError: for what cannot be trained, before training begins.
    """

    args: SlopTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: SlopTrainingArguments | None = None,
        *,
        schedule: GrowthSchedule,
        train_dataset: Any,
        **kwargs: Any,
    ) -> None:
        if model is None or kwargs.get("model_init") is not None:
            raise RunError("give the initial model as `model`; `model_init` cannot make the later stages")
        if any(part is not None for part in kwargs.get("optimizers", ())):
            raise RunError("an optimizer belongs to one model, a run has several; choose it with the argument `optim`")
        args = args or SlopTrainingArguments()
        if not isinstance(args, SlopTrainingArguments):
            raise RunError(f"args must be SlopTrainingArguments, got {type(args).__name__}")
        self.schedule = with_inits(schedule, args.growth_init)
        self.run = RunDirectory(args.output_dir)
        check_model(model, schedule, kwargs.get("processing_class"))
        block_size = check_blocks(train_dataset, model)
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        check_launch(args, fsdp=self.is_fsdp_enabled)
        self.ranks = Ranks.of(args)
        self._setup: Setup = WholeSetup(self.ranks)
        if self.is_deepspeed_enabled:
            from . import zero3

            self._setup = zero3.Zero3Setup(self.accelerator.state.deepspeed_plugin, self.ranks)
        # What later models have in common with the first, whose parameters may by then be gone.
        self._model_class, self._dtype = type(model), model.dtype
        self._attention, self._generation_config = model.config._attn_implementation, model.generation_config
        self.blocks = train_dataset
        self._lay_out(RunFacts.load(self.run), block_size)
        check_growths(self.spans, model.config)
        self._span = self.spans[0]
        self._entering: StateStream | None = None
        self._resumed: dict[str, Any] = {}
        self._soundness = Soundness(self.ranks)
        self._stop = StopOnSignal(self.ranks)
        self.add_callback(self._stop)
        self.add_callback(StageEnd(lambda: self._span.end_step))
        self._seconds_before = self._stage_began = self._evaluation_seconds = 0.0
        self._first_step = 0  # of this call; later ones may begin where a checkpoint ended

    def _lay_out(self, begun: RunFacts | None, block_size: int) -> None:
        """Steps, blocks and batches of all stages; a run that has begun keeps its batches on any number of devices."""
        args, stages = self.args, len(self.schedule.structures)
        seed = args.seed if args.data_seed is None else args.data_seed
        if begun is not None and len(begun.blocks_per_step) == stages:
            per_step = begun.blocks_per_step
        else:
            per_step = blocks_per_step(args, block_size, self.ranks.count, stages)
        self.facts = RunFacts(block_size, len(self.blocks), tuple(per_step), seed)
        self.spans = stage_spans(self.schedule, cast(Any, self.model).config, block_size, per_step)
        self._batches = stage_batches(args, per_step, self.ranks.count)

    # ---- The run -----------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run the schedule, or what is left of it.

        Args:
            resume_from_checkpoint: True goes on where the run in `output_dir` stopped, inside a stage or at a
                boundary; the final weights are those of an uninterrupted run. A path to one of the run's
                `checkpoint-N` goes on from there.
            trial: not supported.
            ignore_keys_for_eval: as for `Trainer.train`.

        Raises:
            RunError: where `output_dir` holds another run, or nothing to resume; where the loss is not finite.
        """
        if trial is not None:
            raise RunError("hyper-parameter search over a staged run is not supported; search with plain Trainer")
        if resume_from_checkpoint:
            position = resume(self.run, self.schedule, self.facts, self.ranks, resume_from_checkpoint)
        else:
            position = begin(self.run, self.schedule, self.facts, self.ranks)
        self._warn_of_repeats()
        self.state = TrainerState()
        if position.stage and position.checkpoint is None:
            self.state = TrainerState.load_from_json(str(self.run.stage_dir(position.stage - 1) / STATE_FILE))
        output = TrainOutput(self.state.global_step, float("nan"), {})
        with self._stop.watching():
            for span in self.spans[position.stage :]:
                self._span = span
                output = self._train_stage(span, position, ignore_keys_for_eval)
                if self.state.global_step == span.end_step:
                    self._finish(span)
                if self._stop.stopped or self.state.global_step < span.end_step:
                    where = f"step {self.state.global_step} of {self.spans[-1].end_step}, in {span.name}"
                    logger.warning(f"stopped at {where}; resume to go on")
                    break
        if position.stage == len(self.spans):  # all was done before
            self._release()
            with no_progress_bars():
                final = self._model_class.from_pretrained(self.run.stage_dir(position.stage - 1), dtype="auto")
            self._take(cast(PreTrainedModel, final))
        return output

    def _train_stage(self, span: StageSpan, position: Position, ignore_keys: list[str] | None) -> TrainOutput:
        """Train one stage for its tokens, from its beginning or from a checkpoint inside it."""
        checkpoint = position.checkpoint if span.number == position.stage else None
        batches = self._batches[span.number]
        if checkpoint is not None:
            self._resumed = read_resume(checkpoint)
            self._change_model(checkpoint)
        elif span.growth is not None:
            self._resumed = {}
            self._change_model(self.run.stage_dir(span.number - 1), span)
        self._seconds_before = self._resumed.get("seconds", 0.0)
        self._setup.begin_stage(batches.micro_batch_size, batches.accumulation_steps)
        # A stage without tokens is prepared and evaluated like every other: no epochs over one step's blocks.
        blocks = span.blocks or self.facts.blocks_per_step[span.number]
        stretch = BlockOrder(self.blocks, span.first_block, blocks, self.facts.data_seed)
        changes = {
            "per_device_train_batch_size": batches.micro_batch_size,
            "gradient_accumulation_steps": batches.accumulation_steps,
            "num_train_epochs": float(span.steps > 0),
        }
        before = {name: getattr(self.args, name) for name in changes}
        self._set_arguments(changes)
        self.train_dataset = stretch
        try:
            path = None if checkpoint is None else str(checkpoint)
            return super().train(resume_from_checkpoint=path, ignore_keys_for_eval=ignore_keys)
        finally:
            self.train_dataset = self.blocks
            self._set_arguments(before)

    def _set_arguments(self, changes: dict[str, Any]) -> None:
        for name, value in changes.items():
            setattr(self.args, name, value)
        self._train_batch_size = self.args.train_batch_size

    def _change_model(self, directory: Path, span: StageSpan | None = None) -> None:
        """Replace the model by an empty one, which the directory's states will fill; grown for a stage."""
        assert self.model is not None
        self._release()
        config = self._model_class.config_class.from_pretrained(directory)
        plan, moments = None, bool(list(directory.glob("optimizer*.safetensors")))
        if span is not None and span.growth is not None:
            plan = plan_growth(config, span.growth, seed=self._growth_seed(span))
            moments = moments and self.args.carry_optimizer_state
            logger.info(f"{span.name}: growing from {plan.old} to {plan.new}, {span.parameters:,} parameters")
        self._entering = StateStream(directory, config, plan, moments=moments)
        config = config if plan is None else plan.config()
        config._attn_implementation = self._attention
        config.use_cache = self.args.use_cache
        model = self._setup.empty_model(self._model_class, config, self._dtype)
        if self._generation_config is not None:
            model.generation_config = type(self._generation_config).from_dict(self._generation_config.to_dict())
        self._take(model)

    def _release(self) -> None:
        """Let go of the model in training and all that belongs to it, so that the next one has its memory."""
        wrapped = self.model_wrapped
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
            torch.compiler.reset()  # another shape: what was compiled is of no use, and would count as a recompilation
            logger.info(f"{self._span.name} will be compiled anew")

    def _take(self, model: PreTrainedModel) -> None:
        """Make `model` the one in training."""
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = model
        self.callback_handler.model = model

    def _growth_seed(self, span: StageSpan) -> int:
        return self.args.growth_seed + span.number

    def _finish(self, span: StageSpan) -> None:
        """Evaluate the stage's model and write its directory."""
        self._soundness.check(None, self._last_good())
        seconds = self._stage_seconds()
        metrics = self.evaluate() if self.eval_dataset is not None and self.args.eval_before_growth else {}
        history = self.state.log_history
        record = stage_record(span, history, metrics, seconds, self.ranks.count, self._growth_seed(span))
        model = cast(PreTrainedModel, self.model)
        states = self._setup.states(self)
        save_stage(self.run, record, states, model, self.processing_class, self.state, self.args.max_shard_size)
        self._drop_optimizer_state(span.number - 1)

    def _drop_optimizer_state(self, number: int) -> None:
        """Remove a stage's optimizer state once the next stage has something of its own to resume from."""
        if number >= 0 and self.ranks.is_first and not self.args.keep_optimizer_states:
            for path in self.run.optimizer_files(number):
                path.unlink()

    def _last_good(self) -> Path | None:
        """Where a run that cannot go on can be resumed from."""
        number = self._span.number
        newest = checkpoints(self.run, number) or ([self.run.stage_dir(number - 1)] if number else [])
        return newest[0] if newest else None

    def _stage_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._stage_began - self._evaluation_seconds

    def _warn_of_repeats(self) -> None:
        last = self.spans[-1]
        passes = (last.first_block + last.blocks) / len(self.blocks)
        if passes > 1:
            logger.warning(
                f"the schedule needs {last.first_token + last.tokens:,} tokens, the corpus has "
                f"{len(self.blocks) * self.facts.block_size:,}: the run will make {passes:.1f} passes over it"
            )

    # ---- Trainer's own steps, on the run's axis ----------------------------------------------------------------

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
        entering, self._entering = self._entering, None
        if entering is not None:
            enter(self._setup.states(self), entering)
        resumed, self._resumed = self._resumed, {}
        if resume_from_checkpoint is not None:
            restore(cast(Any, self.lr_scheduler), resumed["scheduler"])
            if resumed.get("scaler"):
                self.accelerator.scaler.load_state_dict(resumed["scaler"])
        elif self._span.growth is not None and self.eval_dataset is not None and self.args.eval_after_growth:
            self.evaluate()
        set_seed(self.args.seed + self._span.number)
        self._random = resumed.get("random", [])
        self._stage_began, self._evaluation_seconds = time.perf_counter(), 0.0
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
        """Each rank goes on with its own random numbers; another number of ranks begins with new ones."""
        if len(self._random) == self.ranks.count:
            set_random_state(self._random[self.ranks.rank])
        elif self._random:
            set_seed(self.args.seed + self._span.number + self.state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint of the stage in training."""
        self.store_flos()
        self._save_callback_states()
        scaler = self.accelerator.scaler
        resumption = {
            "seconds": self._stage_seconds(),
            "scheduler": cast(Any, self.lr_scheduler).state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        save_checkpoint(
            self.run,
            self._span.number,
            resumption,
            self._setup.states(self),
            cast(PreTrainedModel, self.model),
            self.processing_class,
            self.state,
            self.args.max_shard_size,
            self.args.save_total_limit,
        )
        self._drop_optimizer_state(self._span.number - 1)

    def _save_callback_states(self) -> None:
        """Put what callbacks want to keep into the trainer's state, as Trainer does."""
        kept: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                kept[name] = [*kept.get(name, []), callback.state()]
        self.state.stateful_callbacks = {name: one if len(one) > 1 else one[0] for name, one in kept.items()}

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; watches for a loss that is not finite."""
        loss = super().training_step(*args, **kwargs)
        self._soundness.watch(loss)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, but stops where the loss has not been finite, before that is logged or saved."""
        if self.control.should_log or self.control.should_save:
            self._soundness.check(grad_norm, self._last_good())
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As `Trainer.evaluate`, with a `perplexity` beside each loss, and left out of the stage's seconds."""
        began = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._evaluation_seconds += time.perf_counter() - began

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; adds stage, tokens, FLOPs and perplexities, and counts epochs over the corpus."""
        tokens, flops = self._span.at_step(self.state.global_step)
        logs.update({"stage": self._span.number, "tokens": tokens, "train_flops": flops})
        for name in [name for name in logs if name.startswith("eval_") and name.endswith("loss")]:
            logs[name.removesuffix("loss") + "perplexity"] = math.exp(min(logs[name], MAX_EXPONENT))
        if "train_runtime" in logs:
            done = self.state.global_step - self._first_step
            logs["train_steps_per_second"] = round(done / logs["train_runtime"], 3)
            logs["train_samples_per_second"] = round(done * self._span.blocks_per_step / logs["train_runtime"], 3)
        self.state.epoch = tokens / (len(self.blocks) * self.facts.block_size)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of a batch by `cost.flops_per_token`, the number that planner and report use."""
        return round(inputs["input_ids"].numel() * self._span.flops / max(self._span.tokens, 1))
