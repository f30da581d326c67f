"""Training that publishes its stages beside the same training that does not; `README.md` says how to read a record.

python benchmarks/publishing.py                 # a quarter of an hour
python benchmarks/publishing.py --scale tiny    # to see that it works; the figures mean nothing
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from growth import ROOT, goals_table
from measuring import Record, alternate, circumstances, goal
from rich.console import Console
from rich.table import Table
from training_launch import launch

from slop_hf import PublishCallback, RunConfig, RunDirectory, build_trainer
from slop_hf.hub.publish import Publisher
from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_json

sys.path.insert(0, str(ROOT / "tests/hub"))

from server import USER, LocalHub

RECIPE = ROOT / "recipes/grow_tiny.yaml"
OUTPUTS = {"full": ROOT / "benchmarks/results/publishing.json", "tiny": ROOT / "runs/benchmarks/publishing.json"}
#: What is changed of the recipe. The tiny scale reads little text, and trains each stage for two steps.
CHANGES = {"full": {}, "tiny": {"data.max_documents": 100, "data.vocab_size": 300, "data.held_out": 0.05}}
TINY_TOKENS = 4096
PATIENCE = 1800  # seconds for a run, on a machine with other work
SPEED = 0.97  # of the run that publishes nothing, at least
#: Requests that the Hub answers otherwise than it should, how, and how often in each run.
FAILURES = (
    ("POST /api/repos/create", 500, 1),
    ("PUT /lfs/", "drop", 2),
    ("POST .*/commit/stage-1", 429, 1),
    ("POST .*/preupload/stage-2", 503, 1),
    ("GET .*/tree/stage-3", "drop", 1),
)
#: A stage is published as soon as it is written: while the next one is grown and evaluated, and its first steps made.
SPEEDS = {"training_seconds": "training", "run_seconds": "the whole run"}
TIMES = (*SPEEDS, "cpu_seconds")


@dataclass(frozen=True)
class Setting:
    """How runs are made.

    Args:
        scale: "full" or "tiny".
        folder: where they are written.
        threads: that each computes with; None, as many as torch takes.
    """

    scale: str
    folder: Path
    threads: int | None


def measure(setting: Setting, repetitions: int) -> Record:
    """Runs by turns, each in a process of its own, and the Hub in this one."""
    runs = alternate({"publishing": partial(published_run, setting), "alone": partial(one_run, setting)}, repetitions)
    found: Record = {what: {name: [one[what] for one in several] for name, several in runs.items()} for what in TIMES}
    found["publishing_thread_cpu_seconds"] = [one["thread_seconds"] for one in runs["publishing"]]
    return {
        "recipe": RECIPE.name,
        "load_average_after": os.getloadavg()[0],
        "failures": [{"request": request, "answer": how, "times": times} for request, how, times in FAILURES],
        "timed": "training_seconds: the stages' records, without evaluation and saving; run_seconds: all of train(); "
        "cpu_seconds: of the process meanwhile; publishing_thread_cpu_seconds: what of it went into publishing",
        **found,
        **compare(found),
    }


def compare(found: Record) -> Record:
    """How fast the run that publishes is, as a share of the other's speed: of the medians, and of every pair."""
    medians = {what: {name: statistics.median(runs) for name, runs in found[what].items()} for what in SPEEDS}
    ratios = {what: one["alone"] / one["publishing"] for what, one in medians.items()}
    pairs = {
        what: [alone / ours for ours, alone in zip(found[what]["publishing"], found[what]["alone"], strict=True)]
        for what in SPEEDS
    }
    # Goals are upper limits: the ratios the other way round.
    goals = [
        goal(f"{name}: speed without publishing / with it", 1 / ratios[what], 1 / SPEED)
        for what, name in SPEEDS.items()
    ]
    return {"median_seconds": medians, "pair_ratios": pairs, "ratios": ratios, "goals": goals}


def published_run(setting: Setting) -> Record:
    """A run that publishes to a Hub that fails now and then.

    The Hub is a new one each time: one that has the weights of an earlier run would be sent none.

    Raises:
        RuntimeError: where a stage has not arrived, or not exactly once.
    """
    repo_id = f"{USER}/run"
    with LocalHub() as hub:
        for failure in FAILURES:
            hub.fail(*failure)
        found = one_run(setting, repo_id, {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token})
    arrived = [branch for branch, _ in hub.repos[repo_id].messages]
    unused = [failure[0].pattern for failure in hub.failures if failure[2]]
    if arrived != [*found["stages"], "main"] or unused:
        raise RuntimeError(f"commits to {arrived}, expected each stage once and main; failures left: {unused}")
    return found


def one_run(setting: Setting, repo_id: str | None = None, online: dict[str, str] | None = None) -> Record:
    """A run, that publishes if it is told where to."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **online} if online else {}
    if setting.threads:
        environment["OMP_NUM_THREADS"] = str(setting.threads)
    with tempfile.TemporaryDirectory(dir=setting.folder) as directory:
        settings = {"scale": setting.scale, "output": f"{directory}/run", "repo_id": repo_id}
        return launch("publishing.train", settings, seconds=PATIENCE, environment=environment)[0]


def train(scale: str, output: str, repo_id: str | None) -> Record:
    """Train the recipe, in a process of its own; its seconds, and those of its processors."""
    config = RunConfig.from_yaml(RECIPE, {"training.disable_tqdm": True, **CHANGES[scale]})
    if scale == "tiny":
        schedule = config.read_schedule()
        config = config.with_schedule(schedule.with_shares([TINY_TOKENS] * len(schedule.structures)))
    publishing = PublishCallback(repo_id) if repo_id else None
    trainer = build_trainer(config, output, callbacks=[publishing] if publishing else None)
    with publishing_clocked() as thread_seconds:
        began, cpu = time.perf_counter(), time.process_time()
        trainer.train()
        run_seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        while_training = sum(thread_seconds)
        if publishing:
            print(publishing.finish())
    records = RunDirectory(output).records()
    return {
        "stages": [record.name for record in records],
        "training_seconds": sum(record.seconds for record in records),
        "run_seconds": run_seconds,
        "cpu_seconds": cpu_seconds,
        "thread_seconds": while_training,
    }


@contextmanager
def publishing_clocked() -> Iterator[list[float]]:
    """The processor's seconds of each stage that is published meanwhile."""
    seconds: list[float] = []
    publish = Publisher.publish

    def clocked(self: Publisher, number: int) -> object:
        began = time.thread_time()
        try:
            return publish(self, number)
        finally:
            seconds.append(time.thread_time() - began)

    Publisher.publish = clocked  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Publisher.publish = publish  # type: ignore[method-assign]


def table(record: Record) -> Table:
    """Medians of what was timed."""
    shown = Table("median s", "publishing", "alone", title="publishing")
    for what in TIMES:
        shown.add_row(what, *(f"{statistics.median(record[what][name]):.2f}" for name in ("publishing", "alone")))
    lines = []
    for what, name in SPEEDS.items():
        pairs = ", ".join(f"{ratio:.3f}" for ratio in record["pair_ratios"][what])
        lines.append(f"speed of {name}, publishing / alone: {record['ratios'][what]:.3f} (pairs: {pairs})")
    shown.caption = "\n".join(lines)
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=OUTPUTS, default="full", help="tiny: a few steps, to try it out")
    parser.add_argument("--repetitions", type=int, default=4, help="of each run; the medians count")
    parser.add_argument("--threads", type=int, help="that a run computes with (default: as many as torch takes)")
    parser.add_argument("--output", type=Path, help="the record (full: benchmarks/results/publishing.json)")
    parser.add_argument("--workdir", type=Path, help="where runs are written (default: $TMPDIR)")
    options = parser.parse_args(arguments)
    output = options.output or OUTPUTS[options.scale]
    command = f"python benchmarks/publishing.py --scale {options.scale} --repetitions {options.repetitions}"
    command += f" --threads {options.threads}" if options.threads else ""
    record: Record = circumstances(options.scale, options.repetitions, command)
    with tempfile.TemporaryDirectory(prefix="publishing-benchmark-", dir=options.workdir) as directory:
        record |= measure(Setting(options.scale, Path(directory), options.threads), options.repetitions)
    write_text(output, to_json(record))
    console = Console()
    console.print(table(record))
    console.print(goals_table(record))
    console.print(f"record: {output}")


if __name__ == "__main__":
    main()
