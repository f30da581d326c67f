"""`RunSummary`: a run in one value, a row of the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..dims import ModelDims
from ..errors import RunError
from ..io.serialization import to_json
from ..runs.directory import RunDirectory
from ..runs.records import StageRecord


@dataclass(frozen=True)
class RunSummary:
    """What a run cost and what it led to.

    Of an unfinished run, everything measured is that of its finished stages; the structures are the plan's.

    Args:
        name: the name of its directory.
        initial: structure at the beginning.
        target: structure at the end of the schedule.
        sequence: the order of growth, such as `l-f-h`; empty for training from scratch.
        delta_params: the product of parameter increments that the planner gave the schedule, if one did.
        finished: whether every stage of the schedule has finished.
        stages: finished stages, the initial one counted.
        planned_stages: stages of the schedule, the initial one counted.
        parameters: the target model's true number of parameters; None where the run has not come to it.
        perplexity: that of the last stage, `exp(eval_loss)`.
        eval_loss: held-out loss of the last stage, in nats a token.
        stage_seconds: wall-clock seconds of training of each stage, the initial one first.
        seconds: their sum.
        device_hours: `seconds * devices / 3600`, summed over the stages.
        tokens: training tokens of all stages.
        flops: training FLOPs of all stages (`cost.flops_per_token`).
        marginal_utility: Eq. 2 in perplexity a device hour; None without growth, or where a perplexity or a
            stage's time is missing.
    """

    name: str
    initial: ModelDims
    target: ModelDims
    sequence: str
    delta_params: float | None
    finished: bool
    stages: int
    planned_stages: int
    parameters: int | None
    perplexity: float | None
    eval_loss: float | None
    stage_seconds: tuple[float, ...]
    seconds: float
    device_hours: float
    tokens: int
    flops: float
    marginal_utility: float | None

    def to_json(self) -> str:
        """The summary as JSON text."""
        return to_json(self)


def summarise(run: RunDirectory, *, name: str | None = None) -> RunSummary:
    """Sum up a run from its schedule and the records of its finished stages.

    Args:
        run: the run.
        name: what to call it; default, the name of its directory.

    Raises:
        RunError: where there is no run, or where it has no finished stage yet.
    """
    schedule, records = run.schedule, run.records()
    if not records:
        raise RunError(
            f"{run.path} has no finished stage to report on: expected {schedule.stage_name(0)}; "
            "let `slop train` finish its first stage, or leave this run out"
        )
    last, finished = records[-1], len(records) == len(schedule.structures)
    return RunSummary(
        name=name or run.path.resolve().name,
        initial=schedule.initial,
        target=schedule.target,
        sequence=schedule.sequence,
        delta_params=schedule.scores.get("delta_params"),
        finished=finished,
        stages=len(records),
        planned_stages=len(schedule.structures),
        parameters=last.parameters if finished else None,
        perplexity=last.perplexity,
        eval_loss=last.eval_loss,
        stage_seconds=tuple(record.seconds for record in records),
        seconds=sum(record.seconds for record in records),
        device_hours=sum(record.device_hours for record in records),
        tokens=last.total_tokens,
        flops=last.total_flops,
        marginal_utility=_utility_of(records),
    )


def marginal_utility(perplexities: Sequence[float], hours: Sequence[float]) -> float:
    r"""Marginal utility of a schedule: what each stage took off the perplexity for an hour of its training.

    $$\sum_k \frac{ppl(M_k) - ppl(M_{k+1})}{\Delta t_k}$$

    A stage that raised the perplexity counts with a negative sign; the paper takes every term to be positive.
    As a sum of ratios it is not the total reduction over the total time, and short stages weigh more.

    Args:
        perplexities: perplexity after training of each structure, the initial one first, shape [stages + 1].
        hours: device hours of each growth stage, shape [stages].

    Returns:
        perplexity a device hour.

    Raises:
        RunError: where the shapes do not fit, or where a stage took no time.

    Source: Eq. 2 of the SLOP paper.

    >>> marginal_utility([40.0, 30.0, 32.0, 27.0], [2.0, 4.0, 5.0])  # 10/2 - 2/4 + 5/5
    5.5
    """
    if len(perplexities) != len(hours) + 1 or not hours:
        raise RunError(
            f"{len(perplexities)} perplexities do not fit {len(hours)} growth stages: "
            "give one for the initial model and one for each of the stages, of which there must be one at least"
        )
    if not all(hour > 0 for hour in hours):
        raise RunError(f"hours must be positive, got {list(hours)}: a stage without training has no marginal utility")
    drops = (before - after for before, after in pairwise(perplexities))
    return sum(drop / hour for drop, hour in zip(drops, hours, strict=True))


def run_names(runs: Sequence[RunDirectory]) -> list[str]:
    """A name for each run: that of its directory, with as many parents before it as tell it from the others.

    Raises:
        RunError: where a directory is given twice.

    >>> run_names([RunDirectory("a/slop"), RunDirectory("b/slop"), RunDirectory("b/scratch")])
    ['a/slop', 'b/slop', 'scratch']
    """
    paths = [run.path.resolve() for run in runs]
    if twice := [str(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        raise RunError(f"{', '.join(twice)} given more than once; name each run directory once")
    return [_shortest_name(path, [other for other in paths if other != path]) for path in paths]


def _shortest_name(path: Path, others: Sequence[Path]) -> str:
    for depth in range(1, len(path.parts)):
        tail = path.parts[-depth:]
        if all(other.parts[-depth:] != tail for other in others):
            return "/".join(tail)
    return str(path)


def _utility_of(records: Sequence[StageRecord]) -> float | None:
    hours = [record.device_hours for record in records[1:]]
    perplexities = [record.perplexity for record in records if record.perplexity is not None]
    measured = len(perplexities) == len(records) and all(map(math.isfinite, perplexities))
    return marginal_utility(perplexities, hours) if hours and measured and min(hours) > 0 else None
