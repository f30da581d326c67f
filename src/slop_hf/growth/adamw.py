"""Growing AdamW's moments by the maps of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..errors import GrowthError
from .inits import Fill
from .plan import GrowthPlan
from .tensors import grow_tensor

AdamWState = dict[str, dict[str, torch.Tensor]]


def grow_adamw_state(state: Mapping[str, Mapping[str, torch.Tensor]], plan: GrowthPlan) -> AdamWState:
    """AdamW's state of the grown model, by parameter name.

    Old entries keep both moments, copied layers take those of the layer they copy, and `step` goes on. New entries
    begin with `exp_avg` 0 and with `exp_avg_sq` at the mean over the parameter's old entries. A second moment of 0
    under a large inherited `step` would have no bias correction left: Adam's first updates of the new entries would
    be several times the learning rate (6.6 times for beta2 = 0.999).

    Args:
        state: for each parameter `exp_avg` and `exp_avg_sq`, of its shape, and `step`, a scalar.
        plan: the growth, as `plan_growth` decides it.

    Raises:
        GrowthError: where a parameter has no state.
    """
    grown: AdamWState = {}
    for new, old, row in plan.parameters():
        if old not in state:
            raise GrowthError(f"the optimizer state has no {old}; grow the state of an AdamW that has taken a step")
        moments = state[old]
        maps = plan.maps(row)
        # The mean in float64 does not depend on the number of threads that sum it, once rounded to float32.
        mean_square = float(moments["exp_avg_sq"].double().mean())
        grown[new] = {
            "step": moments["step"].detach().clone(),
            "exp_avg": grow_tensor(moments["exp_avg"], maps, Fill(0.0, 0.0)),
            "exp_avg_sq": grow_tensor(moments["exp_avg_sq"], maps, Fill(mean_square, 0.0)),
        }
    return grown
