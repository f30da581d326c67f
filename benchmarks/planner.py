"""The planner compared with networkx, and its time against the size of the search; `README.md` explains the record.

python benchmarks/planner.py                 # a few minutes, on an otherwise idle machine
python benchmarks/planner.py --scale tiny    # seconds, to see that it works; the numbers mean nothing
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import networkx
import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from measuring import (
    Measurement,
    Record,
    build_goals_table,
    describe_circumstances,
    make_goal,
    make_parser,
    measure_in_process,
    read_options,
    save_figure,
)
from rich.console import Console
from rich.table import Table

from slop_hf import ConfigSpace, ModelDims, SlopPlanner
from slop_hf.cost.flops import count_paper_params
from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_json
from slop_hf.io.units import format_bytes
from slop_hf.operators import OPERATORS
from slop_hf.planning.structures import DimsArray

INITIAL = ModelDims(768, 2048, 6, 6)
ALL = ("layer", "mha", "ffn", "hidden")
#: Numbers of targets or structures by mode.
SIZES = {
    "full": {"once": (10**3, 10**4, 10**5, 10**6), "repeated": (10**3, 10**4, 10**5), "joint": (500, 5000, 15000)},
    "tiny": {"once": (100, 1000), "repeated": (100, 1000), "joint": (50, 200)},
}
GOAL_SIZES = {"once": -1, "repeated": -1, "joint": 1}
PEERS = {"full": 2000, "tiny": 20}


def run(scale: str, repetitions: int) -> Record:
    """Measure every mode at every size, and networkx on a part of the largest."""
    record: Record = {"cases": []}
    for mode, sizes in SIZES[scale].items():
        for size in sizes:
            runs = [measure_in_process(TASKS[mode], size) for _ in range(repetitions)]
            record["cases"].append(
                {
                    "mode": mode,
                    "size": runs[0].value,
                    "seconds": [run.seconds for run in runs],
                    "median_seconds": statistics.median(run.seconds for run in runs),
                    "peak_bytes": [run.peak_bytes for run in runs],
                }
            )
    record["networkx"] = measure_networkx(SIZES[scale]["once"][-1], PEERS[scale], record["cases"])
    record["goals"] = _make_goals(record)
    return record


def build_targets(count: int) -> DimsArray:
    """Build this number of different targets such that every structure on the way can be loaded."""
    hidden, heads = np.array([1536, 2304, 3072, 3840, 4608]), np.array([12, 24])
    depth = np.arange(7, 107)
    ffn = 2048 + 16 * np.arange(1, math.ceil(count / (len(hidden) * len(heads) * len(depth))) + 1)
    sizes = [axis.ravel()[:count] for axis in np.meshgrid(ffn, hidden, depth, heads, indexing="ij")]
    return DimsArray(sizes[1], sizes[0], sizes[2], sizes[3], sizes[3], np.full(len(sizes[0]), 128))


def once(count: int) -> int:
    """Find the best 10 schedules among all orders to this number of targets."""
    space = ConfigSpace(targets=build_targets(count))
    SlopPlanner(INITIAL, space, operators=ALL, objective="delta_params_eq3").plan(top_k=10)
    return count


def repeated(count: int) -> int:
    """Search with one dimension per stage: by FLOPs with up to 6 stages, and by Eq. 3 with 6 stages."""
    space, size = _box(count)
    common: dict[str, Any] = {"mode": "repeated", "operators": ("layer", "ffn", "hidden")}
    SlopPlanner(INITIAL, space, objective="flops", max_stages=6, **common).plan(top_k=10, tokens=65e9)
    SlopPlanner(INITIAL, space, objective="delta_params_eq3", stages=6, **common).plan(top_k=10)
    return size


def joint(count: int) -> int:
    """Search with several dimensions per stage: by FLOPs with up to 6 stages, and by Eq. 3 with 6 stages."""
    space, size = _box(count)
    common: dict[str, Any] = {"mode": "joint", "operators": ("layer", "ffn", "hidden")}
    SlopPlanner(INITIAL, space, objective="flops", max_stages=6, **common).plan(top_k=10, tokens=65e9)
    SlopPlanner(INITIAL, space, objective="delta_params_eq3", stages=6, **common).plan(top_k=10)
    return size


TASKS = {"once": once, "repeated": repeated, "joint": joint}


def _box(count: int) -> tuple[ConfigSpace, int]:
    """Return a space with one target and about `count` structures on the way to it, and their number."""
    side = round(count ** (1 / 3))
    steps = side - 1, max(1, round(count / side**2)) - 1
    target = ModelDims(768 + 128 * steps[0], 2048 + 256 * steps[0], 6 + steps[1], 6 + steps[0])
    return ConfigSpace(targets=[target]), side * side * (steps[1] + 1)


def measure_networkx(targets: int, part: int, cases: Sequence[Record]) -> Record:
    """Measure `networkx.dijkstra_path` on the graphs of some of the targets; the graphs are built before."""
    graphs = [_graph(build_targets(targets).at(number * (targets // part))) for number in range(part)]
    outcome: Measurement = measure_in_process(partial(_shortest, graphs))
    ours = next(case for case in cases if case["mode"] == "once" and case["size"] == targets)
    equal = sum(
        math.isclose(length, _own(target), rel_tol=1e-12)
        for length, (_, target) in zip(outcome.value, graphs, strict=True)
    )
    extrapolated = outcome.seconds * targets / part
    return {
        "targets": part,
        "seconds": outcome.seconds,
        "extrapolated_seconds": extrapolated,
        "ratio": extrapolated / ours["median_seconds"],
        "equal_answers": equal,
    }


def _shortest(graphs: Sequence[tuple[networkx.DiGraph, ModelDims]]) -> list[float]:
    lengths = []
    for graph, target in graphs:
        path = networkx.dijkstra_path(graph, INITIAL, target)
        lengths.append(networkx.path_weight(graph, path, "weight"))
    return lengths


def _own(target: ModelDims) -> float:
    space = ConfigSpace(targets=[target])
    best = SlopPlanner(INITIAL, space, operators=ALL, objective="delta_params_eq3").plan(top_k=1)[0]
    return math.log(best.scores["delta_params_eq3"])


def _graph(target: ModelDims) -> tuple[networkx.DiGraph, ModelDims]:
    """Build the graph of the orders from the initial structure to a target, with logarithms of Eq. 3's weights."""
    graph = networkx.DiGraph()

    def corner(grown: Sequence[str]) -> ModelDims:
        fields = {name for operator in grown for name in OPERATORS[operator].fields}
        return INITIAL.replace(**{name: getattr(target, name) for name in fields}) if fields else INITIAL

    for count in range(len(ALL)):
        for grown, more in product(combinations(ALL, count), ALL):
            if more not in grown:
                before, after = corner(grown), corner((*grown, more))
                graph.add_edge(
                    before, after, weight=math.log(max(1, count_paper_params(after) - count_paper_params(before)))
                )
    return graph, target


def _make_goals(record: Record) -> list[Record]:
    goals = []
    limits = {"once": 2.0, "repeated": 10.0, "joint": 10.0}
    for mode, limit in limits.items():
        cases = [case for case in record["cases"] if case["mode"] == mode]
        case = cases[GOAL_SIZES[mode]]
        goals.append(make_goal(f"{mode}, {case['size']:,}: seconds", case["median_seconds"], limit))
        if mode == "once":
            goals.append(make_goal(f"{mode}, {case['size']:,}: peak bytes", max(case["peak_bytes"]), 1e9))
    peer = record["networkx"]
    goals.append(make_goal("once: seconds / networkx's", 1 / peer["ratio"], 0.01))
    goals.append(make_goal("targets with another answer than networkx", peer["targets"] - peer["equal_answers"], 0))
    return goals


def draw_figure(record: Record, path: Path) -> None:
    """Draw seconds against the number of targets or structures, on logarithmic axes."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        lines = {
            "once": ("each dimension once: targets × 24 orders", "#0072B2"),
            "repeated": ("one dimension per stage: structures", "#D55E00"),
            "joint": ("several dimensions per stage: structures", "#009E73"),
        }
        for mode, (label, colour) in lines.items():
            cases = [case for case in record["cases"] if case["mode"] == mode]
            values = [case["median_seconds"] for case in cases]
            axes.loglog([case["size"] for case in cases], values, "o-", color=colour, label=label, markersize=4)
        axes.set_xlabel("number of targets or structures")
        axes.set_ylabel("median time [s]")
        axes.grid(alpha=0.3, which="both", linewidth=0.4)
        axes.legend(loc="upper left")
        axes.set_ylim(top=axes.get_ylim()[1] * 10)
        save_figure(figure, path)


def build_table(record: Record) -> Table:
    """Return the record as a table."""
    table = Table("mode", "size", "median s", "peak", title="planner")
    for case in record["cases"]:
        peak = format_bytes(max(case["peak_bytes"]))
        table.add_row(case["mode"], f"{case['size']:,}", f"{case['median_seconds']:.3f}", peak)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("planner", __doc__)
    options = read_options(parser, "planner", arguments, repetitions={"full": 3, "tiny": 3})
    command = f"python benchmarks/planner.py --scale {options.scale} --repetitions {options.repetitions}"
    circumstances = describe_circumstances(options.scale, options.repetitions, command)
    record = {**circumstances, **run(options.scale, options.repetitions)}
    write_text(options.output, to_json(record))
    draw_figure(record, options.output.with_name(f"{options.output.stem}_scaling.png"))
    console = Console()
    console.print(build_table(record))
    console.print(json.dumps(record["networkx"]))
    console.print(build_goals_table(record))


if __name__ == "__main__":
    main()
