"""Training that publishes its stages, compared with training that does not; `README.md` explains the record.

python benchmarks/publishing.py                 # a quarter of an hour
python benchmarks/publishing.py --scale tiny    # to see that it works; the numbers mean nothing
"""

from __future__ import annotations

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

from measuring import (
    ROOT,
    Record,
    alternate,
    build_goals_table,
    describe_circumstances,
    make_goal,
    make_parser,
    read_options,
)
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
#: Changes to the recipe by scale. The tiny scale reads little text, and trains each stage for two steps.
CHANGES = {"full": {}, "tiny": {"data.max_documents": 100, "data.vocab_size": 300, "data.held_out": 0.05}}
TINY_TOKENS = 4096
PATIENCE = 1800  # longest duration of a run in seconds, on a busy machine
SPEED = 0.97  # smallest speed relative to the run that publishes nothing
#: Requests that fail: a pattern, the failure, and how often it occurs in each run.
FAILURES = (
    ("POST /api/repos/create", 500, 1),
    ("PUT /lfs/", "drop", 2),
    ("POST .*/commit/stage-1", 429, 1),
    ("POST .*/preupload/stage-2", 503, 1),
    ("GET .*/tree/stage-3", "drop", 1),
)
#: Name of each speed by its key. A stage is published while the next one is grown, evaluated and begun.
SPEEDS = {"training_seconds": "training", "run_seconds": "the whole run"}
TIMES = (*SPEEDS, "cpu_seconds")


@dataclass(frozen=True)
class Setting:
    """Settings of the runs.

    Args:
        scale: "full" or "tiny".
        folder: directory to write them in.
        threads: number of threads of each run; None leaves it to torch.
    """

    scale: str
    folder: Path
    threads: int | None


def measure(setting: Setting, repetitions: int) -> Record:
    """Train with and without publishing in turns, each run in a new process, with the Hub in this one."""
    runs = alternate(
        {"publishing": partial(run_publishing, setting), "alone": partial(run_once, setting)}, repetitions
    )
    times: Record = {what: {name: [run[what] for run in several] for name, several in runs.items()} for what in TIMES}
    times["publishing_thread_cpu_seconds"] = [run["thread_seconds"] for run in runs["publishing"]]
    return {
        "recipe": RECIPE.name,
        "load_average_after": os.getloadavg()[0],
        "failures": [{"request": request, "answer": how, "times": times} for request, how, times in FAILURES],
        "timed": "training_seconds: the stages' records, without evaluation and saving; run_seconds: all of train(); "
        "cpu_seconds: of the process meanwhile; publishing_thread_cpu_seconds: what of it went into publishing",
        **times,
        **compare_speeds(times),
    }


def compare_speeds(times: Record) -> Record:
    """Return the speed with publishing relative to the speed without, of the medians and of every pair."""
    medians = {what: {name: statistics.median(runs) for name, runs in times[what].items()} for what in SPEEDS}
    ratios = {what: seconds["alone"] / seconds["publishing"] for what, seconds in medians.items()}
    pairs = {
        what: [alone / ours for ours, alone in zip(times[what]["publishing"], times[what]["alone"], strict=True)]
        for what in SPEEDS
    }
    # Goals are upper limits, so they use the inverse ratios.
    goals = [
        make_goal(f"{name}: speed without publishing / with it", 1 / ratios[what], 1 / SPEED)
        for what, name in SPEEDS.items()
    ]
    return {"median_seconds": medians, "pair_ratios": pairs, "ratios": ratios, "goals": goals}


def run_publishing(setting: Setting) -> Record:
    """Train a run that publishes to a Hub with failures.

    Each run has a new Hub: nothing would be sent to a Hub that has the same weights from an earlier run.

    Raises:
        RuntimeError: unless each stage arrives exactly once.
    """
    repo_id = f"{USER}/run"
    with LocalHub() as hub:
        for failure in FAILURES:
            hub.fail(*failure)
        record = run_once(setting, repo_id, {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token})
    arrived = [branch for branch, _ in hub.repos[repo_id].messages]
    unused = [failure[0].pattern for failure in hub.failures if failure[2]]
    if arrived != [*record["stages"], "main"] or unused:
        raise RuntimeError(f"commits to {arrived}, expected each stage once and main; failures left: {unused}")
    return record


def run_once(setting: Setting, repo_id: str | None = None, online: dict[str, str] | None = None) -> Record:
    """Train a run in a new process; it publishes if a repository is given."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **online} if online else {}
    if setting.threads:
        environment["OMP_NUM_THREADS"] = str(setting.threads)
    with tempfile.TemporaryDirectory(dir=setting.folder) as directory:
        settings = {"scale": setting.scale, "output": f"{directory}/run", "repo_id": repo_id}
        return launch("publishing.train", settings, seconds=PATIENCE, environment=environment)[0]


def train(scale: str, output: str, repo_id: str | None) -> Record:
    """Train the recipe, in the new process, and return its seconds and its CPU seconds."""
    config = RunConfig.from_yaml(RECIPE, {"training.disable_tqdm": True, **CHANGES[scale]})
    if scale == "tiny":
        schedule = config.read_schedule()
        config = config.with_schedule(schedule.with_shares([TINY_TOKENS] * len(schedule.structures)))
    publishing = PublishCallback(repo_id) if repo_id else None
    trainer = build_trainer(config, output, callbacks=[publishing] if publishing else None)
    with time_publishing() as thread_seconds:
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
def time_publishing() -> Iterator[list[float]]:
    """Yield a list of the CPU seconds of each stage that is published within the block."""
    seconds: list[float] = []
    publish = Publisher.publish

    def publish_and_time(self: Publisher, number: int) -> object:
        began = time.thread_time()
        try:
            return publish(self, number)
        finally:
            seconds.append(time.thread_time() - began)

    Publisher.publish = publish_and_time  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Publisher.publish = publish  # type: ignore[method-assign]


def build_table(record: Record) -> Table:
    """Return the medians of what was timed."""
    table = Table("median s", "publishing", "alone", title="publishing")
    for what in TIMES:
        table.add_row(what, *(f"{statistics.median(record[what][name]):.2f}" for name in ("publishing", "alone")))
    lines = []
    for what, name in SPEEDS.items():
        pairs = ", ".join(f"{ratio:.3f}" for ratio in record["pair_ratios"][what])
        lines.append(f"speed of {name}, publishing / alone: {record['ratios'][what]:.3f} (pairs: {pairs})")
    table.caption = "\n".join(lines)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser("publishing", __doc__)
    parser.add_argument("--threads", type=int, help="threads of a run (default: torch's choice)")
    options = read_options(parser, "publishing", arguments, repetitions={"full": 4, "tiny": 4})
    command = f"python benchmarks/publishing.py --scale {options.scale} --repetitions {options.repetitions}"
    command += f" --threads {options.threads}" if options.threads else ""
    record: Record = describe_circumstances(options.scale, options.repetitions, command)
    with tempfile.TemporaryDirectory(prefix="publishing-benchmark-", dir=options.workdir) as directory:
        record |= measure(Setting(options.scale, Path(directory), options.threads), options.repetitions)
    write_text(options.output, to_json(record))
    console = Console()
    console.print(build_table(record))
    console.print(build_goals_table(record))
    console.print(f"record: {options.output}")


if __name__ == "__main__":
    main()
