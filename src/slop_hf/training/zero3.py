"""DeepSpeed ZeRO-3: states in parts on all ranks. The only file that imports deepspeed.

Every parameter, its float32 master and AdamW's moments are cut into as many equal parts as there are ranks, the last
one padded (Rajbhandari et al., "ZeRO", 2020, section 5).
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

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

from ..errors import RunError
from ..growth import WEIGHT
from .ranks import Ranks
from .states import MOMENTS, STEP

# DeepSpeed calls torch by names of before, in every step.
warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)

#: Entries of DeepSpeed's configuration that transformers derives from the hidden size where they are "auto".
_BY_HIDDEN_SIZE = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


#: glibc's name for `mallopt` of the size from which memory is the kernel's own, and given back when it is freed.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 2**20


def prepare_for_cpus() -> None:
    """Set DeepSpeed up for ranks without an accelerator.

    It does without its compiled operator for ranks that share memory: a minute of g++ for small models. And large
    tensors give their memory back when they are freed: glibc would keep it, in pieces that the next ones do not fit
    into, and a rank of two would come to hold as much as one process alone.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


class Zero3Setup:
    """DeepSpeed's configuration of a run, for each stage anew.

    transformers replaces "auto" by numbers once, for the model that it sees first.

    Args:
        plugin: accelerate's `DeepSpeedPlugin`.
        ranks: of the run.

    Raises:
        RunError: for a configuration whose states cannot be carried over a growth.
    """

    def __init__(self, plugin: Any, ranks: Ranks) -> None:
        self._config: dict[str, Any] = plugin.hf_ds_config.config
        zero = self._config.get("zero_optimization", {})
        if zero.get("stage") != 3:
            raise RunError(
                f'DeepSpeed\'s ZeRO stage {zero.get("stage", 0)} is not supported: set "stage": 3, or launch without '
                "DeepSpeed, which shares gradients alone"
            )
        for part in ("offload_optimizer", "offload_param"):
            if zero.get(part, {}).get("device") == "nvme":
                raise RunError(f"{part} to nvme is not supported: states could not be read at a growth; use cpu")
        if zero.get("zero_hpz_partition_size", 1) != 1 or zero.get("mics_shard_size", -1) != -1:
            raise RunError("hpZ and MiCS are not supported; leave zero_hpz_partition_size and mics_shard_size out")
        if self._config.get("fp16", {}).get("enabled") is True:
            raise RunError("fp16 under DeepSpeed is not supported: its loss scale would be lost at a growth; use bf16")
        if "scheduler" in self._config:
            raise RunError("DeepSpeed's `scheduler` would not know of stages; leave it out and set lr_scheduler_type")
        self._auto = [name for name in _BY_HIDDEN_SIZE if zero.get(name) == "auto"]
        self._ranks = ranks

    def begin_stage(self, micro_batch_size: int, accumulation_steps: int) -> None:
        """Write a stage's batch sizes, and let what depends on the hidden size be derived anew."""
        self._config["train_micro_batch_size_per_gpu"] = micro_batch_size
        self._config["gradient_accumulation_steps"] = accumulation_steps
        self._config["train_batch_size"] = micro_batch_size * accumulation_steps * self._ranks.count
        self._config["zero_optimization"].update(dict.fromkeys(self._auto, "auto"))

    def prepared(self, wrapped: Any) -> None:
        """Let float32 masters be the weights themselves where these are float32 too: a quarter of what a rank holds.

        DeepSpeed means to do so, and looks after both as one; but it compares a device with its name.
        """
        zero = wrapped.optimizer
        for master, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
            if weights is not None and (weights.dtype, weights.device) == (master.dtype, master.device):
                master.data = weights.data

    def empty_model(self, model_class: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
        """A model whose parameters are allocated in parts and hold nothing yet; DeepSpeed decides on their dtype."""
        return _empty_model(model_class, config, self._config)

    def states(self, trainer: Any) -> Zero3States:
        """Of the trainer's engine."""
        return Zero3States(trainer.deepspeed, self._ranks)

    def release(self, wrapped: Any) -> None:
        """Part a destroyed engine from all that would keep it, with its states, to the end of the run.

        That is a global list of DeepSpeed's, the cache of a method, whose keys hold the object itself, and the model:
        whoever made the first one may hold it, though nothing is left in it.
        """
        root: torch.nn.Module | None = getattr(wrapped, "module", None)
        if root is None:
            return
        parameter_offload.FWD_MODULE_STACK[:] = [one for one in parameter_offload.FWD_MODULE_STACK if one is not root]
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


def random_model(config: Any) -> PreTrainedModel:
    """A model in parts with the random weights that it would have in one process; the first rank makes them.

    `AutoModelForCausalLM.from_config` draws others where it draws in parts.

    Args:
        config: of the model; DeepSpeed's configuration is that of the `TrainingArguments` that are alive.
    """
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    whole = dict(model_class(config).named_parameters()) if dist.get_rank() == 0 else {}
    model = _empty_model(model_class, config, deepspeed_config())
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if whole:
                parameter.copy_(whole.pop(name))
    return model


def _empty_model(model_class: type[PreTrainedModel], config: Any, settings: Any) -> PreTrainedModel:
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings):
        model = model_class(config)
    model.tie_weights()
    _make_rotary_float32(model)
    return model


def _make_rotary_float32(model: torch.nn.Module) -> None:
    """Compute the rotary frequencies again: under `zero.Init` in bfloat16 they have come out in bfloat16."""
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if any("inv_freq" in name for name in buffers):
            fresh: torch.nn.Module = type(module)(module.config)  # made outside of zero.Init
            for name, buffer in fresh.named_buffers(recurse=False):
                setattr(module, name, buffer.to(buffers[name].device))


class Zero3States:
    """`States` of a DeepSpeed engine; `weight` is the float32 master.

    Args:
        engine: with a stage 3 optimizer.
        ranks: of the run.
    """

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        assert isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
        self.ranks = ranks
        self._zero = engine.optimizer
        self._adamw = engine.optimizer.optimizer
        self._parameters = dict(engine.module.named_parameters())

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(parameter.ds_shape) for name, parameter in self._parameters.items()}

    def dtype(self, name: str, key: str) -> torch.dtype:
        return torch.float32

    def has_moments(self) -> bool:
        return any(MOMENTS[0] in state for state in self._adamw.state.values())

    @property
    def step(self) -> float:
        return max(float(state[STEP]) for state in self._adamw.state.values() if STEP in state)

    def whole(self, name: str, key: str, owner: int) -> torch.Tensor | None:
        parameter = self._parameters[name]
        part = (
            safe_get_local_fp32_param(parameter) if key == WEIGHT else safe_get_local_optimizer_state(parameter, key)
        )
        part = part.to(self.ranks.device).contiguous()
        mine = self.ranks.rank == owner
        if self.ranks.count == 1:
            flat = part
        else:
            parts = [torch.empty_like(part) for _ in range(self.ranks.count)] if mine else None
            dist.gather(part, parts, dst=owner)
            if parts is None:
                return None
            flat = torch.cat(parts)
        shape = parameter.ds_shape
        return flat[: math.prod(shape)].view(shape).cpu()

    def make_moments(self, step: float) -> None:
        # torch counts in a tensor (beside the parameters for fused kernels), DeepSpeed's own optimizers in an int.
        in_tensors = isinstance(self._adamw, torch.optim.AdamW)
        for flat in self._zero.fp32_partitioned_groups_flat:
            counter = torch.tensor(step, dtype=torch.float32, device=flat.device) if in_tensors else int(step)
            self._adamw.state[flat] = {STEP: counter, **{key: torch.zeros_like(flat) for key in MOMENTS}}

    @torch.no_grad()
    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        parameter = self._parameters[name]
        size = parameter.ds_tensor.numel()
        parts = None
        if value is not None:
            flat = value.to(self.ranks.device, torch.float32).flatten()
            if missing := size * self.ranks.count - flat.numel():
                flat = torch.nn.functional.pad(flat, (0, missing))
            parts = list(flat.split(size))
        if self.ranks.count == 1:
            assert parts is not None
            part = parts[0]
        else:
            part = torch.empty(size, dtype=torch.float32, device=self.ranks.device)
            dist.scatter(part, parts, src=owner)
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    @torch.no_grad()
    def finish(self) -> None:
        # Just as at the end of a step: masters to the weights that the forward pass reads, persistent ones gathered.
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero._post_step([])
