"""The settings of a run, as a report lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..io.serialization import Json
from ..io.units import format_count
from ..runs.directory import RunDirectory, RunFacts
from ..runs.launches import RunLaunches
from ..runs.records import StageRecord
from ..runs.settings import RunSettings


def list_settings(run: RunDirectory, records: Sequence[StageRecord]) -> dict[str, str]:
    """Return what a run was trained with, by headings such as `learning rate`; empty for a run without such files.

    Args:
        run: run directory.
        records: records of its finished stages, at least one.
    """
    facts, launches = RunFacts.load(run), (RunLaunches.load(run) or RunLaunches()).launches
    settings = (RunSettings.load(run) or RunSettings()).before(records[-1].global_step)
    lines: dict[str, str] = {}
    if launches:
        resumed = len(launches) - 1
        lines["begun"] = launches[0].time + (f", resumed {resumed} time{'s' * (resumed > 1)}" if resumed else "")
        lines["command"] = launches[0].command
        lines["data"] = "; ".join(launches[0].data)
    elif any(record.data for record in records):
        lines["data"] = ", ".join(dict.fromkeys(part.source for record in records for part in record.data))
    if settings:
        lines["learning rate"] = _describe_rate(settings)
    if facts is not None:
        lines["batch"] = _describe_batches(facts, len(records))
        lines["optimizer"] = f"{facts.optimizer or 'unknown'}; after a growth: {_describe_state(facts)}"
        lines["seed"] = "unknown" if facts.seed is None else str(facts.seed)
    if settings:
        devices = settings.get("devices") or records[-1].devices
        precision = next((name for name in ("bf16", "fp16") if settings.get(name)), "float32")
        lines["devices"] = f"{devices}, {settings.get('strategy', 'replicated')}, {precision}"
    return {heading: line for heading, line in lines.items() if line}


def _describe_rate(settings: Mapping[str, Json]) -> str:
    rates = settings.get("stage_learning_rates") or [settings.get("learning_rate")]
    peaks = ", ".join(f"{rate:.3g}" for rate in rates if isinstance(rate, (int, float)))
    warmup = settings.get("warmup_steps") or 0
    warm_up = f"{warmup:.0%}" if 0 < warmup < 1 else f"{warmup:g} steps"
    span = settings.get("lr_span", "stage")
    return f"{peaks}; {settings.get('lr_scheduler_type')} over each {span}, warm-up {warm_up}".replace(
        "each run", "the run"
    )


def _describe_batches(facts: RunFacts, stages: int) -> str:
    blocks = facts.batches(stages)
    counts = [format_count(count * facts.block_size) for count in dict.fromkeys(blocks)]
    unit = f"tokens per step, in blocks of {facts.block_size:,}"
    return f"{' → '.join(counts)} {unit}"


def _describe_state(facts: RunFacts) -> str:
    states = {"new": "a new state", "carried": "its state is carried over", "kept": "its state is kept"}
    return states.get(facts.optimizer_state_at_growth or "", "unknown")
