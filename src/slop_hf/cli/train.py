"""`slop train`: the command, its dry run and the summary at its end; `slop_hf.launch` shares the latter two."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import slop_hf

from ..cost.memory import MemoryEstimate, estimate_training_memory
from ..errors import RunError
from ..io.files import check_output
from ..io.numbers import require_whole_number
from ..io.serialization import read_yaml
from ..io.units import format_bytes
from ..runs.directory import RunDirectory
from .options import AsJson, Changes, read_changes
from .shared import is_first_process, print_json, print_table, redirect_prints

if TYPE_CHECKING:
    from ..cost.memory import Precision
    from ..training.config import RunConfig
    from ..training.spans import StageSpan


def train_command(
    config: Annotated[Path, typer.Argument(help="YAML file of the run: schedule, model, data, training.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run directory. Default: runs/ and the name of the file.")
    ] = None,
    schedule: Annotated[
        Path | None, typer.Option("--schedule", "-s", help="Schedule written by `slop plan`; replaces the config's.")
    ] = None,
    scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train the target from random weights with the same FLOPs instead.")
    ] = False,
    source: Annotated[
        str | None,
        typer.Option("--from", help="Start from a published stage (user/name@stage-2-ffn); continue its schedule."),
    ] = None,
    decay_from: Annotated[
        int | None,
        typer.Option(min=1, help="Make a finished model out of the output's checkpoint of this step: RUN-decay-STEP."),
    ] = None,
    decay_steps: Annotated[
        float | None,
        typer.Option(help="With --decay-from: steps of the decay, or below 1 a share of the run. Default: 0.2."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in the output directory, or begin a new one.")
    ] = False,
    change: Changes = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print stages, FLOPs and memory; train nothing.")] = False,
    devices: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: number of devices that share the work. Default: 1.")
    ] = None,
    zero_stage: Annotated[
        int | None, typer.Option(min=0, max=3, help="With --dry-run: ZeRO stage, 0 to 3. Default: 0.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a model through a growth schedule.

    Each stage ends as a stock transformers checkpoint: `RUN/stage-1-layer` and so on. Ctrl-C saves the state and
    stops. `--resume` continues a stopped or killed run; it ends with the same weights as a run without interruption.

    `--from` takes the model and the tokenizer of a published stage, and the rest of its schedule unless you give
    another one. `--set training.push_to_hub=true` publishes each stage when it has finished.

    A run at a constant rate (a trunk) gives a family of models: `--decay-from STEP` continues its checkpoint of that
    step in another directory, RUN-decay-STEP, and lets the learning rate fall to 0. The trunk itself stays as it is.

    `slop launch` does the same on several devices; `slop init` writes a run file to begin with.

    Example: `slop train run.yaml -o runs/first`
    """
    output = output or choose_run_directory(config)
    check_run_options(config, output, devices, zero_stage, dry_run=dry_run)
    run_config = slop_hf.RunConfig.from_yaml(config, overrides=read_changes(change))
    if decay_from is None and decay_steps is not None:
        raise RunError("--decay-steps is for --decay-from; give the step of the checkpoint to decay from")
    if decay_from is not None:
        if scratch or source is not None or schedule is not None:
            raise RunError("--decay-from continues the output's own run; leave --from, --from-scratch, --schedule out")
        run_config, output, resume = _branch_off(run_config, output, decay_from, decay_steps, resume, dry_run)
    new_schedule = None if schedule is None else str(schedule)
    stage = None if source is None else slop_hf.fetch_stage(source)
    if dry_run:
        if stage is None:
            run_config = run_config.with_schedule(new_schedule)
        else:
            run_config = slop_hf.continue_from(run_config, stage, new_schedule)
        sizes = {"devices": devices or 1, "zero_stage": zero_stage or 0}
        show_preview(run_config, output, scratch=scratch, **sizes, as_json=as_json)
        return
    from ..training.launch import guard_exit  # with torch, which `slop --help` does without

    with guard_exit(), show_end(output, as_json=as_json, command=["slop", *sys.argv[1:]]):
        slop_hf.train_run(
            run_config, output, schedule=new_schedule, from_stage=stage, scratch=scratch, resume=resume, report=print
        )


def _branch_off(
    config: RunConfig, output: Path, step: int, decay_steps: float | None, resume: bool, dry_run: bool
) -> tuple[RunConfig, Path, bool]:
    """Return config and directory of the run that decays from a trunk's checkpoint, begun unless in a dry run."""
    from ..training.decay import begin_decay, plan_decay  # with torch, which `slop --help` does without

    trunk, run = RunDirectory(output), RunDirectory(output.with_name(f"{output.name}-decay-{step}"))
    config = plan_decay(config, trunk, step, 0.2 if decay_steps is None else decay_steps)
    if not dry_run:
        begin_decay(trunk, step, run, config, resume=resume)
    return config, run.path, True


def choose_run_directory(config: Path) -> Path:
    """Return the run directory of a run file, if none is given.

    >>> choose_run_directory(Path("recipes/grow_tiny.yaml")).as_posix()
    'runs/grow_tiny'
    """
    return Path("runs", config.stem)


def check_run_options(
    config: Path, output: Path, devices: int | None, zero_stage: int | None, *, dry_run: bool, option: str = "--output"
) -> None:
    """Refuse options of a run that are wrong whatever the files hold, before torch is loaded.

    Args:
        config, output: YAML file of the run, and its directory.
        devices, zero_stage: settings of the preview, or None; a launcher gives them to a run.
        option: option that names the output, for the message.

    Raises:
        RunError: if one is wrong.
    """
    if not dry_run and (devices is not None or zero_stage is not None):
        name = "--zero-stage" if devices is None else "--devices"
        raise RunError(f"{name} is for --dry-run: to train on several devices, use `slop launch`")
    if devices is not None:
        require_whole_number(devices, "--devices", error=RunError)
    check_output(output, option, RunError, is_directory=True)
    if read_yaml(config, error=RunError) is None:
        raise RunError(
            f"{config} is empty: expected the sections of a run, such as schedule, model, data and training"
        )


def show_preview(
    config: RunConfig,
    output: Path,
    *,
    scratch: bool = False,
    devices: int = 1,
    zero_stage: int = 0,
    as_json: bool = False,
) -> None:
    """Print, on the first process, what a run would do: one row per stage, and the memory of each device.

    Args:
        output: run directory, which must not hold a run.
        scratch: as for `train_run`.
        devices: number of devices that share the work and the memory.
    """
    spans = slop_hf.preview_run(config, output, scratch=scratch, devices=devices)
    precision, micro_batches, estimates = _estimate_memory(config, spans, devices, zero_stage)
    if not is_first_process():  # under DeepSpeed all processes make the preview together
        return
    if as_json:
        print_json([_describe(span, memory) for span, memory in zip(spans, estimates, strict=True)])
        return
    rows = [
        (span.name, str(span.dims), f"{span.parameters:,}", f"{span.tokens:,}", f"{span.steps:,}", f"{span.flops:.3g}")
        for span in spans
    ]
    tokens, flops = sum(span.tokens for span in spans), sum(span.flops for span in spans)
    largest = max(range(len(spans)), key=lambda number: estimates[number].total)
    memory = estimates[largest]
    parts = {"weights": memory.parameters, **dataclasses.asdict(memory)}
    parts.pop("parameters")
    sizes = " + ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    settings = f"{devices} device{'s' * (devices > 1)}, ZeRO stage {zero_stage}, micro-batch {micro_batches[largest]}"
    # Trainer's autocast keeps weights in float32 and casts what it reads; DeepSpeed keeps them in bf16.
    more = "; autocast without DeepSpeed takes more" if precision == "bf16" and not zero_stage else ""
    print_table(
        f"{output} would train",
        ("stage", "structure", ">parameters", ">tokens", ">steps", ">FLOPs"),
        rows,
        total=("sum", "", "", f"{tokens:,}", f"{spans[-1].end_step:,}", f"{flops:.3g}"),
        wraps=("structure",),
    )
    print(f"memory per device, largest in {spans[largest].name}: {format_bytes(memory.total)} = {sizes}")
    print(f"({settings}, {precision}{more})")


@contextmanager
def show_end(output: Path, *, as_json: bool = False, command: Sequence[str] = ()) -> Iterator[None]:
    """Train in the block; then print, on the first process, where the run stands, also after Ctrl-C.

    This is one line about its finished stages, or their records as JSON, and how to resume a run that was stopped.

    Args:
        command: the words of this command, if it can be repeated as it is, for the command that resumes the run.
    """
    try:
        with redirect_prints(as_json=as_json):
            yield
    except KeyboardInterrupt:
        _show_outcome(output, as_json, command)
        raise
    _show_outcome(output, as_json, command)


def _show_outcome(output: Path, as_json: bool, command: Sequence[str]) -> None:
    run = RunDirectory(output)
    if not is_first_process():
        return
    records = run.records() if run.exists else []
    if as_json:
        print("[" + ",\n".join(record.to_json().rstrip() for record in records) + "]")
    elif records:
        last = records[-1]
        quality = f", perplexity {last.perplexity:.2f}" if last.perplexity else ""
        stages = "1 stage" if len(records) == 1 else f"{len(records)} stages"
        print(f"{output}: {stages}, {last.total_tokens:,} tokens, {last.total_flops:.3g} FLOPs{quality}")
    else:
        print(f"{output}: no stage has finished yet")
    if not (run.exists and run.is_finished):
        words = [*command, *([] if "--resume" in command else ["--resume"])]
        is_repeatable = command and int(os.environ.get("WORLD_SIZE", "1")) == 1
        how = shlex.join(words) if is_repeatable else "run the same command again, with --resume"
        print(f"to continue: {how}", file=sys.stderr if as_json else sys.stdout)


def _estimate_memory(
    config: RunConfig, spans: Sequence[StageSpan], devices: int, zero_stage: int
) -> tuple[Precision, list[int], list[MemoryEstimate[int]]]:
    """Return the precision of a run, and the micro-batch size and the memory per device of each stage."""
    from ..training.batches import Batches, resolve_per_stage  # with torch, which `slop --help` does without
    from ..training.config import find_vocab_size

    defaults = {item.name: item.default for item in dataclasses.fields(slop_hf.SlopTrainingArguments)}
    settings = {**defaults, **config.training}
    stage_sizes = settings["stage_batch_sizes"]
    if isinstance(stage_sizes, list) and len(spans) == 1:  # from scratch: the target alone
        stage_sizes = stage_sizes[-1:]
    sizes = resolve_per_stage(stage_sizes, settings["per_device_train_batch_size"], len(spans), "stage_batch_sizes")
    checkpointing = settings.get("activation_checkpointing")  # the name of newer transformers
    precision: Precision = "bf16" if settings["bf16"] else "fp32"
    # A stage without steps has no batch; its memory is shown for a full one.
    micro_batches = [
        Batches.share(span.blocks_per_step or size * devices, size, devices).micro_batch_size
        for span, size in zip(spans, sizes, strict=True)
    ]
    model = config.model_config(spans[0].dims, find_vocab_size(config), as_described=True)
    estimates = [
        estimate_training_memory(
            span.dims,
            model,
            config.data.block_size,
            zero_stage=zero_stage,
            devices=devices,
            micro_batch_size=micro_batch,
            checkpointing=bool(settings.get("gradient_checkpointing") if checkpointing is None else checkpointing),
            precision=precision,
            optimizer="muon" if settings["optim"] == "muon" else "adamw",
        )
        for span, micro_batch in zip(spans, micro_batches, strict=True)
    ]
    return precision, micro_batches, estimates


def _describe(span: StageSpan, memory: MemoryEstimate[int]) -> dict[str, object]:
    return {
        "stage": span.name,
        "structure": str(span.dims),
        "parameters": span.parameters,
        "tokens": span.tokens,
        "steps": span.steps,
        "flops": span.flops,
        "memory_bytes": {**dataclasses.asdict(memory), "total": memory.total},
    }
