"""Final benchmark scores of runs: a headline metric per task, the tasks that runs share, and a table of runs × tasks.

Metrics such as perplexity, for which lower is better, are excluded: a radar shows scores as lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from ..evaluation.tasks import HEADLINE_METRICS
from ..io.units import NOTHING
from ..runs.records import AFTER_GROWTH, EvalRecord
from .results import format_score, format_setting
from .summary import RunSummary
from .tables import TextTable, format_run_name

#: Metrics for which lower is better.
LOWER_IS_BETTER = frozenset(
    ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ppl", "loss", "eval_loss", "brier_score")
)


class ScoreKey(NamedTuple):
    """The task, setting and metric of a score. Only scores with the same key are comparable."""

    task: str
    setting: str
    metric: str


def select_headline_scores(evaluations: Iterable[EvalRecord]) -> dict[ScoreKey, float]:
    """Return the final scores for which higher is better, headline metrics first (`tasks.HEADLINE_METRICS`)."""
    return {key: record.metrics[key.metric] for key, record in _index_by_key(evaluations).items()}


def find_shared_keys(scores: Sequence[Mapping[ScoreKey, object]]) -> list[ScoreKey]:
    """Return the tasks that all runs have, sorted by name, each with the first metric that all runs have."""
    first = scores[0] if scores else {}
    return _pick_one_per_task(key for key in first if all(key in run_scores for run_scores in scores))


def label_scores(keys: Sequence[ScoreKey]) -> list[str]:
    """Return the names of tasks, with settings added to a task that occurs with several."""
    tasks = [key.task for key in keys]
    return [key.task if tasks.count(key.task) == 1 else f"{key.task} ({key.setting})" for key in keys]


def tabulate_final_scores(runs: Sequence[RunSummary], evaluations: Sequence[Sequence[EvalRecord]]) -> TextTable | None:
    """Tabulate benchmark scores, one row per run and one column per task; None unless two runs have scores.

    The evaluations belong to each run's last finished stage. Each task is shown by the metric that most runs have.
    """
    scores = [_index_by_key(run_evaluations) for run_evaluations in evaluations]
    if sum(map(bool, scores)) < 2:
        return None
    every_key = [key for run_scores in scores for key in run_scores]
    by_frequency = sorted(set(every_key), key=lambda key: (-every_key.count(key), _rank_metric(key.metric)))
    keys = _pick_one_per_task(by_frequency)
    rows = []
    for run, run_scores in zip(runs, scores, strict=True):
        cells = (format_score(run_scores[key], key.metric) if key in run_scores else NOTHING for key in keys)
        rows.append((format_run_name(run), *cells))
    headings = [f"{label}, {key.metric}" for label, key in zip(label_scores(keys), keys, strict=True)]
    return TextTable((("run", False), *((heading, True) for heading in headings)), tuple(rows))


def _index_by_key(evaluations: Iterable[EvalRecord]) -> dict[ScoreKey, EvalRecord]:
    records = {
        ScoreKey(evaluation.task, format_setting(evaluation), metric): evaluation
        for evaluation in evaluations
        if evaluation.when != AFTER_GROWTH
        for metric, value in evaluation.metrics.items()
        if metric not in LOWER_IS_BETTER and math.isfinite(value)
    }
    return dict(sorted(records.items(), key=lambda item: _rank_metric(item[0].metric)))


def _rank_metric(metric: str) -> int:
    name = metric.partition(",")[0]  # lm-eval may add the name of a filter, as in `exact_match,strict-match`
    return HEADLINE_METRICS.index(name) if name in HEADLINE_METRICS else len(HEADLINE_METRICS)


def _pick_one_per_task(keys: Iterable[ScoreKey]) -> list[ScoreKey]:
    """Return the first key of each task and setting, sorted by name.

    A task named after another, as `mmlu_anatomy` is after `mmlu`, is a part of it and is left out.
    """
    first_keys: dict[tuple[str, str], ScoreKey] = {}
    for key in keys:
        first_keys.setdefault((key.task, key.setting), key)
    names = {key.task for key in first_keys.values()}
    return sorted(key for key in first_keys.values() if not any(key.task.startswith(f"{name}_") for name in names))
