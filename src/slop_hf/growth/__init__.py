"""Growing models and optimizer states by axis maps."""

from .adamw import AdamWState, grow_adamw_state
from .inits import INITS, resolve_inits
from .model import build_model, grow_model, grow_weights
from .plan import GrowthPlan, plan_growth

__all__ = [
    "INITS",
    "AdamWState",
    "GrowthPlan",
    "build_model",
    "grow_adamw_state",
    "grow_model",
    "grow_weights",
    "plan_growth",
    "resolve_inits",
]
