"""Growing AdamW's state by the maps of the weights: by parameter name, as torch's state dict, and on disk.

On disk it is a safetensors file with the keys `exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME`.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..architectures import LAYER
from ..errors import GrowthError
from ..runs.directory import OPTIMIZER_FILE
from .axes import Run
from .inits import ZERO, InitDistribution
from .plan import GrowthPlan, ParameterPlan
from .safetensors_io import (
    DTYPE_NAMES,
    FLOATS,
    StoredTensor,
    create_shard,
    flush_shard,
    plan_shards,
    read_header,
    read_tensor,
    write_tensor,
)
from .tensors import assemble, allocate_grown

AdamWState = dict[str, dict[str, torch.Tensor]]
#: What becomes of `step`, see `grow_adamw_state`.
StepPolicy = Literal["keep", "reset"]

#: AdamW's moments, and to which power a gradient enters them; the last is AMSGrad's.
MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}


def grow_adamw_state(
    state: Mapping[str, Mapping[str, torch.Tensor]], plan: GrowthPlan, *, step: StepPolicy = "keep"
) -> AdamWState:
    """AdamW's state of the grown model, by parameter name.

    Where growth keeps the function, old entries take the moments that belong to their new gradient. With G the old
    gradient, s the scale of a weight (`ParameterPlan.scale`) and n the copies of what it writes (all its dimensions
    but the one that it reads), that is G / (s n), and its square for `exp_avg_sq`. It is exact for tied embeddings,
    grouped queries and norms too, but for three cases:

    * an inserted layer that adds nothing: its output projections have new entries only, everything before them has
      gradient 0, so `exp_avg` is 0, while `exp_avg_sq` stays that of the layer it copies, for when the gradient comes;
    * key/value heads shared out among the query heads of a group: each has the gradient of its own queries. Their sum
      is G; the rule gives each an equal share;
    * hidden padded under LayerNorm: what writes the residual stream has G plus a constant over the hidden axis, since
      the mean is now taken over new slots too.

    Where growth does not keep the function (`random`, `stack`, `interleave`) there is no such G, and the same rule
    carries the moments along.

    Args:
        state: for each parameter `exp_avg` and `exp_avg_sq`, of its shape, and `step`, a scalar.
        plan: the growth, as `plan_growth` decides it.
        step: "keep" goes on counting. New entries then begin with `exp_avg` 0 and with `exp_avg_sq` at the mean over
            the parameter's old ones: a second moment of 0 under a large `step` has no bias correction left, and Adam's
            first updates would be several times the learning rate (6.6 times for beta2 = 0.999). "reset" counts from
            0: new entries begin with both moments 0, just as in a fresh AdamW, and the updates of old ones, whose
            moments stay, are damped for about 1 / (1 - beta2) steps (by sqrt(1 - beta2^t) / (1 - beta1^t)).

    Raises:
        GrowthError: where a parameter has no state, or a state that is not AdamW's or not of the plan's model.

    >>> from slop_hf.growth import plan_growth
    >>> plan = plan_growth({"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4,
    ...                     "num_hidden_layers": 1, "num_attention_heads": 1}, "ffn", 6)
    >>> state = {p.source: {"exp_avg": torch.ones([axis.old_size for axis in p.maps]), "step": torch.tensor(9.0)}
    ...          for p in plan.parameters()}
    >>> grown = grow_adamw_state(state, plan)["model.layers.0.mlp.down_proj.weight"]
    >>> grown["exp_avg"][0], grown["step"]
    (tensor([1., 1., 1., 1., 0., 0.]), tensor(9.))
    """
    _check_step(step)
    check_names(state, plan, "the optimizer state")
    idle = find_parameters_without_gradient(plan)
    return {
        parameter.name: {
            key: grow_entry(key, value, parameter, step, parameter.name in idle)
            for key, value in state[parameter.source].items()
        }
        for parameter in plan.parameters()
    }


def grow_moment(
    moment: torch.Tensor,
    plan: ParameterPlan,
    power: int,
    *,
    step: StepPolicy = "keep",
    idle: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One of AdamW's moments of a grown parameter.

    Args:
        moment: of the old parameter, and of its shape.
        plan: of the parameter.
        power: 1 for `exp_avg`, 2 for `exp_avg_sq`.
        step: as for `grow_adamw_state`.
        idle: whether the parameter's gradient is 0 because nothing reads what it makes.
        out: where to put it; by default in new memory.

    Raises:
        GrowthError: for a moment of another shape.
    """
    moment, shape = moment.detach(), [axis.old_size for axis in plan.maps]
    if list(moment.shape) != shape:
        raise GrowthError(
            f"a moment of {plan.source} has shape {list(moment.shape)}, the model's has {shape}: this is the state of "
            "another model, or a sharded or quantised one; gather it first"
        )
    if power == 1 and (idle or plan.silent):
        return allocate_grown(moment, plan.maps, out).zero_()
    # The mean in float64 does not depend on the number of threads that sum it, once rounded to float32.
    fill = ZERO if power == 1 or step == "reset" else InitDistribution(float(moment.double().mean()), 0.0)
    if plan.silent:
        return allocate_grown(moment, plan.maps, out).fill_(fill.mean)

    def factor(runs: Sequence[Run]) -> float:
        copies = 1
        for dimension, run in enumerate(runs):
            copies *= 1 if dimension == plan.row.reads else run.copies
        return (copies * plan.scale) ** -power

    return assemble(moment, plan.maps, lambda operators: fill, factor, out=out)


def grow_optimizer_state_dict(
    state_dict: Mapping[str, Any], names: Sequence[str], plan: GrowthPlan, *, step: StepPolicy = "keep"
) -> tuple[dict[str, Any], list[str]]:
    """The `state_dict()` of a torch AdamW for the grown model, and the parameters that it is for.

    Each group keeps its hyper-parameters and holds the grown parameters whose source it held. Parameters that were not
    optimised are not; those without a state (no gradient yet) have none. Build the new optimizer of the parameters
    with the returned names, with as many in each group, then call its `load_state_dict`.

    Args:
        state_dict: of the old model's AdamW.
        names: the names of its parameters, one group after the other, as the optimizer was given them.
        plan, step: as for `grow_adamw_state`.

    Returns:
        The new state dict, and the names of its parameters in their order: group after group, and within a group as
        the old ones were, layer by layer. For `AdamW(model.parameters())` that is the order of the grown model's.

    Raises:
        GrowthError: names that do not fit the groups or the plan, and as for `grow_adamw_state`.
    """
    _check_step(step)
    groups = state_dict["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    if len(indices) != len(names):
        raise GrowthError(
            f"the optimizer has {len(indices)} parameters, got {len(names)} names; name each one, group after group "
            "(the names of model.named_parameters(), for AdamW(model.parameters()))"
        )
    grown_of: dict[str, list[ParameterPlan]] = {}
    for parameter in plan.parameters():
        grown_of.setdefault(parameter.source, []).append(parameter)
    if strays := [name for name in names if name not in grown_of]:
        raise GrowthError(f"the model that is to grow has no parameter {strays[0]}; name parameters as the model does")
    name_of, index_of = dict(zip(indices, names, strict=True)), dict(zip(names, indices, strict=True))
    idle, state, new_groups = find_parameters_without_gradient(plan), {}, []
    new_names: list[str] = []
    for group in groups:
        old = [name_of[index] for index in group["params"]]
        grown = _in_the_order_of(old, [parameter for name in old for parameter in grown_of[name]])
        first = len(new_names)
        new_names += [parameter.name for parameter in grown]
        new_group = {**group, "params": list(range(first, len(new_names)))}
        if "param_names" in group:
            new_group["param_names"] = new_names[first:]
        new_groups.append(new_group)
        for index, parameter in enumerate(grown, first):
            if entries := state_dict["state"].get(index_of[parameter.source]):
                state[index] = {
                    key: grow_entry(key, value, parameter, step, parameter.name in idle)
                    for key, value in entries.items()
                }
    return {**state_dict, "state": state, "param_groups": new_groups}, new_names


def _in_the_order_of(old: Sequence[str], grown: Sequence[ParameterPlan]) -> list[ParameterPlan]:
    """Grown parameters as a model lists them whose old ones come in the order `old`: layer by layer."""
    place = {name: index for index, name in enumerate(old)}
    in_layers: dict[str, int] = {}  # by row of the table
    for parameter in grown:
        if parameter.row.is_in_layer:
            row, index = parameter.row.name, place[parameter.source]
            in_layers[row] = min(in_layers.get(row, index), index)
    first = min(in_layers.values(), default=0)

    def key(parameter: ParameterPlan) -> tuple[int, int, int]:
        if not parameter.row.is_in_layer:
            return place[parameter.source], 0, 0
        layer = parameter.name[parameter.row.name.index(LAYER) :].partition(".")[0]
        return first, int(layer), in_layers[parameter.row.name]

    return sorted(grown, key=key)


def grow_optimizer_file(
    source: str | Path, target: str | Path, plan: GrowthPlan, *, step: StepPolicy = "keep"
) -> Path:
    """Grow AdamW's state from disk to disk, a tensor at a time; the values are those of `grow_adamw_state`.

    Args:
        source: a safetensors file, or a folder with `optimizer.safetensors` or shards `optimizer-*.safetensors`.
        target: a file, or a folder to put `optimizer.safetensors` into. It is complete or absent.
        plan, step: as for `grow_adamw_state`.

    Returns:
        The file written.

    Raises:
        GrowthError: existing target, unreadable source, full disk, and as for `grow_adamw_state`.
    """
    _check_step(step)
    target = Path(target)
    if target.suffix != ".safetensors":
        target = target / OPTIMIZER_FILE
    if target.exists():
        raise GrowthError(f"{target} exists already; choose another target, nothing is overwritten")
    stored = read_state_headers(source)
    check_names(stored, plan, str(source))
    parameters, idle = list(plan.parameters()), find_parameters_without_gradient(plan)
    layout = {
        f"{key}/{parameter.name}": (
            entry.dtype,
            tuple(axis.new_size for axis in parameter.maps) if key in MOMENTS else entry.shape,
        )
        for parameter in parameters
        for key, entry in stored[parameter.source].items()
    }
    grown = (
        (
            f"{key}/{parameter.name}",
            grow_entry(key, read_tensor(entry), parameter, step, parameter.name in idle),
        )
        for parameter in parameters
        for key, entry in stored[parameter.source].items()
    )
    return _write(target, layout, grown)


def save_adamw_state(state: Mapping[str, Mapping[str, torch.Tensor]], path: str | Path) -> Path:
    """Write a state by parameter name to a safetensors file, which is complete or absent.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save_adamw_state({"weight": {"step": torch.tensor(3.0)}}, Path(folder) / "optimizer.safetensors")
    ...     load_adamw_file(path)
    {'weight': {'step': tensor(3.)}}
    """
    entries = {f"{key}/{name}": value for name, moments in state.items() for key, value in moments.items()}
    layout = {name: (DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in entries.items()}
    return _write(Path(path), layout, ((name, value.cpu()) for name, value in entries.items()))


def load_adamw_file(path: str | Path) -> AdamWState:
    """The state by parameter name in a file, or in a folder as for `grow_optimizer_file`.

    Raises:
        GrowthError: for what is missing, corrupt or not in this layout.
    """
    stored = read_state_headers(path)
    return {name: {key: read_tensor(entry) for key, entry in entries.items()} for name, entries in stored.items()}


def read_state_headers(source: str | Path) -> dict[str, dict[str, StoredTensor]]:
    """Where each parameter's entries lie: `exp_avg`, `exp_avg_sq` and `step`.

    Args:
        source: a file, or a folder with `optimizer.safetensors` or shards of it.

    Raises:
        GrowthError: for what is missing, corrupt or not in this layout.
    """
    source = Path(source)
    files = [source]
    if source.is_dir():
        single = source / OPTIMIZER_FILE
        files = [single] if single.is_file() else sorted(source.glob("optimizer-*.safetensors"))
    if not files or not files[0].is_file():
        raise GrowthError(f"{source} has no optimizer state: expected {OPTIMIZER_FILE}, or shards of it")
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


def _write(
    target: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> Path:
    """Write a file aside, a tensor at a time, and rename it into place."""
    aside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        (shard,) = plan_shards(layout, sys.maxsize)
        create_shard(aside, shard)
        places = {tensor.name: tensor for tensor in shard.tensors}
        for name, tensor in tensors:
            write_tensor(aside, places[name], tensor)
        flush_shard(aside, shard)
        (aside / shard.file).replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def grow_entry(
    key: str, value: Any, plan: ParameterPlan, step: StepPolicy, idle: bool, out: torch.Tensor | None = None
) -> Any:
    """One entry of a parameter's state, grown; arguments as for `grow_moment`."""
    if key == "step":
        kept = value.detach().clone() if isinstance(value, torch.Tensor) else value
        return kept if step == "keep" else kept * 0
    if key not in MOMENTS:
        raise GrowthError(f"{plan.source} has the state {key!r}, which is not AdamW's: {', '.join(MOMENTS)} and step")
    return grow_moment(value, plan, MOMENTS[key], step=step, idle=idle, out=out)


def find_parameters_without_gradient(plan: GrowthPlan) -> set[str]:
    """The parameters of inserted layers, which nothing reads before their output projections leave 0."""
    rows = [row.name for row in plan.architecture.rows(plan.source_config) if row.is_in_layer]
    return {name.replace(LAYER, str(layer)) for name in rows for layer in plan.inserted}


def _check_step(step: str) -> None:
    if step not in get_args(StepPolicy):
        raise GrowthError(f"step must be one of {', '.join(get_args(StepPolicy))}, got {step!r}")


def check_names(found: Iterable[str], plan: GrowthPlan, what: str) -> None:
    """Refuse a state that is not of the model that is to grow.

    Raises:
        GrowthError: naming the parameter that is missing, or too many.
    """
    known, found = {parameter.source for parameter in plan.parameters()}, set(found)
    if missing := sorted(known - found):
        raise GrowthError(f"{what} has no {missing[0]}; grow the state of an AdamW that has taken a step")
    if strays := sorted(found - known):
        raise GrowthError(f"{what} has {strays[0]}, which the model that is to grow has not; give its own state")
