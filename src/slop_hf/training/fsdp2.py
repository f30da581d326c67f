"""FSDP2 (`torch.distributed.fsdp.fully_shard`): states sharded over all ranks by the rows of each tensor.

A tensor is cut along its first dimension into equal numbers of rows per rank; the last parts may be smaller, or empty
(Zhao et al., "PyTorch FSDP", 2023; this is its second version, with one DTensor per parameter).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.initialization import no_init_weights

from .checks import check_fsdp2
from .states import ReplicatedStates, Strategy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

    from .ranks import Ranks


def prepare_accelerator(accelerator: Accelerator, settings: dict[str, Any] | None) -> None:
    """Let accelerate shard over ranks on CPUs, on which it ignores that FSDP was asked for.

    Args:
        settings: settings of FSDP among the training arguments; None if they are in the environment.
    """
    state = accelerator.state
    plugin = FullyShardedDataParallelPlugin(**(settings or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # without a GPU, torch cannot pin memory
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


class Fsdp2Strategy(Strategy):
    """Models sharded by `fully_shard`, with accelerate's settings.

    accelerate shards the model that the user gives; the model of a later stage, which must never be whole on any rank,
    is sharded here while it is empty.

    Args:
        accelerator: accelerate's view of the launch; settings whose states could not be carried over a growth are
            refused.
    """

    def __init__(self, accelerator: Accelerator, ranks: Ranks) -> None:
        super().__init__(ranks)
        plugin = accelerator.state.fsdp_plugin
        check_fsdp2(plugin, accelerator.parallelism_config, accelerator.mixed_precision)
        if accelerator.mixed_precision == "bf16":
            # accelerate's policy would also round the summed gradients and the loss to bfloat16.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        # Otherwise each rank would add up whole gradients until the last micro-batch of a step.
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self._accelerator, self._plugin = accelerator, plugin
        #: A stage's optimizer and the parameters of its groups, until it is prepared.
        self._optimizer: torch.optim.Optimizer | None = None
        self._groups: list[list[torch.Tensor]] = []

    def build_empty_model(
        self, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
    ) -> PreTrainedModel:
        """Return a model with sharded, uninitialised parameters; its buffers are whole."""
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = model_class._from_config(config, dtype=dtype)
        model.tie_weights()
        model = fsdp2_prepare_model(self._accelerator, model)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        offloads = isinstance(self._plugin.cpu_offload, CPUOffloadPolicy)
        model.to_empty(device="cpu" if offloads else self._accelerator.device)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        return model

    def keep_groups(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [list(group["params"]) for group in optimizer.param_groups]

    def finish_preparation(self, wrapped: torch.nn.Module) -> None:
        """Give the optimizer of a model that was sharded here the parameters that it was made with.

        accelerate distinguishes parameters by the addresses of their memory, and a rank without any rows of two
        parameters has no memory for either.
        """
        assert self._optimizer is not None
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            if any(isinstance(parameter, DTensor) for parameter in parameters):
                group["params"] = parameters
        self._optimizer, self._groups = None, []

    def get_states(self, trainer: Trainer) -> Fsdp2States:
        model = getattr(trainer.model, "_orig_mod", trainer.model)  # compiled
        _reshard(model)
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        return Fsdp2States(model, optimizer, self._ranks)

    def release(self, wrapped: torch.nn.Module) -> None:
        """Free the memory of a sharded model, which its maker may still hold."""
        _reshard(wrapped)
        for parameter in wrapped.parameters():
            if isinstance(parameter, DTensor):
                parameter.grad = None
                parameter.to_local().untyped_storage().resize_(0)


def _reshard(model: torch.nn.Module) -> None:
    """Free gathered parameters: an evaluation leaves those of the last modules gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Fsdp2States(ReplicatedStates):
    """`States` of a model sharded by FSDP2: weights and moments are DTensors."""

    @torch.no_grad()
    def gather(self, name: str, key: str, owner: int, numbers: range | None = None) -> torch.Tensor | None:
        tensor = cast(DTensor, self._get_tensor(name, key))
        if numbers is not None:
            size = self.ranks.count_rows_part(tensor.shape)
            return self.ranks.gather_slice(tensor.to_local().flatten(), size, numbers, owner, tensor.dtype)
        return self.ranks.gather_parts(self.ranks.pad_rows(tensor.to_local(), tensor.shape), tensor.shape, owner)

    @torch.no_grad()
    def put(self, name: str, key: str, value: torch.Tensor | None, owner: int) -> None:
        tensor = cast(DTensor, self._get_tensor(name, key))
        rows = tensor.to_local()
        part = self.ranks.cut_part(value, self.ranks.count_rows_part(tensor.shape), owner, rows.dtype)
        rows.copy_(part[: rows.numel()].view_as(rows))
