"""Growth in memory, beside a copy, drawing random numbers, constructing the target, and resizing by hand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints import VOCAB, llama_config, write_checkpoint
from measuring import Context, Record, alternate, goal, measured, median_peak, median_seconds, raw, timed
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims, grow_model
from slop_hf.growth import grow_weights, hide_progress_bars, plan_growth

SOURCES = {"full": ModelDims(1280, 3584, 20, 10), "tiny": ModelDims(64, 128, 2, 4)}
#: About twice the parameters by each operator.
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
    """Measure every operator under every init."""
    config = llama_config(SOURCES[context.scale], VOCAB[context.scale], torch.float32)
    source = context.workdir / "source"
    measured(write_checkpoint, source, config)
    cases = [
        run_operator(operator, new_dims, config, source, context.repetitions)
        for operator, new_dims in TARGETS[context.scale].items()
    ]
    goals = [one for case in cases for one in _goals(case)]
    return {"dtype": "float32", "vocab_size": config.vocab_size, "cases": cases, "goals": goals}


def run_operator(
    operator: str, new_dims: dict[str, int], config: LlamaConfig, source: Path, repetitions: int
) -> Record:
    """Measure one operator."""
    inits = INITS.get(operator, WIDTH_INITS)
    timings = measured(time_operator, operator, new_dims, inits, config, repetitions).value
    loading = alternate(
        {
            "from_pretrained + grow_model": partial(measured, load_and_grow, source, operator, new_dims),
            "from_pretrained + by hand": partial(measured, load_and_resize, source, operator, new_dims),
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
            **raw(loading),
            "seconds_ratio_to_by_hand": median_seconds(ours) / median_seconds(by_hand),
            "peak_ratio_to_by_hand": median_peak(ours) / median_peak(by_hand),
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
    # Called before the clock runs, what is only done once does not count; the result is what the peer copies.
    reference = grow_weights(weights, plan)
    new_entries = (
        []
        if operator == "layer"
        else [reference[one.name].numel() - weights[one.source].numel() for one in plan.parameters()]
    )
    contenders: dict[str, Callable[[], Any]] = {
        "copy": lambda: [tensor.clone() for tensor in reference.values()],
        "torch.randn": lambda: draw([count for count in new_entries if count]),
        "construct": lambda: LlamaForCausalLM(plan.config()),
    }
    for init in inits:
        contenders[f"grow_weights {init}"] = partial(grow_weights, weights, plans[init])
        contenders[f"grow_model {init}"] = partial(grow_model, model, operator, new_dims, init=init)
    seconds = alternate({name: partial(timed, one) for name, one in contenders.items()}, repetitions)
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
    """`torch.randn` of so many entries each, on all cores; a generator each, or they would wait for it."""

    def one(count: int) -> torch.Tensor:
        return torch.randn(count, generator=torch.Generator().manual_seed(count))

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(one, counts))
        finally:
            torch.set_num_threads(threads)


def load_and_grow(source: Path, operator: str, new_dims: dict[str, int]) -> None:
    """From files to a grown model with this library."""
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
    grow_model(model, operator, new_dims)


def load_and_resize(source: Path, operator: str, new_dims: dict[str, int]) -> None:
    """The same by hand: a new model, and what fits copied into it."""
    with hide_progress_bars():
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
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


def _goals(case: Record) -> list[Record]:
    """The goals of an operator; layers that are stacked draw nothing, so that theirs is a copy's too."""
    goals = []
    for name, ratio in case["ratios"].items():
        function, init = name.split()
        what = f"{case['operator']} {init}, {function}"
        if init == "random":
            goals.append(goal(f"{what}: s / (randn + copy)", ratio["to_randn_and_copy"], 1.0))
        if init in ("preserving", "stack"):
            goals.append(goal(f"{what}: s / copy", ratio["to_copy"], 1.5))
        goals.append(goal(f"{what}: s / construct", ratio["to_construct"], 1.0))
    return goals


def tables(record: Record) -> list[Table]:
    """The record to read."""
    growth = Table("operator", "what", "median s", "/ copy", "/ (randn + copy)", "/ construct", title="in memory")
    loading = Table("operator", "what", "median s", "peak GiB", title="in memory, from files")
    for case in record["cases"]:
        for name, seconds in case["median_seconds"].items():
            ratios = (f"{ratio:.2f}" for ratio in case["ratios"].get(name, {}).values())
            growth.add_row(case["operator"], name, f"{seconds:.3f}", *ratios)
        growth.add_section()
        for name, seconds in case["loading"]["seconds"].items():
            peak = statistics.median(case["loading"]["peak_bytes"][name]) / 2**30
            loading.add_row(case["operator"], name, f"{statistics.median(seconds):.3f}", f"{peak:.3f}")
    return [growth, loading]
