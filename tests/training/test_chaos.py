"""SIGKILL at any moment of a run under ZeRO-3 or FSDP2 loses at most the steps since the last checkpoint."""

import json
import random
import time
from pathlib import Path

import pytest
from launching import ForkedLaunch, largest_difference
from training_runs import BLOCK, SCHEDULE

from slop_hf import GrowthSchedule, RunDirectory
from slop_hf.io.serialization import to_plain

pytestmark = pytest.mark.slow

BLOCKS_PER_STEP = 12  # one, two, three and four ranks can share it
STEPS = 15
SAVE_STEPS = 4
#: Runs under each strategy.
RUNS = {"zero3": 5, "fsdp2": 2}
#: Kills of each run: at any event, and within two seconds of the end of a stage.
KILLS, KILLS_AT_ENDS = 4, 2
#: Launches of the last run after its kills; the other runs keep two ranks and their strategy.
OTHERS = {
    "zero3": [("zero3", 3), ("zero3", 1), ("plain", 1), ("ddp", 2), ("zero3", 2), ("zero3", 3)],
    "fsdp2": [("zero3", 3), ("fsdp2", 1), ("plain", 1), ("fsdp2", 3), ("zero3", 2), ("ddp", 2)],
}
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


def start(kind: str, ranks: int, schedule: Path, output: Path) -> ForkedLaunch:
    own = {"schedule": schedule, "output": output, "batch": BLOCKS_PER_STEP // ranks}
    return ForkedLaunch(kind, ranks, **SETTINGS, **own, record=output.with_suffix(".calls"))


def events(output: Path) -> list[Path]:
    """Return the paths that a run writes, in order: schedule, checkpoints and stages."""
    paths = [output / "schedule.yaml"]
    for number, name in enumerate(SCHEDULE.stage_names):
        running, first = output / f"{name}.running", number * STEPS
        steps = range(first + 1, first + STEPS)
        paths += [running / f"checkpoint-{step}" for step in steps if step % SAVE_STEPS == 0]
        paths.append(output / name)
    return paths


def wait_for(event: int, output: Path, launch: ForkedLaunch) -> None:
    """Wait for an event or a later one, since old checkpoints are removed."""
    while launch.is_alive and not any(path.exists() for path in events(output)[event:]):
        time.sleep(0.005)


def choose_moments(dice: random.Random, output: Path, seconds: float) -> list[tuple[int, float]]:
    """Choose the kills of a run, in order: events, and seconds to wait after each.

    A stage's last steps take less time than its boundary, so its end is approached from the last checkpoint, and from
    the moment at which its directory appears.
    """
    paths = events(output)
    ends = [number for number, path in enumerate(paths) if path.parent == output and number]
    near = [(end - dice.randrange(2), min(2.0, 4 * seconds) * dice.random() ** 3) for end in dice.sample(ends, k=2)]
    others = dice.sample(range(len(paths) - 1), k=KILLS)
    return sorted([*near, *((event, seconds * dice.random() ** 8) for event in others)])


def describe(output: Path) -> str:
    """Describe where a run was killed, from the files that it left."""
    run = RunDirectory(output)
    if not run.exists:
        return "before the run had begun"
    writing = [path.name for path in output.rglob("*.writing")]
    steps = [path.name for path in output.rglob("checkpoint-*")]
    return f"{run.finished_stages} stages finished, {sorted(steps)}" + (f", writing {writing}" if writing else "")


def read_calls(output: Path) -> dict[str, list[str]]:
    """Return, for each stage, whether each call of a callback was a repeated one."""
    calls: dict[str, list[str]] = {}
    for line in output.with_suffix(".calls").read_text().splitlines():
        stage, is_repeated = line.split()
        calls.setdefault(stage, []).append(is_repeated)
    return calls


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", RUNS)
def test_runs_that_are_killed_end_as_if_they_were_not(strategy, schedule, tmp_path, capfd):
    """Six times each."""
    pytest.importorskip("deepspeed")
    whole = tmp_path / "whole"
    launch = start(strategy, 2, schedule, whole)
    wait_for(0, whole, launch)
    began = time.perf_counter()
    wait_for(len(events(whole)) - 1, whole, launch)
    between = (time.perf_counter() - began) / (len(events(whole)) - 1)
    assert launch.wait() == 0, launch.text
    dice, kills = random.Random(0), 0
    for number in range(RUNS[strategy]):
        is_last = number == RUNS[strategy] - 1
        output = tmp_path / f"killed-{number}"
        others = iter(OTHERS[strategy] if is_last else [])
        for event, seconds in choose_moments(dice, output, between):
            kind, ranks = next(others, (strategy, 2))
            launch = start(kind, ranks, schedule, output)
            wait_for(event, output, launch)
            time.sleep(seconds)
            kills += launch.is_alive
            launch.kill()
            assert launch.is_killed or launch.wait() == 0, launch.text
            with capfd.disabled():
                print(f"\n{number}: {kind} on {ranks}, {describe(output)}", end="", flush=True)
        launch = start(strategy, 2, schedule, output)
        assert launch.wait() == 0, f"{describe(output)}\n{launch.text}"

        difference = largest_difference(whole, output)
        # Another number of ranks draws other dropout masks after the checkpoint, so weights end only close by.
        assert difference < 0.1 if is_last else difference == 0.0, "as many ranks end with the same bits"
        names = {path.name for path in output.iterdir()} - {".lock"}
        assert names == {"schedule.yaml", "run.json", "settings.json", *SCHEDULE.stage_names}, "nothing is left over"
        assert not list(output.rglob(".*ing"))
        run = RunDirectory(output)
        assert [bool(run.optimizer_files(stage)) for stage in range(4)] == [False, False, False, True]
        calls = read_calls(output)
        assert list(calls) == ["0", "1", "2", "3"]
        assert all(set(repeated[1:]) <= {"True"} for repeated in calls.values()), calls
    assert kills >= 5 * RUNS[strategy]
