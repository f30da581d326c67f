"""Frozen parameters: those with `requires_grad` False, which stay so through all stages of a run."""

from __future__ import annotations

from collections.abc import Iterable, Set
from itertools import pairwise
from typing import TYPE_CHECKING

from ..architectures import get_architecture
from ..dims import ModelConfig
from ..errors import RunError
from ..growth import plan_growth
from .spans import StageSpan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_frozen(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of a model's frozen parameters, sorted.

    Raises:
        RunError: if all are frozen.
    """
    architecture = get_architecture(model.config)
    names = {architecture.canonical_name(name): item.requires_grad for name, item in model.named_parameters()}
    if not any(names.values()):
        raise RunError(
            "every parameter of the model is frozen (requires_grad False); leave some of them to be trained"
        )
    return tuple(sorted(name for name, is_trained in names.items() if not is_trained))


def list_frozen_of_stages(
    frozen: Iterable[str], spans: Iterable[StageSpan], config: ModelConfig
) -> list[frozenset[str]]:
    """Return the names of each stage's frozen parameters: those that grow from frozen ones of the stage before.

    Args:
        frozen: frozen parameters of the initial model.
        spans: stages of the run.
        config: config of the initial model.
    """
    stages = [frozenset(frozen)]
    for before, span in pairwise(spans):
        names = stages[-1]
        if names and span.growth is not None:
            parameters = plan_growth(before.dims.to_config(config), span.growth).parameters()
            names = frozenset(p.name for p in parameters if p.source in names and not p.takes_nothing)
        stages.append(names)
    return stages


def freeze_parameters(model: PreTrainedModel, frozen: Set[str]) -> None:
    """Freeze the named parameters of a model, and train the others."""
    architecture = get_architecture(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(architecture.canonical_name(name) not in frozen)
