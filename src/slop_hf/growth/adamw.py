"""Growing AdamW's moments by the maps of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..errors import GrowthError
from .axes import Run
from .inits import ZERO, Fill
from .plan import GrowthPlan, ParameterPlan
from .tensors import assemble

AdamWState = dict[str, dict[str, torch.Tensor]]


def grow_adamw_state(state: Mapping[str, Mapping[str, torch.Tensor]], plan: GrowthPlan) -> AdamWState:
    """AdamW's state of the grown model, by parameter name.

    Where growth keeps the function, old entries take the moments that belong to their new gradient: a weight scaled by
    s has gradient G / s, and the writers of a slot copied n times have G / n (its readers, G). Copied layers take the
    moments of the layer they copy, `step` goes on.

    New entries begin with `exp_avg` 0 and with `exp_avg_sq` at the mean over the parameter's old entries. A second
    moment of 0 under a large inherited `step` would have no bias correction left: Adam's first updates of the new
    entries would be several times the learning rate (6.6 times for beta2 = 0.999).

    Args:
        state: for each parameter `exp_avg` and `exp_avg_sq`, of its shape, and `step`, a scalar.
        plan: the growth, as `plan_growth` decides it.

    Raises:
        GrowthError: where a parameter has no state.
    """
    grown: AdamWState = {}
    for parameter in plan.parameters():
        if parameter.source not in state:
            raise GrowthError(
                f"the optimizer state has no {parameter.source}; grow the state of an AdamW that has taken a step"
            )
        moments = state[parameter.source]
        grown[parameter.name] = {
            "step": moments["step"].detach().clone(),
            "exp_avg": grow_moment(moments["exp_avg"], parameter, 1),
            "exp_avg_sq": grow_moment(moments["exp_avg_sq"], parameter, 2),
        }
    return grown


def grow_moment(moment: torch.Tensor, plan: ParameterPlan, power: int) -> torch.Tensor:
    """One of AdamW's moments of a grown parameter; `power` 1 for `exp_avg`, 2 for `exp_avg_sq`."""
    moment = moment.detach()

    def factor(runs: Sequence[Run]) -> float:
        copies = 1
        for dimension, run in enumerate(runs):
            copies *= 1 if dimension == plan.row.reads else run.copies
        return 0.0 if plan.silent else (copies * plan.scale) ** -power

    if power == 1:
        return assemble(moment, plan.maps, lambda operators: ZERO, factor)
    # The mean in float64 does not depend on the number of threads that sum it, once rounded to float32.
    mean = Fill(float(moment.double().mean()), 0.0)
    if plan.silent:
        return moment.new_full([axis.new_size for axis in plan.maps], mean.mean)
    return assemble(moment, plan.maps, lambda operators: mean, factor)
