"""Which tasks there are by name, and what stands for one in a table."""

import sys

import pytest

from slop_hf.errors import EvaluationError
from slop_hf.evaluation import harness
from slop_hf.evaluation.tasks import PAPER_TASKS, headline, task_names
from slop_hf.runs.records import EvalRecord

PAPER = ("piqa", "hellaswag", "leaderboard_bbh", "lambada_openai", "gsm8k")


def test_the_paper_s_benchmarks():
    assert tuple(one.task for one in PAPER_TASKS.values()) == PAPER
    assert task_names("paper") == task_names(("paper", "piqa")) == PAPER


def test_names_are_parted_by_commas_and_kept_once():
    assert task_names(["arc_easy, piqa", "piqa,"]) == ("arc_easy", "piqa")
    with pytest.raises(EvaluationError, match="no task given: name paper, perplexity"):
        task_names(" ,")


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
def test_what_stands_for_a_task(task, metrics, expected):
    assert headline(EvalRecord(task, metrics)) == (expected or ("exact_match,strict-match", 0.1))


def test_nothing_stands_for_a_task_without_metrics():
    assert headline(EvalRecord("tag", {})) is None


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"pip install 'slop-hf\[eval\]'; perplexity does without"):
        harness.harness_version()
