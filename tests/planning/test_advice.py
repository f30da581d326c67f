"""`advise`: its options, their errors, and verdicts that a practitioner would not laugh at."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest

from slop_hf import CostModel, GrowthLaw, GrowthSchedule, MemoryLimit, ModelDims
from slop_hf.cost.flops import count_parameters
from slop_hf.cost.growth_law import GrowthConstants
from slop_hf.cost.law_transfer import load_default_law
from slop_hf.cost.rate_schedule import RATE_SPANS
from slop_hf.errors import PlanError
from slop_hf.planning.advice import FAR, SURE, Advice, Question, advise, build_run, forecast_options
from slop_hf.planning.deployable import HEADS, list_larger, list_shapes, list_smaller, list_ways
from slop_hf.planning.final_loss import FinalLossSearch, LossSettings

TARGET = ModelDims(1024, 4096, 24, 16)
#: An H100 at 40% of its peak in bf16, 989.5 TFLOP/s.
H100 = CostModel(1 / (989.5e12 * 0.4 * 3600), hardware="H100 at 40%")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A published model: its config.json, and the tokens that its authors name."""

    config: dict
    dims: ModelDims
    tokens: float


#: EleutherAI/pythia-410m (Biderman et al. 2023): 300B tokens of the Pile.
PYTHIA = Shape({"model_type": "gpt_neox", "vocab_size": 50304}, ModelDims(1024, 4096, 24, 16), 300e9)
#: Qwen/Qwen3-0.6B (Qwen Team 2025): 36T tokens.
QWEN = Shape(
    {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": True},
    ModelDims(1024, 3072, 28, 16, 8, 128),
    36e12,
)
#: meta-llama/Llama-3.2-1B (Meta 2024): up to 9T tokens.
LLAMA = Shape(
    {"model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": True},
    ModelDims(2048, 8192, 16, 32, 8, 64),
    9e12,
)
SHAPES = {"Pythia-410M": PYTHIA, "Qwen3-0.6B": QWEN, "Llama-3.2-1B": LLAMA}
BUDGETS = {"20B tokens": (20e9, "tokens"), "100 hours": (100, "hours")}


def ask(shape, budget, unit, **others):
    return Question(budget, unit, shape.dims, shape.tokens, config=shape.config, cost_model=H100, **others)


@pytest.fixture(scope="module")
def golden():
    return {(s, b): advise(ask(SHAPES[s], *BUDGETS[b])) for s in SHAPES for b in BUDGETS}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SHAPES)
def test_golden_answers_on_finished_checkpoints(golden, name, budget):
    """Labs grew finished checkpoints in depth by a fifth to a half, and trained them on far more tokens than these.

    SOLAR 32 → 48 layers, LLaMA-Pro 32 → 40, Kanana 32 → 40, Falcon3 28 → 40. With 20B to 60B tokens no way is far
    ahead: starting again loses most, and growth neither wins nor loses much.
    """
    shape, answer = SHAPES[name], golden[name, budget]
    options = {option.kind: option for option in reversed(answer.options)}
    grown = [option for option in answer.options if option.kind == "growth"]
    assert len(grown) == 3 and answer.options[-1].kind.startswith("scratch")
    assert options["scratch_best"].difference > 0.08 and options["scratch_best"].chance < 0.05
    assert abs(options["growth"].loss - options["unchanged"].loss) < 0.02
    assert answer.verdict.kind == ("too_close" if name == "Pythia-410M" else "outside")
    size = count_parameters(shape.dims, shape.config)
    for option in grown:
        assert 1.1 < option.parameters / size <= 1.5
        growth = option.schedule.target.num_hidden_layers / shape.dims.num_hidden_layers
        is_ffn = option.schedule.target.intermediate_size > shape.dims.intermediate_size
        assert is_ffn or 1.1 < growth <= 1.5
        assert option.schedule.tokens[0] == 0, "grown first, then trained"
        assert option.schedule.target.hidden_size == shape.dims.hidden_size
    assert {option.learning_rate for option in grown} == {options["unchanged"].learning_rate}
    assert 1e-4 < options["growth"].learning_rate < options["scratch_best"].learning_rate < 2e-3


def test_more_hours_speak_for_the_growth_of_pythia_and_then_for_a_larger_model(golden):
    few, many = (golden["Pythia-410M", budget].verdict for budget in BUDGETS)
    assert 0.5 < few.chance_growth < many.chance_growth < SURE
    most = advise(ask(PYTHIA, 400, "hours"))
    assert most.options[0].kind == "scratch_best" and most.options[-1].kind == "unchanged"
    assert most.verdict.chance_growth < 0.5


def test_a_budget_with_which_growth_pays_is_found():
    """A model that has seen 23 tokens per parameter; its training took about 1e18 FLOPs."""
    start = ModelDims(512, 2048, 12, 8)
    little, more = (advise(Question(flops, start=start, already_seen=2e9)).verdict for flops in (1e17, 3e18))
    assert little.kind == "too_close" and little.growth_pays_from == 8e17
    assert more.kind == "grow" and more.chance_growth > SURE and more.growth_pays_from is None
    assert advise(Question(1e20)).verdict.growth_pays_from is None, "without a model there is nothing to grow later"


def test_all_options_cost_the_same(golden):
    for (name, budget), answer in golden.items():
        for option in answer.options:
            spent = option.hours if budget == "100 hours" else option.flops
            assert spent == pytest.approx(answer.budget, rel=1e-6)
            assert option.tokens == sum(option.schedule.tokens) > 0
            assert option.flops == pytest.approx(option.schedule.flops(SHAPES[name].config))


def test_options_come_with_errors_and_chances(golden):
    for answer in golden.values():
        losses = [option.loss for option in answer.options]
        assert losses == sorted(losses) and sum(o.chance for o in answer.options) == pytest.approx(1)
        first, *others = answer.options
        assert first.difference == first.difference_error == 0
        for option in others:
            assert option.difference == pytest.approx(option.loss - first.loss)
            assert option.difference_error < option.error, "shared errors cancel"
        close = [option for option in others if option.difference < 0.02]
        assert all(option.difference_error < option.error / 3 for option in close)


def test_a_budget_without_a_model():
    """From scratch the best size is about 20 tokens per parameter or more, and growth has an edge."""
    answer = advise(Question(1e20))
    options = {option.kind: option for option in reversed(answer.options)}
    assert set(options) == {"growth", "scratch_target", "scratch_best"}
    assert 10 < options["scratch_best"].tokens / options["scratch_best"].parameters < 60
    assert answer.options[0].kind == "growth" and answer.verdict.kind == "too_close"
    assert answer.verdict.chance_growth > 0.6
    for option in answer.options:
        dims = option.schedule.target
        assert dims.num_attention_heads in HEADS and dims.hidden_size % 128 == dims.intermediate_size % 128 == 0
        assert 24 <= dims.hidden_size / dims.num_hidden_layers <= 171


def test_a_target_is_kept_and_a_small_start_does_not_hold_back():
    start = ModelDims(512, 2048, 12, 8)
    answer = advise(Question(3e18, start=start, target=TARGET))
    kinds = [option.kind for option in answer.options]
    assert kinds.count("growth") == 3 and set(kinds) == {"growth", "unchanged", "scratch_target", "scratch_best"}
    for option in answer.options:
        if option.kind in ("growth", "scratch_target"):
            assert option.schedule.target == TARGET
    alone = advise(Question(3e18, target=TARGET))
    assert {option.schedule.target for option in alone.options if option.kind == "growth"} == {TARGET}


def make_law(**constants):
    """The default law without doubt, with other constants."""
    law = load_default_law()
    changed = dataclasses.replace(law.constants, **constants)
    return dataclasses.replace(law, constants=changed, replicates=(), own_deviation=0.001, most_kept=1.0)


def test_verdicts_follow_the_law():
    good = make_law(depth_forgets=-1.0, inner_forgets=-1.0, hidden_forgets=-1.0, floor_forgets=0.0)
    assert advise(Question(1e20, law=good)).verdict.kind == "grow"
    bad = make_law(depth_forgets=2.0, inner_forgets=2.0, hidden_forgets=2.0)
    verdict = advise(Question(1e20, law=bad)).verdict
    assert verdict.kind == "do_not_grow" and verdict.sentence.startswith("Do not grow: “grow ")
    assert verdict.chance_growth < 1 - SURE
    unsure = dataclasses.replace(bad, own_deviation=1.0)
    assert advise(Question(1e20, law=unsure)).verdict.kind == "too_close"
    far = dataclasses.replace(unsure, scales={"parameters": (1e3, 1e6)})
    answer = advise(Question(1e20, law=far))
    assert answer.verdict.kind == "outside" and "parameters, fitted to 1k to 1M" in answer.verdict.sentence
    assert all(option.decades_outside > FAR for option in answer.options)
    surely = advise(Question(1e20, law=dataclasses.replace(bad, scales={"parameters": (1e3, 1e6)}))).verdict
    assert surely.kind == "do_not_grow" and "outside what this law was fitted to" in surely.sentence


def test_no_verdict_on_budgets_that_teach_nothing():
    config = {"model_type": "llama", "vocab_size": 300}
    verdict = advise(Question(1e11, config=config, sequence_length=16)).verdict
    assert verdict.kind == "outside" and "ln(vocabulary) = 5.70" in verdict.sentence


def test_a_law_of_small_models_has_its_own_rate():
    law = GrowthLaw(GrowthConstants(), references=(1e5, 32.0, 1e7, 4e-3), deviation=0.05)
    config = {"model_type": "llama", "vocab_size": 256}
    answer = advise(Question(1e13, config=config, sequence_length=64, law=law))
    assert {option.learning_rate for option in answer.options} == {4e-3}
    assert not answer.remarks


def test_what_does_not_fit_into_memory_is_left_out():
    memory = MemoryLimit(30e9)
    small = advise(Question(1e20, memory=memory))
    assert max(option.memory for option in small.options) <= 30e9
    tight = advise(ask(LLAMA, 20e9, "tokens", memory=MemoryLimit(27e9)))
    assert {option.kind for option in tight.options} == {"unchanged", "scratch_best"}
    assert tight.verdict.kind == "do_not_grow" and tight.verdict.chance_growth is None
    with pytest.raises(PlanError, match="the model itself does not fit"):
        advise(ask(LLAMA, 20e9, "tokens", memory=MemoryLimit(5e9)))
    with pytest.raises(PlanError, match="raise device_memory"):
        advise(Question(1e20, memory=MemoryLimit(1e6)))


def test_other_budgets_are_forecast_for_the_same_structures(golden):
    question = ask(PYTHIA, 100, "hours")
    answer = golden["Pythia-410M", "100 hours"]
    losses, errors = forecast_options(question, answer, [50, 100, 200])
    assert losses.shape == errors.shape == (len(answer.options), 3)
    assert losses[:, 1] == pytest.approx([option.loss for option in answer.options])
    assert (np.diff(losses, axis=1) < 0).all() and (errors[0] == 0).all()


def test_a_run_is_written_for_the_model_or_for_its_shape(golden):
    question = ask(LLAMA, 20e9, "tokens")
    answer = golden["Llama-3.2-1B", "20B tokens"]
    rows = {option.kind: build_run(question, option, "texts/", "meta-llama/Llama-3.2-1B") for option in answer.options}
    assert rows["growth"]["model"]["pretrained"] == "meta-llama/Llama-3.2-1B"
    assert "pretrained" not in rows["scratch_best"]["model"]
    assert rows["growth"]["data"] == {"source": "texts/", "block_size": 2048, "tokenizer": "meta-llama/Llama-3.2-1B"}
    assert rows["growth"]["training"]["lr_span"] == "run"
    for option in answer.options:
        schedule = GrowthSchedule.from_plain(build_run(question, option, "texts/")["schedule"], "run.yaml")
        assert schedule == option.schedule
        assert all(stage.init for stage in schedule)
    assert rows["growth"]["training"]["batch_tokens"][0] % 2048 == 0


def test_advice_is_plain_data(golden):
    answer = golden["Pythia-410M", "20B tokens"]
    assert isinstance(answer, Advice) and math.isfinite(answer.budget)
    assert answer.search.startswith("Exact") and len(answer.remarks) == 2
    assert answer.remarks[0] == "The model has seen 300B tokens; the first option adds 0.047 times as many."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "give a budget"),
        ({"budget": math.inf}, "give a budget"),
        ({"budget": 1e21, "unit": "tokens"}, "at most"),
        ({"unit": "days"}, "unit must be"),
        ({"unit": "hours"}, "speed of the hardware"),
        ({"unit": "tokens"}, "needs a model"),
        ({"already_seen": 1e9}, "belongs to a model"),
        ({"start": TARGET, "target": TARGET}, "give a larger one"),
        ({"start": TARGET, "target": TARGET.replace(num_hidden_layers=2)}, "would shrink"),
        ({"start": TARGET, "already_seen": -1}, "already_seen"),
    ],
)
def test_wrong_questions_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        advise(Question(**{"budget": 1e20, **settings}))


@pytest.mark.parametrize("like", [None, LLAMA.dims, QWEN.dims, PYTHIA.dims, ModelDims(64, 128, 4, 2)])
def test_shapes_are_deployable_and_of_the_family(like):
    shapes = list_shapes({"model_type": "llama"}, like)
    assert len(shapes) > 20 and len(set(shapes)) == len(shapes)
    for dims in shapes:
        assert dims.num_attention_heads in HEADS
        assert dims.hidden_size % 128 == 0 or dims.hidden_size < 128
        if like is not None:
            assert dims.head_dim == like.head_dim
            group = like.num_attention_heads // like.num_key_value_heads
            assert dims.num_attention_heads == group * dims.num_key_value_heads


@pytest.mark.parametrize(("family", "ratio"), [("llama", 8 / 3), ("gpt_neox", 4)])
def test_the_ffn_is_as_wide_as_its_family_has_it(family, ratio):
    widest = list_shapes({"model_type": family})[-1]
    assert widest.intermediate_size / widest.hidden_size == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(
    "dims", [LLAMA.dims, QWEN.dims, PYTHIA.dims, ModelDims(64, 128, 1, 2), ModelDims(48, 96, 3, 3)]
)
def test_ways_lead_from_small_to_large(dims):
    larger, smaller = list_larger(dims), list_smaller(dims)
    assert larger and len(set(larger)) == len(larger)
    ways = [way for other in larger for way in list_ways(dims, other)]
    ways += [way for other in smaller for way in list_ways(other, dims)]
    for way in ways:
        for before, after in pairwise(dims.as_dict() for dims in way):
            assert before != after and all(before[name] <= after[name] for name in before)


def test_a_schedule_per_stage_would_hardly_change_the_losses(golden):
    """As in docs/planning.md: advise has one learning-rate schedule over the run."""
    for (name, _), answer in golden.items():
        growth = next(option for option in answer.options if option.kind == "growth")
        losses = []
        for span in RATE_SPANS:
            question = ask(SHAPES[name], growth.flops, "flops")
            settings = LossSettings(question.law, spans=(span,), already_seen=question.already_seen)
            search = FinalLossSearch(question.inputs, growth.flops, settings)
            losses.append(search.rank([growth.schedule.structures], 1).runs[0].loss)
        assert abs(losses[0] - losses[1]) < 0.01, name
