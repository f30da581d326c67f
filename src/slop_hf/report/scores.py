"""What runs have scored at their ends: the metric that stands for a task, tasks that runs share, and runs × tasks.

A metric that is the better the smaller has no place here: a radar shows lengths, and a table is read down its columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..runs.records import EvalRecord
from .results import AFTER_GROWTH, score_text, setting
from .summary import RunSummary
from .tables import NOTHING, Cells, row_name

#: Metrics that stand for a task, best known first; then whatever else is the better the larger.
HEADLINE_METRICS = ("acc_norm", "acc", "exact_match", "f1")

#: Metrics that are the better the smaller: no length on a radar.
SMALLER_IS_BETTER = frozenset(
    ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ppl", "loss", "eval_loss", "brier_score")
)


class ScoreKey(NamedTuple):
    """What a score measures; two of one key can be compared."""

    task: str
    setting: str
    metric: str


def headline_scores(evaluations: Iterable[EvalRecord]) -> dict[ScoreKey, float]:
    """All scores that a larger value makes better, the headline metrics first."""
    return {key: record.metrics[key.metric] for key, record in _by_key(evaluations).items()}


def shared_keys(scored: Sequence[Mapping[ScoreKey, object]]) -> list[ScoreKey]:
    """The tasks that all runs have, by name, each with the first metric that all have."""
    first = scored[0] if scored else {}
    return _one_a_task(key for key in first if all(key in one for one in scored))


def labels_of(keys: Sequence[ScoreKey]) -> list[str]:
    """The names of tasks, with their settings where these alone tell two of them apart."""
    tasks = [key.task for key in keys]
    return [key.task if tasks.count(key.task) == 1 else f"{key.task} ({key.setting})" for key in keys]


def scores_cells(runs: Sequence[RunSummary], evaluations: Sequence[Sequence[EvalRecord]]) -> Cells | None:
    """Downstream scores: a row a run, a column a task, by the metric that most of the runs have.

    None where fewer than two of them have scores.

    Args:
        runs: what they are called.
        evaluations: of each one's last finished stage.
    """
    scored = [_by_key(one) for one in evaluations]
    if sum(map(bool, scored)) < 2:
        return None
    among = [key for one in scored for key in one]
    keys = _one_a_task(sorted(set(among), key=lambda key: (-among.count(key), _rank(key.metric))))
    rows = [
        (row_name(run), *(score_text(one[key], key.metric) if key in one else NOTHING for key in keys))
        for run, one in zip(runs, scored, strict=True)
    ]
    headings = [f"{label}, {key.metric}" for label, key in zip(labels_of(keys), keys, strict=True)]
    return Cells((("run", False), *((heading, True) for heading in headings)), tuple(rows))


def _by_key(evaluations: Iterable[EvalRecord]) -> dict[ScoreKey, EvalRecord]:
    records = {
        ScoreKey(one.task, setting(one), metric): one
        for one in evaluations
        if one.when != AFTER_GROWTH
        for metric, value in one.metrics.items()
        if metric not in SMALLER_IS_BETTER and math.isfinite(value)
    }
    return dict(sorted(records.items(), key=lambda item: _rank(item[0].metric)))


def _rank(metric: str) -> int:
    return HEADLINE_METRICS.index(metric) if metric in HEADLINE_METRICS else len(HEADLINE_METRICS)


def _one_a_task(keys: Iterable[ScoreKey]) -> list[ScoreKey]:
    """The first key of each task and setting, by name.

    A task that is named after another, as `mmlu_anatomy` is after `mmlu`, is part of it.
    """
    chosen: dict[tuple[str, str], ScoreKey] = {}
    for key in keys:
        chosen.setdefault((key.task, key.setting), key)
    names = {key.task for key in chosen.values()}
    return sorted(key for key in chosen.values() if not any(key.task.startswith(f"{name}_") for name in names))
