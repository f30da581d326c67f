"""Process setup before transformers looks for devices, and a clean exit afterwards."""

from __future__ import annotations

import faulthandler
import gc
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist
from accelerate.utils import str_to_bool

from ..errors import OtherRankError, RunError, SlopError
from ..io.serialization import read_json

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Seconds to wait for gloo's threads on a busy machine; groups held by DeepSpeed cannot be waited for.
GLOO_SECONDS = 0.5
#: Seconds that a process of a launch has to exit after an error.
EXIT_SECONDS = 10.0
#: Exit codes after an error in one line, if another process has ended, and after Ctrl-C (128 + SIGINT, as in shells).
ERROR_CODE, LOST_CODE, INTERRUPTED_CODE = 2, 1, 130
#: The environment variable in which gloo looks for the network interface to use.
_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
#: The environment variable by which transformers loads a model on the first rank only.
_LOADS_ON_FIRST = "FSDP_CPU_RAM_EFFICIENT_LOADING"
#: What gloo and NCCL say if another process has ended.
_LOST_CONNECTIONS = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def prepare_launch(args: TrainingArguments) -> None:
    """Name the backend of ranks on CPUs, and complete the environment of DeepSpeed and FSDP if they are used.

    Without a named backend, each of several ranks on CPUs takes itself for the only one. `accelerate launch` without
    a configuration sets no rank, and DeepSpeed would look for MPI. Without an accelerator, DeepSpeed would compile an
    operator for a minute that makes little difference. gloo, also next to NCCL, would use the network interface of the
    machine's own name, which on many clusters is the loopback's.

    Args:
        args: `TrainingArguments` before their `__post_init__`.

    Raises:
        RunError: for a launch that cannot train a staged run.
    """
    if is_fsdp_requested(args):
        _prepare_fsdp(args)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    on_cpu = args.use_cpu or not torch.cuda.is_available()
    if ranks > 1:
        choose_gloo_interface()
    if on_cpu and ranks > 1:
        args.ddp_backend = args.ddp_backend or "gloo"
    by_launcher = bool(str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false")))
    if args.deepspeed is None and not by_launcher:
        # Otherwise accelerate would look for a device, find none, and let every rank train alone.
        args.use_cpu = args.use_cpu or (on_cpu and (ranks > 1 or is_fsdp_requested(args)))
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


def is_fsdp_requested(args: TrainingArguments) -> bool:
    """Whether FSDP was asked for, by the training arguments or by `accelerate launch`."""
    return bool(args.fsdp or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))


def _prepare_fsdp(args: TrainingArguments) -> None:
    """Refuse FSDP of version 1 and launches that FSDP cannot use, and let every rank load whole checkpoints.

    `cpu_ram_efficient_loading` leaves models empty that other ranks than the first load, until FSDP shards them; but
    a finished model is loaded without being sharded.
    """
    config = args.fsdp_config or {}
    if isinstance(config, str):
        config = read_json(Path(config), if_missing="give the settings of FSDP themselves", error=RunError)
    config = {name.removeprefix("fsdp_"): value for name, value in config.items()}
    version = str(config.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", "1"))
    if version != "2":
        raise RunError(
            f"FSDP version {version} is not supported; set fsdp_version: 2 in the configuration of "
            "`accelerate launch`, or use `slop launch --config fsdp2-8gpu`"
        )
    if "RANK" not in os.environ:
        raise RunError(
            "FSDP needs the processes of a launch; start it with `slop launch --config fsdp2-8gpu` (without a GPU: "
            "fsdp2-cpu), or with `accelerate launch`"
        )
    if args.use_cpu and torch.cuda.is_available():
        raise RunError("use_cpu turns FSDP off; leave it out, or launch without FSDP")
    loads = str_to_bool(str(config.get("cpu_ram_efficient_loading", "false")).lower()) or str_to_bool(
        os.environ.get(_LOADS_ON_FIRST, "false")
    )
    if loads and dist.is_initialized():
        raise RunError(
            "fsdp_cpu_ram_efficient_loading may have left the model empty on this rank; set it to false, or make "
            "SlopTrainingArguments before the model"
        )
    os.environ[_LOADS_ON_FIRST] = "false"
    if args.fsdp:
        args.fsdp_config = {**config, "cpu_ram_efficient_loading": False}


def choose_gloo_interface() -> None:
    """Let gloo use the network interface that leads to the first rank's machine, unless the user has named one."""
    address = os.environ.get("MASTER_ADDR")
    if address and not os.environ.get(_GLOO_INTERFACE) and (interface := find_interface(address)) is not None:
        os.environ[_GLOO_INTERFACE] = interface


def find_interface(host: str) -> str | None:
    """Return the name of the network interface through which this machine reaches a host; None if it does not.

    >>> find_interface("127.0.0.1") in psutil.net_if_addrs()
    True
    """
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing: for UDP it only chooses a route
                source = _drop_scope(probe.getsockname()[0])
                for name, entries in psutil.net_if_addrs().items():
                    if any(entry.family == family and _drop_scope(entry.address) == source for entry in entries):
                        return name
    return None


def _drop_scope(address: str) -> str:
    """Return an IPv6 address without the interface in it, as in "fe80::1%eth0"."""
    return address.partition("%")[0]


@contextmanager
def guard_exit() -> Iterator[None]:
    """Run the body of a launched program so that its processes end together, soon and with one message.

    After Ctrl-C the program exits with code 130, without a traceback. If one of several processes fails, it says why
    and exits; the others exit silently, or say that they lost their connection to it. A process that has not exited
    `EXIT_SECONDS` later is killed: its threads may be waiting for other processes.

    The process group is closed before Python exits: gloo's threads free the tensors of a finished message a moment
    later, under Python's lock. If Python is already exiting then, the program aborts although all its work is done.
    """
    try:
        yield
    except BaseException as caught:
        code, message = _find_exit(caught)
        _limit_exit()
        if message:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if code is None:
            raise
        if code != LOST_CODE:  # otherwise there may be messages that nobody will receive
            _close_group()
        sys.exit(code)
    _close_group()


def _find_exit(caught: BaseException) -> tuple[int | None, str]:
    """Return the exit code after an error, and its message; no code if the error is to be raised as it is."""
    if isinstance(caught, KeyboardInterrupt):
        return INTERRUPTED_CODE, ""
    if not is_launched():
        return None, ""
    if isinstance(caught, OtherRankError):
        return ERROR_CODE, str(caught) if _speaks_for_other_machine(caught.rank) else ""
    if isinstance(caught, SlopError):
        return ERROR_CODE, str(caught)
    if any(text in str(caught) for text in _LOST_CONNECTIONS):
        return LOST_CODE, f"rank {os.environ['RANK']} lost its connection to a rank that has ended"
    return None, ""


def is_launched() -> bool:
    """Whether this process is one of several of a launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _speaks_for_other_machine(failed: int) -> bool:
    """Whether the failed rank's message appears on another machine, and this is the first process of this one."""
    local_rank, rank = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("RANK", "0"))
    first = rank - local_rank
    return local_rank == 0 and not first <= failed < first + int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _close_group() -> None:
    if dist.is_available() and dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        time.sleep(GLOO_SECONDS)


def _limit_exit() -> None:
    """Let the process live only `EXIT_SECONDS` longer if it is one of several."""
    if is_launched():
        nowhere = os.open(os.devnull, os.O_WRONLY)  # for the tracebacks that it prints
        faulthandler.dump_traceback_later(EXIT_SECONDS, exit=True, file=nowhere)


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
