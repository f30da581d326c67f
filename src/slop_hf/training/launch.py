"""What a launch needs before transformers looks for its devices."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import str_to_bool

from ..errors import RunError

#: How long gloo's threads are given on a machine that is busy; groups that DeepSpeed holds cannot be waited for.
GLOO_SECONDS = 0.5


def prepare_launch(args: Any) -> None:
    """Name the backend of ranks on CPUs, and set up DeepSpeed's surroundings where it is asked for.

    Without the backend's name each of several ranks on CPUs believes that it is alone. `accelerate launch` without a
    configuration sets no rank, and DeepSpeed would look for MPI; and without an accelerator it would compile an
    operator that makes little difference, for a minute.

    Args:
        args: `TrainingArguments` before their `__post_init__`.

    Raises:
        RunError: for a launch that would not do what it says.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = args.use_cpu or not torch.cuda.is_available()
    if on_cpu and ranks > 1:
        args.ddp_backend = args.ddp_backend or "gloo"
    by_launcher = bool(str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")))
    if args.deepspeed is None and not by_launcher:
        # Unasked, accelerate would look for a device, find none, and let every rank train for itself.
        args.use_cpu = args.use_cpu or (on_cpu and ranks > 1)
        return
    if args.use_cpu:
        raise RunError("use_cpu turns DeepSpeed off; leave it out: without a GPU DeepSpeed runs on the CPU by itself")
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
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
def launched() -> Iterator[None]:
    """What a launched program does, up to an end that its ranks survive.

    gloo's threads let go of the tensors of a finished message a moment later, under Python's lock; where Python has
    begun to end by then, the program aborts, with all its work done.
    """
    try:
        yield
    finally:
        if dist.is_available() and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()
            time.sleep(GLOO_SECONDS)


@contextmanager
def no_zero_init() -> Iterator[None]:
    """Lets this rank load a whole model while the others do something else.

    Under ZeRO-3 transformers makes every new model in parts, as all ranks together: one that loads a model alone would
    wait for the others for ever.
    """
    from transformers.integrations import deepspeed as integration

    configured = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = configured


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
