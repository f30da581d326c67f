"""`SlopTrainer`: transformers' Trainer over the stages of a growth schedule."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, Trainer, TrainerState, default_data_collator, set_seed
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..data.order import BlockOrder
from ..errors import RunError
from ..growth import AdamWState, build_model, grow_adamw_state, grow_weights, no_progress_bars, plan_growth
from ..records import OPTIMIZER_FILE, SCHEDULE_FILE, RunDirectory
from ..schedule import GrowthSchedule
from ..serialization import write_text
from .arguments import SlopTrainingArguments
from .boundary import (
    MAX_EXPONENT,
    check_same_schedule,
    last_checkpoint,
    load_adamw_state,
    read_adamw_state,
    read_stage,
    stage_record,
    write_stage,
)
from .callbacks import LogStageEnd
from .checks import check_blocks, check_growths, check_model
from .spans import StageSpan, stage_spans

logger = logging.get_logger(__name__)

CLOCK_FILE = "slop_clock.json"


class SlopTrainer(Trainer):
    """Trains a model through a growth schedule: each stage for its tokens, weights and AdamW's moments grown between.

    It is a `transformers.Trainer`: callbacks, `report_to`, `compute_metrics` and `processing_class` work as they do
    there, and `on_train_begin` and `on_train_end` come once a stage. `state.global_step`, the log history and every
    logged entry's `tokens` and `train_flops` count over the whole run; `stage` says where.

    Files are those of `records.RunDirectory`; checkpoints inside a stage follow `save_steps`.

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
        self.schedule = schedule
        self.run = RunDirectory(args.output_dir)
        check_model(model, schedule, kwargs.get("processing_class"))
        block_size = check_blocks(train_dataset, model)
        kwargs.setdefault("data_collator", default_data_collator)
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)
        if self.args.world_size > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RunError("SlopTrainer runs in one process; launch it without a distributed configuration")
        self.blocks = train_dataset
        self.block_size = block_size
        blocks_per_step = self.get_total_train_batch_size(self.args)
        self.spans = stage_spans(schedule, model.config, block_size, blocks_per_step)
        check_growths(self.spans, model.config)
        self._span = self.spans[0]
        self._carried: AdamWState = {}
        self._writing: Path | None = None
        self.add_callback(LogStageEnd(lambda: self._span.end_step))
        self._seconds_before = self._stage_began = self._evaluation_seconds = 0.0
        self._first_step = 0  # of this call; later ones may begin where a checkpoint ended

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
            RunError: where `output_dir` holds another run, or nothing to resume.
        """
        if trial is not None:
            raise RunError("hyper-parameter search over a staged run is not supported; search with plain Trainer")
        self._warn_of_repeats()
        number, checkpoint, model = self._begin(resume_from_checkpoint)
        output = TrainOutput(self.state.global_step, float("nan"), {})
        if model is not None:
            self._enter(model)
        for span in self.spans[number:]:
            if checkpoint is None and span.growth is not None:
                self._grow(span)
            output = self._train_stage(span, checkpoint, ignore_keys_for_eval) or output
            if self.state.global_step < span.end_step:
                logger.warning(
                    f"{span.name} stopped at step {self.state.global_step} of {span.end_step}; resume to go on"
                )
                break
            self._finish(span)
            checkpoint = None
        return output

    def _begin(self, resume: str | bool | None) -> tuple[int, str | None, PreTrainedModel | None]:
        """The stage to begin with, the checkpoint inside it, and the model where it is not the given one."""
        if not resume:
            if self.run.exists:
                raise RunError(
                    f"{self.run.path} holds another run, with {self.run.finished_stages} stages finished; "
                    "resume it (resume_from_checkpoint=True) or choose another output directory"
                )
            self.state = TrainerState()
            if self.is_world_process_zero():
                self.schedule.to_yaml(self.run.path / SCHEDULE_FILE)
            return 0, None, None
        if not self.run.exists:
            raise RunError(
                f"nothing to resume: {self.run.path} holds no run; begin one with resume_from_checkpoint=None"
            )
        check_same_schedule(self.run, self.schedule)
        number = self.run.finished_stages
        checkpoint = None if self.run.is_finished else last_checkpoint(self.run, number)
        if isinstance(resume, str) and Path(resume).resolve() != self.run.path.resolve():
            checkpoint = Path(resume)
            if checkpoint.resolve().parent != self.run.running_dir(min(number, len(self.spans) - 1)).resolve():
                raise RunError(f"{resume} is not a checkpoint of the stage in training; resume with True")
        if checkpoint is not None:
            logger.info(f"Resuming {self.schedule.stage_name(number)} from {checkpoint}")
            return (
                number,
                str(checkpoint),
                cast(PreTrainedModel, type(self.model).from_pretrained(checkpoint, dtype="auto")),
            )
        if number == 0:
            self.state = TrainerState()
            return 0, None, None
        logger.info(f"Resuming after {self.schedule.stage_name(number - 1)}")
        model, self._carried, self.state = read_stage(self.run, number - 1)
        return number, None, model

    def _enter(self, model: PreTrainedModel) -> None:
        """Make `model` the one in training."""
        if self.place_model_on_device:
            self._move_model_to_device(model, self.args.device)
        self.accelerator.free_memory()
        self.model = self.model_wrapped = model
        self.optimizer = self.lr_scheduler = None
        self.callback_handler.model = model
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = None

    def _grow(self, span: StageSpan) -> None:
        """Grow the model in training, and the moments it leaves behind, into the stage's structure."""
        assert span.growth is not None
        old = cast(PreTrainedModel, self.model)
        plan = plan_growth(old.config, span.growth, seed=self._growth_seed(span))
        carried = self._carried if self.args.carry_optimizer_state else {}
        self._carried = grow_adamw_state(carried, plan) if carried else {}
        grown = build_model(old, plan, grow_weights(dict(old.named_parameters()), plan))
        self._enter(grown)
        logger.info(f"{span.name}: grown from {plan.old} to {plan.new}, {span.parameters:,} parameters")

    def _growth_seed(self, span: StageSpan) -> int:
        return self.args.growth_seed + span.number

    def _train_stage(
        self, span: StageSpan, checkpoint: str | None, ignore_keys: list[str] | None
    ) -> TrainOutput | None:
        """Train one stage for its tokens, from its beginning or from a checkpoint inside it."""
        self._span = span
        clock = Path(checkpoint or "", CLOCK_FILE)
        self._seconds_before = json.loads(clock.read_text())["seconds"] if clock.is_file() else 0.0
        just_grown = checkpoint is None and span.growth is not None
        if just_grown and self.eval_dataset is not None and self.args.eval_after_growth:
            self.evaluate()
        self._stage_began, self._evaluation_seconds = time.perf_counter(), 0.0
        if not span.steps:
            return None
        set_seed(self.args.seed + span.number)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.train_dataset = BlockOrder(self.blocks, span.first_block, span.blocks, seed)
        try:
            return super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys)
        finally:
            self.train_dataset = self.blocks

    def _finish(self, span: StageSpan) -> None:
        """Evaluate the stage's model and write its directory."""
        seconds = self._stage_seconds()
        metrics = self.evaluate() if self.eval_dataset is not None else {}
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if optimizer is not None:
            self._carried = read_adamw_state(optimizer, cast(torch.nn.Module, self.model))
        if self.is_world_process_zero() and not self.run.stage_dir(span.number).exists():
            history = self.state.log_history
            record = stage_record(span, history, metrics, seconds, self.args.world_size, self._growth_seed(span))
            model = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))
            write_stage(self.run, record, model, self.processing_class, self.state, self._carried)
            shutil.rmtree(self.run.running_dir(span.number), ignore_errors=True)
            self._drop_optimizer_state(span.number - 1)

    def _drop_optimizer_state(self, number: int) -> None:
        """Remove a stage's optimizer state once the next stage has something of its own to resume from."""
        if number >= 0 and not self.args.keep_optimizer_states:
            (self.run.stage_dir(number) / OPTIMIZER_FILE).unlink(missing_ok=True)

    def _stage_seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._stage_began - self._evaluation_seconds

    def _warn_of_repeats(self) -> None:
        last = self.spans[-1]
        passes = (last.first_block + last.blocks) / len(self.blocks)
        if passes > 1:
            logger.warning(
                f"the schedule needs {last.first_token + last.tokens:,} tokens, the corpus has "
                f"{len(self.blocks) * self.block_size:,}: the run will make {passes:.1f} passes over it"
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

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Give a stage's fresh optimizer the moments grown for it; nothing has stepped yet."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        resuming = kwargs.get("resume_from_checkpoint", args[2] if len(args) > 2 else None)
        if self._carried and resuming is None:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            load_adamw_state(cast(torch.optim.Optimizer, optimizer), cast(torch.nn.Module, self.model), self._carried)
        self._carried = {}
        return prepared

    def _get_output_dir(self, trial: Any) -> str:
        """Where Trainer's checkpoints go: into the stage's own folder."""
        return str(self._writing or self.run.running_dir(self._span.number))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint aside and rename it, so that it is complete or absent."""
        running = self.run.running_dir(self._span.number)
        with self._writing_in(running / ".writing") as aside, no_progress_bars():
            super()._save_checkpoint(model, trial)
            written = next(aside.glob("checkpoint-*"))
            write_text(written / CLOCK_FILE, json.dumps({"seconds": self._stage_seconds()}))
            shutil.rmtree(running / written.name, ignore_errors=True)
            written.rename(running / written.name)
        rotate_checkpoints(str(running), save_total_limit=self.args.save_total_limit, use_mtime=False)
        self._drop_optimizer_state(self._span.number - 1)

    @contextmanager
    def _writing_in(self, directory: Path) -> Iterator[Path]:
        shutil.rmtree(directory, ignore_errors=True)
        self._writing = directory
        try:
            yield directory
        finally:
            self._writing = None
            shutil.rmtree(directory, ignore_errors=True)

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
            logs["train_samples_per_second"] = round(
                done * self._span.blocks / self._span.steps / logs["train_runtime"], 3
            )
        self.state.epoch = tokens / (len(self.blocks) * self.block_size)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Training FLOPs of a batch by `cost.flops_per_token`, the number that planner and report use."""
        return round(inputs["input_ids"].numel() * self._span.flops / max(self._span.tokens, 1))
