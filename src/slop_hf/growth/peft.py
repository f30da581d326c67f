"""Growing LoRA adapters with their base model; the only file that imports peft.

A weight W (written axis × read axis) under LoRA acts as W + alpha / r · B A, with

    A   (rank, read axis)     reads as W does, so it takes 1 / copies, the noise on copies and new columns as W does
    B   (written axis, rank)  writes as W does, so it takes W's scale and new rows, and is 0 where W is silenced

The rank does not grow, and each factor of W's is on A or on B, never on both. So B A grows as W would have, and an
init that keeps the function keeps it with adapters too.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from ..architectures import LAYER, Axis, Parameter
from ..errors import GrowthError
from .axes import AxisMap
from .plan import GrowthPlan, ParameterPlan
from .tensors import grow_parameter

_RANK = cast(Axis, "rank")  # of the adapter alone: no table has it
_ADAPTER = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|modules_to_save)"
    r"\.(?P<adapter>[^.]+)(?:\.(?P<rest>.+))?"
)
#: Fields of a LoraConfig that change what A and B mean; refused where they are set.
_REFUSED = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "ensure_weight_tying",
    "use_qalora",
    "megatron_config",
)
_LAYER_NUMBER = re.compile(r"(?<![A-Za-z_])\d|\\d|\[")  # in a name or a pattern; the 4 of `dense_4h_to_h` is none


def is_peft_model(model: Any) -> bool:
    """Whether a model is peft's; peft is not loaded to find out.

    >>> is_peft_model(torch.nn.Linear(2, 2))
    False
    """
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel))


def extract_base_model(model: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The base model of a `PeftModel`, and its weights under the names that they have without adapters.

    The base is still wrapped in adapters: take its config and class, not its forward.

    Raises:
        GrowthError: peft is not installed, no LoRA, a variant of LoRA, merged adapters, a quantised base.
    """
    _check_supported(model)
    base = model.get_base_model()
    weights = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in base.named_parameters()
        if not _ADAPTER.fullmatch(name)
    }
    return base, weights


def grow_adapters(model: Any, grown_base: PreTrainedModel, plan: GrowthPlan) -> Any:
    """A `PeftModel` around a grown base, with the adapters of `model` grown by the same plan.

    All adapters are carried over: ranks, alphas, dropout, which of them are active, what is trained, modules to save
    and biases. Layers that copy a layer copy its adapters. Where the depth changes, whatever in a config names layers
    by number (`layers_to_transform`, patterns) is replaced by the full names of the modules. An `init_lora_weights`
    that changes the base (PiSSA, OLoRA, ...) has done so already and becomes `True`.

    Only what the adapters write and read can learn while the base stays frozen: new slots of ffn, which W reads with
    zeros under `preserving`, come to life through an adapter of `down_proj`, an inserted layer through those of its
    output projections.

    Args:
        model: as `extract_base_model` accepts it; it is left untouched.
        grown_base: the grown base model, which is wrapped in place.
        plan: the growth.

    Returns:
        A `PeftModel` of the class of `model`; it saves and loads as any other.

    Raises:
        GrowthError: as for `extract_base_model`, and for adapters of modules that the family's table does not have.

    Source: LoRA, https://arxiv.org/abs/2106.09685.
    """
    _check_supported(model)
    source = dict(model.get_base_model().named_parameters())
    plans = {parameter.name: parameter for parameter in plan.parameters()}
    with torch.random.fork_rng(devices=[]):  # peft fills adapters at random before they get their values
        grown = _wrap(model, grown_base, plan)
        for name, parameter in grown.get_base_model().named_parameters():
            old = source.get(_source_name(name, plan))
            if old is None:
                raise GrowthError(f"the adapter's config asks for {name} after growth, which has no source; merge it")
            if found := _ADAPTER.fullmatch(name):
                parameter.data = grow_parameter(old, _adapter_plan(found, old, plans, plan))
        modules = dict(model.get_base_model().named_modules())
        for name, module in grown.get_base_model().named_modules():
            if hasattr(module, "scaling") and hasattr(module, "lora_A"):  # it may have been set by hand
                module.scaling.update(modules[_source_name(name, plan)].scaling)
    grown.base_model.set_adapter(model.active_adapters)
    grown.active_adapter = model.active_adapter
    for name, parameter in grown.get_base_model().named_parameters():
        parameter.requires_grad_(source[_source_name(name, plan)].requires_grad)
    return grown.train(model.training)


def _check_supported(model: Any) -> None:
    """Refuse what is no plain LoRA."""
    if find_spec("peft") is None:
        raise GrowthError("growing adapters takes peft; pip install 'slop-hf[peft]'")
    from peft import PeftModel, PeftType
    from peft.tuners.lora import Embedding, Linear, LoraLayer

    if not isinstance(model, PeftModel):
        raise GrowthError(f"expected a PeftModel, got {type(model).__name__}; mixed adapters must be merged first")
    for name, config in model.peft_config.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.peft_type != PeftType.LORA:
            raise GrowthError(f"adapter {name!r} is of type {kind}, only LORA can grow; merge or remove it first")
        if refused := [field for field in (*_REFUSED, "use_dora") if getattr(config, field, None)]:
            raise GrowthError(f"adapter {name!r} uses {refused[0]}, which cannot grow; merge_and_unload it first")
    base: Any = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise GrowthError("the base model is quantised; load it in full precision to grow it")
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
            raise GrowthError(f"this release of peft ignores the factor of {name}, so it cannot grow; upgrade peft")


def _wrap(model: Any, base: PreTrainedModel, plan: GrowthPlan) -> Any:
    """The grown base with adapters of the right sizes, whatever their values."""
    grown = None
    for name in model.peft_config:
        config = _grown_config(model, name, plan)
        if grown is None:
            grown = type(model)(base, config, adapter_name=name)
        else:
            grown.add_adapter(name, config)
    return grown


def _grown_config(model: Any, adapter: str, plan: GrowthPlan) -> Any:
    """The adapter's config for the grown base."""
    from peft.tuners.lora import LoraLayer

    config = copy.deepcopy(model.peft_config[adapter])
    config.base_model_name_or_path = None  # the old base's; peft writes the new one's when it saves
    if isinstance(config.init_lora_weights, str):
        config.init_lora_weights = True
    if plan.old.num_hidden_layers == plan.new.num_hidden_layers or not _names_layers(config):
        return config
    if any(map(_LAYER_NUMBER.search, config.modules_to_save or ())):
        raise GrowthError(f"modules_to_save of adapter {adapter!r} names layers by number; name modules without it")
    ranks, alphas = {}, {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter in module.r:
            for grown in _grown_names(name, plan):
                ranks[grown], alphas[grown] = module.r[adapter], module.lora_alpha[adapter]
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    config.target_modules = set(ranks)
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {
        f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != config.lora_alpha
    }
    return config


def _names_layers(config: Any) -> bool:
    """Whether a config tells layers apart."""
    if config.layers_to_transform is not None or isinstance(config.target_modules, str):
        return True
    if isinstance(config.exclude_modules, str):
        return True
    lists = (config.target_modules, config.exclude_modules, config.rank_pattern, config.alpha_pattern)
    names = [*(name for names in lists for name in names or ()), *(config.modules_to_save or ())]
    return any(map(_LAYER_NUMBER.search, names))


def _source_name(name: str, plan: GrowthPlan) -> str:
    """The name in the old model of what a parameter or module of the grown one comes from."""
    prefix = _layer_prefix(plan)
    if not name.startswith(prefix):
        return name
    layer, dot, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{plan.layers[int(layer)]}{dot}{rest}"


def _grown_names(name: str, plan: GrowthPlan) -> list[str]:
    """The names of the grown modules that come from an old one."""
    prefix = _layer_prefix(plan)
    if not name.startswith(prefix):
        return [name]
    layer, dot, rest = name.removeprefix(prefix).partition(".")
    return [f"{prefix}{new}{dot}{rest}" for new, old in enumerate(plan.layers) if old == int(layer)]


def _layer_prefix(plan: GrowthPlan) -> str:
    return next(row.name.partition(LAYER)[0] for row in plan.architecture.parameters if row.is_in_layer)


def _adapter_plan(
    found: re.Match[str], old: torch.Tensor, plans: Mapping[str, ParameterPlan], plan: GrowthPlan
) -> ParameterPlan:
    """The plan of one tensor of an adapter, from that of the weight that it adapts."""
    part = found["part"]
    base = plans.get(f"{found['module']}.{found['rest'] if part == 'modules_to_save' else 'weight'}")
    tied = base is None and _tied_head(found["module"], plan)
    if tied:
        base = plans[tied.tied_to or ""]
    if base is None or (base.row.kind not in ("projection", "embedding") and part != "modules_to_save"):
        raise GrowthError(
            f"{found[0]} adapts {found['module']}, which the axis table of {plan.architecture.model_type!r} does not "
            "describe; merge_and_unload the adapter first"
        )
    base = replace(base, name=found[0], source=_source_name(found[0], plan))
    if part == "modules_to_save":
        return base
    row = tied or base.row
    writes, reads = (1, 0) if row.kind == "embedding" else (0, 1)
    rank = AxisMap.identity(old.shape[0 if part in ("lora_A", "lora_embedding_A") else -1])
    if part in ("lora_A", "lora_embedding_A"):
        return replace(
            base,
            row=Parameter(found[0], (_RANK, row.axes[reads]), "projection"),
            maps=(rank, base.maps[reads]),
            # The final norm divides for a tied matrix, which cannot do so itself.
            scale=float(plan.residual_copies) if tied else 1.0,
            centre=False,
            silent=False,
        )
    if found["rest"] == "bias":
        bias = Parameter(found[0], (row.axes[writes],), "bias", part=row.part)
        return replace(base, row=bias, maps=(base.maps[writes],), noise=0.0)
    return replace(
        base,
        row=Parameter(found[0], (row.axes[writes], _RANK), "projection", part=row.part),
        maps=(base.maps[writes], rank),
        noise=0.0,
    )


def _tied_head(module: str, plan: GrowthPlan) -> Parameter | None:
    """The row of a weight that has no storage of its own."""
    rows = plan.architecture.rows(plan.source_config, tied=True)
    return next((row for row in rows if row.name == f"{module}.weight" and row.tied_to), None)
