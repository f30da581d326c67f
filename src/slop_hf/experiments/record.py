"""`Comparison`: what was measured of each run of an experiment, and the ledger of what it cost, as one JSON file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..dims import ModelDims
from ..errors import RunError
from ..records import RunDirectory, StageRecord, perplexity
from ..report.summary import marginal_utility
from ..schedule import GrowthSchedule
from ..serialization import digest, parse, plain, read_json, to_json, versions, write_text

if TYPE_CHECKING:  # a record is read, and figures are drawn, without torch
    from .arms import ArmRun
    from .config import Experiment

HELD_OUT = "eval_loss"
#: Where a comparison looks for probes, and the name of their reports.
PROBES, PROBE_FILE = "probes", "probe.json"
#: Digits of measured losses and seconds in the record: below them is noise.
_DIGITS = 6


@dataclass(frozen=True)
class StageResult:
    """One stage of a run; losses are held-out, in nats a token.

    Args:
        name: of its directory.
        dims: its structure.
        parameters: of the model.
        tokens, flops, seconds: of its training.
        eval_loss: at its end.
        eval_loss_after_growth: right after the growth, before training; None for the initial model.
        devices: that shared the work.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    dims: ModelDims
    parameters: int
    tokens: int
    flops: float
    seconds: float
    eval_loss: float
    eval_loss_after_growth: float | None = None
    devices: int = 1


@dataclass(frozen=True)
class Curve:
    """Held-out loss in the course of a run; entries of all four belong together.

    Args:
        stages: number of the stage; a loss right after a growth is the new stage's.
        flops: training FLOPs so far.
        seconds: of training so far, a stage's steps taken to last alike.
        losses: in nats a token.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    stages: tuple[int, ...]
    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to.

    Args:
        arm: its name.
        budget: multiple of the experiment's.
        seed: of weights, data order and growth.
        schedule: as run.
        stages: the initial one first.
        curve: held-out losses on the way.
        inherited: stages that another run had trained already, and that cost nothing again.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    arm: str
    budget: float
    seed: int
    schedule: GrowthSchedule
    stages: tuple[StageResult, ...]
    curve: Curve
    inherited: int = 0

    @property
    def tokens(self) -> int:
        """Of all stages, as everything below."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of training."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def eval_loss(self) -> float:
        """Held-out loss at the end."""
        return self.stages[-1].eval_loss

    @property
    def perplexity(self) -> float:
        """`exp(eval_loss)`."""
        return perplexity(self.eval_loss)

    @property
    def marginal_utility(self) -> float | None:
        """Eq. 2 of the paper, in perplexity a device hour; None without growth, or where a stage took no time."""
        hours = [stage.seconds * stage.devices / 3600 for stage in self.stages[1:]]
        if not hours or not min(hours) > 0:
            return None
        return marginal_utility([perplexity(stage.eval_loss) for stage in self.stages], hours)


@dataclass(frozen=True)
class Cost:
    """Something that was paid for.

    Args:
        what: `runs`, `trunks` (beginnings that several runs share) or `probes`.
        count: how many.
        tokens, flops, seconds: of training.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    what: str
    count: int
    tokens: int
    flops: float
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All that came out of an experiment at a scale.

    Args:
        name: of the experiment's file.
        scale: the scale's name.
        title, about: of the experiment.
        equal: what all runs of a budget spend alike, `flops` or `tokens`.
        budget: how much of it.
        arms: what is told of each, by name; figures and tables keep the order.
        runs: those that have finished, in the order of arms, budgets and seeds.
        ledger: what was paid, everything counted once.
        reference: the arm whose final loss the others are to reach.
        missing, diverged: names of runs that have not finished, and of those that never will.
        printed: what the paper prints of an arm, by arm and column.
        settings: the run that all arms have in common, and what each arm changes.
        versions: of slop_hf, transformers and torch.
        device: what it ran on.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: str
    scale: str
    title: str
    equal: str
    budget: float
    arms: dict[str, str]
    runs: tuple[RunResult, ...] = ()
    ledger: tuple[Cost, ...] = ()
    about: str = ""
    reference: str | None = None
    missing: tuple[str, ...] = ()
    diverged: tuple[str, ...] = ()
    printed: dict[str, dict[str, float]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def of(self, arm: str, budget: float = 1.0) -> list[RunResult]:
        """The finished runs of an arm at a budget, by seed."""
        found = [run for run in self.runs if run.arm == arm and run.budget == budget]
        return sorted(found, key=lambda run: run.seed)

    def budgets(self, arm: str) -> list[float]:
        """Those that an arm has finished runs at, ascending."""
        return sorted({run.budget for run in self.runs if run.arm == arm})

    @property
    def fingerprint(self) -> str:
        """A hash of all of it; figures carry it, so that a stale one is told from a fresh one."""
        return digest(plain(self))

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, aside and renamed."""
        return write_text(path, _compact(to_json(self)))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read one.

        Raises:
            RunError: where the file is none.
        """
        content = read_json(path, missing="`slop compare` writes one", error=RunError)
        return parse(cls, content, where=str(path), error=RunError)


def collect(experiment: Experiment, jobs: Sequence[ArmRun], root: Path, device: str = "") -> Comparison:
    """Read what the finished runs of an experiment came to.

    Args:
        experiment: that was run.
        jobs: its runs with their trunks, as `with_trunks` gives them.
        root: the comparison's directory; probes in `probes/` there are in the ledger.
        device: what it ran on.

    Raises:
        RunError: where a run has no held-out losses.
    """
    from .arms import diverged_places

    begun = [job for job in jobs if RunDirectory(root / job.place).exists]
    done = {job.place for job in begun if RunDirectory(root / job.place).is_finished}
    lost = diverged_places(jobs, root)
    ended = [job for job in begun if job.place in done | lost]
    runs, trunks = [job for job in ended if job.arm], [job for job in ended if not job.arm]
    ledger = cost_of("runs", runs, root), cost_of("trunks", trunks, root), _probed(root)
    left = [job for job in jobs if job.arm and job.place not in done]
    return Comparison(
        name=experiment.name,
        scale=experiment.scale,
        title=experiment.title,
        about=experiment.about,
        equal=experiment.sizes.equal,
        budget=experiment.sizes.budget,
        arms={name: arm.about for name, arm in experiment.arms.items()},
        runs=tuple(run_result(job, root) for job in runs if job.place in done),
        ledger=tuple(cost for cost in ledger if cost.count),
        reference=experiment.reference,
        missing=tuple(job.name for job in left if job.place not in lost),
        diverged=tuple(job.name for job in left if job.place in lost),
        printed=experiment.printed,
        settings={
            "run": plain(experiment.run),
            "arms": {name: arm.training for name, arm in experiment.arms.items() if arm.training},
        },
        versions=versions(),
        device=device,
    )


def cost_of(what: str, jobs: Sequence[ArmRun], root: Path) -> Cost:
    """What the finished stages of some runs have cost, those that they took over from a trunk left out.

    Args:
        what: to call them.
        jobs: the runs.
        root: the directory that their places are in.
    """
    paid = [record for job in jobs for record in RunDirectory(root / job.place).records()[_inherited(root, job) :]]
    return Cost(
        what,
        len(jobs),
        sum(record.tokens for record in paid),
        sum(record.flops for record in paid),
        round(sum(record.seconds * record.devices for record in paid), 1),
    )


def _probed(root: Path) -> Cost:
    """What the probes have cost whose directories lie in the comparison's `probes/`.

    Raises:
        RunError: for a report of one that is none.
    """
    costs = []
    for path in sorted((root / PROBES).rglob(PROBE_FILE)):
        report = read_json(path, missing="run `slop probe` again", error=RunError)
        if not isinstance(report, dict) or "cost" not in report:
            raise RunError(f"{path} is no report of `slop probe`: it does not say what it cost; move it out of there")
        costs.append(parse(Cost, report["cost"], where=f"{path}: cost", error=RunError))
    return Cost(
        "probes",
        sum(cost.count for cost in costs),
        sum(cost.tokens for cost in costs),
        sum(cost.flops for cost in costs),
        sum(cost.seconds for cost in costs),
    )


def _inherited(root: Path, job: ArmRun) -> int:
    """How many stages the run took over from a trunk when it began, whatever trunks there are now."""
    from .arms import TRUNK_FILE, beside

    path = beside(root, job, TRUNK_FILE)
    return RunDirectory(root / path.read_text().strip()).finished_stages if path.exists() else 0


def run_result(job: ArmRun, root: Path) -> RunResult:
    """What a finished run came to.

    Args:
        job: the run.
        root: the directory that its place is in.

    Raises:
        RunError: where it has no held-out losses.
    """
    run = RunDirectory(root / job.place)
    records = run.records()
    stages = tuple(_stage_result(run, record) for record in records)
    curve = _curve(run, records)
    return RunResult(job.arm, job.budget, job.seed, run.schedule, stages, curve, _inherited(root, job))


def _stage_result(run: RunDirectory, record: StageRecord) -> StageResult:
    if record.eval_loss is None:
        raise RunError(f"{run.path}: {record.name} has no held-out loss; set `held_out` in the scale's data")
    after_growth = record.eval_loss_after_growth
    return StageResult(
        name=record.name,
        dims=record.dims,
        parameters=record.parameters,
        tokens=record.tokens,
        flops=record.flops,
        seconds=round(record.seconds, 2),
        eval_loss=round(record.eval_loss, _DIGITS),
        eval_loss_after_growth=None if after_growth is None else round(after_growth, _DIGITS),
        devices=record.devices,
    )


def _curve(run: RunDirectory, records: Sequence[StageRecord]) -> Curve:
    """The held-out losses of a run's log; within a stage every step takes as long and as many FLOPs as the others."""
    stages, flops, seconds, losses = [], [], [], []
    for entry in run.history():
        if HELD_OUT not in entry or not math.isfinite(entry[HELD_OUT]):
            continue
        record = records[entry["stage"]]
        before = sum(one.seconds for one in records[: record.stage])
        done = (entry["tokens"] - record.first_token) / max(record.tokens, 1)
        stages.append(record.stage)
        flops.append(float(entry["train_flops"]))
        seconds.append(round(before + done * record.seconds, 2))
        losses.append(round(entry[HELD_OUT], _DIGITS))
    return Curve(tuple(stages), tuple(flops), tuple(seconds), tuple(losses))


def _compact(text: str) -> str:
    """JSON with lists of numbers on one line each."""
    lines, row = [], ""
    for line in text.splitlines():
        stripped = line.strip()
        number = stripped.rstrip(",").lstrip("-")[:1].isdigit()
        if row and (number or stripped.startswith("]")):
            row += (" " if number and not row.endswith("[") else "") + stripped
            if not number:
                lines.append(row)
                row = ""
        elif line.endswith("["):
            if row:
                lines.append(row)
            row = line
        else:
            if row:
                lines.append(row)
                row = ""
            lines.append(line)
    return "\n".join(lines) + "\n"
