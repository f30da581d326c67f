"""`slop launch`: a run under `accelerate launch`, without a checkout."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from ..errors import RunError
from .options import Changes, read_changes
from .recipe_files import find_deepspeed_file, find_launch_config, list_launch_configs
from .train import check_run_options, choose_run_directory

#: Help of the command, in place of a docstring: it lists the configurations that come with slop-hf.
LAUNCH_HELP = f"""Train a run on several devices, with `accelerate launch`.

`--config` names a configuration of accelerate: your own file, or one of these:

{"".join(f"* `{config.name}`: {config.about}" + chr(10) for config in list_launch_configs())}
Without it, accelerate takes your default configuration, or else every GPU of this machine. The run is the one
that `slop train` trains: Ctrl-C and SIGTERM save its state, and `--resume` continues it.

Examples:

`slop launch run.yaml --config zero3-8gpu -o runs/first`

`slop launch run.yaml --config zero3-8gpu --num-processes 4 --resume`

On each of several machines, with its own rank:

`slop launch run.yaml --config zero3-multi-node --machine-rank 0 --main-process-ip 10.0.0.1`
"""


def launch_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run; `slop init` writes one.")],
    launch_config: Annotated[
        str | None, typer.Option("--config", help="Configuration of accelerate: a name above, or a file.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory. Default: runs/ and the name of the file.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in the output directory, or begin a new one.")
    ] = False,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the target from random weights with the same FLOPs instead.")
    ] = False,
    change: Changes = None,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="Number of processes, of all machines together, one per device.")
    ] = None,
    num_machines: Annotated[int | None, typer.Option(min=1, help="Number of machines.")] = None,
    machine_rank: Annotated[int | None, typer.Option(min=0, help="Number of this machine, from 0.")] = None,
    main_process_ip: Annotated[str | None, typer.Option(help="Address of machine 0.")] = None,
    main_process_port: Annotated[int | None, typer.Option(min=0, max=65535, help="A free port there.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command; launch nothing.")] = False,
) -> None:
    output = output or choose_run_directory(config)
    check_run_options(config, output, None, None, dry_run=dry_run)
    read_changes(change)
    settings = {
        "num_processes": num_processes,
        "num_machines": num_machines,
        "machine_rank": machine_rank,
        "main_process_ip": main_process_ip,
        "main_process_port": main_process_port,
    }
    words = [*_build_launcher(launch_config), *_list_options(settings), "-m", "slop_hf.launch", str(config)]
    words += ["--output-dir", str(output), *["--resume"] * resume, *["--from-scratch"] * scratch]
    words += [word for text in change or () for word in ("--set", text)]
    if dry_run:
        print("accelerate launch " + shlex.join(words))
        return
    command = [sys.executable, "-m", "accelerate.commands.launch", *words]
    sys.stdout.flush()
    # In place of this process, so that signals of the shell and of schedulers reach the launcher.
    os.execv(command[0], command)


def _build_launcher(name: str | None) -> list[str]:
    """Return the arguments of accelerate that select a configuration."""
    if name is None:
        return []
    path = find_launch_config(name)
    words = ["--config_file", str(path)]
    deepspeed = find_deepspeed_file(path)
    if deepspeed is None:
        return words
    if importlib.util.find_spec("deepspeed") is None:
        raise RunError(f"--config {name} needs DeepSpeed; install it: pip install 'slop-hf[deepspeed]'")
    return [*words, "--deepspeed_config_file", str(deepspeed)]


def _list_options(settings: Mapping[str, object]) -> Sequence[str]:
    """Return the words of a command line for the settings that are given."""
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", str(value))]
