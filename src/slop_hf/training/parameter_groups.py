"""Parameter groups by the growth that added the parameters, for steps and learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from torch.optim import Optimizer

from ..architectures import get_architecture
from ..dims import ModelConfig
from ..growth import plan_growth
from .spans import StageSpan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Mark of the groups whose parameters the growth at the beginning of the stage has added.
IS_NEW = "is_new"


def list_adding_stages(spans: Iterable[StageSpan], config: ModelConfig) -> list[dict[str, int]]:
    """Return, for each stage, the stage that added each parameter; parameters that began with the run are left out.

    Only layers are added as a whole. A parameter that becomes larger stays the parameter that it was.

    Args:
        spans: stages of the run.
        config: config of the initial model.
    """
    stages: list[dict[str, int]] = [{}]
    for before, span in pairwise(spans):
        added = stages[-1]
        if span.growth is not None:
            parameters = plan_growth(before.dims.to_config(config), span.growth).parameters()
            origins = {p.name: span.number if p.is_added else added.get(p.source, 0) for p in parameters}
            added = {name: stage for name, stage in origins.items() if stage}
        stages.append(added)
    return stages


def split_groups(
    optimizer: Optimizer, model: PreTrainedModel, added: Mapping[str, int], stage: int, *, has_own_steps: bool
) -> None:
    """Split the groups of a fresh optimizer so that no group mixes parameters that this growth has added with others.

    Args:
        optimizer: optimizer of the stage; its groups are replaced, and those with added parameters marked `IS_NEW`.
        added: stage that added each parameter (see `list_adding_stages`).
        stage: number of the stage.
        has_own_steps: whether parameters of different ages may not share a group either: ZeRO-3 counts the steps of a
            group, not of a parameter.
    """
    architecture = get_architecture(model.config)
    stages = {id(p): added.get(architecture.canonical_name(name), 0) for name, p in model.named_parameters()}
    groups: list[dict[str, object]] = []
    for group in optimizer.param_groups:
        parts: dict[int, list[torch.Tensor]] = {}
        for parameter in group["params"]:
            age = stages[id(parameter)]
            parts.setdefault(age if has_own_steps or age == stage else 0, []).append(parameter)
        groups += [{**group, "params": parts[age], IS_NEW: bool(age) and age == stage} for age in sorted(parts)]
    optimizer.param_groups = groups
