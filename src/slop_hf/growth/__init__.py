"""Growth of models and optimizer states by axis maps."""

from .adamw import (
    AdamWState,
    grow_adamw_state,
    grow_optimizer_file,
    grow_optimizer_state_dict,
    load_adamw_file,
    save_adamw_state,
)
from .checkpoint import CheckpointPlan, find_checkpoint_directory, grow_checkpoint, plan_checkpoint_growth
from .experts import measure_expert_utility
from .inits import INITS, resolve_inits
from .model import build_model, carry_requires_grad, grow_model, grow_weights, hide_progress_bars
from .peft import extract_base_model, grow_adapters, is_peft_model
from .plan import GrowthPlan, plan_growth
from .receipt import GrowthProbe, GrowthReceipt
from .state_reader import WEIGHT, GrownStateReader
from .verify import hash_stored_weights, hash_weights, probe_growth

__all__ = [
    "INITS",
    "WEIGHT",
    "AdamWState",
    "CheckpointPlan",
    "GrownStateReader",
    "GrowthPlan",
    "GrowthProbe",
    "GrowthReceipt",
    "build_model",
    "carry_requires_grad",
    "extract_base_model",
    "find_checkpoint_directory",
    "grow_adamw_state",
    "grow_adapters",
    "grow_checkpoint",
    "grow_model",
    "grow_optimizer_file",
    "grow_optimizer_state_dict",
    "grow_weights",
    "hash_stored_weights",
    "hash_weights",
    "hide_progress_bars",
    "is_peft_model",
    "load_adamw_file",
    "measure_expert_utility",
    "plan_checkpoint_growth",
    "plan_growth",
    "probe_growth",
    "resolve_inits",
    "save_adamw_state",
]
