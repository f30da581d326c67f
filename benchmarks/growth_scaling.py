"""Time and memory of growth against the size of the model, with a figure."""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from checkpoints import VOCAB, llama_config, read_and_write, require_space, write_checkpoint
from growth_checkpoint import BASELINE, grow, measure_on_disk
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from measuring import Context, Measurement, Record, alternate, measure_in_process, save_figure
from rich.table import Table
from transformers import LlamaForCausalLM

from slop_hf import ModelDims, grow_model
from slop_hf.cost.flops import count_parameters
from slop_hf.growth import hide_progress_bars
from slop_hf.io.units import format_bytes, format_count

SOURCES = {
    "full": (
        ModelDims(320, 1280, 8, 5),
        ModelDims(640, 2048, 15, 10),
        ModelDims(1280, 3584, 20, 10),
        ModelDims(2048, 5632, 21, 16),
    ),
    "tiny": (ModelDims(32, 64, 2, 2), ModelDims(64, 128, 2, 2)),
}
OPERATOR = "ffn"
#: Label, colour and marker of each line; peers are dashed.
LINES = {
    "grow_model": ("grow_model", "#0072B2", "o-"),
    "copy": ("a copy of the grown weights", "#56B4E9", "o--"),
    "grow_checkpoint": ("grow_checkpoint", "#D55E00", "s-"),
    BASELINE: ("reading the source, writing the target's size", "#E69F00", "s--"),
    "weights": ("the weights of both models", "#56B4E9", "o--"),
}


def run(context: Context) -> Record:
    """Double the parameters of models of several sizes, in memory and on disk."""
    vocab = VOCAB[context.scale]
    cases = [run_size(dims, vocab, context) for dims in SOURCES[context.scale]]
    record: Record = {"dtype": "bfloat16", "vocab_size": vocab, "operator": OPERATOR, "init": "random", "cases": cases}
    draw_figure(record, context.figure)
    return {**record, "figure": context.figure.name, "goals": []}


def run_size(dims: ModelDims, vocab: int, context: Context) -> Record:
    """Measure one size."""
    config = llama_config(dims, vocab, torch.bfloat16)
    new = double_ffn(dims, vocab)
    new_dims = {"intermediate_size": new.intermediate_size}
    source_bytes, target_bytes = (2 * count_parameters(each, config) for each in (dims, new))
    require_space(context.workdir, source_bytes + target_bytes)
    source, target = context.workdir / f"source-{source_bytes}", context.workdir / "target"
    measure_in_process(write_checkpoint, source, config)
    results = alternate(
        {
            "grow_model": partial(measure_inside, load_and_grow, source, new_dims),
            "copy": partial(measure_inside, copy, source, new_dims),
            "grow_checkpoint": partial(measure_on_disk, target, grow, source, target, OPERATOR, new_dims, "random"),
            BASELINE: partial(measure_on_disk, target, read_and_write, source, target, target_bytes),
        },
        context.repetitions,
    )
    seconds = {name: [run.seconds for run in runs] for name, runs in results.items()}
    peaks = {name: [run.peak_bytes for run in results[name]] for name in ("grow_model", "grow_checkpoint")}
    medians = {name: statistics.median(runs) for name, runs in seconds.items()}
    return {
        "source_dims": dims.as_dict(),
        "target_dims": new.as_dict(),
        "source_parameters": count_parameters(dims, config),
        "target_parameters": count_parameters(new, config),
        "source_bytes": source_bytes,
        "target_bytes": target_bytes,
        "seconds": seconds,
        "peak_bytes": peaks,
        "median_seconds": medians,
        "median_peak_bytes": {
            **{name: statistics.median(runs) for name, runs in peaks.items()},
            "weights": source_bytes + target_bytes,
        },
        "ratios": {
            "grow_model_to_copy": medians["grow_model"] / medians["copy"],
            "grow_checkpoint_to_read_and_write": medians["grow_checkpoint"] / medians[BASELINE],
        },
    }


def double_ffn(dims: ModelDims, vocab: int) -> ModelDims:
    """Return the structure with a larger ffn that has about twice the parameters."""
    config = llama_config(dims, vocab, torch.bfloat16)
    per_slot = 3 * dims.hidden_size * dims.num_hidden_layers
    wanted = dims.intermediate_size + count_parameters(dims, config) / per_slot
    return dims.replace(intermediate_size=round(wanted / 64) * 64)


def measure_inside(function: object, *arguments: object) -> Measurement:
    """Measure a function that returns the seconds that count; the peak memory is that of the whole call."""
    whole = measure_in_process(function, *arguments)  # type: ignore[arg-type]
    return Measurement(whole.value, whole.peak_bytes)


def load_and_grow(source: Path, new_dims: dict[str, int]) -> float:
    """Load a model, and return the seconds of `grow_model`."""
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    began = time.perf_counter()
    grown = grow_model(model, OPERATOR, new_dims)
    seconds = time.perf_counter() - began
    del grown
    return seconds


def copy(source: Path, new_dims: dict[str, int]) -> float:
    """Load and grow a model, and return the seconds of copying its weights."""
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    grown = [weight.detach() for weight in grow_model(model, OPERATOR, new_dims).parameters()]
    began = time.perf_counter()
    copied = [weight.clone() for weight in grown]
    seconds = time.perf_counter() - began
    del copied
    return seconds


def draw_figure(record: Record, path: Path) -> None:
    """Draw time and peak memory against the source's parameters, on logarithmic axes."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(9.0, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        time_axes, memory_axes = figure.subplots(1, 2)
        sizes = [case["source_parameters"] for case in record["cases"]]
        for axes, field, unit, title, label in (
            (time_axes, "median_seconds", 1.0, "Time to double a model", "median time [s]"),
            (
                memory_axes,
                "median_peak_bytes",
                1e9,
                "Memory to double a model",
                "peak memory above the idle process [GB]",
            ),
        ):
            for name in record["cases"][0][field]:
                text, colour, style = LINES[name]
                values = [case[field][name] / unit for case in record["cases"]]
                axes.loglog(sizes, values, style, color=colour, label=text, markersize=4)
            axes.set_title(title)
            axes.set_xlabel("parameters of the source")
            axes.set_ylabel(label)
            axes.xaxis.set_major_locator(FixedLocator(sizes))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1e6:,.0f}M"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3, which="both", linewidth=0.4)
            axes.legend(loc="upper left")
            axes.set_ylim(top=axes.get_ylim()[1] * 6)  # room for the legend
        save_figure(figure, path)


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    title = f"{record['operator']}, init {record['init']}, to twice the parameters"
    table = Table("source", "what", "median s", "/ peer", "peak", title=title)
    for case in record["cases"]:
        ratios = dict(zip(("grow_model", "grow_checkpoint"), case["ratios"].values(), strict=True))
        for name, seconds in case["median_seconds"].items():
            ratio = f"{ratios[name]:.2f}" if name in ratios else ""
            peak = format_bytes(case["median_peak_bytes"][name]) if name in ratios else ""
            table.add_row(format_count(case["source_parameters"]), name, f"{seconds:.3f}", ratio, peak)
        table.add_section()
    return [table]
