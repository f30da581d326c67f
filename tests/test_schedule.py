import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, from_scratch
from slop_hf.errors import RunError, ScheduleError
from slop_hf.operators import find_operators
from slop_hf.training.checks import check_model

A = ModelDims(64, 128, 2, 2)
B = A.replace(num_hidden_layers=4)
C = B.replace(hidden_size=128, num_attention_heads=4, num_key_value_heads=4)
SCHEDULE = GrowthSchedule(A, (GrowthStage(("layer",), B, 1000), GrowthStage(("hidden", "mha"), C, 2000)), 5000)


def test_properties():
    assert SCHEDULE.sequence == "l-h"
    assert SCHEDULE.stage_names == ("stage-0-initial", "stage-1-layer", "stage-2-hidden")
    assert SCHEDULE.structures == (A, B, C) and SCHEDULE.target == C
    assert SCHEDULE.tokens == (5000, 1000, 2000)


def test_yaml_round_trip(tmp_path):
    path = tmp_path / "schedule.yaml"
    SCHEDULE.to_yaml(path)
    assert GrowthSchedule.from_yaml(path) == SCHEDULE


def test_token_counts_may_be_written_with_an_exponent(tmp_path):
    path = tmp_path / "schedule.yaml"
    text = (
        SCHEDULE.to_yaml()
        .replace("tokens: 1000\n", "tokens: 1e3\n")
        .replace("initial_tokens: 5000", "initial_tokens: 5E3")
    )
    assert "1e3" in text and "5E3" in text
    path.write_text(text)
    assert GrowthSchedule.from_yaml(path) == SCHEDULE


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("- layer\n", "- depth\n", r"unknown operator 'depth' \(known: layer, "),
        ("tokens: 1000", "token: 1000", r"unknown key 'stages.0.token'"),
        ("initial:\n", "begin:\n", "missing key 'initial'"),
        ("num_hidden_layers: 4", "num_hidden_layers: 1", "would shrink from 2 to 1"),
        ("- layer\n", "- ffn\n", "stage 1 names ffn, but .* belong to layer"),
        ("tokens: 1000", "tokens: -3", "0 or more, got -3"),
        ("tokens: 1000", "tokens: many", "stages.0.tokens"),
        ("tokens: 1000", "tokens: [", "not valid YAML"),
    ],
)
def test_faulty_files_are_refused_in_a_line(tmp_path, old, new, message):
    path = tmp_path / "schedule.yaml"
    text = SCHEDULE.to_yaml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ScheduleError, match=message) as caught:
        GrowthSchedule.from_yaml(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_numpy_token_counts_are_written():
    schedule = GrowthSchedule(A, (GrowthStage(("layer",), B, np.int64(1000)),), np.int64(500))
    assert schedule.to_yaml() == GrowthSchedule(A, (GrowthStage(("layer",), B, 1000),), 500).to_yaml()


def test_missing_file(tmp_path):
    with pytest.raises(ScheduleError, match="no such file"):
        GrowthSchedule.from_yaml(tmp_path / "none.yaml")


def test_stages_that_are_not_stages():
    with pytest.raises(ScheduleError, match="at least one operator"):
        GrowthStage((), B)
    with pytest.raises(ScheduleError, match="name one twice"):
        GrowthStage(("layer", "layer"), B)
    with pytest.raises(ScheduleError, match="init names 'ffn', but the stage grows layer"):
        GrowthStage(("layer",), B, init={"ffn": "random"})
    with pytest.raises(ScheduleError, match="belong to none"):
        GrowthSchedule(A, (GrowthStage(("layer",), A),))


def test_head_dim_is_an_operator_of_its_own():
    assert find_operators(A, ModelDims(128, 128, 2, 2)) == ("hidden", "head_dim")


def test_tokens_are_shared_by_the_papers_rule():
    shared = SCHEDULE.with_tokens(45e9)
    assert shared.tokens == (25 * 10**9, 10 * 10**9, 10 * 10**9)
    assert SCHEDULE.with_tokens(10, initial_share=0).tokens == (0, 5, 5)
    with pytest.raises(ScheduleError, match="must be positive"):
        SCHEDULE.with_tokens(-1)
    with pytest.raises(ScheduleError, match="give it a share"):
        GrowthSchedule(A).with_tokens(10, initial_share=0)


def test_the_model_that_a_schedule_is_for(tmp_path):
    """Old files name none, and fit every model; equality and files of schedules without one are as they were."""
    assert "vocab_size" not in SCHEDULE.to_yaml() and "tie_word" not in SCHEDULE.to_yaml()
    planned = dataclasses.replace(SCHEDULE, vocab_size=300, tie_word_embeddings=False)
    planned.to_yaml(tmp_path / "plan.yaml")
    read = GrowthSchedule.from_yaml(tmp_path / "plan.yaml")
    assert (read.vocab_size, read.tie_word_embeddings) == (300, False) and read == SCHEDULE
    scratch = from_scratch(planned)
    assert (scratch.vocab_size, scratch.tie_word_embeddings, scratch.stages) == (300, False, ())
    for config, message in [
        ({"vocab_size": 400, "tie_word_embeddings": False}, "vocabulary of 300, the model has 400"),
        (
            {"vocab_size": 300, "tie_word_embeddings": True},
            "untied embeddings, the model's are tied: plan with `--tied`",
        ),
    ]:
        assert message in planned.find_mismatch(config)
        assert SCHEDULE.find_mismatch(config) is None
        model = SimpleNamespace(config=SimpleNamespace(**A.as_dict(), **config))
        with pytest.raises(RunError, match=message):
            check_model(model, planned, None)
    assert planned.find_mismatch({"vocab_size": 300}) is None
    with pytest.raises(ScheduleError, match="vocab_size must be a whole number"):
        dataclasses.replace(SCHEDULE, vocab_size=0)


def test_from_scratch_has_the_same_flops():
    schedule = SCHEDULE.with_tokens(10**9)
    scratch = from_scratch(schedule)
    assert scratch.structures == (C,)
    assert scratch.flops() == pytest.approx(schedule.flops(), rel=1e-6)
