"""Buffers of a growing model: those of transformers follow from the config, all others are carried over."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import GrowthError
from .plan import GrowthPlan


def check_buffers(source: PreTrainedModel, plan: GrowthPlan) -> None:
    """Refuse a growth that would lose a buffer which `carry_buffers` has to copy.

    Raises:
        GrowthError: if the class of the model does not register the buffer, or if the buffer has to grow.
    """
    if not (old := _get_added_buffers(source)):
        return
    with torch.device("meta"):
        grown = type(source)(plan.config())
    new = {name: tuple(buffer.shape) for name, buffer in _get_added_buffers(grown).items()}
    for name in sorted(set(old) - {plan.find_source(name) for name in new}):
        raise GrowthError(
            f"{type(source).__name__} does not register the buffer {name}, so the grown model would lose it; "
            "register it in the class, or delete it and set it in the grown model"
        )
    for name, shape in new.items():
        source_name = plan.find_source(name)
        if source_name in old and tuple(old[source_name].shape) != shape:
            raise GrowthError(
                f"the buffer {source_name} has shape {list(old[source_name].shape)} and would need {list(shape)} "
                "after growth, but only parameters can grow; make its shape independent of the config"
            )


def list_persistent_buffers(source: PreTrainedModel, plan: GrowthPlan) -> dict[str, torch.Tensor]:
    """Return the added buffers that a checkpoint of the grown model holds, by their names in it."""
    passing = _list_non_persistent(source)
    added = _get_added_buffers(source).items()
    return {grown: buffer for name, buffer in added if name not in passing for grown in plan.find_grown(name)}


def carry_buffers(source: PreTrainedModel, grown: PreTrainedModel, plan: GrowthPlan) -> None:
    """Copy into a grown model the buffers that are not transformers' own, each with its dtype.

    A model built by `from_pretrained` has uninitialised memory in them if no checkpoint holds them.
    """
    old = _get_added_buffers(source)
    for name in _get_added_buffers(grown):
        if (buffer := old.get(plan.find_source(name))) is not None:
            _get_owner(grown, name)._buffers[name.rpartition(".")[2]] = buffer.detach().clone()


def _get_added_buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the buffers that transformers does not compute from the config, by name: all but those of its modules.

    Its modules of the supported families have no persistent buffers; if one has, somebody else has registered it.
    """
    passing = _list_non_persistent(model)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name not in passing or not _get_owner(model, name).__module__.startswith("transformers.")
    }


def _list_non_persistent(model: PreTrainedModel) -> set[str]:
    owned = {name: _get_owner(model, name)._non_persistent_buffers_set for name, _ in model.named_buffers()}
    return {name for name, passing in owned.items() if name.rpartition(".")[2] in passing}


def _get_owner(model: PreTrainedModel, name: str) -> torch.nn.Module:
    """Return the module that a buffer is registered in."""
    return model.get_submodule(name.rpartition(".")[0])
