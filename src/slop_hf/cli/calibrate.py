"""`slop calibrate`: the command and its tables."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cost.flops import count_flops_per_token, count_parameters
from ..cost.hours import CostModel, check_calibration
from ..cost.memory import BYTES_PER_PARAMETER
from ..dims import ModelConfig, ModelDims
from ..errors import PlanError
from ..io.files import check_output
from ..io.serialization import Json
from ..io.units import format_bytes, format_count
from .calibrate_loss import calibrate_loss
from .model_config import build_config, read_structure
from .options import AsJson, make_option, split_list
from .shared import print_json, print_table, redirect_prints

if TYPE_CHECKING:
    from ..training.calibration import StepTimes

_LOSS = "Losses instead of hours"
#: Parameters of the command for hours and losses, and those that need `--loss`.
_COMMON_OPTIONS = ("output", "dry_run", "as_json")
_LOSS_OPTIONS = ("loss", "share", "prior", "runs", "change", "workers", "devices")
#: Structures that take a few minutes on a small CPU. On a GPU they would measure Python's overhead.
LADDER = (
    ModelDims(128, 384, 4, 2),
    ModelDims(256, 768, 4, 4),
    ModelDims(384, 1024, 6, 6),
    ModelDims(512, 1536, 8, 8),
    ModelDims(768, 2048, 8, 12),
)


def calibrate_command(
    context: typer.Context,
    structures: Annotated[
        str | None,
        typer.Option(
            help='Structures to measure: "hidden,ffn,layers,heads[,kv_heads[,head_dim]];…". Default: a small ladder.'
        ),
    ] = None,
    initial: Annotated[
        str | None, typer.Option(help="Measure five sizes from this structure to --target or --to instead.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Model or config that sets family, vocabulary and smallest structure.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Largest of those sizes.")] = None,
    destination: Annotated[
        str | None,
        typer.Option("--to", help="Largest size, from a model directory, config.json or Hub id[@revision]."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps per structure; their median counts.")] = 10,
    warmup_steps: Annotated[int, typer.Option(help="Untimed steps before those.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Sequences per step on each device.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary size. Default: from --from, or 32000.")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="Tie the input and output embeddings.")] = False,
    precision: Annotated[str, typer.Option(help="'fp32', or 'bf16' for runs with `bf16: true`.")] = "fp32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations (gradient checkpointing).")
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Measure the CPU even if there is a GPU.")] = False,
    seed: Annotated[int, typer.Option(help="Random seed of weights and tokens.")] = 0,
    loss: Annotated[
        Path | None, make_option(_LOSS, "--loss", help="Fit a law of losses instead, for this run's YAML file.")
    ] = None,
    share: Annotated[
        float | None, make_option(_LOSS, help="Share of that run's FLOPs to spend. Default: 0.05.")
    ] = None,
    prior: Annotated[Path | None, make_option(_LOSS, help="Law to begin the fit with. Default: wide priors.")] = None,
    runs: Annotated[
        Path | None, make_option(_LOSS, help="Directory of the short runs. Default: runs/calibrate-NAME.")
    ] = None,
    change: Annotated[
        list[str] | None,
        make_option(_LOSS, "--set", help="Change a value of the YAML file: training.learning_rate=1e-3"),
    ] = None,
    workers: Annotated[
        int, make_option(_LOSS, min=1, help="Parallel runs on CPUs; each gets its share of the cores.")
    ] = 1,
    devices: Annotated[str, make_option(_LOSS, help="CUDA devices to spread the runs over, such as 0,1,2,3.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write. Default: cost_model.yaml, or growth_law.yaml with --loss."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be measured; measure nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure the speed of this hardware, or losses on your data, and fit a model to plan with.

    Speed: a few structures train for a few steps, and a cost model is fitted to their times. Measure as you will
    train: same batch, sequence length, precision and, above all, sizes, while the machine does nothing else. The
    built-in ladder is for CPUs. On a GPU, give the structures of your plan and a batch that fills it.

    Losses, with `--loss run.yaml`: your run's structures train on its data for a share of its FLOPs, and a growth law
    is fitted to them. The runs are the initial model and the target from scratch, your schedule, each at several
    lengths, and a mixing probe of each growth (`slop probe --mixing`). You see the plan and its cost first, and at the
    end the forecast for your run with its 80% interval. Steps that runs share are trained once; after an interruption,
    the same command continues.

    Examples:

    `slop calibrate -o cost.yaml`, then `slop plan … --cost-model cost.yaml`

    `slop calibrate --initial 768,2048,6,6 --target 2048,5632,16,16 --batch-size 8 --sequence-length 2048`

    `slop calibrate --loss run.yaml --share 0.05 --dry-run`, then the same with `-o law.yaml`
    """
    _refuse_options(context, is_loss=loss is not None)
    if loss is not None:
        calibrate_loss(
            loss,
            output or Path("growth_law.yaml"),
            share=share,
            prior=prior,
            runs=runs,
            change=change,
            devices=split_list(devices),
            workers=workers,
            dry_run=dry_run,
            as_json=as_json,
        )
        return
    output = output or Path("cost_model.yaml")
    config = build_config(source, vocab_size, tied=tied)
    sizes = _choose_structures(structures, initial, source, target, destination)
    check_output(output, "--output", PlanError)
    settings = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "steps": steps,
        "warmup_steps": warmup_steps,
        "precision": precision,
        "seed": seed,
    }
    check_calibration(sizes, config, **settings)  # type: ignore[arg-type]
    if dry_run:
        _show_preview(
            [_describe(dims, config, batch_size, sequence_length) for dims in sizes],
            f"would measure {warmup_steps} + {steps} steps of {batch_size} × {sequence_length} tokens",
            as_json=as_json,
        )
        return
    from .. import calibrate  # torch takes seconds

    times: list[StepTimes] = []
    with redirect_prints(as_json=as_json):
        cost_model = calibrate(
            sizes,
            config,
            **settings,  # type: ignore[arg-type]
            checkpointing=checkpointing,
            training={"use_cpu": cpu},
            progress=True,
            observe=times.append,
        )
    cost_model.to_yaml(output)
    _show_result(cost_model, sorted(times, key=lambda time: sizes.index(time.dims)), output, as_json=as_json)


def _refuse_options(context: typer.Context, *, is_loss: bool) -> None:
    """Refuse options of the other kind of calibration."""
    present = []
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in _COMMON_OPTIONS and (name in _LOSS_OPTIONS) != is_loss and source is not None:
            present += [parameter.opts[0]] * (source.name == "COMMANDLINE")
    if present and is_loss:
        raise PlanError(f"{', '.join(present)}: --loss measures losses with the settings of its file; leave this out")
    if present:
        raise PlanError(f"{', '.join(present)}: give --loss and the file of a run, too, or leave this out")


def _choose_structures(
    structures: str | None, initial: str | None, source: str | None, target: str | None, destination: str | None
) -> list[ModelDims]:
    """Return the structures to measure, from the options that name them."""
    has_end = target is not None or destination is not None
    if structures is not None:
        if initial is not None or has_end:
            raise PlanError("give either --structures, or both ends: --initial or --from, and --target or --to")
        return [ModelDims.parse(text) for text in structures.split(";") if text.strip()]
    if initial is None and not has_end:
        return list(LADDER)
    smallest = read_structure("smallest", initial, source, "--initial", "--from")
    return interpolate_structures(smallest, read_structure("largest", target, destination, "--target", "--to"))


def interpolate_structures(smallest: ModelDims, largest: ModelDims, count: int = 5) -> list[ModelDims]:
    """Return structures at about equal ratios from one to another, including both.

    Each has the head layout of the nearer end, so that it trains at that end's speed, and an ffn size that is a
    multiple of the ends' common divisor (at most 256).

    >>> [str(dims) for dims in interpolate_structures(ModelDims(768, 2048, 6, 6), ModelDims(2048, 5632, 16, 16))]
    ['(768, 2048, 6, 6)', '(1024, 2560, 8, 8)', '(1280, 3328, 10, 10)', '(1664, 4352, 13, 13)', '(2048, 5632, 16, 16)']
    """
    inner = [_interpolate(smallest, largest, step / (count - 1)) for step in range(1, count - 1)]
    return list(dict.fromkeys([smallest, *inner, largest]))


def _interpolate(smallest: ModelDims, largest: ModelDims, fraction: float) -> ModelDims:
    def mix(name: str, multiple: int) -> int:
        size = getattr(smallest, name) ** (1 - fraction) * getattr(largest, name) ** fraction
        return max(1, round(size / multiple)) * multiple

    near = smallest if fraction < 0.5 else largest
    group = near.num_attention_heads // near.num_key_value_heads
    head_width = near.hidden_size // near.num_attention_heads  # some families have another head_dim
    heads = mix("hidden_size", head_width * group) // head_width
    return ModelDims(
        hidden_size=heads * head_width,
        intermediate_size=mix("intermediate_size", gcd(smallest.intermediate_size, largest.intermediate_size, 256)),
        num_hidden_layers=mix("num_hidden_layers", 1),
        num_attention_heads=heads,
        num_key_value_heads=heads // group,
        head_dim=near.head_dim,
    )


def _describe(dims: ModelDims, config: ModelConfig, batch_size: int, sequence_length: int) -> dict[str, Json]:
    parameters = count_parameters(dims, config)
    return {
        "structure": str(dims),
        "parameters": parameters,
        "flops_per_step": count_flops_per_token(dims, config, sequence_length) * batch_size * sequence_length,
        "training_state_bytes": parameters * sum(BYTES_PER_PARAMETER["fp32"]),
    }


def _show_preview(rows: Sequence[dict[str, Json]], title: str, *, as_json: bool) -> None:
    if as_json:
        print_json(rows)
        return
    state = max((row["training_state_bytes"] for row in rows), default=0)
    print_table(
        title,
        ("structure", ">parameters", ">FLOPs per step"),
        [(row["structure"], f"{row['parameters']:,}", f"{row['flops_per_step']:.3g}") for row in rows],
        wraps=("structure",),
        caption=f"largest training state: {format_bytes(state)}, without activations",
    )


def _show_result(cost_model: CostModel, times: Sequence[StepTimes], output: Path, *, as_json: bool) -> None:
    """Print measured and predicted device hours per billion tokens, and the speed that the fit implies."""
    rows: list[dict[str, Json]] = [
        {
            "structure": str(time.dims),
            "parameters": time.parameters,
            "flops_per_token": time.flops_per_token,
            "seconds_per_step": time.seconds_per_step,
            "measured_hours": time.measurement.hours / time.tokens * 1e9,
            "predicted_hours": cost_model.hours(time.flops_per_token, 1e9),
            "error": error,
            "peak_bytes": time.peak_bytes,
        }
        for time, error in zip(times, cost_model.errors, strict=True)
    ]
    if as_json:
        print_json({"cost_model": cost_model, "mean_error": cost_model.mean_error, "structures": rows})
        return
    has_memory = all(row["peak_bytes"] is not None for row in rows)
    print_table(
        "Device hours per 1B tokens",
        ("structure", ">parameters", ">s / step", ">measured", ">predicted", ">error", *[">peak memory"] * has_memory),
        [
            (
                row["structure"],
                format_count(row["parameters"]),
                f"{row['seconds_per_step']:.3g}",
                f"{row['measured_hours']:,.4g}",
                f"{row['predicted_hours']:,.4g}",
                f"{row['error']:+.1%}",
                *([format_bytes(row["peak_bytes"])] if has_memory else []),
            )
            for row in rows
        ],
        wraps=("structure",),
        caption=cost_model.hardware,
    )
    rate = 1 / (cost_model.hours_per_flop * 3600)
    microseconds = cost_model.hours_per_token * 3600e6
    print(f"{rate:.3g} FLOP/s per device and {microseconds:.3g} µs per token; mean error {cost_model.mean_error:.1%}")
    print(f"cost model written to {output}")
