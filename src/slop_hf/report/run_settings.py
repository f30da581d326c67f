"""The settings of a run, as a report lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..io.serialization import Json
from ..io.units import format_count
from ..runs.directory import RunDirectory, RunFacts
from ..runs.launches import RunLaunches
from ..runs.records import StageRecord
from ..runs.settings import RunSettings

#: What the optimizer remembers after a growth, by `optimizer_state_at_growth`.
_STATES = {
    "new": "starts again after a growth",
    "carried": "carries its state over a growth",
    "kept": "keeps its state at a growth",
}


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
        state = _STATES.get(facts.optimizer_state_at_growth or "", "")
        lines["optimizer"] = "; ".join(filter(None, (facts.optimizer, state)))
        lines["seed"] = "" if facts.seed is None else str(facts.seed)
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
    span = "the run" if settings.get("lr_span") == "run" else "each stage"
    return f"{peaks}; {settings.get('lr_scheduler_type')} over {span}, warm-up {warm_up}"


def _describe_batches(facts: RunFacts, stages: int) -> str:
    counts = [format_count(count * facts.block_size) for count in dict.fromkeys(facts.batches(stages))]
    return f"{' → '.join(counts)} tokens per step, in blocks of {facts.block_size:,}"
