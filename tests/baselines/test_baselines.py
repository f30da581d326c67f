import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slop_hf import GrowthSchedule, GrowthStage, ModelDims
from slop_hf.baselines import (
    ARMS,
    FROM_RANDOM,
    ArmRequest,
    compare_at_equal_flops,
    elle,
    from_scratch,
    is_growth_favoured,
    msg,
    single_stage,
    stacking,
)
from slop_hf.cost.flops import DEFAULT_CONFIG, count_flops_per_token, count_parameters
from slop_hf.cost.hours import CostModel
from slop_hf.cost.scaling_law import HOFFMANN, ScalingLaw
from slop_hf.errors import PlanError, ScheduleError
from slop_hf.operators import find_operators
from slop_hf.planning.budget import allocate_tokens

NEOX = {"model_type": "gpt_neox", "vocab_size": 1000, "attention_bias": True}
WITH_BUDGETS = {name: arm for name, arm in ARMS.items() if name != "from_scratch"}
SIZES = tuple(ModelDims(64, 128, 2, 2).as_dict())


def one_stage(initial, target, tokens=10**9, initial_tokens=10**9, init=None):
    stages = (GrowthStage(find_operators(initial, target), target, tokens, init),) if initial != target else ()
    return GrowthSchedule(initial, stages, initial_tokens)


def build(arm, plan, *settings, budget="flops", **options):
    """An arm of a plan; settings are the config and the sequence length."""
    return arm(ArmRequest(plan, *settings, budget=budget), **options)


def growths(schedule):
    return [stage.operators for stage in schedule.stages]


# The SLOP paper's main schedule (Table 8) and its tokens (section 4.1).
A, B = ModelDims(768, 2048, 6, 6), ModelDims(768, 2048, 8, 6)
C, D = ModelDims(768, 7680, 8, 6), ModelDims(2816, 7680, 8, 22)


def paper_plan(billions=(25, 10, 10, 10)):
    first, *rest = (round(count * 10**9) for count in billions)
    operators = (("layer",), ("ffn",), ("hidden", "mha"))
    stages = (GrowthStage(names, dims, count) for names, dims, count in zip(operators, (B, C, D), rest, strict=True))
    return GrowthSchedule(A, tuple(stages), first)


@st.composite
def ends(draw):
    """Two loadable structures, the second not smaller: grouped queries, heads that grow in number or in size."""
    kv_heads = draw(st.integers(1, 4))
    kv_target = kv_heads + draw(st.integers(0, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    heads_target = kv_target * (-(-heads // kv_target) + draw(st.integers(0, 2)))
    head_dim = 2 * draw(st.integers(4, 16))
    head_dim_target = head_dim + 2 * draw(st.sampled_from([0, 0, 3, 16]))
    hidden, hidden_target = heads * head_dim, heads_target * head_dim_target
    if draw(st.booleans()):  # a width that is not heads * head_dim
        hidden = heads * 8 * draw(st.integers(1, 8))
        hidden_target = heads_target * 8 * (-(-hidden // (heads_target * 8)) + draw(st.integers(0, 8)))
    multiple = draw(st.sampled_from([8, 96, 256]))
    ffn, layers = multiple * draw(st.integers(1, 12)), draw(st.integers(1, 12))
    more, deeper = multiple * draw(st.integers(0, 24)), draw(st.integers(0, 30))
    return (
        ModelDims(hidden, ffn, layers, heads, kv_heads, head_dim),
        ModelDims(hidden_target, ffn + more, layers + deeper, heads_target, kv_target, head_dim_target),
    )


@st.composite
def plans(draw):
    initial, target = draw(ends())
    between = target.replace(num_hidden_layers=initial.num_hidden_layers)
    tokens = st.integers(10**9, 10**12)
    structures = [between, target] if draw(st.booleans()) else [target]
    stages, before = [], initial
    for dims in structures:
        if dims != before:
            stages.append(GrowthStage(find_operators(before, dims), dims, draw(tokens)))
        before = dims
    pretrained = bool(stages) and draw(st.booleans())
    return GrowthSchedule(initial, tuple(stages), 0 if pretrained else draw(tokens))


@settings(max_examples=200)
@given(plans(), st.sampled_from([DEFAULT_CONFIG, {**DEFAULT_CONFIG, "model_type": "qwen3"}]))
def test_every_arm_reaches_the_target_with_the_plans_flops(plan, config):
    for name, make in ARMS.items():
        arm = build(make, plan, config, 1024)
        assert arm.target == plan.target
        assert arm.flops(config, 1024) == pytest.approx(plan.flops(config, 1024), rel=1e-6)
        assert all(stage.operators for stage in arm)
        for old, new in zip(arm.structures[:-1], arm.structures[1:], strict=True):
            assert all(getattr(old, size) <= getattr(new, size) for size in SIZES)
        if name not in FROM_RANDOM:
            assert arm.initial == plan.initial
            assert (arm.initial_tokens == 0) == (plan.initial_tokens == 0)
        else:
            assert arm.initial_tokens > 0


@settings(max_examples=50)
@given(plans())
def test_every_arm_at_the_plans_tokens(plan):
    for make in WITH_BUDGETS.values():
        arm = build(make, plan, budget="tokens")
        assert sum(arm.tokens) == pytest.approx(sum(plan.tokens), abs=1)
        assert arm.structures == build(make, plan).structures


@settings(max_examples=100)
@given(ends(), st.integers(1, 6))
def test_elle_keeps_to_multiples(pair, count):
    initial, target = pair
    ffn = math.gcd(initial.intermediate_size, target.intermediate_size)
    tied = all(dims.num_attention_heads * dims.head_dim == dims.hidden_size for dims in pair)
    for dims in build(elle, one_stage(initial, target), stages=count).structures:
        assert dims.intermediate_size % (256 if ffn % 256 == 0 else ffn) == 0
        assert not tied or dims.num_attention_heads * dims.head_dim == dims.hidden_size
        assert all(getattr(initial, size) <= getattr(dims, size) <= getattr(target, size) for size in SIZES)


@settings(max_examples=50)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 5), st.integers(1, 6))
def test_head_dim_stays_in_a_family_that_cannot_hold_another(heads, more_heads, count, layers):
    initial = ModelDims(heads * 64, 256, layers, heads)
    target = ModelDims((heads + more_heads) * 64, 1024, 6, heads + more_heads)
    plan = one_stage(initial, target)
    for arm in (build(make, plan, NEOX, 1024) for make in ARMS.values()):
        for dims in arm.structures:
            assert dims.head_dim == 64 and dims.num_attention_heads * 64 == dims.hidden_size
            assert dims.num_key_value_heads == dims.num_attention_heads
    assert build(elle, plan, NEOX, 1024, stages=count).target == target


def test_single_stage_trains_the_initial_model_as_the_plan_does():
    arm = build(single_stage, paper_plan(), budget="tokens")
    assert arm.structures == (A, D) and arm.tokens == (25 * 10**9, 30 * 10**9)
    rest = sum(count_flops_per_token(dims) for dims in (B, C, D)) * 10**10
    assert build(single_stage, paper_plan()).tokens == (25 * 10**9, round(rest / count_flops_per_token(D)))


def test_msg_of_the_authors_scripts():
    base = build(
        msg, one_stage(ModelDims(512, 768, 3, 8), ModelDims(768, 3072, 12, 12), 10**9, 10**9), budget="tokens"
    )
    assert growths(base) == [("ffn",), ("layer",), ("hidden",), ("mha",), ("layer",)]
    assert [str(dims) for dims in base.structures] == [
        "(512, 768, 3, 8)",
        "(512, 3072, 3, 8)",
        "(512, 3072, 6, 8)",
        "(768, 3072, 6, 8, head_dim 64)",
        "(768, 3072, 6, 12)",
        "(768, 3072, 12, 12)",
    ]
    assert base.tokens == (*[2 * 10**8] * 5, 10**9)
    large = build(msg, one_stage(ModelDims(512, 1024, 6, 8), ModelDims(1024, 4096, 24, 16)))
    assert [dims.num_hidden_layers for dims in large.structures] == [6, 6, 12, 12, 12, 24]


def test_msg_grows_heads_with_hidden_if_they_would_not_divide_it():
    arm = build(msg, paper_plan(), budget="tokens")
    assert growths(arm) == [("ffn",), ("layer",), ("mha", "hidden"), ("layer",)]
    assert [count / arm.initial_tokens for count in arm.tokens] == [1, 1, 1, 2, 5]
    assert arm.structures[2:4] == (ModelDims(768, 7680, 7, 6), ModelDims(2816, 7680, 7, 22))


def test_msg_leaves_out_dimensions_that_do_not_grow():
    deeper = ModelDims(64, 128, 16, 2)
    arm = build(msg, one_stage(ModelDims(64, 128, 4, 2), deeper, 10**9, 10**9), budget="tokens")
    assert [dims.num_hidden_layers for dims in arm.structures] == [4, 8, 16]
    assert [count / sum(arm.tokens) for count in arm.tokens] == [0.2, 0.3, 0.5]
    pretrained = build(msg, one_stage(ModelDims(64, 128, 4, 2), deeper, 8 * 10**9, 0), budget="tokens")
    assert pretrained.tokens == (0, 3 * 10**9, 5 * 10**9)


def test_msg_grows_the_size_of_heads_with_hidden():
    arm = build(msg, one_stage(ModelDims(64, 128, 2, 2), ModelDims(128, 256, 2, 2)))
    assert growths(arm) == [("ffn",), ("hidden", "head_dim")]


def test_elle_of_the_authors_scripts():
    plan = one_stage(ModelDims(384, 1536, 6, 6), ModelDims(768, 3072, 12, 12), 8 * 4 * 10**8, 25 * 10**8)
    arm = build(elle, plan, budget="tokens", stages=4)
    assert [dims.num_hidden_layers for dims in arm.structures] == [6, 8, 10, 11, 12]
    assert [dims.hidden_size for dims in arm.structures] == [384, 512, 640, 704, 768]
    assert [dims.intermediate_size for dims in arm.structures] == [1536, 2048, 2560, 2816, 3072]
    assert {dims.head_dim for dims in arm.structures} == {64}
    assert growths(arm) == [("layer", "mha", "ffn", "hidden")] * 4
    assert arm.tokens == (25 * 10**8, *[8 * 10**8] * 4)


def test_elle_has_as_many_stages_as_the_plan():
    assert [str(dims) for dims in build(elle, paper_plan()).structures] == [
        "(768, 2048, 6, 6)",
        "(1536, 4096, 7, 12)",
        "(2176, 5888, 8, 17)",
        "(2816, 7680, 8, 22)",
    ]
    with pytest.raises(PlanError, match="stages must be a whole number, 1 or more, got 0"):
        build(elle, paper_plan(), stages=0)


def middle_of(initial, target):
    return build(elle, one_stage(initial, target), stages=2).structures[1]


def test_elle_keeps_groups_of_queries():
    assert middle_of(ModelDims(512, 1024, 4, 8, 2), ModelDims(1024, 2048, 8, 16, 4)) == ModelDims(768, 1536, 6, 12, 3)
    middle = middle_of(ModelDims(576, 1536, 4, 9, 3), ModelDims(1024, 2816, 8, 16, 4))  # 3 queries a key, then 4
    assert middle.num_attention_heads % middle.num_key_value_heads == 0 and 9 <= middle.num_attention_heads <= 16


def test_elle_grows_the_size_of_a_fixed_number_of_heads():
    assert middle_of(ModelDims(64, 96, 2, 2), ModelDims(128, 160, 2, 2)) == ModelDims(96, 128, 2, 2)


def test_elle_keeps_a_head_dim_apart_from_hidden():
    small, large = ModelDims(1024, 3072, 8, 16, 8, 128), ModelDims(2048, 6144, 16, 32, 16, 128)
    assert middle_of(small, large) == ModelDims(1536, 4608, 12, 24, 12, 128)


def test_elle_merges_stages_that_grow_nothing():
    arm = build(elle, one_stage(ModelDims(64, 128, 2, 2), ModelDims(64, 128, 3, 2), 24, 25), budget="tokens", stages=3)
    assert arm.tokens == (25, 24)


def test_stacking_doubles_twice():
    arm = build(stacking, one_stage(A, ModelDims(2048, 5632, 10, 16), 4 * 10**9, 0), budget="tokens")
    assert [dims.num_hidden_layers for dims in arm.structures] == [3, 5, 10]
    assert {dims.hidden_size for dims in arm.structures} == {2048}
    assert arm.tokens == (5 * 10**8, 7 * 10**8, 28 * 10**8)
    assert [stage.init for stage in arm] == [{"layer": "stack"}] * 2
    two = build(stacking, one_stage(ModelDims(64, 128, 1, 2), ModelDims(64, 128, 2, 2), 400, 0), budget="tokens")
    assert two.tokens == (120, 280)
    assert build(stacking, one_stage(ModelDims(64, 128, 1, 2), ModelDims(64, 256, 1, 2), 400, 0)).stages == ()


def test_arms_use_the_inits_of_the_plan():
    small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 256, 4, 2)
    named = one_stage(small, large, init={"layer": "interleave"})
    assert [stage.init for stage in build(single_stage, named)] == [{"layer": "interleave"}]
    assert [stage.init for stage in build(msg, named)] == [None, {"layer": "interleave"}, {"layer": "interleave"}]
    same = one_stage(small, large, init="preserving")
    assert build(single_stage, same).stages[0].init == {"layer": "preserving", "ffn": "preserving"}
    assert build(single_stage, one_stage(small, large)).stages[0].init is None


def test_arms_of_a_plan_without_stages_are_the_plan():
    plan = GrowthSchedule(A, initial_tokens=10**9)
    assert from_scratch(plan) == plan
    assert all(build(make, plan) == plan for make in (single_stage, msg, elle))


@pytest.mark.parametrize("make", WITH_BUDGETS.values(), ids=WITH_BUDGETS)
def test_refused_requests(make):
    with pytest.raises(ScheduleError, match=r"no tokens to compare at; give it some: schedule\.with_tokens"):
        build(make, paper_plan((0, 0, 0, 0)))
    with pytest.raises(PlanError, match="unknown budget 'hours'"):
        build(make, paper_plan(), budget="hours")


def test_the_last_stage_takes_what_rounding_leaves_of_the_flops():
    costs = [count_flops_per_token(dims) for dims in (A, D)]
    first, last = allocate_tokens([1, 2], 1e15, costs)
    assert last / first == pytest.approx(2, rel=1e-5)
    assert abs(costs[0] * first + costs[1] * last - 1e15) <= costs[1] / 2


def test_without_costs_each_stage_is_rounded_by_itself():
    assert allocate_tokens([2.5, 1, 1], 1000) == [556, 222, 222]
    assert allocate_tokens([2.5, 1, 1], 1000, [1, 1, 1]) == [556, 222, 222]
    assert allocate_tokens([1, 1, 1], 100) == [33, 33, 33]
    assert allocate_tokens([1, 1, 1], 100, [1, 1, 1]) == [33, 33, 34]


@pytest.mark.parametrize("shares", [[1], [0, 0], [2, -1], []])
def test_invalid_shares(shares):
    with pytest.raises(PlanError, match="do not split tokens between 2 structures"):
        allocate_tokens(shares, 1e15, [1e9, 2e9])


def test_comparison_computed_by_hand():
    small, large = ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2)
    config = {"model_type": "llama", "vocab_size": 100, "tie_word_embeddings": False}
    plan = one_stage(small, large, 3 * 10**8, 10**9)
    arms = compare_at_equal_flops(plan, config, 32, CostModel(1e-15, 1e-9), ScalingLaw(1.0, 20.0, 0.5, 30.0, 0.5))
    assert [arm.name for arm in arms] == ["plan", "from_scratch", "single_stage", "copies", "msg", "elle", "stacking"]

    def params(layers):  # embeddings, final norm; attention, ffn and two norms a layer
        return 2 * 100 * 64 + 64 + layers * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64)

    def flops(layers):  # matrices but the embedding; half a square of scores and values
        return 6 * (100 * 64 + layers * (4 * 64 * 64 + 3 * 64 * 128 + 64 * 32))

    def floor(layers):
        return 1.0 + 20.0 / math.sqrt(params(layers))

    spent = flops(2) * 10**9 + flops(8) * 3 * 10**8
    seen = (30.0 / (floor(2) + 30.0 / math.sqrt(10**9) - floor(8))) ** 2  # the large one at that loss
    assert arms[0].schedule is plan
    assert arms[0].flops == pytest.approx(spent)
    assert arms[0].tokens == 13 * 10**8
    assert arms[0].hours == pytest.approx(1e-15 * spent + 1e-9 * 13 * 10**8)
    assert arms[0].loss == pytest.approx(floor(8) + 30.0 / math.sqrt(seen + 3 * 10**8))
    scratch = round(spent / flops(8))
    assert arms[1].tokens == scratch
    assert arms[1].hours == pytest.approx(1e-15 * spent + 1e-9 * scratch)
    assert arms[1].loss == pytest.approx(floor(8) + 30.0 / math.sqrt(scratch))
    assert arms[2].loss == pytest.approx(arms[0].loss)  # the plan has a single stage
    assert all(arm.flops == pytest.approx(spent, rel=1e-6) for arm in arms)


def test_losses_after_a_pretrained_model_need_already_seen():
    arms = compare_at_equal_flops(paper_plan((0, 10, 10, 10)))
    assert [arm.loss is None for arm in arms] == [arm.name not in FROM_RANDOM for arm in arms]
    assert is_growth_favoured(arms) is None
    known = {arm.name: arm for arm in compare_at_equal_flops(paper_plan((0, 10, 10, 10)), already_seen=25e9)}
    assert known["plan"].loss == pytest.approx(compare_at_equal_flops(paper_plan())[0].loss)
    assert known["stacking"].loss == arms[-1].loss  # random weights have seen nothing
    assert all(arm.hours is None for arm in arms)


def test_stacking_begins_with_random_weights_even_if_its_first_model_is_the_plans():
    plan = one_stage(ModelDims(64, 128, 2, 2), ModelDims(64, 128, 8, 2), 10**9, 0)
    losses = {arm.name: arm.loss for arm in compare_at_equal_flops(plan, already_seen=10**9)}
    arm = build(stacking, plan)
    assert arm.initial == plan.initial and arm.initial_tokens > 0
    params = [count_parameters(dims) for dims in arm.structures]
    assert losses["stacking"] == pytest.approx(ScalingLaw().staged_losses(params, arm.tokens)[-1])


@pytest.mark.parametrize(
    "billions, law, favoured",
    [
        ((25, 10, 10, 10), None, False),  # the paper's plan trains the small models past their use
        ((2.5, 1, 1, 1), None, True),
        ((25, 10, 10, 10), HOFFMANN, True),  # by 0.001
        ((0, 10, 10, 10), None, True),  # the initial model is free
    ],
)
def test_predicted_verdict(billions, law, favoured):
    arms = compare_at_equal_flops(paper_plan(billions), law=law, already_seen=0 if billions[0] else 25e9)
    assert is_growth_favoured(arms) is favoured


def test_is_growth_favoured_needs_both_losses():
    plan, scratch, *_ = compare_at_equal_flops(paper_plan())
    assert is_growth_favoured([plan]) is None and is_growth_favoured([scratch]) is None
    assert is_growth_favoured([plan, scratch]) is False


def test_a_plan_without_tokens_is_refused():
    with pytest.raises(ScheduleError, match="no tokens to compare at"):
        compare_at_equal_flops(paper_plan((0, 0, 0, 0)))
