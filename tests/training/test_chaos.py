"""SIGKILL at any moment of a run under ZeRO-3 loses at most the steps since the last checkpoint."""

import json
import random
import time
from pathlib import Path

import pytest
from launching import kill, largest_difference, launch, start
from training_runs import BLOCK, SCHEDULE

from slop_hf import GrowthSchedule, RunDirectory
from slop_hf.io.serialization import to_plain

BLOCKS_PER_STEP = 12  # one, two, three and four ranks can share it
STEPS = 15
SAVE_STEPS = 4
RUNS = 20
#: Launches that resume a killed run with other than its two ranks, by number of the run.
OTHERS = {4: ("zero3", 3), 9: ("zero3", 1), 14: ("plain", 1), 19: ("ddp", 2)}
SETTINGS = {"arguments": {"learning_rate": 1e-3, "save_steps": SAVE_STEPS}, "dropout": 0.1}


@pytest.fixture(scope="module")
def schedule(tmp_path_factory):
    """The small run's schedule, with fifteen steps per stage."""
    content = to_plain(SCHEDULE)
    content["initial_tokens"] = STEPS * BLOCKS_PER_STEP * BLOCK
    for stage in content["stages"]:
        stage["tokens"] = content["initial_tokens"]
    path = tmp_path_factory.mktemp("schedule") / "schedule.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    assert len(GrowthSchedule.from_yaml(path).stages) == 3
    return path


def settings(schedule: Path, output: Path, ranks: int) -> dict:
    return {**SETTINGS, "schedule": schedule, "output": output, "batch": BLOCKS_PER_STEP // ranks}


def events(output: Path) -> list[Path]:
    """Return the paths that a run writes, in order: schedule, checkpoints and stages."""
    paths = [output / "schedule.yaml"]
    for number, name in enumerate(SCHEDULE.stage_names):
        running, first = output / f"{name}.running", number * STEPS
        steps = range(first + 1, first + STEPS)
        paths += [running / f"checkpoint-{step}" for step in steps if step % SAVE_STEPS == 0]
        paths.append(output / name)
    return paths


def wait_for(event: int, output: Path, process) -> None:
    """Wait for an event or a later one, since old checkpoints are removed."""
    while process.poll() is None and not any(path.exists() for path in events(output)[event:]):
        time.sleep(0.01)


def where(output: Path) -> str:
    """Describe where a run was killed, from the files that it left."""
    run = RunDirectory(output)
    if not run.exists:
        return "before the run had begun"
    writing = [path.name for path in output.rglob("*.writing")]
    steps = [path.name for path in output.rglob("checkpoint-*")]
    return f"{run.finished_stages} stages finished, {sorted(steps)}" + (f", writing {writing}" if writing else "")


@pytest.mark.slow
@pytest.mark.deepspeed
def test_twenty_kills(schedule, tmp_path, capfd):
    pytest.importorskip("deepspeed")
    whole = tmp_path / "whole"
    process = start("zero3", 2, **settings(schedule, whole, 2))
    wait_for(0, whole, process)
    began = time.perf_counter()
    wait_for(len(events(whole)) - 1, whole, process)
    between = (time.perf_counter() - began) / (len(events(whole)) - 1)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text[-4000:]
    dice = random.Random(0)
    outcomes = []
    for number in range(RUNS):
        output = tmp_path / f"killed-{number}"
        process = start("zero3", 2, **settings(schedule, output, 2))
        wait_for(dice.randrange(len(events(output)) - 1), output, process)
        time.sleep(between * dice.random() ** 8)  # often at once: a stage's steps take less time than its boundary
        killed = process.poll() is None
        kill(process)
        process.communicate()
        left = where(output)
        kind, ranks = OTHERS.get(number, ("zero3", 2))
        ended = launch(kind, ranks, **settings(schedule, output, ranks))
        assert ended.code == 0, f"run {number}, killed with {left}:\n{ended.text[-4000:]}"
        difference = largest_difference(whole, output)
        outcomes.append((killed, left, kind, ranks, difference))
        with capfd.disabled():
            print(
                f"\n{number}: killed {killed} with {left}; resumed by {kind} on {ranks}: {difference:.2g}", flush=True
            )
    same = [outcome for number, outcome in enumerate(outcomes) if number not in OTHERS]
    assert all(difference == 0.0 for *_, difference in same), "as many ranks end with the same bits"
    # Another number of ranks draws other dropout masks after the checkpoint, so weights end only close by.
    assert all(difference < 0.1 for *_, difference in outcomes)
    assert sum(killed for killed, *_ in outcomes) >= 15
