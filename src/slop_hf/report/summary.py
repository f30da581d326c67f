"""`RunSummary`: the costs and results of a run in one value, a row of the paper's Table 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..dims import ModelDims
from ..errors import RunError
from ..io.record import Record
from ..runs.directory import RunDirectory
from ..runs.records import StageRecord
from ..runs.snapshot import RunSnapshot


@dataclass(frozen=True)
class RunSummary(Record, error=RunError):
    """Costs and results of a run.

    For an unfinished run, measurements cover the finished stages; `initial`, `target` and `sequence` are planned.

    Args:
        name: name of the run directory.
        initial: initial structure.
        target: structure at the end of the schedule.
        sequence: order of growth, such as `l-f-h`; empty for training from scratch.
        delta_params: the planner's score Π Δparams of the schedule; None if the schedule has no such score.
        finished: whether every stage of the schedule has finished.
        stages: number of finished stages, including the initial one.
        planned_stages: number of stages of the schedule, including the initial one.
        parameters: parameter count of the target model; None for an unfinished run.
        perplexity: held-out perplexity after the last stage, `exp(eval_loss)`.
        eval_loss: held-out loss after the last stage, in nats per token.
        stage_seconds: wall-clock seconds of training of each stage, the initial one first.
        seconds: sum of `stage_seconds`.
        device_hours: `seconds * devices / 3600`, summed over the stages.
        tokens: training tokens of all stages.
        flops: training FLOPs of all stages (`cost.flops.count_flops_per_token`).
        marginal_utility: Eq. 2, in perplexity per device hour; None without growth, or if the perplexity or the time
            of a stage is missing.
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


def summarise(run: RunDirectory, *, name: str | None = None) -> RunSummary:
    """Summarise a run from its schedule and the records of its finished stages.

    Args:
        run: a run with at least one finished stage.
        name: name of the run in the summary; default: the name of its directory.

    Raises:
        RunError: if the directory is not a run, has no finished stage yet, or lacks a stage before a finished one.
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
        marginal_utility=_compute_run_utility(records),
    )


def describe_outcomes(summaries: Sequence[RunSummary]) -> list[str]:
    """Return a sentence for each grown run and the same target trained from scratch with the same FLOPs.

    Only finished runs with a held-out loss count; FLOPs may differ by 2%, as steps are whole.
    """
    finished = [summary for summary in summaries if summary.finished and summary.eval_loss is not None]
    sentences = []
    for grown in (summary for summary in finished if summary.sequence):
        for scratch in (summary for summary in finished if not summary.sequence):
            if scratch.target != grown.target or not math.isclose(scratch.flops, grown.flops, rel_tol=0.02):
                continue
            sentences.append(
                f"held-out loss: grown {grown.eval_loss:.2f} ({grown.name}), from scratch {scratch.eval_loss:.2f} "
                f"({scratch.name}) at equal FLOPs ({grown.flops:.2e}), one run each"
            )
    return sentences


def compute_marginal_utility(perplexities: Sequence[float], hours: Sequence[float]) -> float:
    r"""Return the marginal utility of a schedule: the drop in perplexity per device hour, summed over growth stages.

    $$\sum_k \frac{ppl(M_k) - ppl(M_{k+1})}{\Delta t_k}$$

    A stage that raised the perplexity has a negative term; the paper assumes that every term is positive.
    The sum of ratios differs from total drop / total time: short stages weigh more.

    Args:
        perplexities: perplexity after training each structure, the initial one first, shape [stages + 1].
        hours: device hours of each growth stage, shape [stages].

    Returns:
        perplexity per device hour.

    Raises:
        RunError: if the shapes do not match, or if a stage took no time.

    Source: Eq. 2 of the SLOP paper.

    >>> compute_marginal_utility([40.0, 30.0, 32.0, 27.0], [2.0, 4.0, 5.0])  # 10/2 - 2/4 + 5/5
    5.5
    """
    if len(perplexities) != len(hours) + 1 or not hours:
        raise RunError(
            f"{len(perplexities)} perplexities do not fit {len(hours)} growth stages: "
            "give one for the initial model and one per growth stage, with at least one growth stage"
        )
    if not all(hour > 0 for hour in hours):
        raise RunError(f"hours must be positive, got {list(hours)}: a stage without training has no marginal utility")
    drops = (before - after for before, after in pairwise(perplexities))
    return sum(drop / hour for drop, hour in zip(drops, hours, strict=True))


def name_runs(runs: Sequence[RunDirectory | RunSnapshot]) -> list[str]:
    """Return a unique name for each run: its directory, preceded by as many parent directories as necessary.

    Raises:
        RunError: if a directory occurs twice.

    >>> name_runs([RunDirectory("a/slop"), RunDirectory("b/slop"), RunDirectory("b/scratch")])
    ['a/slop', 'b/slop', 'scratch']
    """
    paths = [run.path.resolve() for run in runs]
    if repeated := [str(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]:
        raise RunError(f"{', '.join(repeated)} given more than once; name each run directory once")
    return [_find_shortest_name(path, [other for other in paths if other != path]) for path in paths]


def _find_shortest_name(path: Path, others: Sequence[Path]) -> str:
    for depth in range(1, len(path.parts)):
        tail = path.parts[-depth:]
        if all(other.parts[-depth:] != tail for other in others):
            return "/".join(tail)
    return str(path)


def _compute_run_utility(records: Sequence[StageRecord]) -> float | None:
    hours = [record.device_hours for record in records[1:]]
    perplexities = [record.perplexity for record in records if record.perplexity is not None]
    is_measured = len(perplexities) == len(records) and all(map(math.isfinite, perplexities))
    return compute_marginal_utility(perplexities, hours) if hours and is_measured and min(hours) > 0 else None
