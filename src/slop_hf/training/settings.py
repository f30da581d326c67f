"""The settings of a run that may change when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..io.serialization import Json
from .arguments import SlopTrainingArguments
from .batches import Batches

#: Training arguments that are written down with the step from which they hold.
CHANGEABLE = (
    # The learning rate.
    *(
        "learning_rate",
        "adamw_learning_rate",
        "stage_learning_rates",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "lr_span",
    ),
    *("warmup_steps", "rewarm_steps", "new_parameter_rate", "new_parameter_steps"),
    # A step.
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "tf32"),
    *("gradient_checkpointing", "activation_checkpointing", "torch_compile", "compile_layers"),
    "use_liger_kernel",
    # Evaluation, logging and saving.
    *("eval_strategy", "eval_steps", "eval_before_growth", "eval_after_growth", "per_device_eval_batch_size"),
    *("logging_strategy", "logging_steps", "save_strategy", "save_steps", "save_total_limit"),
    "keep_optimizer_states",
)


def describe_settings(
    args: SlopTrainingArguments, batches: Sequence[Batches], devices: int, strategy: str
) -> dict[str, Json]:
    """Return the settings as plain data, as JSON gives them back.

    The batches are those that the run trains in: the tokens of a step stay as they were when the run began, whatever
    the arguments say.

    Args:
        batches: batch of one device in each stage.
        devices: number of devices that share a step.
        strategy: how they hold the model: "replicated" (one process, DistributedDataParallel), "zero3" or "fsdp2".
    """
    values = args.to_dict()
    settings = {name: values[name] for name in CHANGEABLE if name in values}
    settings["devices"], settings["strategy"] = devices, strategy
    settings["micro_batch_sizes"] = [batch.micro_batch_size for batch in batches]
    settings["accumulation_steps"] = [batch.accumulation_steps for batch in batches]
    plain: dict[str, Json] = json.loads(json.dumps(settings, default=str))
    return plain
