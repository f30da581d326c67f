"""Growing models and optimizer states by axis maps."""

from .adamw import AdamWState, grow_adamw_state
from .checkpoint import grow_checkpoint, plan_checkpoint_growth
from .inits import INITS, resolve_inits
from .model import build_model, grow_model, grow_weights, no_progress_bars
from .plan import GrowthPlan, plan_growth
from .receipt import GrowthProbe, GrowthReceipt
from .verify import probe_growth, weights_hash

__all__ = [
    "INITS",
    "AdamWState",
    "GrowthPlan",
    "GrowthProbe",
    "GrowthReceipt",
    "build_model",
    "grow_adamw_state",
    "grow_checkpoint",
    "grow_model",
    "grow_weights",
    "no_progress_bars",
    "plan_checkpoint_growth",
    "plan_growth",
    "probe_growth",
    "resolve_inits",
    "weights_hash",
]
