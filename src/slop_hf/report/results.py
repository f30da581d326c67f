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
    """Tabulate benchmark scores ± standard errors, one row per task and metric.

    Scores right after a growth have their own column, to the left of the scores at the end of the stage.

    Args:
        records: records of the finished stages.
        evaluations: the evaluations of each of these stages.
    """
    columns: list[tuple[str, list[EvalRecord]]] = []
    for record, stage_evaluations in zip(records, evaluations, strict=True):
        heading = format_stage_heading(record)
        after_growth = [evaluation for evaluation in stage_evaluations if evaluation.when == AFTER_GROWTH]
        at_end = [evaluation for evaluation in stage_evaluations if evaluation.when != AFTER_GROWTH]
        columns += [
            (name, part) for name, part in ((f"{heading} after growth", after_growth), (heading, at_end)) if part
        ]
    if not columns:
        return None
    scores_by_column = [
        {
            (evaluation.task, format_setting(evaluation), metric): format_score(evaluation, metric)
            for evaluation in part
            for metric in evaluation.metrics
        }
        for _, part in columns
    ]
    rows = [
        (
            task,
            metric,
            *(scores.get((task, setting, metric), NOTHING) for scores in scores_by_column),
            setting or NOTHING,
        )
        for task, setting, metric in dict.fromkeys(key for scores in scores_by_column for key in scores)
    ]
    headings = (("task", False), ("metric", False), *((name, True) for name, _ in columns), ("setting", False))
    return TextTable(headings, tuple(rows))


def tabulate_held_out_losses(records: Sequence[StageRecord]) -> TextTable | None:
    """Tabulate the held-out loss at the end of each stage, in nats per token, one row per source of the mixture."""
    sources = dict.fromkeys(source for record in records for source in record.eval_losses)
    rows = [
        (source, *(format_decimals(record.eval_losses.get(source), 4) for record in records)) for source in sources
    ]
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
        last = by_stage[max(by_stage)]
        rows.append(
            (
                source,
                f"{last.weight:.1%}",
                *(
                    format_count(by_stage[record.stage].tokens if record.stage in by_stage else None)
                    for record in records
                ),
                format_count(sum(consumed.tokens for consumed in by_stage.values())),
                format_count(last.available_tokens),
                format_decimals(last.end_token / last.available_tokens if last.available_tokens else None, 2),
            )
        )
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
