"""Checks before training begins: model, data, launch and disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..cost.flops import count_layer_matrices
from ..data.config import ONLY
from ..data.order import count_consumed_tokens
from ..data.packing import MixedBlocks
from ..dims import ModelDims
from ..errors import DataError, RunError
from ..growth import is_peft_model
from ..growth.adamw import compute_first_updates
from ..io.serialization import Json
from ..io.units import format_bytes
from ..schedule import GrowthSchedule
from .muon import MUON

if TYPE_CHECKING:
    from accelerate import ParallelismConfig
    from accelerate.utils import FullyShardedDataParallelPlugin
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

    from .arguments import SlopTrainingArguments
    from .run_plan import RunPlan

#: Bytes of a float32 number.
_FLOAT32 = 4

#: Updates of new entries, over the learning rate, from which `describe_uncorrected_updates` warns.
LARGEST_FIRST_UPDATE = 1.5

HALF_PRECISION = (torch.float16, torch.bfloat16)


def check_adapters(model: object) -> None:
    """Refuse a model with peft's adapters: a stage is a stock checkpoint, which cannot hold them."""
    if is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False):
        raise RunError(
            "the model has adapters of peft, and SlopTrainer trains stock models only; give "
            "model.merge_and_unload(), frozen where it is not to be trained, or train adapters after the last growth"
        )


def check_model(model: PreTrainedModel, schedule: GrowthSchedule, processing_class: object) -> None:
    """Refuse a model other than the schedule's initial model, or with too small a vocabulary for the tokenizer."""
    dims = ModelDims.from_config(model.config)
    if dims != schedule.initial:
        raise RunError(
            f"the model has {dims}, the schedule begins with {schedule.initial}; "
            "plan from this model (`slop plan --from MODEL`), or give the schedule's initial model"
        )
    if mismatch := schedule.find_mismatch(model.config):
        raise RunError(mismatch)
    entries = len(processing_class) if hasattr(processing_class, "__len__") else 0
    if entries > model.config.vocab_size:
        raise RunError(
            f"the tokenizer has {entries} entries, more than the model's vocabulary of {model.config.vocab_size}; "
            "use a model or a tokenizer that fits the other"
        )


def check_precision(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Refuse weights in half precision where float32 is promised: small updates would be rounded away.

    Frozen weights may be of any precision. Under DeepSpeed, which keeps float32 masters, this is not to be called.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    half = [dtype for dtype in HALF_PRECISION if dtype in dtypes]
    is_mixed = args.bf16 or args.fp16
    if not half or (torch.float16 not in half and not is_mixed):  # without mixed precision, bfloat16 was asked for
        return
    name = str(half[0]).removeprefix("torch.")
    raise RunError(
        f"the model's weights are {name}: mixed precision needs float32 weights to update; load the model with "
        "dtype=torch.float32, or call model.float()"
    )


def check_publishing(push_to_hub: bool, callbacks: Iterable[TrainerCallback] | None) -> None:
    """Refuse `push_to_hub` without a callback that publishes: the trainer itself does not push."""
    if push_to_hub and not any(getattr(callback, "publishes", False) for callback in callbacks or ()):
        raise RunError(
            "push_to_hub needs a callback that publishes finished stages: give callbacks=[PublishCallback(...)] "
            "(`from slop_hf import PublishCallback`), as `slop train` does, or run `slop publish` afterwards"
        )


def check_blocks(dataset: object, model: PreTrainedModel) -> int:
    """Return the number of tokens per block of the training data, which must be map-style and fit the model."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(f"train_dataset must be map-style (with len and index), got {type(dataset).__name__}")
    if not len(dataset):
        raise DataError("train_dataset is empty; give a larger corpus or a smaller block_size")
    if "input_ids" not in dataset[0]:
        raise DataError(f"rows of train_dataset have no input_ids, only {', '.join(dataset[0])}; tokenize them first")
    block_size = len(dataset[0]["input_ids"])
    limit = model.config.max_position_embeddings
    if block_size > limit:
        raise DataError(
            f"blocks have {block_size} tokens, the model's max_position_embeddings is {limit}; use shorter blocks"
        )
    return block_size


def check_document_mask(dataset: MixedBlocks, model: PreTrainedModel, batch_sizes: Sequence[int]) -> None:
    """Refuse attention kernels that would not mask the documents of a block from each other.

    Args:
        dataset: training data; its blocks have `position_ids` if their documents are to be masked.
        batch_sizes: micro-batch size of each stage.
    """
    kernel = model.config._attn_implementation
    if "position_ids" in dataset[0] and "flash" in kernel and max(batch_sizes) > 1:
        raise RunError(
            f"document_mask under {kernel} takes one block at a time, got {max(batch_sizes)}; set "
            "per_device_train_batch_size to 1, or attn_implementation to sdpa or flex_attention"
        )


def check_launch(args: TrainingArguments) -> None:
    """Refuse launches whose states could not be carried over a growth."""
    if args.n_gpu > 1:
        raise RunError(
            f"one process sees {args.n_gpu} GPUs; start one process per GPU with `accelerate launch`, "
            "or set CUDA_VISIBLE_DEVICES"
        )
    if args.save_on_each_node:
        raise RunError("save_on_each_node would scatter a run over the nodes; put output_dir on a shared disk")


def check_deepspeed_config(config: Mapping[str, Json], *, needs_groups: bool = False) -> None:
    """Refuse configurations of DeepSpeed whose states could not be read, or not exactly, for a growth.

    Args:
        needs_groups: whether parameters of added layers need groups of their own.
    """
    if needs_groups and "optimizer" in config:
        raise RunError(
            "optim muon, optimizer_state_at_growth kept and new_parameter_rate need groups of parameters, which "
            "DeepSpeed's own `optimizer` does not have; leave it out of DeepSpeed's configuration and set optim"
        )
    zero = config.get("zero_optimization") or {}
    if zero.get("stage") != 3:
        raise RunError(
            f'DeepSpeed\'s ZeRO stage {zero.get("stage", 0)} is not supported: set "stage": 3, or launch without '
            "DeepSpeed"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise RunError(f"{part} to nvme is not supported: states could not be read for a growth; use cpu")
    ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio != 1:
        raise RunError(
            f"offload_optimizer with ratio {ratio} is not supported: its states lie in two places; leave it out"
        )
    if zero.get("zero_hpz_partition_size", 1) != 1 or zero.get("mics_shard_size", -1) != -1:
        raise RunError("hpZ and MiCS are not supported; leave zero_hpz_partition_size and mics_shard_size out")
    for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
        if zero.get(name):
            raise RunError(f"{name} is not supported: a growth would read rounded weights; leave it out")
    if zero.get("zenflow"):
        raise RunError("zenflow is not supported: it updates weights behind the step; leave it out")
    if (config.get("fp16") or {}).get("enabled") is True:
        raise RunError("fp16 under DeepSpeed is not supported: its loss scale would be lost at a growth; use bf16")
    for name in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if (config.get("bf16") or {}).get(name):
            raise RunError(f"{name} is not supported: growth and AdamW need float32 masters; leave it out")
    if "scheduler" in config:
        raise RunError("DeepSpeed's `scheduler` does not know the stages; leave it out and set lr_scheduler_type")


def check_fsdp2(plugin: FullyShardedDataParallelPlugin, parallelism: ParallelismConfig | None, precision: str) -> None:
    """Refuse settings of FSDP2 whose states could not be read, or not exactly, for a growth.

    Args:
        plugin: accelerate's settings of FSDP2.
        parallelism: accelerate's other kinds of parallelism; None without them.
        precision: accelerate's mixed precision: "no", "bf16" or "fp16".

    Raises:
        RunError: for such a setting.
    """
    if plugin.activation_checkpointing:
        raise RunError(
            "fsdp_activation_checkpointing is not supported: it changes the names of parameters; leave it out and set "
            "gradient_checkpointing among the training arguments"
        )
    if plugin.ignored_modules is not None:
        raise RunError("fsdp_ignored_modules is not supported: ranks would train them apart; leave it out")
    sizes = () if parallelism is None else ("dp_replicate_size", "tp_size", "cp_size", "sp_size")
    for name in sizes:
        if getattr(parallelism, name, 1) != 1:
            raise RunError(f"{name} {getattr(parallelism, name)} is not supported next to FSDP2; leave it out")
    if precision not in ("no", "bf16"):
        raise RunError(f"{precision} under FSDP2 is not supported: it would sum gradients in {precision}; use bf16")


def describe_space_shortage(plan: RunPlan, directory: Path, checkpoints: int | None) -> str | None:
    """Return a warning if a run needs more disk space than is free, else None.

    Args:
        checkpoints: checkpoints that a stage keeps; there is one more while it is written.
    """
    sizes = [span.parameters for span in plan.spans]
    largest = max(plan.spans, key=lambda span: span.parameters)
    checkpoint = 3 * largest.parameters  # weights and AdamW's two moments; Muon has one
    if plan.facts.optimizer == MUON:
        checkpoint -= count_layer_matrices(largest.dims, plan.facts.model)
    needed = (sum(sizes) + checkpoint * ((checkpoints or 1) + 1)) * _FLOAT32
    free = shutil.disk_usage(directory).free
    if needed <= free:
        return None
    return (
        f"the run needs about {format_bytes(needed)} in {directory}, and {format_bytes(free)} are free: it will stop "
        "when the disk is full; lower save_total_limit, or choose another disk"
    )


def describe_uncorrected_updates(args: SlopTrainingArguments, plan: RunPlan) -> str | None:
    """Return a warning if new entries of old tensors would begin with far larger updates than old ones, else None."""
    widens = any(set(span.growth.operators) - {"layer"} for span in plan.spans if span.growth is not None)
    if args.optimizer_state_at_growth != "kept" or not widens:
        return None
    largest = max(compute_first_updates(args.adam_beta1, args.adam_beta2))
    if largest <= LARGEST_FIRST_UPDATE:
        return None
    return (
        f"optimizer_state_at_growth kept: with adam_beta2 {args.adam_beta2:g}, new entries of parameters that "
        f"become wider begin with updates of up to {largest:.1f} times the learning rate, because AdamW corrects the "
        "bias of a whole tensor only; set adam_beta2 to 0.95, or optimizer_state_at_growth to carried"
    )


def describe_repeated_data(dataset: MixedBlocks, plan: RunPlan) -> list[str]:
    """Return a warning for each source that a run reads more than once."""
    facts, blocks = plan.facts, sum(span.blocks for span in plan.spans)
    warnings = []
    for consumed in count_consumed_tokens(dataset, facts.data_seed, facts.block_size, 0, blocks):
        passes = consumed.end_token / consumed.available_tokens
        if passes > 1:
            source = "the corpus" if consumed.source == ONLY else f"source {consumed.source}"
            warnings.append(
                f"the schedule needs {consumed.end_token:,} tokens of {source}, which has "
                f"{consumed.available_tokens:,}: the run will make {passes:.1f} passes over it"
            )
    return warnings
