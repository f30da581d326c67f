"""`slop calibrate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ..cost.flops import DEFAULT_CONFIG, TRAINING_BYTES_PER_PARAMETER, count_parameters, count_flops_per_token
from ..cost.hours import CostModel
from ..dims import ModelDims
from ..errors import PlanError
from ..io.serialization import to_plain
from .model_config import read_config

if TYPE_CHECKING:
    from ..training import StepTimes

#: A few minutes on a small CPU. A GPU would wait for Python most of the time: give it the structures of the plan.
LADDER = (
    ModelDims(128, 384, 4, 2),
    ModelDims(256, 768, 4, 4),
    ModelDims(384, 1024, 6, 6),
    ModelDims(512, 1536, 8, 8),
    ModelDims(768, 2048, 8, 12),
)


def calibrate(
    structures: Annotated[
        str | None,
        typer.Option(
            help='What to measure: "hidden,ffn,layers,heads[,kv_heads[,head_dim]];…". Default: a small ladder.'
        ),
    ] = None,
    initial: Annotated[
        str | None, typer.Option(help="Measure five sizes instead, from this structure to --target or --to.")
    ] = None,
    source: Annotated[
        str | None, typer.Option("--from", help="Family, vocabulary and initial structure: a model or its config.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="The largest of those sizes.")] = None,
    destination: Annotated[
        str | None, typer.Option("--to", help="Take it from a model directory, a config.json or a Hub id[@revision].")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to time, of each structure; their median counts.")] = 10,
    warmup_steps: Annotated[int, typer.Option(help="Steps before those, not counted.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step on each device.")] = 4,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary. Default: that of --from, or 32000.")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="Input and output embeddings are tied.")] = False,
    precision: Annotated[str, typer.Option(help="'fp32', or 'bf16' for runs with `bf16: true`.")] = "fp32",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Activations are recomputed.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Measure the CPU where there is a GPU.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and tokens.")] = 0,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the cost model, for `slop plan --cost-model`.")
    ] = Path("cost_model.yaml"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be measured, and measure nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result (or what would be measured) as JSON.")
    ] = False,
) -> None:
    """Measure this hardware: train a few structures for a few steps, and fit how long training takes.

    Measure as you will train: the same batch, sequence length, precision and, above all, sizes, while the machine does
    nothing else. The built-in ladder is for CPUs; on a GPU, give the structures of the plan and a batch that fills it.

    Examples:

    `slop calibrate -o cost.yaml`, and then `slop plan … --cost-model cost.yaml`

    `slop calibrate --initial 768,2048,6,6 --target 2048,5632,16,16 --batch-size 8 --sequence-length 2048`
    """
    config = _config(source, vocab_size, tied)
    chosen = _chosen(structures, initial, source, target, destination)
    if output.is_dir():
        raise PlanError(f"--output {output} is a directory: give a file, such as {output / 'cost_model.yaml'}")
    if dry_run:
        each = f"{warmup_steps} + {steps} steps of {batch_size} × {sequence_length} tokens"
        _show_preview([_preview(dims, config, batch_size, sequence_length) for dims in chosen], each, as_json)
        return
    from .. import calibrate as measure  # torch takes seconds

    times: list[StepTimes] = []
    # What transformers prints while it trains would get into the JSON.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        cost_model = measure(
            chosen,
            config,
            sequence_length=sequence_length,
            batch_size=batch_size,
            steps=steps,
            warmup_steps=warmup_steps,
            precision=precision,  # type: ignore[arg-type]
            checkpointing=checkpointing,
            seed=seed,
            training={"use_cpu": cpu},
            progress=True,
            observe=times.append,
        )
    cost_model.to_yaml(output)
    _show(cost_model, sorted(times, key=lambda one: chosen.index(one.dims)), output, as_json)


def _config(source: str | None, vocab_size: int | None, tied: bool) -> dict[str, Any]:
    config = dict(DEFAULT_CONFIG) if source is None else read_config(source, "--from")[1]
    config |= {"vocab_size": vocab_size} if vocab_size else {}
    config |= {"tie_word_embeddings": True} if tied else {}
    return config


def _chosen(
    structures: str | None, initial: str | None, source: str | None, target: str | None, destination: str | None
) -> list[ModelDims]:
    """The structures to measure, from the options that name them."""
    has_end = target is not None or destination is not None
    if structures is not None:
        if initial is not None or has_end:
            raise PlanError("give either --structures, or both ends: --initial or --from, and --target or --to")
        return [ModelDims.parse(text) for text in structures.split(";") if text.strip()]
    if initial is None and not has_end:
        return list(LADDER)
    smallest = _end(initial, source, "--initial", "--from")
    return structures_between(smallest, _end(target, destination, "--target", "--to"))


def _end(text: str | None, source: str | None, *names: str) -> ModelDims:
    if (text is None) == (source is None):
        raise PlanError(f"sizes from one structure to another need both ends: give either {' or '.join(names)}")
    if text is not None:
        return ModelDims.parse(text)
    assert source is not None
    return read_config(source, names[1])[0]


def structures_between(smallest: ModelDims, largest: ModelDims, count: int = 5) -> list[ModelDims]:
    """Structures at about equal ratios from one to another, both ends among them.

    Each has heads as those of the end that it is nearer to, so that it trains at that end's speed, and an ffn of the
    multiples that both ends are of.

    >>> [str(dims) for dims in structures_between(ModelDims(768, 2048, 6, 6), ModelDims(2048, 5632, 16, 16))]
    ['(768, 2048, 6, 6)', '(1024, 2560, 8, 8)', '(1280, 3328, 10, 10)', '(1664, 4352, 13, 13)', '(2048, 5632, 16, 16)']
    """
    inner = [_part_way(smallest, largest, step / (count - 1)) for step in range(1, count - 1)]
    return list(dict.fromkeys([smallest, *inner, largest]))


def _part_way(smallest: ModelDims, largest: ModelDims, share: float) -> ModelDims:
    def between(name: str, multiple: int) -> int:
        size = getattr(smallest, name) ** (1 - share) * getattr(largest, name) ** share
        return max(1, round(size / multiple)) * multiple

    near = smallest if share < 0.5 else largest
    group = near.num_attention_heads // near.num_key_value_heads
    of_a_head = near.hidden_size // near.num_attention_heads  # not its head_dim, in families with one of its own
    heads = between("hidden_size", of_a_head * group) // of_a_head
    return ModelDims(
        hidden_size=heads * of_a_head,
        intermediate_size=between(
            "intermediate_size", gcd(smallest.intermediate_size, largest.intermediate_size, 256)
        ),
        num_hidden_layers=between("num_hidden_layers", 1),
        num_attention_heads=heads,
        num_key_value_heads=heads // group,
        head_dim=near.head_dim,
    )


def _preview(dims: ModelDims, config: dict[str, Any], batch_size: int, sequence_length: int) -> dict[str, Any]:
    parameters = count_parameters(dims, config)
    return {
        "structure": str(dims),
        "parameters": parameters,
        "flops_per_step": count_flops_per_token(dims, config, sequence_length) * batch_size * sequence_length,
        "training_state_bytes": parameters * TRAINING_BYTES_PER_PARAMETER,
    }


def _show_preview(rows: Sequence[dict[str, Any]], each: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    state = max((row["training_state_bytes"] for row in rows), default=0) / 2**20
    caption = f"largest training state: {state:,.0f} MiB, without activations"
    table = Table(box=SIMPLE, title=f"would measure {each}", caption=caption)
    table.add_column("structure", no_wrap=True)
    for column in ("parameters", "FLOPs a step"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(row["structure"], f"{row['parameters']:,}", f"{row['flops_per_step']:.3g}")
    Console().print(table)


def _show(cost_model: CostModel, times: Sequence[StepTimes], output: Path, as_json: bool) -> None:
    rows = _rows(cost_model, times)
    if as_json:
        answer = {"cost_model": to_plain(cost_model), "mean_error": cost_model.mean_error, "structures": rows}
        print(json.dumps(answer, indent=2))
        return
    Console().print(_table(rows, cost_model.hardware))
    print(f"{_verdict(cost_model)}\ncost model written to {output}")


def _rows(cost_model: CostModel, times: Sequence[StepTimes]) -> list[dict[str, Any]]:
    """What was measured beside what the fit makes of it, in device hours of a billion tokens."""
    return [
        {
            "structure": str(one.dims),
            "parameters": one.parameters,
            "flops_per_token": one.flops_per_token,
            "seconds_per_step": one.seconds_per_step,
            "measured_hours": one.measurement.hours / one.tokens * 1e9,
            "predicted_hours": cost_model.hours(one.flops_per_token, 1e9),
            "error": error,
            "peak_bytes": one.peak_bytes,
        }
        for one, error in zip(times, cost_model.errors, strict=True)
    ]


def _table(rows: Sequence[dict[str, Any]], hardware: str) -> Table:
    table = Table(box=SIMPLE, title="Device hours of 1B tokens", caption=hardware)
    table.add_column("structure", no_wrap=True)
    with_memory = all(row["peak_bytes"] is not None for row in rows)
    for column in ("parameters", "s / step", "measured", "predicted", "error", *(["peak memory"] * with_memory)):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        figures = f"{row['parameters'] / 1e6:,.1f}M", f"{row['seconds_per_step']:.3g}"
        hours = f"{row['measured_hours']:,.4g}", f"{row['predicted_hours']:,.4g}", f"{row['error']:+.1%}"
        memory = [f"{row['peak_bytes'] / 2**20:,.0f} MiB"] if with_memory else []
        table.add_row(row["structure"], *figures, *hours, *memory)
    return table


def _verdict(cost_model: CostModel) -> str:
    """The two prices in units that can be compared with a data sheet."""
    rate = 1 / (cost_model.hours_per_flop * 3600)
    micros = cost_model.hours_per_token * 3600e6
    return f"{rate:.3g} FLOP/s a device and {micros:.3g} µs a token; mean error {cost_model.mean_error:.1%}"
