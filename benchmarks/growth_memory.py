"""Growth in memory, compared with copying, drawing random numbers, constructing the target, and resizing by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import VOCAB, llama_config, write_checkpoint
from measuring import (
    Context,
    Record,
    alternate,
    compute_median_peak,
    compute_median_seconds,
    list_runs,
    make_goal,
    measure_in_process,
    time_call,
)
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims, grow_model
from slop_hf.growth import grow_weights, hide_progress_bars, plan_growth
from slop_hf.io.units import format_bytes

SOURCES = {"full": ModelDims(1280, 3584, 20, 10), "tiny": ModelDims(64, 128, 2, 4)}
#: Growth by each operator to about twice the parameters.
TARGETS: dict[str, dict[str, dict[str, int]]] = {
    "full": {
        "layer": {"num_hidden_layers": 45},
        "ffn": {"intermediate_size": 10240},
        "hidden": {"hidden_size": 2304, "num_attention_heads": 18},
        "mha": {"num_attention_heads": 40},
    },
    "tiny": {
        "layer": {"num_hidden_layers": 5},
        "ffn": {"intermediate_size": 320},
        "hidden": {"hidden_size": 112, "num_attention_heads": 7},
        "mha": {"num_attention_heads": 16},
    },
}
INITS = {"layer": ("stack", "preserving")}
WIDTH_INITS = ("random", "preserving", "copy")


def run(context: Context) -> Record:
    """Measure every operator with every init."""
    config = llama_config(SOURCES[context.scale], VOCAB[context.scale], torch.float32)
    source = context.workdir / "source"
    measure_in_process(write_checkpoint, source, config)
    cases = [
        run_operator(operator, new_dims, config, source, context.repetitions)
        for operator, new_dims in TARGETS[context.scale].items()
    ]
    goals = [goal for case in cases for goal in _make_goals(case)]
    return {"dtype": "float32", "vocab_size": config.vocab_size, "cases": cases, "goals": goals}


def run_operator(
    operator: str, new_dims: dict[str, int], config: LlamaConfig, source: Path, repetitions: int
) -> Record:
    """Measure one operator with every init."""
    inits = INITS.get(operator, WIDTH_INITS)
    timings = measure_in_process(time_operator, operator, new_dims, inits, config, repetitions).value
    loading = alternate(
        {
            "from_pretrained + grow_model": partial(measure_in_process, load_and_grow, source, operator, new_dims),
            "from_pretrained + by hand": partial(measure_in_process, load_and_resize, source, operator, new_dims),
        },
        repetitions,
    )
    medians = {name: statistics.median(runs) for name, runs in timings["seconds"].items()}
    randn_and_copy = medians["torch.randn"] + medians["copy"]
    ratios = {
        name: {
            "to_copy": seconds / medians["copy"],
            "to_randn_and_copy": seconds / randn_and_copy,
            "to_construct": seconds / medians["construct"],
        }
        for name, seconds in medians.items()
        if name.startswith("grow_")
    }
    ours, by_hand = loading.values()
    return {
        "operator": operator,
        **{name: value for name, value in timings.items() if name != "seconds"},
        "seconds": timings["seconds"],
        "median_seconds": medians,
        "ratios": ratios,
        "loading": {
            **list_runs(loading),
            "seconds_ratio_to_by_hand": compute_median_seconds(ours) / compute_median_seconds(by_hand),
            "peak_ratio_to_by_hand": compute_median_peak(ours) / compute_median_peak(by_hand),
        },
    }


def time_operator(
    operator: str, new_dims: dict[str, int], inits: Sequence[str], config: LlamaConfig, repetitions: int
) -> Record:
    """Time growth and its peers in this process."""
    model = LlamaForCausalLM(config)
    weights = dict(model.named_parameters())
    plans = {init: plan_growth(config, operator, new_dims, init=init) for init in inits}
    plan = plans[inits[0]]
    # A call before the clock starts excludes what is done only once; its result is what the peer copies.
    reference = grow_weights(weights, plan)
    new_entries = (
        []
        if operator == "layer"
        else [reference[parameter.name].numel() - weights[parameter.source].numel() for parameter in plan.parameters()]
    )
    contenders: dict[str, Callable[[], Any]] = {
        "copy": lambda: [tensor.clone() for tensor in reference.values()],
        "torch.randn": lambda: draw([count for count in new_entries if count]),
        "construct": lambda: LlamaForCausalLM(plan.config()),
    }
    for init in inits:
        contenders[f"grow_weights {init}"] = partial(grow_weights, weights, plans[init])
        contenders[f"grow_model {init}"] = partial(grow_model, model, operator, new_dims, init=init)
    seconds = alternate({name: partial(time_call, contender) for name, contender in contenders.items()}, repetitions)
    return {
        "source_dims": plan.old.as_dict(),
        "target_dims": plan.new.as_dict(),
        "source_parameters": sum(tensor.numel() for tensor in weights.values()),
        "target_parameters": sum(tensor.numel() for tensor in reference.values()),
        "target_bytes": sum(tensor.nbytes for tensor in reference.values()),
        "new_entries": sum(new_entries),
        "seconds": seconds,
    }


def draw(counts: Sequence[int]) -> list[torch.Tensor]:
    """Draw tensors of these sizes by `torch.randn` on all cores, with one generator each: a shared one would block."""

    def draw_one(count: int) -> torch.Tensor:
        return torch.randn(count, generator=torch.Generator().manual_seed(count))

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(draw_one, counts))
        finally:
            torch.set_num_threads(threads)


def load_and_grow(source: Path, operator: str, new_dims: dict[str, int]) -> None:
    """Load a model from files and grow it with this library."""
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    grow_model(model, operator, new_dims)


def load_and_resize(source: Path, operator: str, new_dims: dict[str, int]) -> None:
    """Load a model from files and grow it by hand: copy the old weights into a corner of a new model's."""
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto", trust_remote_code=False)
    depth = model.config.num_hidden_layers
    grown = LlamaForCausalLM(plan_growth(model.config, operator, new_dims).config())
    olds = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in grown.named_parameters():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(int(parts[2]) % depth)
            old = olds[".".join(parts)]
            weight[tuple(slice(size) for size in old.shape)].copy_(old)


def _make_goals(case: Record) -> list[Record]:
    """Return the goals of an operator. Stacked layers draw nothing, so they are compared with a copy, too."""
    goals = []
    for name, ratio in case["ratios"].items():
        function, init = name.split()
        what = f"{case['operator']} {init}, {function}"
        if init == "random":
            goals.append(make_goal(f"{what}: s / (randn + copy)", ratio["to_randn_and_copy"], 1.0))
        if init in ("preserving", "stack"):
            goals.append(make_goal(f"{what}: s / copy", ratio["to_copy"], 1.5))
        goals.append(make_goal(f"{what}: s / construct", ratio["to_construct"], 1.0))
    return goals


def build_tables(record: Record) -> list[Table]:
    """Return the record as tables."""
    growth = Table("operator", "what", "median s", "/ copy", "/ (randn + copy)", "/ construct", title="in memory")
    loading = Table("operator", "what", "median s", "peak", title="in memory, from files")
    for case in record["cases"]:
        for name, seconds in case["median_seconds"].items():
            ratios = (f"{ratio:.2f}" for ratio in case["ratios"].get(name, {}).values())
            growth.add_row(case["operator"], name, f"{seconds:.3f}", *ratios)
        growth.add_section()
        for name, seconds in case["loading"]["seconds"].items():
            peak = format_bytes(statistics.median(case["loading"]["peak_bytes"][name]))
            loading.add_row(case["operator"], name, f"{statistics.median(seconds):.3f}", peak)
    return [growth, loading]
