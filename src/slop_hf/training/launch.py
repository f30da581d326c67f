"""Process setup before transformers looks for devices, and a clean exit afterwards."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from accelerate.utils import str_to_bool

from ..errors import RunError

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Seconds to wait for gloo's threads on a busy machine; groups held by DeepSpeed cannot be waited for.
GLOO_SECONDS = 0.5


def prepare_launch(args: TrainingArguments) -> None:
    """Name the backend of ranks on CPUs, and complete the environment of DeepSpeed if it is used.

    Without a named backend, each of several ranks on CPUs takes itself for the only one. `accelerate launch` without
    a configuration sets no rank, and DeepSpeed would look for MPI. Without an accelerator, DeepSpeed would compile an
    operator for a minute that makes little difference.

    Args:
        args: `TrainingArguments` before their `__post_init__`.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = args.use_cpu or not torch.cuda.is_available()
    if on_cpu and ranks > 1:
        args.ddp_backend = args.ddp_backend or "gloo"
    by_launcher = bool(str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")))
    if args.deepspeed is None and not by_launcher:
        # Otherwise accelerate would look for a device, find none, and let every rank train alone.
        args.use_cpu = args.use_cpu or (on_cpu and ranks > 1)
        return
    if args.use_cpu:
        raise RunError("use_cpu turns DeepSpeed off; leave it out: without a GPU DeepSpeed runs on the CPU by itself")
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _find_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
    if not on_cpu:
        return
    if args.deepspeed is not None and ranks > 1:
        raise RunError(
            "the argument `deepspeed` cannot name the backend that ranks on CPUs need; name its file in the "
            "configuration of `accelerate launch --config_file`, as recipes/accelerate/cpu_zero3.yaml does"
        )
    args.ddp_backend = args.ddp_backend or "gloo"
    from . import zero3

    zero3.prepare_for_cpus()


@contextmanager
def guard_exit() -> Iterator[None]:
    """Run the body of a launched program; then close the process group before Python exits.

    gloo's threads free the tensors of a finished message a moment later, under Python's lock. If Python is already
    exiting then, the program aborts although all its work is done.
    """
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()
            time.sleep(GLOO_SECONDS)


@contextmanager
def disable_zero_init() -> Iterator[None]:
    """Let this rank load a whole model inside the block, while the others do something else.

    Under ZeRO-3 transformers shards every new model, all ranks together: a rank that loads a model alone would hang.
    """
    from transformers.integrations import deepspeed as integration

    configured = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = configured


def _find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
