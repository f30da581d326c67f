"""Names of tasks, and the metric that represents a task in a table."""

import sys

import pytest

from slop_hf.errors import EvaluationError
from slop_hf.evaluation import lm_eval
from slop_hf.evaluation.tasks import PAPER_TASKS, find_headline, list_task_names
from slop_hf.runs.records import EvalRecord

PAPER = ("piqa", "hellaswag", "leaderboard_bbh", "lambada_openai", "gsm8k")


def test_the_paper_s_benchmarks():
    assert tuple(one.task for one in PAPER_TASKS.values()) == PAPER
    assert list_task_names("paper") == list_task_names(("paper", "piqa")) == PAPER


def test_names_are_separated_by_commas_and_listed_once():
    assert list_task_names(["arc_easy, piqa", "piqa,"]) == ("arc_easy", "piqa")
    with pytest.raises(EvaluationError, match=r"tasks must name one or more, got .*: paper, perplexity"):
        list_task_names(" ,")


@pytest.mark.parametrize(
    "task, metrics, expected",
    [
        ("piqa", {"acc": 0.5, "acc_norm": 0.6}, ("acc_norm", 0.6)),
        ("lambada_openai", {"perplexity": 9.0, "acc": 0.4}, ("acc", 0.4)),
        ("gsm8k", {"exact_match,flexible-extract": 0.2, "exact_match,strict-match": 0.1}, None),
        ("other", {"bleu": 3.0, "exact_match,custom": 0.2}, ("exact_match,custom", 0.2)),
        ("strange", {"bleu": 3.0}, ("bleu", 3.0)),
    ],
)
def test_the_metric_that_represents_a_task(task, metrics, expected):
    assert find_headline(EvalRecord(task, metrics)) == (expected or ("exact_match,strict-match", 0.1))


def test_a_task_without_metrics_has_no_headline():
    assert find_headline(EvalRecord("tag", {})) is None


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'slop-hf\[eval\]'; perplexity does without it"):
        lm_eval.get_lm_eval_version()
