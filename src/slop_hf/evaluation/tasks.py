"""The tasks that the paper reports, by their names in lm-eval, and what stands for a task in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import EvaluationError
from ..runs.records import EvalRecord

#: Stands for `PAPER_TASKS` wherever tasks are named.
PAPER = "paper"
#: Held-out text, which slop-hf scores by itself.
PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class PaperTask:
    """A benchmark of the paper as lm-eval has it.

    Args:
        task: its name in lm-eval.
        num_fewshot: solved examples before each question, lm-eval's default.
        metric: what is reported.
        note: what else one has to know.
    """

    task: str
    num_fewshot: int
    metric: str
    note: str = ""


#: Section 4.1 names the benchmarks, and neither variants, examples nor metrics: these are ours.
PAPER_TASKS: Mapping[str, PaperTask] = {
    "PIQA": PaperTask("piqa", 0, "acc_norm"),
    "HellaSwag": PaperTask("hellaswag", 0, "acc_norm"),
    "BBH": PaperTask(
        "leaderboard_bbh",
        3,
        "acc_norm",
        "the 24 tasks as multiple choice: `bbh` of lm-eval has the model reason in words to an answer, "
        "where models of about 1B score near nothing",
    ),
    "LAMBADA": PaperTask("lambada_openai", 0, "acc", "and its perplexity of the last word"),
    "GSM8K": PaperTask("gsm8k", 5, "exact_match,strict-match"),
}

# What a task is known by, the first that it has.
_HEADLINES = ("acc_norm", "acc", "exact_match", "perplexity", "word_perplexity", "f1")


def task_names(tasks: str | Iterable[str]) -> tuple[str, ...]:
    """The single names in a list of tasks, in order; `paper` stands for those of `PAPER_TASKS`.

    Raises:
        EvaluationError: where there is none.

    >>> task_names("perplexity, paper")
    ('perplexity', 'piqa', 'hellaswag', 'leaderboard_bbh', 'lambada_openai', 'gsm8k')
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    names: dict[str, None] = {}
    for name in (part.strip() for item in given for part in item.split(",")):
        if name == PAPER:
            names.update(dict.fromkeys(one.task for one in PAPER_TASKS.values()))
        elif name:
            names[name] = None
    if not names:
        raise EvaluationError(f"no task given: name {PAPER}, {PERPLEXITY}, or tasks of lm-eval, parted by commas")
    return tuple(names)


def headline(record: EvalRecord) -> tuple[str, float] | None:
    """The metric that stands for a task in a table, with its value; None where there is no metric.

    >>> headline(EvalRecord("lambada_openai", {"perplexity": 66.7, "acc": 0.59}))
    ('acc', 0.59)
    """
    chosen = next((one.metric for one in PAPER_TASKS.values() if one.task == record.task), None)
    names = [chosen, *_HEADLINES, *(f"{name}," for name in _HEADLINES)]
    for wanted in filter(None, names):
        for name, value in record.metrics.items():
            if name == wanted or (wanted.endswith(",") and name.startswith(wanted)):
                return name, value
    return next(iter(record.metrics.items()), None)
