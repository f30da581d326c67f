"""Names of evaluation tasks, and the metric that represents a task in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import EvaluationError
from ..runs.records import EvalRecord

#: Name that stands for all `PAPER_TASKS`.
PAPER = "paper"
#: Task of slop-hf itself: exact perplexity on held-out text.
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class PaperTask:
    """A benchmark of the SLOP paper as a task of lm-eval; `num_fewshot` is lm-eval's default."""

    task: str
    num_fewshot: int
    metric: str
    note: str = ""


#: Section 4.1 names the benchmarks, but no variants, numbers of examples or metrics: these are our choice.
PAPER_TASKS: Mapping[str, PaperTask] = {
    "PIQA": PaperTask("piqa", 0, "acc_norm"),
    "HellaSwag": PaperTask("hellaswag", 0, "acc_norm"),
    "BBH": PaperTask(
        "leaderboard_bbh",
        3,
        "acc_norm",
        "24 tasks as multiple choice; lm-eval's `bbh` has the model reason in free text, and models of about 1B "
        "parameters then score near zero",
    ),
    "LAMBADA": PaperTask("lambada_openai", 0, "acc", "it also reports the perplexity of the last word"),
    "GSM8K": PaperTask("gsm8k", 5, "exact_match,strict-match"),
}

#: Metrics that may represent a task, in order of preference; larger is better.
HEADLINE_METRICS = ("acc_norm", "acc", "exact_match", "f1")
_HEADLINES = (*HEADLINE_METRICS, "perplexity", "word_perplexity")


def list_task_names(tasks: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names in a comma-separated list, or in several, without repetitions; `paper` is expanded.

    Raises:
        EvaluationError: if no task is named, or a name is not a text.

    >>> list_task_names("perplexity, paper")
    ('perplexity', 'piqa', 'hellaswag', 'leaderboard_bbh', 'lambada_openai', 'gsm8k')
    """
    lists = [tasks] if isinstance(tasks, str) else [*tasks] if isinstance(tasks, Iterable) else [tasks]
    if wrong := [item for item in lists if not isinstance(item, str)]:
        raise EvaluationError(f"tasks must be names such as {PAPER!r} or 'piqa,gsm8k', got {wrong[0]!r}")
    names: dict[str, None] = {}
    for name in (part.strip() for item in lists for part in item.split(",")):
        if name == PAPER:
            names.update(dict.fromkeys(benchmark.task for benchmark in PAPER_TASKS.values()))
        elif name:
            names[name] = None
    if not names:
        raise EvaluationError(
            f"tasks must name one or more, got {tasks!r}: {PAPER}, {PERPLEXITY}, or tasks of lm-eval, separated by "
            "commas"
        )
    return tuple(names)


def find_headline(record: EvalRecord) -> tuple[str, float] | None:
    """Return the metric that represents a task in a table, and its value; None if the record has no metric.

    >>> find_headline(EvalRecord("lambada_openai", {"perplexity": 66.7, "acc": 0.59}))
    ('acc', 0.59)
    """
    of_paper = [benchmark.metric for benchmark in PAPER_TASKS.values() if benchmark.task == record.task]
    for wanted in (*of_paper, *_HEADLINES, *(f"{name}," for name in _HEADLINES)):
        for name, value in record.metrics.items():
            if name == wanted or (wanted.endswith(",") and name.startswith(wanted)):
                return name, value
    return next(iter(record.metrics.items()), None)
