"""Per-stage tables of one run: benchmark scores, held-out losses and training data by source.

Stages are columns. Each function returns None for a run without such records.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..io.units import NOTHING, format_count, format_decimals
from ..runs.records import AFTER_GROWTH, ConsumedTokens, EvalRecord, StageRecord
from .tables import TextTable


def tabulate_stage_scores(
    records: Sequence[StageRecord], evaluations: Sequence[Sequence[EvalRecord]]
) -> TextTable | None:
    """Tabulate benchmark scores ± standard errors, from the evaluations of each stage; one row per task and metric.

    Scores right after a growth have their own column, to the left of the scores at the end of the stage.
    """
    columns: dict[str, dict[tuple[str, str, str], str]] = {}
    for record, stage_evaluations in zip(records, evaluations, strict=True):
        for item in sorted(stage_evaluations, key=lambda item: item.when != AFTER_GROWTH):
            heading = format_stage_heading(record) + (" after growth" if item.when == AFTER_GROWTH else "")
            scores = {(item.task, metric, format_setting(item)): format_score(item, metric) for metric in item.metrics}
            columns.setdefault(heading, {}).update(scores)
    rows = [
        (*key[:2], *(scores.get(key, NOTHING) for scores in columns.values()), key[2] or NOTHING)
        for key in dict.fromkeys(key for scores in columns.values() for key in scores)
    ]
    headings = (("task", False), ("metric", False), *((name, True) for name in columns), ("setting", False))
    return TextTable(headings, tuple(rows)) if columns else None


def tabulate_held_out_losses(records: Sequence[StageRecord]) -> TextTable | None:
    """Tabulate the held-out loss at the end of each stage, in nats per token, one row per source of the mixture."""
    sources = dict.fromkeys(source for record in records for source in record.eval_losses)
    rows = [(name, *(format_decimals(record.eval_losses.get(name), 4) for record in records)) for name in sources]
    headings = (("source", False), *((format_stage_heading(record), True) for record in records))
    return TextTable(headings, tuple(rows)) if rows else None


def tabulate_data(records: Sequence[StageRecord]) -> TextTable | None:
    """Tabulate training tokens, one row per source, with the number of passes over the source by the last stage."""
    by_source: dict[str, dict[int, ConsumedTokens]] = {}
    for record in records:
        for consumed in record.data:
            by_source.setdefault(consumed.source, {})[record.stage] = consumed
    rows = []
    for source, by_stage in by_source.items():
        last, tokens = by_stage[max(by_stage)], {stage: consumed.tokens for stage, consumed in by_stage.items()}
        passes = last.end_token / last.available_tokens if last.available_tokens else None
        counts = [*(tokens.get(record.stage) for record in records), sum(tokens.values()), last.available_tokens]
        rows.append((source, f"{last.weight:.1%}", *map(format_count, counts), format_decimals(passes, 2)))
    headings = ["share", *map(format_stage_heading, records), "total", "available", "passes"]
    columns = (("source", False), *((heading, True) for heading in headings))
    return TextTable(columns, tuple(rows)) if rows else None


def format_stage_heading(record: StageRecord) -> str:
    """Return a stage's column heading: the name of its directory without the word `stage`.

    >>> from slop_hf.dims import ModelDims
    >>> dims = ModelDims(64, 128, 2, 2)
    >>> format_stage_heading(StageRecord(1, "stage-1-layer-ffn", dims, 9, 9, 9, 0, 1, 1, 9.0, 9.0, 1.0))
    '1 layer-ffn'
    """
    return record.name.removeprefix("stage-").replace("-", " ", 1)


def format_setting(record: EvalRecord) -> str:
    """Return the settings that a score depends on: the number of few-shot examples, and the limit on documents.

    >>> format_setting(EvalRecord("hellaswag", {"acc": 0.3}, num_fewshot=5, limit=100))
    '5-shot, limit 100'
    """
    shots = [f"{record.num_fewshot}-shot"] if record.num_fewshot is not None else []
    return ", ".join(shots + ([f"limit {record.limit}"] if record.limit is not None else []))


def format_score(record: EvalRecord, metric: str) -> str:
    """Return a score ± its standard error: four decimal places below 10 (accuracies), else two (perplexities)."""
    value, error = record.metrics[metric], record.stderr.get(metric)
    places = 4 if abs(value) < 10 else 2
    return format_decimals(value, places) + (f" ± {format_decimals(error, places)}" if error is not None else "")
