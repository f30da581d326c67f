"""`Comparison`: what was measured of each run of an experiment, and the ledger of what it cost, as one JSON file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..dims import ModelDims
from ..errors import RunError
from ..io.files import write_text
from ..io.serialization import hash_json, parse, read_json, to_json, to_plain
from ..report.summary import marginal_utility
from ..runs.records import compute_perplexity
from ..schedule import GrowthSchedule

if TYPE_CHECKING:  # a record is read, and figures are drawn, without torch
    pass

EVAL_LOSS = "eval_loss"
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
        return compute_perplexity(self.eval_loss)

    @property
    def marginal_utility(self) -> float | None:
        """Eq. 2 of the paper, in perplexity a device hour; None without growth, or where a stage took no time."""
        hours = [stage.seconds * stage.devices / 3600 for stage in self.stages[1:]]
        if not hours or not min(hours) > 0:
            return None
        return marginal_utility([compute_perplexity(stage.eval_loss) for stage in self.stages], hours)


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
        return hash_json(to_plain(self))

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, aside and renamed."""
        return write_text(path, _compact(to_json(self)))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read one.

        Raises:
            RunError: where the file is none.
        """
        content = read_json(path, if_missing="`slop compare` writes one", error=RunError)
        return parse(cls, content, where=str(path), error=RunError)


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
