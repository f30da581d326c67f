"""DeepSpeed ZeRO-3: states sharded over all ranks. The only file that imports deepspeed.

Every parameter, its float32 master and AdamW's moments are cut into one equal part per rank, the last one padded
(Rajbhandari et al., "ZeRO", 2020, section 5).
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import deepspeed_config

from ..growth import WEIGHT
from .checks import check_deepspeed_config
from .muon import ALGORITHM, MOMENTUM, MUON, MatrixPart, MuonWithAdamW
from .ranks import Ranks
from .states import MOMENT_KEYS, STEP, Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedConfig, Trainer

# DeepSpeed calls torch by deprecated names in every step.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)

#: Entries of DeepSpeed's configuration that transformers derives from the hidden size if they are "auto".
_BY_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")

#: glibc's M_MMAP_THRESHOLD: allocations of at least this size are mapped, and returned to the kernel when freed.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2**20


def prepare_for_cpus() -> None:
    """Set DeepSpeed up for ranks without an accelerator.

    Its operator for ranks that share memory is turned off: compiling it takes a minute. It finds the number of ranks
    in the environment, as under its own launcher: without it, it starts a process to count them for each gradient.
    And large tensors return their memory when they are freed: glibc would keep it, in pieces too small for the next
    stage's tensors, and one of two ranks would end up holding as much as a single process.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class Zero3Strategy(Strategy):
    """Models sharded by DeepSpeed, whose configuration is completed again for each stage.

    transformers replaces "auto" by numbers only once, for the first model. Configurations whose states could not be
    carried over a growth are refused.

    Args:
        needs_groups: whether parameters of added layers need groups of their own.
    """

    def __init__(self, accelerator: Accelerator, ranks: Ranks, *, needs_groups: bool = False) -> None:
        super().__init__(ranks)
        self._accelerator = accelerator
        self._config: dict[str, Any] = accelerator.state.deepspeed_plugin.hf_ds_config.config
        check_deepspeed_config(self._config, needs_groups=needs_groups)
        self._auto = [name for name in _BY_HIDDEN_SIZE if self._config["zero_optimization"].get(name) == "auto"]

    def begin_stage(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """Write a stage's batch sizes, and reset to "auto" the entries that depend on the hidden size."""
        self._config["train_micro_batch_size_per_gpu"] = micro_batch_size
        self._config["gradient_accumulation_steps"] = accumulation_steps
        self._accelerator.gradient_accumulation_steps = accumulation_steps  # else it warns that the two differ
        self._config["train_batch_size"] = micro_batch_size * accumulation_steps * self._ranks.count
        self._config["zero_optimization"].update(dict.fromkeys(self._auto, "auto"))

    def finish_preparation(self, wrapped: torch.nn.Module) -> None:
        """Say where matrices lie, if Muon is to find them, and share the memory of masters with float32 weights.

        That is a quarter of what a rank holds.

        DeepSpeed intends the same, and keeps both in step; but its test compares a device with the device's name.
        """
        zero: Any = wrapped.optimizer
        for master, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            if weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device):
                master.data = weights.data
        if isinstance(zero.optimizer, MuonWithAdamW):
            for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                sizes = [parameter.partition_numel() for parameter in parameters]
                starts = accumulate(sizes, initial=0)
                shapes = [tuple(parameter.ds_shape) for parameter in parameters]
                zero.optimizer.shards[flat] = [MatrixPart(*part) for part in zip(shapes, starts, sizes)]  # noqa: B905

    def build_empty_model(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
    ) -> PreTrainedModel:
        """Return a model with sharded, uninitialised parameters; DeepSpeed decides on their dtype."""
        return _build_empty_model(model_class, config, self._config)

    def get_states(self, trainer: Trainer) -> Zero3States:
        return Zero3States(trainer.deepspeed, self._ranks)

    def release(self, wrapped: torch.nn.Module) -> None:
        """Cut every reference that would keep a destroyed engine and its states alive to the end of the run.

        These are a global list of DeepSpeed's, the cache of a method, whose keys hold the object itself, and the
        model, which its maker may still hold although it is empty.
        """
        root: torch.nn.Module | None = getattr(wrapped, "module", None)
        if root is None:
            return
        stack = parameter_offload.FWD_MODULE_STACK
        stack[:] = [module for module in stack if module is not root]
        for method in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(method, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()
        for module in root.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks, module._backward_hooks):
                hooks.clear()
        for parameter in root.parameters():
            vars(parameter).pop("_z3_optimizer", None)
            if hasattr(parameter, "ds_tensor"):
                parameter.ds_tensor.data = parameter.ds_tensor.new_empty(0)


def build_random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a sharded model with the random weights that it would have in one process; the first rank draws them.

    `AutoModelForCausalLM.from_config` would draw other weights into sharded parameters. The configuration of DeepSpeed
    comes from the living `TrainingArguments`.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    whole = dict(model_class(config).named_parameters()) if dist.get_rank() == 0 else {}
    model = _build_empty_model(model_class, config, deepspeed_config())
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if whole:
                parameter.copy_(whole.pop(name))
    return model


def _build_empty_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, settings: dict[str, Any]
) -> PreTrainedModel:
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings):
        model = model_class(config)
    model.tie_weights()
    for module in model.modules():  # `zero.Init` in bfloat16 leaves rotary frequencies in bfloat16
        buffers = dict(module.named_buffers(recurse=False))
        if any("inv_freq" in name for name in buffers):
            fresh: torch.nn.Module = type(module)(module.config)  # built outside of zero.Init
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(buffers[name].device))
    return model


class Zero3States:
    """`States` of a DeepSpeed engine with a stage 3 optimizer; `weight` is the float32 master.

    Frozen parameters have no master: their weight is the parameter itself, as float32.
    """

    def __init__(self, engine: deepspeed.DeepSpeedEngine, ranks: Ranks) -> None:
        assert isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
        self.ranks = ranks
        self._zero = engine.optimizer
        self._adamw = engine.optimizer.optimizer
        self._parameters: dict[str, Any] = dict(engine.module.named_parameters())
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        #: The trained parameters of each group; a callback may have frozen more of them since.
        self._groups = [
            [names[id(parameter)] for parameter in group if parameter.requires_grad]
            for group in self._zero.fp16_groups
        ]
        self._trained = {name for group in self._groups for name in group}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(parameter.ds_shape) for name, parameter in self._parameters.items()}

    def get_dtype(self, name: str, key: str) -> torch.dtype:
        return torch.float32

    def count_steps(self) -> dict[str, float]:
        """As in `States`; DeepSpeed counts in common for all parameters of a group, with or without a gradient."""
        steps: dict[str, float] = {}
        for names, flat in zip(self._groups, self._zero.fp32_partitioned_groups_flat, strict=True):
            state = self._adamw.state.get(flat, {})
            if {STEP, *MOMENT_KEYS} <= state.keys():
                steps |= dict.fromkeys(names, float(state[STEP]))
        return steps

    def list_momentum(self) -> Collection[str]:
        groups = zip(self._groups, self._zero.fp32_partitioned_groups_flat, strict=True)
        return {name for names, flat in groups if MOMENTUM in self._adamw.state.get(flat, {}) for name in names}

    @torch.no_grad()
    def gather(self, name: str, key: str, owner: int, numbers: range | None = None) -> torch.Tensor | None:
        parameter = self._parameters[name]
        if key != WEIGHT:
            part = safe_get_local_optimizer_state(parameter, key)
        else:
            part = safe_get_local_fp32_param(parameter) if name in self._trained else parameter.ds_tensor
        part = part.detach().flatten()
        if numbers is not None:
            return self.ranks.gather_slice(part, part.numel(), numbers, owner, torch.float32)
        return self.ranks.gather_parts(part.to(self.ranks.device, torch.float32), parameter.ds_shape, owner)

    def make_moments(self, steps: Mapping[str, float], momentum: Collection[str] = ()) -> None:
        # torch counts in a tensor (on the parameters' device for fused kernels), DeepSpeed's own optimizers in an int.
        in_tensors = isinstance(self._adamw, torch.optim.AdamW | MuonWithAdamW)
        numbers = enumerate(zip(self._groups, self._zero.fp32_partitioned_groups_flat, strict=True))
        for number, (names, flat) in numbers:
            group = self._adamw.param_groups[self._zero.sub_group_to_group_id[number]]
            if group.get(ALGORITHM) == MUON:
                if not set(momentum).isdisjoint(names):
                    self._adamw.state[flat] = {MOMENTUM: torch.zeros_like(flat)}
            elif counted := [steps[name] for name in names if name in steps]:
                step = max(counted)
                counter = torch.tensor(step, dtype=torch.float32, device=flat.device) if in_tensors else int(step)
                self._adamw.state[flat] = {STEP: counter, **{key: torch.zeros_like(flat) for key in MOMENT_KEYS}}

    @torch.no_grad()
    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        parameter = self._parameters[name]
        part = self.ranks.cut_part(value, parameter.ds_tensor.numel(), owner)
        if key != WEIGHT:
            safe_set_local_optimizer_state(parameter, part, key)
        elif name in self._trained:
            safe_set_local_fp32_param(parameter, part)
        else:
            parameter.ds_tensor.copy_(part.view_as(parameter.ds_tensor))

    @torch.no_grad()
    def finish(self) -> None:
        # As at the end of a step: copy masters to the weights that the forward pass reads, and gather persistent ones.
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero._post_step([])
