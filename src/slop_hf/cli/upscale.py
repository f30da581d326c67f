"""`slop upscale`: the command and its page."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

import slop_hf

from ..cost.flops import count_parameters
from ..errors import PlanError
from ..io.files import check_output, require_absent, write_text
from ..io.serialization import Json, to_yaml
from ..io.units import format_bytes, format_count, format_duration
from ..planning.upscaling import Upscaling, plan_upscaling
from .advise import show_advice
from .model_config import choose_sequence_length, read_law, read_whole_config, split_config
from .options import (
    AsJson,
    Checkpointing,
    DeviceMemory,
    MemoryDevices,
    MicroBatchSize,
    PrecisionName,
    ZeroStage,
    build_memory_limit,
    make_option,
)
from .shared import print_json, print_table

if TYPE_CHECKING:
    from ..growth.checkpoint import CheckpointPlan

_GROWTH, _TRAINING, _OUTPUT = "Growth", "Continued training", "Output"


def upscale_command(
    checkpoint: Annotated[str, typer.Argument(help="Finished checkpoint: model directory, or Hub id[@revision].")],
    output: Annotated[
        Path,
        make_option(_OUTPUT, "--output", "-o", help="Directory of the grown checkpoint; it must not exist."),
    ],
    already_seen: Annotated[
        float | None, make_option(_TRAINING, help="Tokens that the checkpoint was trained on, e.g. 15e12.")
    ] = None,
    layers: Annotated[
        int | None, make_option(_GROWTH, help="New number of layers. Default: about a third more.")
    ] = None,
    by: Annotated[float | None, make_option(_GROWTH, help="Factor of the layers instead, e.g. 1.33.")] = None,
    init: Annotated[
        str | None,
        make_option(
            _GROWTH,
            help="Init of the new layers. Default: interleave. preserving: LLaMA-Pro's, whose new layers add nothing "
            "at first; stack: the layers repeated in order.",
        ),
    ] = None,
    seed: Annotated[int, make_option(_GROWTH, help="Random seed of new entries.")] = 0,
    tokens: Annotated[
        float | None, make_option(_TRAINING, help="Tokens to train the grown model on. Default: 20 per parameter.")
    ] = None,
    data: Annotated[
        str | None,
        make_option(_TRAINING, help="Training text, as data.source names it: a file, a folder, a URL, a Hub id."),
    ] = None,
    sequence_length: Annotated[
        int | None,
        make_option(_TRAINING, help="Tokens per training sequence. Default: 2048, or the model's positions if fewer."),
    ] = None,
    law: Annotated[
        str | None,
        make_option(_TRAINING, help="Growth law of the forecast: a file. Default: the law of the package."),
    ] = None,
    device_memory: DeviceMemory = None,
    devices: MemoryDevices = 1,
    zero: ZeroStage = 0,
    micro_batch_size: MicroBatchSize = 1,
    checkpointing: Checkpointing = False,
    precision: PrecisionName = "bf16",
    run: Annotated[
        Path | None, make_option(_OUTPUT, "--run", help="File of the run for `slop train`. Default: OUTPUT.yaml.")
    ] = None,
    max_shard_size: Annotated[str, make_option(_OUTPUT, help="Largest size of a weight file.")] = "5GB",
    dry_run: Annotated[
        bool,
        make_option(
            _OUTPUT, "--dry-run", help="Print what would be written; of a Hub id, only the config is downloaded."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Grow a finished checkpoint in depth, and write the run that trains the result on.

    Layers are copied once, before any further training, as in SOLAR, Falcon3-10B, Kanana and LLaMA-Pro. Memory holds
    one tensor at a time, so any size works. The page compares the run with other ways to spend the same FLOPs.

    Examples:

    `slop upscale meta-llama/Llama-3.1-8B --already-seen 15e12 -o ./llama-44-layers --dry-run`

    `slop upscale ./model --already-seen 2e12 --by 1.5 --tokens 100e9 --data texts/ -o ./deeper`
    """
    run = _check_targets(output, run)
    if data is not None:
        from ..data.sources import list_local_files  # with torch

        list_local_files(data)  # refuses a source that does not exist
    if already_seen is None:
        raise PlanError("--already-seen is missing: give the tokens that the checkpoint was trained on, such as 15e12")
    config = read_whole_config(checkpoint, "CHECKPOINT")
    start, kept = split_config(config, checkpoint)
    plan = plan_upscaling(
        start,
        already_seen=already_seen,
        layers=layers,
        by=by,
        tokens=tokens,
        init=init,
        config=kept,
        sequence_length=choose_sequence_length(config, sequence_length),
        memory=build_memory_limit(device_memory, zero, devices, micro_batch_size, checkpointing, precision),
        law=read_law(law),
    )
    # The run's file finds the directory next to itself, wherever both are moved to.
    content = plan.build_run(os.path.relpath(output.resolve(), run.resolve().parent), data)
    settings = {"seed": seed, "max_shard_size": max_shard_size}
    files: CheckpointPlan | None = None
    if not dry_run or Path(checkpoint).expanduser().exists():
        files = slop_hf.plan_checkpoint_growth(checkpoint, output, plan.stage, **settings)  # type: ignore[arg-type]
    if not as_json:
        _show_page(checkpoint, plan, files)
    if dry_run:
        _show_files(output, run, plan, content, files, as_json=as_json)
        return
    receipt = slop_hf.grow_checkpoint(checkpoint, output, plan.stage, **settings)  # type: ignore[arg-type]
    write_text(run, _format_run(content, checkpoint, plan))
    if as_json:
        result = {"receipt": receipt, "written": [str(output), str(run)]}
        print_json({**plan.as_dict(), "run": content, **result})
        return
    print(f"{output}: {receipt.dims}, {receipt.parameters:,} parameters, in {format_duration(receipt.seconds)}")
    print(f"{run}: the run for `slop train {shlex.quote(str(run))} -o DIRECTORY`")
    if data is None:
        print("its training text is missing: add it to the file, or `--set data.source=TEXTS` to the command")


def _check_targets(output: Path, run: Path | None) -> Path:
    """Return the file of the run; refuse existing targets, and targets that cannot be written."""
    check_output(output, "--output", PlanError, is_directory=True)
    require_absent(output, "directory", error=PlanError)
    run = output.with_name(f"{output.name}.yaml") if run is None else run
    check_output(run, "--run", PlanError)
    if run.resolve().is_relative_to(output.resolve()):
        raise PlanError(f"--run {run} is in the directory of the grown checkpoint: give a file next to it")
    require_absent(run, "file", error=PlanError)
    return run


def _format_run(content: dict[str, Json], checkpoint: str, plan: Upscaling) -> str:
    """Return the run as YAML, with its origin as a comment."""
    before, after = (dims.num_hidden_layers for dims in plan.schedule.structures)
    lines = [f"# {checkpoint}, grown from {before} to {after} layers and trained on; written by `slop upscale`."]
    if "source" not in (content["data"] or {}):
        lines.append("# The training text is missing: add data.source, such as a folder of texts or a Hub dataset.")
    return "\n".join(lines) + "\n" + to_yaml(content)


def _show_page(checkpoint: str, plan: Upscaling, files: CheckpointPlan | None) -> None:
    """Print the structure and its costs before and after, the training, and the forecast."""
    question, option, limit = plan.question, plan.option, plan.question.memory
    sides = plan.schedule.structures
    memory = [limit.estimate(dims, question.config, question.sequence_length).total for dims in sides]
    per_token = [question.count_flops(dims) for dims in sides]
    parameters = [int(count_parameters(dims, question.config)) for dims in sides]
    rows = [
        ("layers", *(str(dims.num_hidden_layers) for dims in sides), f"× {plan.factor:.3g}"),
        ("structure", *map(str, sides), ""),
        *(
            (name, *map(show, pair), f"× {pair[1] / pair[0]:.3g}")
            for name, show, pair in (
                ("parameters", format_count, parameters),
                ("FLOPs per token", lambda count: f"{count:.3g}", per_token),
                ("memory per device", format_bytes, memory),
            )
        ),
    ]
    print_table(
        f"{escape(checkpoint)} grown in depth",
        ("", ">before", ">after", ">"),
        rows,
        wraps=("before", "after"),
        caption=f"memory for training: {limit.precision}, {limit.devices} device{'s' * (limit.devices > 1)}, "
        f"ZeRO stage {limit.zero_stage}, micro-batch {limit.micro_batch_size}",
    )
    console = Console()
    console.print(
        f"Growth: init {plan.stage.init}, once, before any further training. Training: "
        f"{format_count(plan.stage.tokens)} tokens, {option.flops:.2e} FLOPs, learning rate {option.learning_rate:g}.",
        highlight=False,
    )
    if plan.remark is not None:
        console.print(plan.remark, highlight=False)
    if files is not None:
        console.print(
            f"Files: {len(files.shards)} of weights, {format_bytes(files.weight_bytes)}; needs "
            f"{format_bytes(files.needed_bytes)} of disk space, {format_bytes(files.free_bytes)} are free.",
            highlight=False,
        )
    console.print()
    show_advice(question, plan.advice)


def _show_files(
    output: Path, run: Path, plan: Upscaling, content: dict[str, Json], files: CheckpointPlan | None, *, as_json: bool
) -> None:
    """Print what would be written."""
    if as_json:
        would_write: list[Json] = [str(output), str(run)]
        growth = None if files is None else files.as_dict()
        print_json({**plan.as_dict(), "run": content, "checkpoint": growth, "would_write": would_write})
        return
    print(f"would write {output} and {run}:\n\n{to_yaml(content)}", end="")
