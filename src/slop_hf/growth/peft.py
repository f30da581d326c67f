"""Growth of LoRA adapters with their base model; the only file that imports peft.

With LoRA, a weight W (written axis × read axis) acts as W + alpha / r · B A, where

    A   (rank, read axis)     reads what W reads: it takes W's 1 / copies, noise on copies and new columns
    B   (written axis, rank)  writes what W writes: it takes W's scale and new rows, and is 0 if W is zeroed

The rank does not grow, and each factor of W goes to A or to B, never to both. So B A grows as W would, and an init
that preserves the function preserves it with adapters too.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from transformers import PreTrainedModel

from ..architectures import Axis, Parameter
from ..errors import GrowthError
from .axes import AxisMap
from .growable import require_growable
from .plan import GrowthPlan, ParameterPlan
from .tensors import grow_parameter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

_RANK = cast(Axis, "rank")  # an axis of adapters, which no table has
_ADAPTER = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|modules_to_save)"
    r"\.(?P<adapter>[^.]+)(?:\.(?P<rest>.+))?"
)
#: Fields of a LoraConfig that change the meaning of A and B; a config that sets one is refused.
_UNSUPPORTED_FIELDS = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
    "use_qalora",
    "megatron_config",
    "use_dora",
)
_LAYER_NUMBER = re.compile(r"(?<![A-Za-z_])\d|\\d|\[")  # in a name or pattern, but not the 4 of `dense_4h_to_h`


def is_peft_model(model: object) -> TypeGuard[PeftModel]:
    """Whether a model is peft's; the check does not import peft.

    >>> is_peft_model(torch.nn.Linear(2, 2))
    False
    """
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def extract_base_model(model: PeftModel) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Return the base model of a `PeftModel`, and its weights under their names without adapters.

    The base is still wrapped in adapters: use its config and class, not its forward.

    Raises:
        GrowthError: if peft is not installed, the adapters are not plain LoRA or are merged, or the base is quantised.
    """
    _check_supported(model)
    base: PreTrainedModel = model.get_base_model()
    weights: dict[str, torch.Tensor] = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in base.named_parameters()
        if not _ADAPTER.fullmatch(name)
    }
    return base, weights


def grow_adapters(model: PeftModel, grown_base: PreTrainedModel, plan: GrowthPlan) -> PeftModel:
    """Return a `PeftModel` around a grown base, with the adapters of `model` grown by the same plan.

    All adapters are carried over: ranks, alphas, dropout, active adapters, trainable parameters, modules to save and
    biases. Layers that copy a layer copy its adapters. If the depth changes, everything in a config that names layers
    by number (`layers_to_transform`, patterns) is replaced by the full names of the modules. An `init_lora_weights`
    that changes the base (PiSSA, OLoRA, ...) has already done so and becomes `True`.

    While the base stays frozen, only what the adapters write and read can learn: new slots of ffn, which W reads with
    zeros under `preserving`, learn through an adapter of `down_proj`, and an inserted layer through adapters of its
    output projections.

    Args:
        model: as for `extract_base_model`; it is not changed.
        grown_base: grown base model; it is wrapped in place.
        plan: growth of the base.

    Returns:
        A `PeftModel` of the class of `model`, which saves and loads like any other.

    Raises:
        GrowthError: as for `extract_base_model`, and if an adapter adapts a module that the family's table lacks.

    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """
    _check_supported(model)
    sources = dict(model.get_base_model().named_parameters())
    plans = {parameter.name: parameter for parameter in plan.parameters()}
    with torch.random.fork_rng(devices=[]):  # peft fills adapters with random values first
        first, *others = model.peft_config
        grown = type(model)(grown_base, _build_config(model, first, plan), adapter_name=first)
        for adapter in others:
            grown.add_adapter(adapter, _build_config(model, adapter, plan))
        for name, parameter in grown.get_base_model().named_parameters():
            old = sources.get(plan.find_source(name))
            if old is None:
                raise GrowthError(f"the adapter's config asks for {name} after growth, which has no source; merge it")
            if match := _ADAPTER.fullmatch(name):
                parameter.data = grow_parameter(old, _plan_adapter(match, old, plans, plan))
        modules = dict(model.get_base_model().named_modules())
        for name, module in grown.get_base_model().named_modules():
            if hasattr(module, "scaling") and hasattr(module, "lora_A"):  # the user may have set it
                module.scaling.update(modules[plan.find_source(name)].scaling)
    grown.base_model.set_adapter(model.active_adapters)  # type: ignore[operator]
    grown.active_adapter = model.active_adapter
    for name, parameter in grown.get_base_model().named_parameters():
        parameter.requires_grad_(sources[plan.find_source(name)].requires_grad)
    return grown.train(model.training)


def _check_supported(model: object) -> None:
    """Raise unless a model is a `PeftModel` with plain, unmerged LoRA adapters on an unquantised base."""
    if find_spec("peft") is None:
        raise GrowthError("growing adapters needs peft; pip install 'slop-hf[peft]'")
    from peft import PeftModel, PeftType
    from peft.tuners.lora import Embedding, Linear, LoraLayer

    if not isinstance(model, PeftModel):
        raise GrowthError(f"expected a PeftModel, got {type(model).__name__}; mixed adapters must be merged first")
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.peft_type != PeftType.LORA:
            raise GrowthError(f"adapter {name!r} is of type {kind}, only LORA can grow; merge or remove it first")
        if refused := [field for field in _UNSUPPORTED_FIELDS if getattr(config, field, None)]:
            raise GrowthError(f"adapter {name!r} uses {refused[0]}, which cannot grow; merge_and_unload it first")
    base: PreTrainedModel = model.get_base_model()
    require_growable(base)
    tied = base.config.tie_word_embeddings
    ends = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    for name, module in base.named_modules():
        if getattr(module, "modules_to_save", None) is not None and tied and id(module) in ends:
            raise GrowthError(f"modules_to_save holds {name}, which is tied; untie the embeddings, or merge it first")
        if not isinstance(module, LoraLayer):
            continue
        if module.merged:
            raise GrowthError("an adapter is merged into the base; call unmerge_adapter() or merge_and_unload() first")
        if variants := getattr(module, "lora_variant", {}):
            variant = type(next(iter(variants.values()))).__name__
            raise GrowthError(f"{name} is a variant of LoRA ({variant}), which cannot grow; merge_and_unload it first")
        if type(module) not in (Linear, Embedding):
            raise GrowthError(f"{name} is peft's {type(module).__name__}; only linear layers and embeddings can grow")
        if hasattr(module.get_base_layer(), "embed_scale") and not hasattr(module, "_get_embed_scale"):
            raise GrowthError(f"this release of peft ignores the scale of {name}, so it cannot grow; upgrade peft")


def _build_config(model: PeftModel, adapter: str, plan: GrowthPlan) -> LoraConfig:
    from peft.tuners.lora import LoraLayer

    config = copy.deepcopy(model.peft_config[adapter])
    config.base_model_name_or_path = None  # it names the old base; peft fills in the new one when it saves
    if isinstance(config.init_lora_weights, str):
        config.init_lora_weights = True
    if plan.old.num_hidden_layers == plan.new.num_hidden_layers or not _names_layers(config):
        return config
    if any(map(_LAYER_NUMBER.search, config.modules_to_save or ())):
        raise GrowthError(f"modules_to_save of adapter {adapter!r} names layers by number; use names without numbers")
    ranks, alphas = {}, {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            for grown in plan.find_grown(name):
                ranks[grown], alphas[grown] = module.r[adapter], module.lora_alpha[adapter]
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.target_modules = set(ranks)
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {
        f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
    }
    return config


def _names_layers(config: LoraConfig) -> bool:
    """Whether a config treats layers differently."""
    if config.layers_to_transform is not None or isinstance(config.target_modules, str):
        return True
    if isinstance(config.exclude_modules, str):
        return True
    lists = (config.target_modules, config.exclude_modules, config.rank_pattern, config.alpha_pattern)
    names = [*(name for names in lists for name in names or ()), *(config.modules_to_save or ())]
    return any(map(_LAYER_NUMBER.search, names))


def _plan_adapter(
    match: re.Match[str], old: torch.Tensor, plans: Mapping[str, ParameterPlan], plan: GrowthPlan
) -> ParameterPlan:
    """Derive the plan of an adapter's tensor from the plan of the weight that it adapts.

    `match` is the tensor's name, split by `_ADAPTER`; `old` is the tensor before growth.
    """
    part, module, rest = match["part"], match["module"], match["rest"]
    base = plans.get(f"{module}.{rest if part == 'modules_to_save' else 'weight'}")
    tied_row = None
    if base is None:
        rows = plan.architecture.rows(plan.source_config, tied=True)
        tied_row = next((row for row in rows if row.name == f"{module}.weight" and row.tied_to), None)
        base = plans[tied_row.tied_to] if tied_row and tied_row.tied_to else None
    if base is None or (base.row.kind not in ("projection", "embedding") and part != "modules_to_save"):
        raise GrowthError(
            f"{match[0]} adapts {module}, which the axis table of {plan.architecture.model_type!r} does not "
            "describe; merge_and_unload the adapter first"
        )
    base = replace(base, name=match[0], source=plan.find_source(match[0]))
    if part == "modules_to_save":
        return base
    row = tied_row or base.row
    written = row.write_dimension
    read = 1 - written
    if part in ("lora_A", "lora_embedding_A"):
        row = Parameter(match[0], (_RANK, row.axes[read]), "projection")
        maps: tuple[AxisMap, ...] = (AxisMap.identity(old.shape[0]), base.maps[read])
        # A tied output projection cannot divide by the copies that it reads: the final norm does it, and applies to
        # the adapter too.
        scale = float(plan.residual_copies) if tied_row else 1.0
        return replace(base, row=row, maps=maps, scale=scale, is_centred=False, zeroed=False)
    if rest == "bias":
        bias = Parameter(match[0], (row.axes[written],), "bias", part=row.part, is_normalised=row.is_normalised)
        row, maps = bias, base.maps[written : written + 1]
    else:
        axes: tuple[Axis, ...] = (row.axes[written], _RANK)
        row = Parameter(match[0], axes, "projection", part=row.part, is_normalised=row.is_normalised)
        maps = (base.maps[written], AxisMap.identity(old.shape[-1]))
    return replace(base, row=row, maps=maps, noise=0.0)
