"""What `SlopTrainer` refuses before training begins."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..data.config import ONLY
from ..data.order import consumed
from ..dims import ModelDims
from ..errors import DataError, RunError
from ..growth import plan_growth, resolve_inits
from ..operators import operator_named
from ..runs.directory import RunFacts
from ..schedule import GrowthSchedule
from .spans import StageSpan

#: Bytes of a parameter in a finished stage, and with AdamW's moments; in float32.
WEIGHT_BYTES, STATE_BYTES = 4, 12


def check_model(model: PreTrainedModel, schedule: GrowthSchedule, processing_class: Any) -> None:
    """Refuse a model that is not the schedule's initial one, or too small for the tokenizer.

    Raises:
        RunError: naming both sides.
    """
    dims = ModelDims.from_config(model.config)
    if dims != schedule.initial:
        raise RunError(
            f"the model has {dims}, the schedule begins with {schedule.initial}; "
            "plan from this model (`slop plan --from MODEL`), or give the schedule's initial model"
        )
    entries = len(processing_class) if hasattr(processing_class, "__len__") else 0
    if entries > model.config.vocab_size:
        raise RunError(
            f"the tokenizer has {entries} entries, the model's vocabulary {model.config.vocab_size}; they must fit"
        )


def check_publishing(push_to_hub: bool, callbacks: Sequence[Any] | None) -> None:
    """Refuse `push_to_hub` where nobody sees to it: the trainer does not push.

    Raises:
        RunError: with what to attach.
    """
    if push_to_hub and not any(getattr(callback, "publishes", False) for callback in callbacks or ()):
        raise RunError(
            "push_to_hub needs somebody who publishes finished stages: give callbacks=[PublishCallback(...)] "
            "(`from slop_hf import PublishCallback`), as `slop train` does, or run `slop publish` afterwards"
        )


def check_blocks(dataset: Any, model: PreTrainedModel) -> int:
    """The number of tokens in a block of the training data.

    Raises:
        DataError: for data that is not map-style, empty, or longer than the model's positions.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"train_dataset must be map-style (with len and index), got {type(dataset).__name__}")
    if not len(dataset):
        raise DataError("train_dataset is empty; give a larger corpus or a smaller block_size")
    block_size = len(dataset[0]["input_ids"])
    limit = model.config.max_position_embeddings
    if block_size > limit:
        raise DataError(
            f"blocks have {block_size} tokens, the model's max_position_embeddings is {limit}; cut them shorter"
        )
    return block_size


def check_document_mask(dataset: Any, model: PreTrainedModel, batch_sizes: Sequence[int]) -> None:
    """Refuse kernels that would not keep the documents of a block apart.

    Args:
        dataset: the training data; with `position_ids` it wants that.
        model: the initial model.
        batch_sizes: blocks that a device takes at a time, of each stage.

    Raises:
        RunError: with what to set instead.
    """
    kernel = model.config._attn_implementation
    if "position_ids" in dataset[0] and "flash" in kernel and max(batch_sizes) > 1:
        raise RunError(
            f"document_mask under {kernel} takes one block at a time, got {max(batch_sizes)}; set "
            "per_device_train_batch_size to 1, or attn_implementation to sdpa or flex_attention"
        )


def check_launch(args: Any, *, fsdp: bool) -> None:
    """Refuse launches whose states could not be carried over a growth.

    Raises:
        RunError: with another way to launch.
    """
    if fsdp:
        raise RunError("FSDP is not supported; shard with DeepSpeed ZeRO-3 (recipes/accelerate), or launch without")
    if args.n_gpu > 1:
        raise RunError(
            f"one process sees {args.n_gpu} GPUs; start one a GPU by `accelerate launch`, or set CUDA_VISIBLE_DEVICES"
        )
    if args.save_on_each_node:
        raise RunError("save_on_each_node would write a run in pieces; put output_dir on a shared disk")


def space_warning(spans: Sequence[StageSpan], directory: Path, checkpoints: int | None) -> str | None:
    """What a run will want of its disk, where that is more than is free.

    Args:
        spans: the stages.
        directory: of the run.
        checkpoints: kept of a stage; one more is there while it is written.
    """
    finished = sum(span.parameters for span in spans) * WEIGHT_BYTES
    running = max(span.parameters for span in spans) * STATE_BYTES * ((checkpoints or 1) + 1)
    free = shutil.disk_usage(directory).free
    if finished + running <= free:
        return None
    return (
        f"the run will want about {(finished + running) / 2**30:.1f} GiB in {directory}, of which {free / 2**30:.1f} "
        "GiB are free: it will stop where the disk is full; lower save_total_limit, or choose another disk"
    )


def pass_warnings(dataset: Any, last: StageSpan, facts: RunFacts) -> list[str]:
    """Which sources a run will read more than once.

    Args:
        dataset: the training data.
        last: the run's last stage.
        facts: of the run.
    """
    found = []
    for one in consumed(dataset, facts.data_seed, facts.block_size, 0, last.first_block + last.blocks):
        passes = one.end_token / one.available_tokens
        if passes > 1:
            what = "the corpus" if one.source == ONLY else f"source {one.source}"
            found.append(
                f"the schedule needs {one.end_token:,} tokens of {what}, it has {one.available_tokens:,}: "
                f"the run will make {passes:.1f} passes over it"
            )
    return found


def with_inits(schedule: GrowthSchedule, init: str | dict[str, str] | None) -> GrowthSchedule:
    """The schedule with an init for each stage that names none; operators that a stage has not are left out.

    Raises:
        GrowthError: for an unknown operator or init.
    """
    if init is None:
        return schedule
    if isinstance(init, dict):
        for operator in init:
            operator_named(operator)
            resolve_inits((operator,), init)
    stages = []
    for stage in schedule.stages:
        if stage.init is None:
            own = init if isinstance(init, str) else {name: init[name] for name in stage.operators if name in init}
            resolve_inits(stage.operators, own)
            stage = replace(stage, init=own or None)
        stages.append(stage)
    return replace(schedule, stages=tuple(stages))


def check_growths(spans: Sequence[StageSpan], config: Any) -> None:
    """Refuse now what a boundary would refuse after hours.

    Raises:
        GrowthError: as `plan_growth`.
    """
    for before, span in pairwise(spans):
        if span.growth is not None:
            plan_growth(before.dims.to_config(config), span.growth)
