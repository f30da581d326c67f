"""Checks of a model in memory before it grows."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from ..errors import GrowthError
from .plan import GrowthPlan
from .safetensors_io import DTYPE_NAMES


def require_growable(model: object) -> None:
    """Refuse anything but a causal language model of transformers with its weights in memory, without adapters.

    Whether its family has an axis table is checked by `plan_growth`, and its parameters by `check_weights`.

    Raises:
        GrowthError: with the remedy for this kind of object.

    >>> require_growable("runs/small")
    Traceback (most recent call last):
    slop_hf.errors.GrowthError: expected a model in memory, got the path 'runs/small'; load it with \
AutoModelForCausalLM.from_pretrained, or grow it from disk to disk with grow_checkpoint
    """
    kind = type(model).__name__
    if isinstance(model, str | os.PathLike):
        raise GrowthError(
            f"expected a model in memory, got the path {os.fspath(model)!r}; load it with "
            "AutoModelForCausalLM.from_pretrained, or grow it from disk to disk with grow_checkpoint"
        )
    if not isinstance(model, torch.nn.Module):
        raise GrowthError(f"expected a causal language model of transformers, got {kind}; pass the model itself")
    modules = model._modules
    if "_orig_mod" in modules:
        raise GrowthError("the model is compiled by torch.compile; grow model._orig_mod, and compile the grown model")
    if not isinstance(model, PreTrainedModel):
        if "module" in modules:
            raise GrowthError(f"the model is wrapped in {kind}; grow model.module, and wrap the grown model")
        raise GrowthError(f"expected a causal language model of transformers, got {kind}; only those can grow")
    if getattr(model, "is_quantized", False):
        raise GrowthError(f"this {kind} is quantised; load it in full precision to grow it")
    if model.get_output_embeddings() is None:
        raise GrowthError(
            f"{kind} has no output embeddings, and only causal language models can grow; "
            "load the weights with AutoModelForCausalLM"
        )
    if on_meta := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise GrowthError(
            f"{on_meta[0]} is on the meta device, which holds no values; "
            "load the weights into memory first, without offloading"
        )


def check_weights(weights: Mapping[str, torch.Tensor], plan: GrowthPlan) -> None:
    """Refuse weights that differ from the axis table in names, or from the plan in shape, and all but plain floats.

    Args:
        weights: weights of the old model, by the table's names.
        plan: growth of the model.

    Raises:
        GrowthError: if a weight is missing, unknown, of another shape, quantised or sharded.
    """
    shapes = {parameter.source: parameter.old_shape for parameter in plan.parameters()}
    missing, unexpected = sorted(set(shapes) - set(weights)), sorted(set(weights) - set(shapes))
    faults = [f"has no {name}" for name in missing[:1]] + [f"has a parameter {name}" for name in unexpected[:1]]
    if faults:
        raise GrowthError(
            f"the model {' and '.join(faults)}, unlike the axis table of {plan.architecture.model_type!r}; "
            "merge adapters, undo quantisation and remove modules that were added or compiled before growing"
        )
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            raise GrowthError(f"{name} must be a tensor, got {type(weight).__name__}")
        if weight.dtype not in DTYPE_NAMES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
            raise GrowthError(f"{name} has dtype {weight.dtype}, expected {dtypes}; undo quantisation before growing")
        if type(weight.data) is not torch.Tensor:
            kind = type(weight.data).__name__
            raise GrowthError(f"{name} is a {kind}, not a plain tensor; gather sharded weights, and undo quantisation")
        if tuple(weight.shape) != shapes[name]:
            raise GrowthError(
                f"{name} has shape {list(weight.shape)}, but the model's config makes it {list(shapes[name])}; "
                "correct the config, or gather sharded weights first"
            )
