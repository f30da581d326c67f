"""lm-eval on its own tasks with local data, by the same call that scores them on the Hub's data."""

import random

import pytest
import torch
import yaml

from slop_hf import evaluate_model
from slop_hf.errors import EvaluationError, GrowthError
from slop_hf.evaluation import lm_eval, scoring
from slop_hf.evaluation.held_out import HeldOut
from slop_hf.evaluation.tasks import PAPER_TASKS, find_headline

pytest.importorskip("lm_eval")


@pytest.fixture
def evaluate(datasets_dir, model_dir, tmp_path):
    def score(tasks="paper", model=model_dir, **more):
        return evaluate_model(model, tasks, **{"datasets": datasets_dir, "cache_dir": tmp_path / "cache", **more})

    return score


@pytest.fixture
def nothing_is_scored(monkeypatch):
    def scored(*_, **__):
        raise AssertionError("something was scored")

    monkeypatch.setattr(lm_eval, "score_task", scored)
    monkeypatch.setattr(scoring, "measure_perplexity", scored)
    monkeypatch.setattr(scoring.EvaluatedModel, "model", property(scored))


def test_the_paper_s_tasks(evaluate, no_network):
    records = {record.task: record for record in evaluate()}
    assert len(records) == len(PAPER_TASKS) + 24
    for one in PAPER_TASKS.values():
        record = records[one.task]
        assert record.num_fewshot == one.num_fewshot and find_headline(record)[0] == one.metric
        assert 0 <= record.metrics[one.metric] <= 1 and record.harness.startswith("lm-eval ")
    group = [record for name, record in records.items() if name.startswith("leaderboard_bbh_")]
    mean = sum(one.metrics["acc_norm"] * one.documents for one in group) / sum(one.documents for one in group)
    assert records["leaderboard_bbh"].metrics["acc_norm"] == pytest.approx(mean)
    assert records["leaderboard_bbh"].documents == sum(one.documents for one in group)
    assert records["lambada_openai"].metrics["perplexity"] > 1 and records["lambada_openai"].stderr["acc"] >= 0


def test_a_score_against_one_computed_here(evaluate, model, tokenizer):
    from benchmark_data import MADE_UP

    def loglikelihood(context, answer):
        ids = tokenizer(context + answer, return_tensors="pt").input_ids
        begin = len(tokenizer(context).input_ids)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(logits[place - 1, ids[0, place]]) for place in range(begin, ids.shape[1]))

    right = normed = 0
    rows = MADE_UP["piqa"]()["validation"]
    for row in rows:
        answers = [f" {row['sol1']}", f" {row['sol2']}"]
        found = [loglikelihood(f"Question: {row['goal']}\nAnswer:", answer) for answer in answers]
        right += found.index(max(found)) == row["label"]
        each = [one / (len(answer) - 1) for one, answer in zip(found, answers, strict=True)]
        normed += each.index(max(each)) == row["label"]
    (record,) = evaluate("piqa")
    assert record.metrics == {"acc": right / len(rows), "acc_norm": normed / len(rows)}


def test_a_second_call_scores_nothing(evaluate, request):
    first = evaluate("piqa, gsm8k", limit=2)
    request.getfixturevalue("nothing_is_scored")
    assert evaluate(["gsm8k", "piqa"], limit=2) == first[::-1]
    for more in ({"limit": 3}, {"num_fewshot": 1}):
        with pytest.raises(AssertionError, match="something was scored"):
            evaluate("gsm8k", **{"limit": 2, **more})


def test_a_model_in_memory_is_the_one_on_disk(evaluate, model, tokenizer, request):
    on_disk = evaluate("piqa", limit=2)
    request.getfixturevalue("nothing_is_scored")
    assert evaluate("piqa", model, tokenizer=tokenizer, limit=2) == on_disk


def test_other_data_is_scored_again(evaluate, datasets_dir, tmp_path):
    evaluate("piqa")
    changed = tmp_path / "datasets" / "piqa"
    changed.mkdir(parents=True)
    for path in (datasets_dir / "piqa").iterdir():
        (changed / path.name).write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    (record,) = evaluate("piqa", datasets=changed.parent)
    assert record.documents == 4


def test_examples_before_the_question(evaluate):
    few, own = evaluate("gsm8k", num_fewshot=2, limit=1), evaluate("gsm8k", limit=1)
    assert (few[0].num_fewshot, own[0].num_fewshot) == (2, 5)
    assert few[0].limit == few[0].documents == 1


def test_model_and_random_state_are_left_unchanged(evaluate, model, tokenizer):
    model.train()
    states = random.getstate(), torch.get_rng_state()
    evaluate("piqa", model, tokenizer=tokenizer, limit=1)
    assert model.training and random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    model.eval()


def test_your_own_tasks(evaluate, tmp_path):
    task = {
        "task": "doors",
        "tag": "houses",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "test.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_target": "label",
        "doc_to_choice": ["yes", "no"],
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "doors.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "test.jsonl").write_text('{"q": "red?", "label": 0}\n{"q": "new?", "label": 1}\n')
    (record,) = evaluate("doors", include_path=tmp_path / "tasks", datasets=None)
    assert evaluate("houses", include_path=tmp_path / "tasks", datasets=None) == [record]
    assert record.task == "doors" and record.documents == 2 and set(record.metrics) == {"acc"}


def test_unavailable_data_is_refused(evaluate, no_network):
    with pytest.raises(EvaluationError, match=r"piqa cannot be scored: .*TASK/SPLIT.jsonl .*--datasets") as caught:
        evaluate("piqa", datasets=None)
    assert len(str(caught.value).splitlines()) == 1


def test_unknown_tasks(evaluate, tmp_path, request):
    request.getfixturevalue("nothing_is_scored")
    with pytest.raises(EvaluationError, match=r"no task 'helaswag': did you mean hellaswag"):
        evaluate("helaswag")
    (tmp_path / "data" / "piqqa").mkdir(parents=True)
    with pytest.raises(EvaluationError, match="no task 'piqqa'"):
        evaluate("piqa", datasets=tmp_path / "data")
    (tmp_path / "data" / "piqqa").rename(tmp_path / "data" / "piqa")
    with pytest.raises(EvaluationError, match="expected a file per split"):
        evaluate("piqa", datasets=tmp_path / "data")


def test_anything_but_a_model_is_refused(evaluate, model, tmp_path):
    with pytest.raises(GrowthError, match="no such directory"):
        evaluate("piqa", tmp_path / "nothing")
    with pytest.raises(GrowthError, match="neither a run nor a model directory"):
        evaluate("piqa", tmp_path)
    (tmp_path / "schedule.yaml").touch()
    with pytest.raises(EvaluationError, match="is a run, not a model: name one of its stages"):
        evaluate("piqa", tmp_path)
    with pytest.raises(EvaluationError, match="give it as `tokenizer`"):
        evaluate("piqa", model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"limit": 0}, "limit must be a whole number, 1 or more, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be a whole number, 0 or more"),
        ({"batch_size": "many"}, "batch_size must be 'auto', or a whole number"),
        ({"include_path": "nowhere"}, "include_path .*nowhere: no such directory"),
        ({"tasks": "perplexity"}, "perplexity is measured on held-out text, got none"),
    ],
)
def test_wrong_settings_are_refused(evaluate, settings, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(**{"tasks": "piqa", **settings})


def test_perplexity_does_not_need_lm_eval(evaluate, tokenizer, monkeypatch, request):
    monkeypatch.setattr(lm_eval, "_require_lm_eval", lambda: 1 / 0)
    held_out = HeldOut.from_texts({"a": "the door was red"}, tokenizer, 32)
    (record,) = evaluate("perplexity", held_out=held_out, datasets=None)
    request.getfixturevalue("nothing_is_scored")
    assert evaluate("perplexity", held_out=held_out, datasets=None, batch_size=1) == [record]


def test_text_of_another_tokenizer(evaluate):
    from slop_hf.data import train_tokenizer

    other = HeldOut.from_texts({"a": "the door was red"}, train_tokenizer(["ab ab cd cd"], 260), 32)
    with pytest.raises(EvaluationError, match="tokenized by another tokenizer than the model's"):
        evaluate("perplexity", held_out=other)
