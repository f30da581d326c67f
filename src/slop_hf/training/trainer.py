"""`SlopTrainer`: transformers' Trainer over the stages of a growth schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerState, default_data_collator
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..cost.hours import CostModel
from ..data.order import BlockOrder, consumed
from ..data.packing import MixedBlocks
from ..data.tokenizing import vocabulary_of
from ..errors import RunError
from ..growth import GrownStateReader, hide_progress_bars, plan_growth
from ..runs.directory import STATE_FILE, RunDirectory, RunFacts
from ..schedule import GrowthSchedule
from .arguments import ADAMW, SlopTrainingArguments
from .batches import count_blocks_per_step, resolve_per_stage, share_batches
from .callbacks import StageCallback, StageEnd
from .checkpoints import read_resumption
from .checks import (
    check_blocks,
    check_document_mask,
    check_growths,
    check_launch,
    check_model,
    check_publishing,
    describe_repeated_data,
    describe_space_shortage,
    with_inits,
)
from .divergence import Soundness
from .learning_rate import check_scheduler
from .loggers import continue_curves
from .preemption import StopOnSignal
from .progress import RunProgress
from .ranks import Ranks
from .stage_record import HELD_OUT, stage_record
from .resuming import Position, begin, resume
from .saving import save_stage
from .spans import StageSpan, compute_stage_spans
from .stage_trainer import StageTrainer
from .states import Setup, WholeSetup
from .run_timer import Pace, peak_of_device

logger = logging.get_logger(__name__)


class SlopTrainer(StageTrainer):
    """Trains a model through a growth schedule: each stage for its tokens, the weights grown between.

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
        check_publishing(args.push_to_hub, kwargs.get("callbacks"))
        self.schedule = with_inits(schedule, args.growth_init)
        self.run = RunDirectory(args.output_dir)
        check_model(model, schedule, kwargs.get("processing_class"))
        block_size = check_blocks(train_dataset, model)
        self.blocks = MixedBlocks.wrap(train_dataset)
        held_out = kwargs.get("eval_dataset")
        if isinstance(held_out, dict):  # such as `Corpus.held_out`
            if len(held_out) == 1 and list(held_out) == list(self.blocks.parts):
                (held_out,) = held_out.values()  # the loss of the only source is `eval_loss`
            kwargs["eval_dataset"] = held_out or None
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
        self._lay_out(self.ranks.from_first(RunFacts.load(self.run)), block_size)
        check_growths(self.spans, model.config)
        check_document_mask(train_dataset, model, [batches.micro_batch_size for batches in self._batches])
        check_scheduler(args, self.spans)
        self._span = self.spans[0]
        self._resumed, self._random = {}, []
        self._soundness = Soundness(self.ranks)
        self._pace = self._begin_pace(args)
        self._stop = StopOnSignal(self.ranks)
        self._progress = RunProgress(lambda: self._span, self.spans)
        if not args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(self._progress)
        self.add_callback(self._stop)
        self.add_callback(StageEnd(lambda: self._span.end_step))

    def _lay_out(self, begun: RunFacts | None, block_size: int) -> None:
        """Steps, blocks and batches of all stages; a run that has begun keeps its batches on any number of devices."""
        args, stages = self.args, len(self.schedule.structures)
        seed = args.seed if args.data_seed is None else args.data_seed
        per_step = count_blocks_per_step(args, block_size, self.ranks.count, stages)
        if begun is not None:
            asked, per_step = per_step, begun.batches(stages)
            if args.batch_tokens is not None and asked != per_step:
                logger.warning(f"batch_tokens {args.batch_tokens} is not what the run began with, and is left out")
        self.facts = RunFacts(
            block_size,
            len(self.blocks),
            tuple(per_step),
            seed,
            data=self.blocks.fingerprint,
            vocabulary=self._vocabulary(),
        )
        self.spans = compute_stage_spans(self.schedule, self.model.config, block_size, per_step)
        self._batches = share_batches(args, per_step, self.ranks.count)
        self._rates = resolve_per_stage(args.stage_learning_rates, args.learning_rate, stages, "stage_learning_rates")

    def _vocabulary(self) -> str:
        tokenizer = self.processing_class
        return vocabulary_of(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else ""

    def _begin_pace(self, args: SlopTrainingArguments) -> Pace:
        half = args.bf16 or args.fp16 or self._dtype in (torch.bfloat16, torch.float16)
        tf32 = bool(args.tf32) or torch.backends.cuda.matmul.allow_tf32
        known = peak_of_device(args.device, half=half, tf32=tf32)
        peak = args.peak_tflops * 1e12 if args.peak_tflops else known
        cost_model = None if args.cost_model is None else CostModel.from_yaml(args.cost_model)
        return Pace(self.spans, self.ranks.count, peak, cost_model)

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
        # Ranks that look for a run at different moments may see different things.
        resume_from_checkpoint = self.ranks.from_first(resume_from_checkpoint)
        if resume_from_checkpoint:
            init = self.args.growth_init
            position = resume(self.run, self.schedule, self.facts, self.ranks, resume_from_checkpoint, init)
        else:
            position = begin(self.run, self.schedule, self.facts, self.ranks)
        self._warn()
        self._continue_curves(position)
        self.state = TrainerState()
        if position.stage and position.checkpoint is None:
            self.state = TrainerState.load_from_json(str(self.run.stage_dir(position.stage - 1) / STATE_FILE))
        output = TrainOutput(self.state.global_step, float("nan"), {})
        try:
            with self._stop.watching():
                for span in self.spans[position.stage :]:
                    self._span = span
                    output = self._train_stage(span, position, ignore_keys_for_eval)
                    if self.state.global_step == span.end_step:
                        self._finish(span)
                    step, last = self.state.global_step, self.spans[-1].end_step
                    if (self._stop.stopped or step < span.end_step) and step < last:
                        logger.warning(f"stopped at step {step} of {last}, in {span.name}; resume to go on")
                        break
        finally:
            self._progress.close()
        if position.stage == len(self.spans):  # all was done before
            self._release()
            with hide_progress_bars():
                final = self._model_class.from_pretrained(
                    self.run.stage_dir(position.stage - 1), dtype="auto", attn_implementation=self._attention
                )
            self._take(cast(PreTrainedModel, final))
        return output

    def _train_stage(self, span: StageSpan, position: Position, ignore_keys: list[str] | None) -> TrainOutput:
        """Train one stage for its tokens, from its beginning or from a checkpoint inside it."""
        checkpoint = position.checkpoint if span.number == position.stage else None
        batches = self._batches[span.number]
        if checkpoint is not None:
            self._resumed = read_resumption(checkpoint)
            self._change_model(checkpoint)
        elif span.growth is not None:
            self._resumed = {}
            self._change_model(self.run.stage_dir(span.number - 1), span)
        self._setup.begin_stage(batches.micro_batch_size, batches.accumulation_steps)
        # A stage without tokens is prepared and evaluated like every other: no epochs over one step's blocks.
        blocks = span.blocks or self.facts.blocks_per_step[span.number]
        stretch = BlockOrder(self.blocks, span.first_block, blocks, self.facts.data_seed)
        changes = {
            "per_device_train_batch_size": batches.micro_batch_size,
            "gradient_accumulation_steps": batches.accumulation_steps,
            "num_train_epochs": float(span.steps > 0),
            "learning_rate": self._rates[span.number],
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
            plan = plan_growth(config, span.growth, seed=self._growth_seed(span), noise=self.args.growth_noise)
            if self.args.carry_optimizer_state and not moments and self.spans[span.number - 1].end_step:
                logger.warning(f"{directory} has no optimizer state any more: AdamW begins anew in {span.name}")
            moments = moments and self.args.carry_optimizer_state
            logger.info(f"{span.name}: growing from {plan.old} to {plan.new}, {span.parameters:,} parameters")
        self._entering = GrownStateReader(directory, config, plan, moments=moments)
        config = config if plan is None else plan.config()
        config._attn_implementation = self._attention
        config.use_cache = self.args.use_cache
        model = self._setup.empty_model(self._model_class, config, self._dtype)
        if self._generation_config is not None:
            model.generation_config = type(self._generation_config).from_dict(self._generation_config.to_dict())
        self._take(model)

    def _growth_seed(self, span: StageSpan) -> int:
        return self.args.growth_seed + span.number

    def _finish(self, span: StageSpan) -> None:
        """Evaluate the stage's model and write its directory."""
        self._check_soundness()
        seconds = self._pace.stage_seconds
        history = list(self.state.log_history)
        metrics = self.evaluate() if self.eval_dataset is not None and self.args.eval_before_growth else {}
        if HELD_OUT in metrics:  # the last step may have been the one
            self._soundness.watch(torch.tensor(metrics[HELD_OUT]))
            self._check_soundness()
        seed, size = self.facts.data_seed, self.facts.block_size
        data = consumed(self.blocks, seed, size, span.first_block, span.blocks)
        devices, growth_seed, noise = self.ranks.count, self._growth_seed(span), self.args.growth_noise
        record = stage_record(span, history, metrics, seconds, devices, growth_seed, noise, data, self.facts)
        states = self._setup.states(self)
        save_stage(self.run, record, states, self.model, self.processing_class, self.state, self.args.max_shard_size)
        self._drop_optimizer_state(span.number - 1)
        told = [callback for callback in self.callback_handler.callbacks if isinstance(callback, StageCallback)]
        for callback in sorted(told, key=lambda callback: callback.publishes):
            callback.on_stage_written(self.run, span.number, self.ranks)

    def _continue_curves(self, position: Position) -> None:
        if self.ranks.is_first:
            begun = RunFacts.load(self.run)
            run_id = begun.run_id if begun is not None and begun.run_id else self.run.path.resolve().name
            first_step = position.first_step(self.spans)
            continue_curves(self.callback_handler.callbacks, self.args, self.run, run_id, first_step)

    def _warn(self) -> None:
        """Say before training what may not have been meant."""
        if (optim := getattr(self.args.optim, "value", self.args.optim)) not in ADAMW:
            logger.warning(f"checkpoints keep AdamW's state only: a run that is resumed begins a new {optim}")
        for said in describe_repeated_data(self.blocks, self.spans[-1], self.facts):
            logger.warning(said)
        if self.ranks.is_first and (warning := describe_space_shortage(self.spans, self.run.path, self.args.save_total_limit)):
            logger.warning(warning)
