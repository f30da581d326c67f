"""Facts that records of earlier releases lack: ends of learning-rate schedules, and FLOPs of optimizers."""

from __future__ import annotations

import dataclasses

from ..errors import RunError, SlopError
from ..io.serialization import parse
from ..training.config import RunConfig, preview_rates
from .comparison import Comparison
from .jobs import is_trained_with_adamw


def add_missing_facts(comparison: Comparison) -> Comparison:
    """Return a comparison whose runs say how their learning rates end and what their optimizer costs.

    Runs that say so already stay as they are, and so do runs whose settings the record does not hold.

    Raises:
        RunError: if the settings are not those of a run.
    """
    if "run" not in comparison.settings or all(run.end_rate is not None for run in comparison.runs):
        return comparison
    shared = parse(RunConfig, comparison.settings["run"], where=f"the record of {comparison.name}", error=RunError)
    changes = comparison.settings.get("arms")
    completed: dict[tuple[str, float], tuple[float, float | None]] = {}
    runs = []
    for run in comparison.runs:
        if run.end_rate is None:
            training = changes.get(run.arm, {}) if isinstance(changes, dict) else {}
            config = dataclasses.replace(shared, schedule=run.schedule, training={**shared.training, **training})
            key = run.arm, run.budget
            if key not in completed and (facts := _read_facts(config)) is not None:
                completed[key] = facts
            if key in completed:
                run = dataclasses.replace(run, end_rate=completed[key][0], optimizer_flops=completed[key][1])
        runs.append(run)
    return dataclasses.replace(comparison, runs=tuple(runs))


def _read_facts(config: RunConfig) -> tuple[float, float | None] | None:
    """Return the end of a run's learning rate as a share of the peak, and its optimizer's FLOPs; None if unknown."""
    try:
        spans, _, end_rate = preview_rates(config)
    except SlopError:
        return None
    flops = sum(span.count_optimizer_flops(span.end_step) for span in spans)
    return round(end_rate, 6), flops if is_trained_with_adamw(config) else None
