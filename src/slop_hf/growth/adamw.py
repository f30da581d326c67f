"""Growth of AdamW's state by the axis maps of the weights: by parameter name, as torch's state dict, and on disk.

On disk a state is one safetensors file with the keys `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`. Muon's state
of a parameter is a single moment without a step, `momentum_buffer/NAME`; it grows like `exp_avg`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch.optim.optimizer import StateDict

from ..architectures import LAYER
from ..errors import GrowthError
from ..io.files import require_path, write_file
from ..runs.directory import OPTIMIZER_FILE
from .axes import Segment
from .inits import ZERO, InitDistribution
from .plan import GrowthPlan, ParameterPlan, require_plan
from .safetensors_io import (
    DTYPE_NAMES,
    FLOATS,
    StoredTensor,
    TensorLayout,
    create_shard,
    name_file_in_errors,
    plan_shard,
    read_header,
    read_tensor,
    write_tensor,
)
from .tensors import allocate_grown, assemble, split_parts

#: `exp_avg`, `exp_avg_sq` and `step`, by parameter name.
AdamWState = dict[str, dict[str, torch.Tensor]]
#: Treatment of `step`, see `grow_adamw_state`.
StepPolicy = Literal["keep", "reset", "per_parameter"]
#: An entry of a state: a tensor; in some state dicts, `step` is a number.
Entry = TypeVar("Entry", torch.Tensor, int, float)

#: AdamW's moments, and the power to which a gradient enters each; the third is AMSGrad's, the last Muon's only one.
GRADIENT_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2, "momentum_buffer": 1}


def grow_adamw_state(
    state: Mapping[str, Mapping[str, torch.Tensor]], plan: GrowthPlan, *, step: StepPolicy = "keep"
) -> AdamWState:
    """Return AdamW's state of the grown model, by parameter name.

    If growth preserves the function, old entries get the moments that belong to their new gradient. Let G be the old
    gradient, s the scale of the weight (`ParameterPlan.scale`) and n the number of copies of the slots that it writes
    (the product over all its dimensions except the one that it reads). The new gradient is G / (s n), so

        exp_avg' = exp_avg / (s n)        exp_avg_sq' = exp_avg_sq / (s n)^2

    This is exact, also for tied embeddings, grouped queries and norms, with three exceptions:

    * An inserted layer that adds nothing: its output projections have new entries only, and everything before them has
      gradient 0. So `exp_avg` becomes 0, while `exp_avg_sq` stays as in the copied layer, ready for the gradient.
    * Key/value heads copied so that each serves fewer query heads: each copy gets the gradient of its own
      queries. These add up to G; the rule gives each copy an equal share.
    * `hidden` padded under LayerNorm: what writes the residual stream gets G plus a constant over the hidden axis,
      since the mean now includes the new slots.

    If growth does not preserve the function (`random`, `stack`, `interleave`), the new gradient is another one; the
    same rule is used. Under `scaled`, n copies of a layer add 1/n each of what it added, and all their gradients,
    times the scale, are 1/n of the old ones to first order (`ParameterPlan.branch_share`).

    Args:
        state: for each parameter, `exp_avg` and `exp_avg_sq` of its shape, and the scalar `step`. Parameters without
            a state, such as frozen ones, get none.
        plan: growth, as decided by `plan_growth`.
        step: "keep" continues to count. New entries then start with `exp_avg` 0 and with the mean of the parameter's
            old `exp_avg_sq`: under a large `step`, a second moment of 0 has no bias correction left, and Adam's first
            updates would be several times the learning rate (6.6 times for beta2 = 0.999). "reset" counts from 0: new
            entries start with both moments 0, as in a fresh AdamW. Old entries keep their moments, and their updates
            are multiplied by sqrt(1 - beta2^t) / (1 - beta1^t), for about 1 / (1 - beta2) steps.
            "per_parameter" tells old entries from new ones, and copies are new: of each old slot and each old layer,
            the first copy is the old one. Old entries keep their moments, new ones start with both moments 0.
            Parameters of added layers count from 0, as in a fresh AdamW; all others continue to count. Torch counts
            once per tensor, so new entries of an old tensor miss their bias correction: k steps after growth, the
            update of an entry with a steady gradient is (1 - beta1^k) / sqrt(1 - beta2^k) of a fresh AdamW's. Under
            beta2 = 0.95 that is a warm-up, from 0.45 at the first step to 1.10 at most (`compute_first_updates`).
            Counting from 0 instead would disturb the old entries, which are trained, in the same way.

    Raises:
        GrowthError: if no parameter has a state, or the state is not AdamW's, or it belongs to another model.

    >>> from slop_hf.growth import plan_growth
    >>> plan = plan_growth({"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4,
    ...                     "num_hidden_layers": 1, "num_attention_heads": 1}, "ffn", 6)
    >>> state = {p.source: {"exp_avg": torch.ones(p.old_shape), "step": torch.tensor(9.0)} for p in plan.parameters()}
    >>> grown = grow_adamw_state(state, plan)["model.layers.0.mlp.down_proj.weight"]
    >>> grown["exp_avg"][0], grown["step"]
    (tensor([1., 1., 1., 1., 0., 0.]), tensor(9.))
    """
    _check_step(step)
    require_plan(plan)
    _check_state(state)
    check_state_names(state, plan, "the optimizer state")
    without_gradient = find_parameters_without_gradient(plan)
    return {
        parameter.name: {
            key: grow_entry(key, value, parameter, step, parameter.name in without_gradient)
            for key, value in state[parameter.source].items()
        }
        for parameter in plan.parameters()
        if parameter.source in state
    }


def grow_moment(
    moment: torch.Tensor,
    plan: ParameterPlan,
    power: int,
    *,
    step: StepPolicy = "keep",
    has_no_gradient: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return one of AdamW's moments of a grown parameter.

    Args:
        power: 1 for `exp_avg`, 2 for `exp_avg_sq`.
        has_no_gradient: whether the gradient is 0 because nothing reads the parameter's output yet.
        out: tensor to write the result into; None allocates one.

    Raises:
        GrowthError: if the moment does not have the parameter's shape.
    """
    moment = moment.detach()
    if moment.shape != plan.old_shape:
        raise GrowthError(
            f"a moment of {plan.source} has shape {list(moment.shape)}, the model's has {list(plan.old_shape)}: this "
            "is the state of another model, or a sharded or quantised one; gather it first"
        )
    if (power == 1 and (has_no_gradient or plan.zeroed)) or (step == "per_parameter" and plan.is_added):
        return allocate_grown(moment, plan.maps, out).zero_()
    if plan.parts:
        grown = allocate_grown(moment, plan.maps, out)
        for old, new_part, part in split_parts(moment, grown, plan):
            grow_moment(old, part, power, step=step, has_no_gradient=has_no_gradient, out=new_part)
        return grown
    # A mean in float64, once rounded to float32, does not depend on the number of threads that sum it.
    new = ZERO if power == 1 or step != "keep" else InitDistribution(float(moment.double().mean()), 0.0)
    if plan.zeroed:
        return allocate_grown(moment, plan.maps, out).fill_(new.mean)

    def compute_factor(segments: Sequence[Segment]) -> float:
        copies = math.prod(s.copies for dimension, s in enumerate(segments) if dimension != plan.row.read_dimension)
        return (copies * plan.scale / plan.branch_share) ** -power

    maps = [axis.originals for axis in plan.maps] if step == "per_parameter" else plan.maps
    return assemble(moment, maps, lambda operators: new, compute_factor, out=out)


def compute_first_updates(beta1: float, beta2: float, steps: int = 2000) -> list[float]:
    """Return the updates of new entries of an old tensor, over those of a fresh AdamW, for each step after growth.

    The gradient is steady, the moments begin at 0, and the tensor's step count is large, as with `step`
    "per_parameter". After k steps the ratio is `(1 - beta1^k) / sqrt(1 - beta2^k)`.

    >>> updates = compute_first_updates(0.9, 0.95)
    >>> round(updates[0], 2), round(max(updates), 2)
    (0.45, 1.1)
    >>> round(max(compute_first_updates(0.9, 0.999)), 1)
    6.6
    """
    return [(1 - beta1**k) / math.sqrt(1 - beta2**k) if beta2 else 1 - beta1**k for k in range(1, steps + 1)]


def grow_optimizer_state_dict(
    state_dict: StateDict, names: Sequence[str], plan: GrowthPlan, *, step: StepPolicy = "keep"
) -> tuple[StateDict, list[str]]:
    """Return the `state_dict()` of a torch AdamW for the grown model, and the names of its parameters.

    Each group keeps its hyper-parameters and holds the grown versions of the parameters that it held. Parameters that
    were not optimised stay out; parameters without a state (no gradient yet) get none. To use it, build the new
    optimizer from the parameters with the returned names, as many in each group, and call its `load_state_dict`.

    Args:
        state_dict: state dict of the old model's AdamW.
        names: names of its parameters in the order in which the optimizer received them, one group after another.
        plan: growth, as decided by `plan_growth`.
        step: as for `grow_adamw_state`.

    Returns:
        The new state dict, and the names of its parameters in order: group after group, and within a group layer by
        layer, like the old ones. For `AdamW(model.parameters())` that is the order of the grown model.

    Raises:
        GrowthError: if the names do not fit the groups or the plan, and as for `grow_adamw_state`.
    """
    _check_step(step)
    require_plan(plan)
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise GrowthError(f"expected the state_dict() of a torch optimizer, got {type(state_dict).__name__}")
    groups = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if isinstance(names, str) or not isinstance(names, Sequence) or len(set(names)) < len(names):
        raise GrowthError("names must be a list of parameter names, each once, in the order of the optimizer")
    if len(indices) != len(names):
        raise GrowthError(
            f"the optimizer has {len(indices)} parameters, got {len(names)} names; name each one, group after group "
            "(the names of model.named_parameters(), for AdamW(model.parameters()))"
        )
    grown_by_source: dict[str, list[ParameterPlan]] = {}
    for parameter in plan.parameters():
        grown_by_source.setdefault(parameter.source, []).append(parameter)
    if unknown := [name for name in names if name not in grown_by_source]:
        raise GrowthError(
            f"the model being grown has no parameter {unknown[0]}; use the names of model.named_parameters()"
        )
    name_by_index = dict(zip(indices, names, strict=True))
    index_by_name = dict(zip(names, indices, strict=True))
    without_gradient = find_parameters_without_gradient(plan)
    state: dict[int, dict[str, torch.Tensor]] = {}
    new_groups: list[dict[str, object]] = []
    new_names: list[str] = []
    for group in groups:
        old_names = [name_by_index[index] for index in group["params"]]
        grown = _sort_by_layer([parameter for name in old_names for parameter in grown_by_source[name]], old_names)
        first = len(new_names)
        new_names += [parameter.name for parameter in grown]
        new_group = {**group, "params": list(range(first, len(new_names)))}
        if "param_names" in group:
            new_group["param_names"] = new_names[first:]
        new_groups.append(new_group)
        for index, parameter in enumerate(grown, first):
            if entries := state_dict["state"].get(index_by_name[parameter.source]):
                state[index] = {
                    key: grow_entry(key, value, parameter, step, parameter.name in without_gradient)
                    for key, value in entries.items()
                }
    return {**state_dict, "state": state, "param_groups": new_groups}, new_names


def _sort_by_layer(grown: Sequence[ParameterPlan], old_names: Sequence[str]) -> list[ParameterPlan]:
    """Sort a group's grown parameters as a model lists them, layer by layer, given the order of the old ones."""
    position = {name: index for index, name in enumerate(old_names)}
    row_position: dict[str, int] = {}  # table row of a layer -> first position of one of its parameters
    for parameter in sorted(grown, key=lambda parameter: position[parameter.source]):
        if parameter.row.is_in_layer:
            row_position.setdefault(parameter.row.name, position[parameter.source])
    first = min(row_position.values(), default=0)

    def sort_key(parameter: ParameterPlan) -> tuple[int, int, int]:
        if not parameter.row.is_in_layer:
            return position[parameter.source], 0, 0
        layer = parameter.name[parameter.row.name.index(LAYER) :].partition(".")[0]
        return first, int(layer), row_position[parameter.row.name]

    return sorted(grown, key=sort_key)


def grow_optimizer_file(
    source: str | Path, target: str | Path, plan: GrowthPlan, *, step: StepPolicy = "keep"
) -> Path:
    """Grow AdamW's state from disk to disk, one tensor at a time, with the same values as `grow_adamw_state`.

    Args:
        source: safetensors file, or directory with `optimizer.safetensors` or shards `optimizer-*.safetensors`.
        target: file, or directory to put `optimizer.safetensors` into. The file is written completely or not at all.
        plan: growth, as decided by `plan_growth`.
        step: as for `grow_adamw_state`.

    Returns:
        Path of the file written.

    Raises:
        GrowthError: if the target exists, the source cannot be read or the disk is full, and as for
            `grow_adamw_state`.
    """
    _check_step(step)
    require_plan(plan)
    require_path(source, "source", error=GrowthError)
    require_path(target, "target", error=GrowthError)
    target = Path(target)
    target = target if target.suffix == ".safetensors" else target / OPTIMIZER_FILE
    if target.exists():
        raise GrowthError(f"{target} exists already; choose another target, nothing is overwritten")
    stored = read_state_headers(source)
    check_state_names(stored, plan, str(source))
    without_gradient = find_parameters_without_gradient(plan)
    entries = {
        f"{key}/{parameter.name}": (key, entry, parameter)
        for parameter in plan.parameters()
        for key, entry in stored.get(parameter.source, {}).items()
    }
    layout = {
        name: (entry.dtype, entry.shape if key == "step" else p.new_shape) for name, (key, entry, p) in entries.items()
    }
    grown = (
        (name, grow_entry(key, read_tensor(entry), parameter, step, parameter.name in without_gradient))
        for name, (key, entry, parameter) in entries.items()
    )
    return _write(target, layout, grown)


def save_adamw_state(state: Mapping[str, Mapping[str, torch.Tensor]], path: str | Path) -> Path:
    """Write a state by parameter name to a safetensors file, completely or not at all, and return its path.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = save_adamw_state({"weight": {"step": torch.tensor(3.0)}}, Path(directory) / "optimizer.safetensors")
    ...     load_adamw_file(path)
    {'weight': {'step': tensor(3.)}}
    """
    _check_state(state)
    require_path(path, "path", error=GrowthError)
    entries = {f"{key}/{name}": value for name, moments in state.items() for key, value in moments.items()}
    for name, value in entries.items():
        if not isinstance(value, torch.Tensor) or value.dtype not in DTYPE_NAMES:
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise GrowthError(f"{name} must be a floating-point tensor, got {kind}")
    layout = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in entries.items()}
    return _write(Path(path), layout, ((name, value.cpu()) for name, value in entries.items()))


def load_adamw_file(path: str | Path) -> AdamWState:
    """Return the state by parameter name in a file, or in a directory as for `grow_optimizer_file`.

    Raises:
        GrowthError: if the files are missing, corrupt or not in this layout.
    """
    stored = read_state_headers(path)
    return {name: {key: read_tensor(entry) for key, entry in entries.items()} for name, entries in stored.items()}


def read_state_headers(source: str | Path) -> dict[str, dict[str, StoredTensor]]:
    """Return the locations of what `load_adamw_file` loads; only headers are read."""
    require_path(source, "source", error=GrowthError)
    source = Path(source)
    files = [source]
    if source.is_dir():
        single = source / OPTIMIZER_FILE
        files = [single] if single.is_file() else sorted(source.glob("optimizer-*.safetensors"))
    if not files or not files[0].is_file():
        raise GrowthError(f"{source} has no optimizer state: expected {OPTIMIZER_FILE}, or shards of it")
    if (count := re.search(r"-of-(\d+)", files[-1].name)) and int(count[1]) != len(files):
        raise GrowthError(f"{source} has {len(files)} shards of {int(count[1])} of the optimizer state; copy it again")
    stored: dict[str, dict[str, StoredTensor]] = {}
    for file in files:
        for entry in read_header(file).values():
            key, slash, name = entry.name.partition("/")
            if not slash or entry.dtype not in FLOATS:
                raise GrowthError(
                    f"{file}: {entry.name} of dtype {entry.dtype} is not AdamW's state; expected floating point "
                    "under the keys exp_avg/NAME, exp_avg_sq/NAME and step/NAME"
                )
            stored.setdefault(name, {})[key] = entry
    return stored


def _write(target: Path, layout: Mapping[str, TensorLayout], tensors: Iterable[tuple[str, torch.Tensor]]) -> Path:
    with name_file_in_errors(target), write_file(target) as temporary:
        shard = plan_shard(temporary.name, layout)
        create_shard(target.parent, shard)
        locations = {tensor.name: tensor for tensor in shard.tensors}
        for name, tensor in tensors:
            write_tensor(target.parent, locations[name], tensor)
    return target


def grow_entry(
    key: str,
    value: Entry,
    plan: ParameterPlan,
    step: StepPolicy,
    has_no_gradient: bool,
    out: torch.Tensor | None = None,
) -> Entry:
    """Return one grown entry of a parameter's state; arguments and errors as for `grow_moment`."""
    if key == "step":
        copy = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return copy * 0 if is_counted_from_zero(plan, step) else copy

    if key not in GRADIENT_POWERS or not isinstance(value, torch.Tensor) or value.dtype not in DTYPE_NAMES:
        known = ", ".join(GRADIENT_POWERS)
        raise GrowthError(
            f"{plan.source} has the state {key!r}, unknown to AdamW: {known} in floating point, and step"
        )
    return grow_moment(value, plan, GRADIENT_POWERS[key], step=step, has_no_gradient=has_no_gradient, out=out)


def is_counted_from_zero(plan: ParameterPlan, step: StepPolicy) -> bool:
    """Whether AdamW counts the steps of a grown parameter from 0."""
    return step == "reset" or (step == "per_parameter" and plan.is_added)


def find_parameters_without_gradient(plan: GrowthPlan) -> set[str]:
    """Return the parameters of inserted layers: nothing reads them until their output projections leave 0."""
    rows = [row.name for row in plan.architecture.rows(plan.source_config) if row.is_in_layer]
    return {name.replace(LAYER, str(layer)) for name in rows for layer in plan.inserted_layers}


def _check_step(step: str) -> None:
    if step not in get_args(StepPolicy):
        raise GrowthError(f"step must be one of {', '.join(get_args(StepPolicy))}, got {step!r}")


def _check_state(state: object) -> None:
    """Raise unless a state maps parameter names to named tensors, such as AdamW's."""
    if not isinstance(state, Mapping) or not all(isinstance(entries, Mapping) for entries in state.values()):
        raise GrowthError(
            "the state must map each parameter's name to its exp_avg, exp_avg_sq and step; "
            "for the state_dict() of an optimizer there is grow_optimizer_state_dict"
        )


def check_state_names(names: Iterable[str], plan: GrowthPlan, origin: str) -> None:
    """Raise unless `origin` holds states, and only of parameters being grown; frozen ones have none."""
    if plan.dense is not None:
        raise GrowthError(
            "the optimizer state of a dense model does not grow into one of a model with experts; begin with a new one"
        )
    expected, names = {parameter.source for parameter in plan.parameters()}, set(names)
    if not names:
        raise GrowthError(f"{origin} holds no state; grow the state of an AdamW that has taken a step")
    if unexpected := sorted(names - expected):
        raise GrowthError(f"{origin} has {unexpected[0]}, unlike the model being grown; pass the state of this model")
