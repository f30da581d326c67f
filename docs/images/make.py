"""Draws the pictures of README and docs that are out of date: `make images`, or `python docs/images/make.py`.

Each picture is stored with a digest of what it shows: the data, and the code that draws it. `--check` compares them.
The figures in `results/` belong to `benchmarks/results.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import axis_maps
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from slop_hf import ConfigSpace, ModelDims, SlopPlanner
from slop_hf.baselines import Arm, compare_at_equal_flops
from slop_hf.baselines.comparison import forecast_final_loss
from slop_hf.errors import RunError
from slop_hf.io.serialization import parse, read_json, to_json, to_plain
from slop_hf.report.drawing import read_source
from slop_hf.report.figures import draw_run_losses
from slop_hf.report.plan_figure import draw_plan
from slop_hf.runs.directory import RunDirectory
from slop_hf.runs.records import StageRecord
from slop_hf.runs.snapshot import RunSnapshot
from slop_hf.schedule import GrowthSchedule

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEMO = HERE / "demo.json"
DRAWING = "src/slop_hf/report/drawing.py"


@dataclass(frozen=True)
class Picture:
    """A picture.

    Args:
        draw: writes it to a path.
        files: files that it is drawn by or from, relative to the root of the repository.
        read: returns the other data that it shows, as text.
    """

    draw: Callable[[Path], object]
    files: Sequence[str]
    read: Callable[[], str] = str

    @property
    def digest(self) -> str:
        """A digest of everything that the picture depends on."""
        texts = [(ROOT / file).read_text(encoding="utf-8") for file in self.files]
        return hashlib.sha256("\0".join([*texts, self.read()]).encode()).hexdigest()


def plan_example() -> tuple[list[GrowthSchedule], list[Arm]]:
    """Return the schedules of the example in docs/planning.md, and the best one with its arms."""
    targets = ("2816,7680,8,22", "1280,3584,40,10", "1536,4096,32,12", "2560,6912,10,20")
    space = ConfigSpace(targets=list(map(ModelDims.parse, targets)))
    schedules = SlopPlanner(ModelDims.parse("768,2048,6,6"), space).plan(top_k=5, tokens=65e9)
    return schedules, compare_at_equal_flops(schedules[0])


def draw_plan_example(path: Path) -> None:
    """Draw the schedules of the example and their arms."""
    schedules, (_, *arms) = plan_example()
    losses = [*map(forecast_final_loss, schedules), *(arm.loss for arm in arms)]
    draw_plan(schedules, [(arm.name, arm.schedule) for arm in arms], losses=losses, path=path)


def read_demo() -> list[RunSnapshot]:
    """Return the two runs of the demo, as `record_demo` stored them."""
    runs = read_json(DEMO, if_missing="make it by --demo", error=RunError)
    return [
        RunSnapshot(
            path=Path(name),
            schedule=parse(GrowthSchedule, run["schedule"], where=str(DEMO)),
            facts=None,
            records=tuple(parse(StageRecord, record, where=str(DEMO)) for record in run["records"]),
            evaluations=(),
            history=tuple(run["history"]),
        )
        for name, run in runs.items()
    ]


def record_demo(directory: Path) -> None:
    """Store what the picture of the demo shows of `make demo`: schedules, stage records, and the losses of the log."""
    keys = ("step", "stage", "tokens", "train_flops", "loss", "eval_loss")
    content = {}
    for name in ("slop", "from-scratch"):
        run = RunSnapshot.read(RunDirectory(directory / name))
        history = [
            {key: entry[key] for key in keys if key in entry} for entry in run.history if "train_flops" in entry
        ]
        content[name] = to_plain({"schedule": run.schedule, "records": run.records, "history": history})
    DEMO.write_text(to_json(content), encoding="utf-8")


PICTURES = {
    "plan.png": Picture(
        draw_plan_example,
        ("src/slop_hf/report/plan_figure.py", DRAWING),
        lambda: to_json(to_plain(plan_example())),
    ),
    "demo_loss.png": Picture(
        lambda path: draw_run_losses(read_demo(), path),
        ("docs/images/demo.json", "src/slop_hf/report/figures.py", DRAWING),
    ),
    "axis_maps.png": Picture(axis_maps.draw, ("docs/images/axis_maps.py",), axis_maps.list_sources),
}


def list_outdated() -> list[str]:
    """Return the names of the pictures that are missing, or older than what they show."""
    return [name for name, picture in PICTURES.items() if read_source(HERE / name) != picture.digest]


def make(name: str) -> None:
    """Draw a picture, and store its digest in it."""
    picture, path = PICTURES[name], HERE / name
    picture.draw(path)
    info = PngInfo()
    info.add_text("Source", picture.digest)
    with Image.open(path) as image:
        image.load()
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, pnginfo=info, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw or check the pictures; return the exit code, 1 if `--check` finds one out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a picture is out of date")
    parser.add_argument("--demo", type=Path, metavar="RUNS", help="first take the runs of `make demo` from runs/demo")
    options = parser.parse_args(arguments)
    if options.demo is not None:
        record_demo(options.demo)
    outdated = list_outdated()
    for name in outdated:
        if not options.check:
            make(name)
        print(f"docs/images/{name} " + ("is out of date; run `make images`" if options.check else "drawn"))
    return int(options.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
