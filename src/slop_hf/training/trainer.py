"""`SlopTrainer`: transformers' Trainer over the stages of a growth schedule."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerControl,
    TrainerState,
    default_data_collator,
    set_seed,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ..cost.hours import CostModel
from ..data.order import count_consumed_tokens
from ..data.packing import Blocks, MixedBlocks, hash_sample
from ..data.tokenizing import hash_vocabulary
from ..errors import RunError
from ..growth import GrownStateReader, hide_progress_bars, plan_growth
from ..growth.adamw import StepPolicy
from ..runs.directory import STATE_FILE, RunDirectory, RunFacts, list_checkpoints
from ..runs.records import EVAL_LOSS, compute_perplexity
from ..schedule import GrowthSchedule
from .arguments import ADAMW_STATE, SlopTrainingArguments, name_optimizer
from .block_lengths import EqualBlocks, check_batch, check_collator, check_lengths
from .callbacks import StageEnd
from .checkpoints import GrowthFacts, LossSums, Resumption, read_resumption
from .checks import (
    check_adapters,
    check_blocks,
    check_document_mask,
    check_launch,
    check_model,
    check_precision,
    check_publishing,
    describe_repeated_data,
    describe_space_shortage,
    describe_uncorrected_updates,
)
from .divergence import NonFiniteLossGuard
from .freezing import find_frozen, freeze_parameters, list_frozen_of_stages
from .held_out_loss import HeldOutLoss
from .launch import is_fsdp_requested
from .learning_rate import build_stage_scheduler, check_scheduler, restore_scheduler, set_new_parameter_rates
from .leftovers import remove_leftovers
from .loggers import continue_curves, end_curves
from .muon import MUON, build_muon
from .parameter_groups import list_adding_stages, split_groups
from .preemption import StopOnSignal
from .progress import ProgressFile, RunProgress
from .random_state import set_random_state
from .ranks import Ranks
from .resuming import Position, begin_run, resume_run
from .run_lock import lock_on_all_ranks
from .run_plan import RunPlan, plan_run, with_inits
from .run_timer import RunTimer, find_peak_flops
from .saving import Snapshot, save_checkpoint, save_stage, store_callback_states
from .spans import StageSpan
from .stage_record import build_stage_record, describe_growth
from .stage_reports import report_stages
from .state_io import load_states
from .states import Strategy

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import DataLoader, Dataset

_is_frozen = False  # whether objects were frozen when `_has_frozen_objects` was last asked
logger = logging.get_logger(__name__)


class _Stopped(Exception):
    """A callback asked to stop before the first step of a stage."""


class SlopTrainer(Trainer):
    """Trains a model through a growth schedule: each stage for its tokens, with growth of the weights in between.

    It is a `transformers.Trainer`: callbacks, `report_to`, `compute_metrics` and `processing_class` work as they do
    there; `on_train_begin` and `on_train_end` are called once per stage. `state.global_step`, the log history and the
    `tokens` and `train_flops` of every log entry count over the whole run; `stage` is the stage of the entry.
    Parameters that are frozen (`requires_grad` False) when training begins stay frozen, and so do copies of frozen
    layers.

    It runs in one process, in several processes that each hold the model (DistributedDataParallel), under DeepSpeed
    ZeRO-3 or under FSDP2. No rank ever holds a whole sharded model: at a boundary, states pass through the stage's
    files one parameter at a time. `runs.directory.RunDirectory` describes the files. Checkpoints inside a stage follow
    `save_steps`, and can be resumed from with another number of processes and under another of these strategies.

    After SIGTERM or Ctrl-C the trainer saves a checkpoint and stops. It does the same if a callback sets
    `control.should_training_stop`; after the last step of a stage, the stage is finished instead.

    It overrides private methods of `Trainer` (`_build_accelerator_args`, `_init_training_state`,
    `_prepare_for_training`, `_save_checkpoint`, `_load_rng_state`, `_maybe_log_save_evaluate`), and
    `create_accelerator_and_postprocess`; `tests/training` fails if a release of transformers changes them.

    Args:
        model: initial model, with the schedule's initial dims.
        args: training arguments.
        schedule: growth schedule with tokens.
        train_dataset: map-style data set of blocks of equal length with `input_ids`. The trainer shuffles it, and
            repeats no block within a pass over it.
        kwargs: further arguments of `transformers.Trainer`.

    Raises:
        RunError, DataError, GrowthError: before training begins, if the run cannot be trained.
    """

    # Attributes of `Trainer`, whose types mypy does not read.
    args: SlopTrainingArguments
    control: TrainerControl
    is_fsdp_enabled: bool
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: SlopTrainingArguments | None = None,
        *,
        schedule: GrowthSchedule,
        train_dataset: Blocks,
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
        schedule = with_inits(schedule, args.growth_init)
        check_adapters(model)
        check_model(model, schedule, kwargs.get("processing_class"))
        block_size = check_blocks(train_dataset, model)
        self.blocks = MixedBlocks.wrap(train_dataset)
        check_lengths(self.blocks, block_size)
        held_out = kwargs.get("eval_dataset")
        if isinstance(held_out, dict):  # such as `Corpus.held_out`
            if len(held_out) == 1 and list(held_out) == list(self.blocks.parts):
                (held_out,) = held_out.values()  # the loss of the only source is `eval_loss`
            kwargs["eval_dataset"] = held_out or None
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        check_launch(args)
        collator = self._get_collator_with_removed_columns(self.data_collator)
        check_collator(collator, self.blocks[0], block_size)
        if not self.is_deepspeed_enabled:
            check_precision(model, args)
        self._init_run(model, schedule, block_size)
        self._init_stage()
        self._add_observers(block_size)

    def _init_run(self, model: PreTrainedModel, schedule: GrowthSchedule, block_size: int) -> None:
        """Plan the run, and note what holds in all of its stages."""
        args = self.args
        self.run = RunDirectory(args.output_dir)
        self.ranks = Ranks.from_args(args)
        self.plan = self._plan_run(model, schedule, block_size)
        self.schedule, self.spans = self.plan.schedule, self.plan.spans
        check_document_mask(self.blocks, model, [batches.micro_batch_size for batches in self.plan.batches])
        check_scheduler(args, self.spans)
        self._strategy = self._choose_strategy()
        # Traits that later models share with the first one, whose parameters may be gone by then.
        self._model_class, self._dtype = type(model), model.dtype
        self._attention, self._generation_config = model.config._attn_implementation, model.generation_config
        self._added: list[dict[str, int]] = []  # stage that added each parameter of each stage, if groups are split
        if self._splits_groups:
            self._added = list_adding_stages(self.spans, model.config)
        self._frozen: list[frozenset[str]] = []  # frozen parameters of each stage, once training begins

    def _init_stage(self) -> None:
        """Set the state of the stage in training to that before the first one; `train` keeps it up to date."""
        self._span: StageSpan = self.spans[0]
        self._reader: GrownStateReader | None = None  # source of the states of the next model
        self._resumption: Resumption = {}  # content of the checkpoint from which the stage resumes
        self._growth: GrowthFacts | None = None  # the growth that it began with
        self._losses: LossSums | None = None  # its sums of losses, until they are restored
        self._first_step = 0  # first step of this call of `Trainer.train`, which may begin at a checkpoint
        self._saved_step = -1  # step of the newest checkpoint of this call
        self._newest_evaluation: tuple[int, dict[str, float]] = (-1, {})  # step and metrics, of this call

    def _add_observers(self, block_size: int) -> None:
        """Watch losses, speed and signals during training."""
        self._guard = NonFiniteLossGuard(self.ranks)
        self._held_out_loss = HeldOutLoss(self.ranks, block_size)
        self._timer = self._build_timer()
        self._stop = StopOnSignal(self.ranks)
        self._progress = RunProgress(lambda: self._span, self.spans)
        if not self.args.disable_tqdm:
            self.remove_callback(DEFAULT_PROGRESS_CALLBACK)
            self.add_callback(self._progress)
        self.add_callback(ProgressFile(self.run.path, lambda: self._span, self.spans[-1]))
        self.add_callback(self._stop)
        self.add_callback(StageEnd(lambda: self._span.end_step))

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As in `Trainer`, with the way to compile that `compile_layers` asks for."""
        settings: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        if self.args.compile_layers:
            plugin = settings["dynamo_plugin"]
            # A stage may begin with an evaluation in other batches, a resumed stage does not. torch would then compile
            # the steps of only one of them for batches of any size, and their sums would differ in the last bit.
            plugin.use_regional_compilation, plugin.dynamic = True, False
        return settings

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, but with FSDP2 also on CPUs."""
        super().create_accelerator_and_postprocess()
        if is_fsdp_requested(self.args) and not self.is_fsdp_enabled:
            from . import fsdp2

            fsdp2.prepare_accelerator(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def _choose_strategy(self) -> Strategy:
        """Return the strategy of the launch; refuse settings of it whose states could not be carried over a growth."""
        if self.is_deepspeed_enabled:
            from . import zero3

            needs_groups = self._splits_groups or self.plan.facts.optimizer == MUON
            return zero3.Zero3Strategy(self.accelerator, self.ranks, needs_groups=needs_groups)
        if self.is_fsdp_enabled:
            from . import fsdp2

            return fsdp2.Fsdp2Strategy(self.accelerator, self.ranks)
        return Strategy(self.ranks)

    def _plan_run(self, model: PreTrainedModel, schedule: GrowthSchedule, block_size: int) -> RunPlan:
        tokenizer = self.processing_class
        return plan_run(
            schedule,
            self.args,
            model.config,
            block_size=block_size,
            devices=self.ranks.count,
            blocks=len(self.blocks),
            data=self.blocks.fingerprint,
            vocabulary=hash_vocabulary(tokenizer) if isinstance(tokenizer, PreTrainedTokenizerFast) else "",
            sample="" if self.blocks.fingerprint else hash_sample(self.blocks),
            optimizer=name_optimizer(self.args, self.optimizer_cls_and_kwargs),
            # DeepSpeed updates float32 masters, whatever the weights are.
            dtype=str(torch.float32 if self.is_deepspeed_enabled else model.dtype).removeprefix("torch."),
            begun=self.ranks.from_first(RunFacts.load(self.run)),
            strategy="zero3" if self.is_deepspeed_enabled else "fsdp2" if self.is_fsdp_enabled else "replicated",
        )

    def _build_timer(self) -> RunTimer:
        cost_model = self.args.cost_model
        return RunTimer(
            self.spans,
            devices=self.ranks.count,
            peak_flops=find_peak_flops(self.args, self._dtype),
            cost_model=None if cost_model is None else CostModel.from_yaml(cost_model),
        )

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train the stages of the schedule, or the remaining ones of a resumed run.

        Args:
            resume_from_checkpoint: True to resume the run in `output_dir` where it stopped, inside a stage or at a
                boundary; it ends with the same weights as without the interruption. Or the path of one of the run's
                `checkpoint-N`, to resume from there.
            trial: not supported.
            ignore_keys_for_eval: as for `Trainer.train`.

        Raises:
            RunError: if `output_dir` holds another run, or no run to resume.
            DivergedError: if the loss is no longer finite.
            KeyboardInterrupt: after Ctrl-C, when the state has been saved, so that the program does not continue with
                an unfinished run.
        """
        if trial is not None:
            raise RunError("hyper-parameter search over a staged run is not supported; search with plain Trainer")
        with lock_on_all_ranks(self.run.path, "training", self.ranks):
            return self._train_stages(resume_from_checkpoint, ignore_keys_for_eval)

    def _train_stages(
        self, resume_from_checkpoint: str | bool | None, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        # The first rank decides: ranks that look for a run at different moments may see different things.
        resume_from_checkpoint = self.ranks.from_first(resume_from_checkpoint)
        self._list_frozen()
        if resume_from_checkpoint:
            position = resume_run(self.run, self.plan, self.ranks, resume_from_checkpoint, self.args.growth_init)
        else:
            position = begin_run(self.run, self.plan, self.ranks)
        self._warn()
        if self.ranks.is_first:
            begun, first_step = RunFacts.load(self.run), position.find_step(self.plan)
            run_id = begun.run_id if begun is not None and begun.run_id else self.run.path.resolve().name
            continue_curves(self.callback_handler.callbacks, self.args, self.run, run_id, first_step)
        self.state = TrainerState()
        if position.stage and position.checkpoint is None:
            self.state = TrainerState.load_from_json(str(self.run.stage_dir(position.stage - 1) / STATE_FILE))
        output = TrainOutput(self.state.global_step, float("nan"), {})
        try:
            with self._stop.watch_signals():
                remove_leftovers(
                    self.run,
                    self.ranks,
                    keep_optimizer_states=self.args.keep_optimizer_states,
                    keep_checkpoints=self.args.keep_checkpoints,
                )
                report_stages(self.run, self.callback_handler.callbacks, self.ranks)
                for span in self.spans[position.stage :]:
                    self._span = span
                    output = self._train_stage(span, position, ignore_keys_for_eval)
                    if self.state.global_step == span.end_step:
                        self._finish_stage(span)
                    if self._is_stopped(span):
                        break
        finally:
            self._progress.close()
            end_curves(self.callback_handler.callbacks)
        if self._stop.is_interrupted:
            raise KeyboardInterrupt(f"{self.run.path} was stopped; train(resume_from_checkpoint=True) continues it")
        if position.stage == len(self.spans):  # the run had finished before
            if self.ranks.is_first:
                logger.warning(
                    f"{self.run.path} is finished: its {len(self.spans)} stages had all been trained before"
                )
            self._release_model()
            path = self.run.stage_dir(position.stage - 1)
            with hide_progress_bars():
                model = self._model_class.from_pretrained(
                    path, dtype="auto", attn_implementation=self._attention, trust_remote_code=False
                )
            freeze_parameters(model, self._frozen[-1])
            self._set_model(model)
        return output

    def _list_frozen(self) -> None:
        """Take the frozen parameters from the initial model, which may have been changed up to now."""
        if not self._frozen:
            frozen = find_frozen(self.model)
            self.plan = replace(self.plan, facts=replace(self.plan.facts, frozen=frozen))
            self._frozen = list_frozen_of_stages(frozen, self.spans, self.model.config)

    def _is_stopped(self, span: StageSpan) -> bool:
        """Whether a signal or a callback stops the run in a stage or after it; logged."""
        step, end_step = self.state.global_step, self.plan.end_step
        where = f"in {span.name}, with its state saved" if step > span.first_step else f"before {span.name}"
        if step == span.end_step:
            asked = self.control.should_training_stop and step < end_step  # at the last step, by Trainer itself
            if not self._stop.agree(asked) or span is self.spans[-1]:
                return False
            where = f"after {span.name}"
        if self.ranks.is_first:
            logger.warning(f"stopped at step {step} of {end_step}, {where}; resume to continue")
        return True

    def _warn(self) -> None:
        """Log what the user may not have intended."""
        if (optimizer := self.plan.facts.optimizer) not in (ADAMW_STATE, MUON):
            logger.warning(f"checkpoints keep only AdamW's state: a resumed run starts with a fresh {optimizer}")
        if warning := describe_uncorrected_updates(self.args, self.plan):
            logger.warning(warning)
        for warning in describe_repeated_data(self.blocks, self.plan):
            logger.warning(warning)
        if self.ranks.is_first:
            shortage = describe_space_shortage(self.plan, self.run.path, self.args.save_total_limit)
            if shortage:
                logger.warning(shortage)

    def _train_stage(self, span: StageSpan, position: Position, ignore_keys: list[str] | None) -> TrainOutput:
        """Train one stage for its tokens, from its beginning or from a checkpoint inside it."""
        checkpoint = position.checkpoint if span.number == position.stage else None
        batches = self.plan.batches[span.number]
        self._resumption = {} if checkpoint is None else read_resumption(checkpoint)
        self._growth = self._resumption.get("growth") or describe_growth(span, self.args)
        if checkpoint is not None:
            self._change_model(checkpoint)
        elif span.growth is not None:
            self._change_model(self.run.stage_dir(span.number - 1), span)
        self._strategy.begin_stage(batches.micro_batch_size, batches.accumulation_steps)
        # A stage without tokens is prepared and evaluated like any other: zero epochs over the blocks of one step.
        blocks = span.blocks or self.plan.facts.blocks_per_step[span.number]
        changes = {
            "per_device_train_batch_size": batches.micro_batch_size,
            "gradient_accumulation_steps": batches.accumulation_steps,
            "num_train_epochs": float(span.steps > 0),
            "learning_rate": self.plan.rates[span.number],
        }
        arguments = {name: getattr(self.args, name) for name in changes}
        dataset = self.train_dataset
        self._set_arguments(changes)
        facts = self.plan.facts
        self.train_dataset = EqualBlocks(self.blocks, span.first_block, blocks, facts.data_seed, facts.block_size)
        self._saved_step, self._newest_evaluation = -1, (-1, {})
        self.control.should_training_stop = False  # as `Trainer` does, but only after the evaluation of a grown model
        try:
            path = None if checkpoint is None else str(checkpoint)
            return super().train(resume_from_checkpoint=path, ignore_keys_for_eval=ignore_keys)
        except _Stopped:
            return TrainOutput(self.state.global_step, float("nan"), {})
        finally:
            self.train_dataset = dataset
            self._set_arguments(arguments)

    def _set_arguments(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            setattr(self.args, name, value)
        self._train_batch_size = self.args.train_batch_size

    def _finish_stage(self, span: StageSpan) -> None:
        """Evaluate the stage's model and write its directory."""
        self._check_loss()
        seconds = self._timer.stage_seconds
        history = list(self.state.log_history)
        metrics = {}
        if self.eval_dataset is not None and self.args.eval_before_growth:
            step, newest = self._newest_evaluation
            metrics = newest if step == span.end_step else self.evaluate()
        if EVAL_LOSS in metrics:  # the last step may have been the one that diverged
            self._guard.watch(torch.tensor(metrics[EVAL_LOSS]))
            self._check_loss()
        facts = self.plan.facts
        record = build_stage_record(
            span,
            history=history,
            metrics=metrics,
            seconds=seconds,
            devices=self.ranks.count,
            growth=self._growth,
            data=count_consumed_tokens(self.blocks, facts.data_seed, facts.block_size, span.first_block, span.blocks),
            facts=facts,
        )
        save_stage(self.run, record, self._take_snapshot(), keep_checkpoints=self.args.keep_checkpoints)
        self._drop_optimizer_state(span.number - 1)
        report_stages(self.run, self.callback_handler.callbacks, self.ranks)

    def _take_snapshot(self) -> Snapshot:
        states = self._strategy.get_states(self)
        return Snapshot(
            states, self.model, self._model_class, self.processing_class, self.state, self.args.max_shard_size
        )

    def _drop_optimizer_state(self, number: int) -> None:
        """Remove the optimizer state of a finished stage, now that the next one has enough to resume from."""
        if number >= 0 and self.ranks.is_first and not self.args.keep_optimizer_states:
            for path in self.run.optimizer_files(number):
                path.unlink()

    def _change_model(self, directory: Path, span: StageSpan | None = None) -> None:
        """Replace the model by an empty one, grown if a stage is given; `_reader` will fill it from the directory."""
        assert self.model is not None
        self._release_model()
        config = self._model_class.config_class.from_pretrained(directory, trust_remote_code=False)
        growth, moments = None, bool(list(directory.glob("optimizer*.safetensors")))
        if span is not None and span.growth is not None:
            seed = self.args.growth_seed + span.number
            growth = plan_growth(config, span.growth, seed=seed, noise=self.args.growth_noise)
            carries = self.args.optimizer_state_at_growth != "new"
            if carries and not moments and self.spans[span.number - 1].end_step:
                logger.warning(f"{directory} no longer has an optimizer state: it starts afresh in {span.name}")
            moments = moments and carries
            logger.info(f"{span.name}: growing from {growth.old} to {growth.new}, {span.parameters:,} parameters")
        step: StepPolicy = "per_parameter" if self.args.optimizer_state_at_growth == "kept" else "keep"
        self._reader = GrownStateReader(directory, config, growth, moments=moments, step=step)
        config = config if growth is None else growth.config()
        config._attn_implementation = self._attention
        config.use_cache = self.args.use_cache
        model = self._strategy.build_empty_model(self._model_class, config, self._dtype)
        if self._generation_config is not None:
            model.generation_config = type(self._generation_config).from_dict(self._generation_config.to_dict())
        freeze_parameters(model, self._frozen[self._span.number])
        self._set_model(model)

    def _release_model(self) -> None:
        """Free the model in training, its optimizer and dataloaders, before the next model is built."""
        wrapped = self.model_wrapped
        with _limit_collection():  # everything is still referenced here: a full collection would take 0.3 s in vain
            self.accelerator.free_memory()
        self.model = self.model_wrapped = self.deepspeed = None
        self.optimizer = self.lr_scheduler = None
        for name in ("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"):
            setattr(self.callback_handler, name, None)
        self._strategy.release(wrapped)
        del wrapped
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.args.torch_compile:
            torch.compiler.reset()  # code compiled for other shapes is useless, and counts against a limit
            logger.info(f"{self._span.name} will be compiled again")

    def _set_model(self, model: PreTrainedModel) -> None:
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.model = self.model_wrapped = model
        self.callback_handler.model = model

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: object,
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
            self.state.best_metric, self.state.best_global_step = before.best_metric, before.best_global_step
        self.state.max_steps = self.plan.end_step
        self._first_step = self.state.global_step
        done = self._first_step - self._span.first_step
        return 0, done * self.args.gradient_accumulation_steps

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[object], resume_from_checkpoint: str | None
    ) -> tuple[torch.nn.Module, DataLoader[object]]:
        """Fill the prepared model and its fresh optimizer from the directory that they continue from."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._strategy.finish_preparation(self.model_wrapped)
        reader, self._reader = self._reader, None
        if reader is not None:
            load_states(self._strategy.get_states(self), reader)
        self._losses = self._resumption.get("losses")
        if resume_from_checkpoint is not None:
            restore_scheduler(self.lr_scheduler, self._resumption["scheduler"])
            if scaler := self._resumption.get("scaler"):
                self.accelerator.scaler.load_state_dict(scaler)
        elif self._span.growth is not None and self.eval_dataset is not None and self.args.eval_after_growth:
            self.evaluate()
            if self.control.should_training_stop and self._span.steps:  # `Trainer` would forget it as it begins
                raise _Stopped
        set_seed(self.args.seed + self._span.number)
        self._timer.begin_stage(self._span, self.state.global_step, self._resumption.get("seconds", 0.0))
        return cast("tuple[torch.nn.Module, DataLoader[object]]", prepared)

    @property
    def _splits_groups(self) -> bool:
        """Whether parameters of added layers have steps or learning rates of their own."""
        return self.args.optimizer_state_at_growth == "kept" or self.args.new_parameter_rate != 1

    def create_optimizer(self, model: torch.nn.Module | None = None) -> Optimizer:
        """As `Trainer.create_optimizer`, with parameters of added layers in groups of their own if they need them."""
        is_fresh, number = self.optimizer is None, self._span.number
        if is_fresh and self.plan.facts.optimizer == MUON:
            decayed, rate = self.get_decay_parameter_names(self.model), self._compute_adamw_rate()
            self.optimizer = build_muon(self.model, self.args, decayed, self.ranks, adamw_rate=rate)
        optimizer: Optimizer = super().create_optimizer(model)
        if is_fresh and self._splits_groups:
            keeps = self.args.optimizer_state_at_growth == "kept"
            split_groups(optimizer, self.model, self._added[number], number, has_own_steps=keeps)
        self._strategy.keep_groups(optimizer)
        return optimizer

    def _compute_adamw_rate(self) -> float:
        """Return AdamW's learning rate next to Muon's in this stage; `stage_learning_rates` change both alike."""
        muon, first, rate = self.args.learning_rate, self.plan.rates[0], self.args.adamw_learning_rate
        if rate is None:
            return muon
        return rate * muon / first if first else rate

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the scheduler of the stage, by `lr_span` and `rewarm_steps`."""
        if self.lr_scheduler is None:
            optimizer = cast("Optimizer", self.optimizer if optimizer is None else optimizer)
            scheduler = build_stage_scheduler(self.args, optimizer, self._span, self.plan.end_step)
            self.lr_scheduler = set_new_parameter_rates(self.args, scheduler, self._span)
            self._created_lr_scheduler = True
        return cast("LRScheduler", self.lr_scheduler)

    def _load_from_checkpoint(self, *args: object, **kwargs: object) -> None:
        """Do nothing: states are loaded once model and optimizer have been prepared."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore each rank's random numbers and sums of losses; another number of ranks starts with new seeds."""
        states = self._resumption.get("random", [])
        if len(states) == self.ranks.count:
            set_random_state(states[self.ranks.rank])
        elif states:
            set_seed(self.args.seed + self._span.number + self.state.global_step)
        if self._losses is not None:  # Trainer sets its sums to 0 just before it calls this
            pending = self._losses["pending"]
            same_ranks = len(pending) == self.ranks.count
            self._tr_loss.fill_(pending[self.ranks.rank] if same_ranks else math.fsum(pending) / len(pending))
            self._total_loss_scalar, self._globalstep_last_logged = self._losses["total"], self._losses["logged"]
            self._losses = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; also refuses padded batches, and watches for non-finite losses."""
        check_batch(inputs, self.plan.facts.block_size)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self._guard.watch(loss)
        return loss

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: float | torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> None:
        """As in `Trainer`, but stops before a non-finite loss is logged or saved."""
        if self.control.should_log or self.control.should_save:
            self._check_loss(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        step = self.state.global_step
        if self.control.should_training_stop and step < self._span.end_step and step != self._saved_step:
            self._check_loss(grad_norm)
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; at the end of a stage, its evaluation need not be repeated for the record."""
        metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        self._newest_evaluation = self.state.global_step, metrics
        return metrics

    def _check_loss(self, grad_norm: float | torch.Tensor | None = None) -> None:
        number = self._span.number
        newest = list_checkpoints(self.run, number) or ([self.run.stage_dir(number - 1)] if number else [])
        # Too high a loss scale makes gradients infinite; the scaler skips such a step.
        self._guard.check(None if self.accelerator.scaler else grad_norm, newest[0] if newest else None)

    def _save_checkpoint(self, model: torch.nn.Module, trial: object) -> None:
        """Write a checkpoint unless there is one of this step, as after a stop at a step that saves anyway."""
        if self._saved_step == self.state.global_step:
            return
        self._saved_step = self.state.global_step
        self.store_flos()
        store_callback_states(self)
        scaler, number = self.accelerator.scaler, self._span.number
        resumption: Resumption = {
            "growth": self._growth,
            "seconds": self._timer.stage_seconds,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "losses": {
                "total": self._total_loss_scalar,
                "logged": self._globalstep_last_logged,
                "pending": self.ranks.gather_all(float(self._tr_loss)),
            },
        }
        with self._timer.exclude():
            save_checkpoint(self.run, number, resumption, self._take_snapshot(), self.args.save_total_limit)
        if len(list_checkpoints(self.run, number)) > 1:  # the newest may turn out to be corrupt
            self._drop_optimizer_state(number - 1)

    def evaluate(
        self,
        eval_dataset: Dataset[object] | dict[str, Dataset[object]] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, with a `perplexity` for each loss; its time does not count as training time.

        Several data sets, given by name, have one loss each, and `eval_loss` is their mean. If the names are sources
        of the mixture, the mean is weighted by their shares.

        Each loss is the mean over all predicted tokens, on any number of ranks and for any batch size.
        """
        with self._timer.exclude():
            metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, dict):
            mean = {f"{metric_key_prefix}_loss": self._average_losses(metrics, data, metric_key_prefix)}
            self.log(mean)
            metrics |= mean
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with the mean over predicted tokens as its loss."""
        self._held_out_loss = HeldOutLoss(self.ranks, self.plan.facts.block_size)
        across_devices, self.args.average_tokens_across_devices = self.args.average_tokens_across_devices, False
        try:  # the loss of a rank's batch is the mean over the rank's own tokens
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.args.average_tokens_across_devices = across_devices
        if (name := f"{metric_key_prefix}_loss") in output.metrics:
            output.metrics[name] = self._held_out_loss.average(output.metrics[name])
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """As `Trainer.prediction_step`, without labels for rows that only fill up the last batch."""
        loss, logits, labels = super().prediction_step(
            model, self._held_out_loss.mask_surplus(inputs), *args, **kwargs
        )
        return None if loss is None else self._held_out_loss.weigh(loss), logits, labels

    def _average_losses(self, metrics: dict[str, float], names: Iterable[str], prefix: str) -> float:
        weights = {name: self.blocks.weights.get(name, 0.0) for name in names}
        if not any(weights.values()):
            weights = dict.fromkeys(weights, 1.0)
        losses = {name: metrics[f"{prefix}_{name}_loss"] for name in weights}
        return math.fsum(weights[name] * losses[name] for name in weights) / math.fsum(weights.values())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with stage, tokens, FLOPs, speed and perplexities; epochs count over the corpus."""
        step, span = self.state.global_step, self._span
        tokens, flops = span.count_until(step)
        logs.update({"stage": span.number, "tokens": tokens, "train_flops": flops})
        if "loss" in logs:
            logs.update(self._timer.throughput(step))
            if (seconds_left := self._timer.eta(step)) is not None:
                logs["seconds_left"] = seconds_left
        for name in [name for name in logs if name.startswith("eval_") and name.endswith("loss")]:
            logs[name.removesuffix("loss") + "perplexity"] = compute_perplexity(logs[name])
        if "train_runtime" in logs:
            done = step - self._first_step
            logs["train_steps_per_second"] = round(done / logs["train_runtime"], 3)
            logs["train_samples_per_second"] = round(done * span.blocks_per_step / logs["train_runtime"], 3)
            # The mean over the whole stage; Trainer divides by the steps of this call.
            logs["train_loss"] = self._total_loss_scalar / max(step - span.first_step, 1)
        self.state.epoch = tokens / (len(self.blocks) * self.plan.facts.block_size)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Return the training FLOPs of a batch by `cost.flops`, as in the planner and the report."""
        return round(inputs["input_ids"].numel() * self._span.flops / max(self._span.tokens, 1))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: with `push_to_hub`, a callback publishes finished stages."""

    def push_to_hub(self, *args: object, **kwargs: object) -> str:
        """Refuse: the model in training is not a finished stage.

        Raises:
            RunError: with the ways to publish finished stages.
        """
        raise RunError(
            "the trainer pushes nothing itself; use `slop_hf.publish_stage`, or `slop publish RUN --to NAME`"
        )

    def _get_output_dir(self, trial: object) -> str:
        return str(self.run.running_dir(self._span.number))


@contextmanager
def _limit_collection() -> Iterator[None]:
    """Limit `gc.collect` to objects made inside the block."""
    if _has_frozen_objects():  # another user of `freeze`, whose objects `unfreeze` would release
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _has_frozen_objects() -> bool:
    """Whether this process uses `gc.freeze`; a yes is kept, since counting a million objects takes 0.1 s."""
    global _is_frozen
    _is_frozen = _is_frozen or gc.get_freeze_count() > 0
    return _is_frozen
