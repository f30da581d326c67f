"""`Comparison`: the measurements of every run of an experiment and the compute ledger, as one JSON file."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..dims import ModelDims
from ..errors import RunError
from ..io.files import write_text
from ..io.record import Record
from ..io.serialization import Json, hash_json, to_json, to_plain
from ..report.summary import compute_marginal_utility
from ..runs.records import compute_perplexity
from ..schedule import GrowthSchedule

#: A learning-rate schedule is finished if it ends at this share of its peak or below: 0, or a tenth as in the paper.
FINISHED_RATE = 0.1
#: A list of numbers in indented JSON.
_NUMBERS = re.compile(r"\[\n\s+([-+.\deE,\s]+?)\n\s+\]")


@dataclass(frozen=True)
class StageResult(Record, error=RunError):
    """One stage of a run; losses are held-out losses in nats per token.

    Args:
        name: name of the stage's directory.
        eval_loss: loss at the end of the stage.
        eval_loss_after_growth: loss right after growth, before training; None for the initial model.
        devices: number of devices that shared the work.
    """

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
class Curve(Record, error=RunError):
    """Held-out losses during a run: four tuples of the same length, one entry per evaluation.

    Args:
        stages: number of the stage; a loss right after growth belongs to the new stage.
        flops: training FLOPs so far.
        seconds: training time so far; all steps of a stage are taken to last equally long.
        losses: held-out loss in nats per token.
    """

    stages: tuple[int, ...]
    flops: tuple[float, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class RunResult(Record, error=RunError):
    """A finished run; its tokens, FLOPs and seconds cover all stages.

    Args:
        budget: multiple of the experiment's budget.
        seed: seed of weights, data order and growth.
        stages: results by stage, the initial model's first.
        inherited: number of stages taken over from a shared prefix, which cost nothing again.
        end_rate: learning rate that the run's last schedule ends with, as a share of its peak; None if unknown.
        optimizer_flops: FLOPs of the optimizer's steps; None if unknown.
        passes: how often the run has read the training data, on average; None if unknown.
    """

    arm: str
    budget: float
    seed: int
    schedule: GrowthSchedule
    stages: tuple[StageResult, ...]
    curve: Curve
    inherited: int = 0
    end_rate: float | None = None
    optimizer_flops: float | None = None
    passes: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the run is known to end with a finished learning-rate schedule."""
        return self.end_rate is not None and self.end_rate <= FINISHED_RATE

    @property
    def total_flops(self) -> float:
        """Training FLOPs including the optimizer's, if those are known."""
        return self.flops + (self.optimizer_flops or 0.0)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model at the end."""
        return self.stages[-1].parameters

    @property
    def tokens_per_parameter(self) -> float:
        """Tokens of all stages per parameter of the model at the end."""
        return self.tokens / self.parameters

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def eval_loss(self) -> float:
        """Held-out loss at the end of the run."""
        return self.stages[-1].eval_loss

    @property
    def marginal_utility(self) -> float | None:
        """Eq. 2 of the paper, in perplexity per device hour; None without growth, or if a stage took no time."""
        hours = [stage.seconds * stage.devices / 3600 for stage in self.stages[1:]]
        if not hours or not min(hours) > 0:
            return None
        return compute_marginal_utility([compute_perplexity(stage.eval_loss) for stage in self.stages], hours)


@dataclass(frozen=True)
class Cost(Record, error=RunError):
    """One entry of the compute ledger.

    Args:
        what: `runs`, `trunks` (first stages or steps shared by several runs) or `probes`.
        count: number of them.
        tokens, flops, seconds: training in total; seconds are summed over devices.
        optimizer_flops: FLOPs of the optimizer's steps, which `flops` leaves out; 0 if unknown.
    """

    what: str
    count: int
    tokens: int
    flops: float
    seconds: float
    optimizer_flops: float = 0.0

    @classmethod
    def sum(cls, what: str, costs: Sequence[Cost]) -> Cost:
        """Return the sum of some entries as one entry."""
        numbers = ("count", "tokens", "flops", "seconds", "optimizer_flops")
        return cls(what, *(sum(getattr(cost, name) for cost in costs) for name in numbers))


@dataclass(frozen=True)
class Comparison(Record, error=RunError, if_missing="`slop compare` writes one"):
    """The measurements of an experiment at one scale.

    Args:
        name: name of the experiment's file, without its suffix.
        scale: name of the scale.
        title, about: title and description of the experiment.
        equal: unit of the budget that all runs share, `flops` or `tokens`.
        budget: budget in that unit.
        arms: description of each arm by name, in the order of figures and tables.
        runs: finished runs, in the order of arms, budgets and seeds.
        ledger: compute spent, everything counted once.
        reference: name of the arm whose final loss the other arms should reach.
        missing, diverged: names of unfinished runs, and of runs that diverged.
        printed: numbers printed in the paper, by arm and column.
        settings: `run`, the config shared by all arms, and `arms`, the training arguments that each arm changes.
        versions: versions of slop_hf, transformers and torch.
        device: hardware that the runs were trained on.
    """

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
    settings: dict[str, Json] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    device: str = ""

    def runs_of(self, arm: str, budget: float = 1.0) -> list[RunResult]:
        """Return the finished runs of an arm at one budget, in the order of their seeds."""
        return sorted((run for run in self.runs if (run.arm, run.budget) == (arm, budget)), key=lambda run: run.seed)

    def of(self, arm: str, budget: float = 1.0) -> list[RunResult]:
        """Return `runs_of`, under its earlier name."""
        warnings.warn("Comparison.of is now Comparison.runs_of", DeprecationWarning, stacklevel=2)
        return self.runs_of(arm, budget)

    def budgets(self, arm: str) -> list[float]:
        """Return the budgets at which an arm has finished runs, smallest first."""
        return sorted({run.budget for run in self.runs if run.arm == arm})

    @property
    def fingerprint(self) -> str:
        """A hash of the whole record; figures carry it, so that outdated ones can be recognized."""
        return hash_json(to_plain(self))

    def save(self, path: str | Path) -> Path:
        """Write the record as JSON, atomically, with each list of numbers on one line, and return the path."""
        return write_text(path, _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", to_json(self)))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Read a record from JSON.

        Raises:
            RunError: if the file does not exist or does not hold a comparison.
        """
        return cls.from_json(path)
