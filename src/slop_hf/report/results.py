"""Tables of what each stage scored, lost and read: benchmarks, held-out losses and data by source.

A column a stage. Each table is None for a run that has nothing to fill it with.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..runs.records import ConsumedTokens, EvalRecord, StageRecord
from .tables import NOTHING, Cells, count, decimals

#: `EvalRecord.when` of what was scored right after a growth.
AFTER_GROWTH = "after_growth"


def results_cells(records: Sequence[StageRecord], evaluations: Sequence[Sequence[EvalRecord]]) -> Cells | None:
    """What the stages of one run scored: a row a task and metric, ± the standard error.

    What was scored right after a growth, before training, stands in a column of its own.

    Args:
        records: of the finished stages.
        evaluations: of each of them, in the same order.
    """
    columns: list[tuple[str, list[EvalRecord]]] = []
    for record, scored in zip(records, evaluations, strict=True):
        parts = [("after growth", [one for one in scored if one.when == AFTER_GROWTH])]
        parts.append(("", [one for one in scored if one.when != AFTER_GROWTH]))
        columns += [(f"{stage_heading(record)} {suffix}".strip(), part) for suffix, part in parts if part]
    if not columns:
        return None
    by_column = [
        {(one.task, setting(one), metric): score_text(one, metric) for one in part for metric in one.metrics}
        for _, part in columns
    ]
    rows = [
        (task, metric, *(scores.get((task, how, metric), NOTHING) for scores in by_column), how or NOTHING)
        for task, how, metric in dict.fromkeys(key for scores in by_column for key in scores)
    ]
    headings = (("task", False), ("metric", False), *((name, True) for name, _ in columns), ("setting", False))
    return Cells(headings, tuple(rows))


def held_out_cells(records: Sequence[StageRecord]) -> Cells | None:
    """Held-out loss at the end of each stage, in nats a token: a row a source of the mixture."""
    sources = dict.fromkeys(source for record in records for source in record.eval_losses)
    rows = [(source, *(decimals(record.eval_losses.get(source), 4) for record in records)) for source in sources]
    headings = (("source", False), *((stage_heading(record), True) for record in records))
    return Cells(headings, tuple(rows)) if rows else None


def data_cells(records: Sequence[StageRecord]) -> Cells | None:
    """Tokens trained on, a row a source, with how often its tokens have been passed over by the last stage."""
    read: dict[str, dict[int, ConsumedTokens]] = {}
    for record in records:
        for one in record.data:
            read.setdefault(one.source, {})[record.stage] = one
    rows = []
    for source, stretches in read.items():
        last = stretches[max(stretches)]
        passes = decimals(last.end_token / last.available_tokens, 2) if last.available_tokens else NOTHING
        by_stage = (count(stretches[one.stage].tokens) if one.stage in stretches else NOTHING for one in records)
        total = count(sum(stretch.tokens for stretch in stretches.values()))
        rows.append((source, f"{last.weight:.1%}", *by_stage, total, count(last.available_tokens), passes))
    headings = [stage_heading(record) for record in records] + ["total", "available", "passes"]
    return (
        Cells((("source", False), ("share", True), *((name, True) for name in headings)), tuple(rows))
        if rows
        else None
    )


def stage_heading(record: StageRecord) -> str:
    """A stage as the heading of a column: its directory's name without the word `stage`.

    >>> from slop_hf.dims import ModelDims
    >>> dims = ModelDims(64, 128, 2, 2)
    >>> stage_heading(StageRecord(1, "stage-1-layer-ffn", dims, 9, 9, 9, 0, 1, 1, 9.0, 9.0, 1.0))
    '1 layer-ffn'
    """
    return record.name.removeprefix("stage-").replace("-", " ", 1)


def setting(record: EvalRecord) -> str:
    """What makes a score of the same task another one: examples shown, and a limit on its documents.

    >>> setting(EvalRecord("hellaswag", {"acc": 0.3}, num_fewshot=5, limit=100))
    '5-shot, limit 100'
    """
    shots = [f"{record.num_fewshot}-shot"] if record.num_fewshot is not None else []
    return ", ".join(shots + ([f"limit {record.limit}"] if record.limit is not None else []))


def score_text(record: EvalRecord, metric: str) -> str:
    """A score with four places below one, fewer above: shares and perplexities alike."""
    value, error = record.metrics[metric], record.stderr.get(metric)
    places = 4 if abs(value) < 10 else 2
    return decimals(value, places) + (f" ± {decimals(error, places)}" if error is not None else "")
