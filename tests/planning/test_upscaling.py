"""`plan_upscaling`: the depth by default, the run of the grown model, and the forecast for it."""

import pytest

from slop_hf import GrowthSchedule, ModelDims
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.planning.advice import Question, judge_schedule
from slop_hf.planning.upscaling import TOKENS_PER_PARAMETER, USUAL_FACTORS, choose_layers, plan_upscaling

LLAMA_8B = ModelDims(4096, 14336, 32, 32, 8)
CHECKPOINTS = {
    "Pythia-410M": (ModelDims(1024, 4096, 24, 16), {"model_type": "gpt_neox", "vocab_size": 50304}, 300e9),
    "Llama-3.2-1B": (
        ModelDims(2048, 8192, 16, 32, 8),
        {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True},
        9e12,
    ),
    "Llama-3.1-8B": (LLAMA_8B, {"model_type": "llama", "vocab_size": 128256}, 15e12),
}


@pytest.mark.parametrize("layers", range(2, 130))
def test_the_default_depth_is_usual(layers):
    low, high = USUAL_FACTORS
    assert low <= choose_layers(layers) / layers <= high
    assert choose_layers(layers) % (4 if layers >= 16 else 2 if layers > 3 else 1) == 0


@pytest.mark.parametrize(("start", "config", "seen"), CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("tokens", [20e9, 200e9])
def test_the_law_hardly_separates_usual_factors(start, config, seen, tokens):
    """The default rests on this: 1.25 and 1.5 times the layers differ by less than growth's own uncertainty."""
    plans = [plan_upscaling(start, already_seen=seen, by=by, tokens=tokens, config=config) for by in (1.25, 1.5)]
    errors = [
        max(option.difference_error for option in plan.advice.options if option.kind in ("growth", "unchanged"))
        for plan in plans
    ]
    assert abs(plans[1].option.loss - plans[0].option.loss) < 0.02 < min(errors) < 0.1


def test_the_forecast_is_that_of_advise():
    plan = plan_upscaling(LLAMA_8B, already_seen=15e12, tokens=50e9, layers=40)
    flops = count_flops_per_token(plan.stage.dims) * 50_000_000_000
    question = Question(flops, start=LLAMA_8B, already_seen=15e12, target=LLAMA_8B.replace(num_hidden_layers=40))
    assert plan.advice == judge_schedule(question, plan.schedule)
    assert plan.option.flops == pytest.approx(flops) and plan.option.tokens == 50_000_000_000
    kinds = {option.kind for option in plan.advice.options}
    assert kinds == {"growth", "unchanged", "scratch_target", "scratch_best"}


def test_tokens_follow_from_the_grown_model():
    plan = plan_upscaling(LLAMA_8B, already_seen=15e12)
    assert plan.stage.dims.num_hidden_layers == 44
    assert plan.stage.tokens == pytest.approx(TOKENS_PER_PARAMETER * count_parameters(plan.stage.dims), rel=0.005)


def test_the_run_trains_the_grown_model_only():
    plan = plan_upscaling(LLAMA_8B, already_seen=15e12, tokens=50e9)
    run = plan.build_run("deeper")
    schedule = GrowthSchedule.from_plain(run["schedule"], "run.yaml")
    assert schedule == GrowthSchedule(plan.stage.dims, initial_tokens=50_000_000_000)
    assert run["model"] == {"pretrained": "deeper"}
    assert run["data"] == {"block_size": 2048, "tokenizer": "deeper"}
    assert plan.build_run("deeper", "texts/")["data"]["source"] == "texts/"
    # The checkpoint's own training counts: a model from scratch with these tokens would have a higher rate.
    assert run["training"]["learning_rate"] < 5e-4


@pytest.mark.parametrize(("by", "is_remarked"), [(1.25, False), (1.5, False), (1.1, True), (2, True)])
def test_unusual_factors_are_remarked(by, is_remarked):
    plan = plan_upscaling(LLAMA_8B, already_seen=15e12, by=by)
    assert (plan.remark is not None) == is_remarked
