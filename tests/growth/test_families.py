"""The conformance suite over all families, and what is particular to single families."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from slop_hf import GrowthStage, ModelDims, grow_model
from slop_hf.architectures import ARCHITECTURES, LLAMA
from slop_hf.errors import ArchitectureError, GrowthError
from slop_hf.growth import INITS, inits, plan_growth
from slop_hf.growth.inits import InitDistribution
from slop_hf.testing import (
    GQA,
    MHA,
    MQA,
    Case,
    build_exactness_page,
    build_tiny_model,
    check,
    check_conformance,
    compute_logit_error,
    list_conformance_cases,
    make_probe_tokens,
)
from slop_hf.testing.suite import EXPERT_GROWTHS

LONG = torch.randint(64, (2, 50), generator=torch.Generator().manual_seed(2))
EXACTNESS = Path(__file__).parents[2] / "docs" / "exactness.md"

# The cases that the library refuses, by operator and init, each with a part of the reason.
UNEVEN_SPREAD = {("head_dim", "spread"): "whole multiple"}
HEAD_NORMS = {("head_dim", init): "normalises each head" for init in ("preserving", "spread")}
ALL_HEADS_NORMS = {
    **{("head_dim", init): "normalises all heads together" for init in ("preserving", "spread")},
    ("mha", "preserving"): "would begin with keys and queries of 0",
    ("mha", "copy"): "has to copy all of them equally often",
}
TIED_LAYER_NORMS = {("hidden", init): "tied embeddings" for init in ("preserving", "copy")}
#: Their heads have a size of hidden_size / num_attention_heads.
FIXED_HEADS = {
    **{(operator, init): "head_dim stays 12" for operator in ("mha", "head_dim") for init in INITS[operator]},
    **TIED_LAYER_NORMS,
}
#: Norms over all heads together, and a hidden size that grows with the heads.
OLMOE = {
    **{(operator, init): "head_dim stays 12" for operator in ("mha", "head_dim") for init in INITS[operator]},
    ("hidden", "preserving"): "would begin with keys and queries of 0",
    ("hidden", "copy"): "has to copy all of them equally often",
}
REFUSED = {
    **dict.fromkeys(("qwen3", "qwen3_moe", "gemma3_text"), HEAD_NORMS),
    **dict.fromkeys(("olmo2", "olmo3"), ALL_HEADS_NORMS),
    **dict.fromkeys(("gpt_neox", "gpt2", "stablelm"), FIXED_HEADS),
    "olmoe": OLMOE,
    "starcoder2": {**UNEVEN_SPREAD, **TIED_LAYER_NORMS},
}
#: Families all of whose short cases run in the usual suite; of the others a few, and in the slow tests all.
THOROUGH = ("llama", "gpt_neox")
FEW = (("layer", "preserving"), ("hidden", "copy"))


def check_refusals(results):
    expected = REFUSED.get(results[0].case.family, UNEVEN_SPREAD)
    refused = [result for result in results if result.refused]
    for result in refused:
        pair = (result.case.operator, result.case.init)
        assert pair in expected and expected[pair] in result.refused, f"{result.case}: {result.refused}"
    return {(result.case.operator, result.case.init) for result in refused}


@pytest.mark.parametrize("family", THOROUGH)
def test_conformance(family):
    """Some cases; the slow tests go through all."""
    results = check_conformance(family, every=False)
    check_refusals(results)
    grown = [result for result in results if not result.refused]
    assert len(grown) > len(results) / 2
    assert all(result.error < 1e-5 for result in grown if result.preserves)
    # The first layers of all keep the function by a zero at their end, and in some families only that learns at once.
    deeper = [result for result in grown if result.case.dims.num_hidden_layers]
    assert all(result.live > 0.2 for result in deeper), "too few new entries learn from the first step on"


@pytest.mark.parametrize("family", sorted(set(ARCHITECTURES) - {*THOROUGH, "mistral", "qwen2", "qwen3", "gemma2"}))
def test_a_few_cases_of_every_family(family):
    cases = [case for case in list_conformance_cases(family, every=False) if (case.operator, case.init) in FEW]
    results = [check(case) for case in cases if case.dims.num_hidden_layers]
    check_refusals(results)
    assert len(results) == len(FEW) and all(result.error < 1e-5 for result in results if not result.refused)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_conformance_of_every_case(family, dtype):
    assert check_refusals(check_conformance(family, dtype)) == set(REFUSED.get(family, UNEVEN_SPREAD))


def test_the_cases_of_a_family():
    for family in ARCHITECTURES:
        every = list_conformance_cases(family)
        assert {(case.operator, case.init) for case in every} == {
            (name, init) for name in INITS for init in INITS[name]
        }
        assert len(every) == (86 if family in ("gpt_neox", "gpt2") else 254) and len(set(map(str, every))) == len(
            every
        )
        some = list_conformance_cases(family, every=False)
        assert set(map(str, some)) < set(map(str, every)) and len(some) == 23
        assert {(case.dims, case.tied) for case in some} == {(case.dims, case.tied) for case in every}


# --- the suite finds mistakes ---


def broken(monkeypatch, **changes):
    """Replace Llama's table by one with rows changed or removed."""
    rows = {row.name: row for row in LLAMA.parameters}
    for name, change in changes.items():
        name = next(row for row in rows if row.endswith(f"{name}.weight"))
        row = rows.pop(name)
        if change:
            rows[name] = dataclasses.replace(row, **change)
    monkeypatch.setitem(ARCHITECTURES, "llama", dataclasses.replace(LLAMA, parameters=tuple(rows.values())))


@pytest.mark.parametrize(
    ("changes", "operator", "message"),
    [
        ({"q_proj": None}, "ffn", "has a parameter model.layers.0.self_attn.q_proj.weight, unlike the axis table"),
        (
            {"down_proj": {"kind": "embedding"}},
            "ffn",
            "says that the function is preserved, but logits differ by",
        ),
        (
            {"norm": {"kind": "projection"}},
            "hidden",
            "says that the function is preserved, but logits differ by",
        ),
    ],
)
def test_a_wrong_table_is_found(monkeypatch, changes, operator, message):
    broken(monkeypatch, **changes)
    case = next(
        case for case in list_conformance_cases("llama") if (case.operator, case.init) == (operator, "preserving")
    )
    with pytest.raises((AssertionError, GrowthError), match=message):
        check(case)


def zeros(operator, row, role, initializer_range):
    return InitDistribution(float(role == "norm"), 0.0)


def half(operator, row, role, initializer_range):
    return InitDistribution(float(role == "norm"), 0.0 if role == "read" else initializer_range)


@pytest.mark.parametrize(
    ("init", "operator", "claimed", "message"),
    [
        (zeros, "ffn", True, r"llama ffn own .*: new entries do not depend on the seed"),
        (inits.random, "ffn", True, r"llama ffn own .*: the plan says that the function is preserved"),
        (half, "ffn", False, r"llama ffn own .*: the function is preserved, but GrowthPlan.preserves denies it"),
    ],
)
def test_a_wrong_init_is_found(monkeypatch, init, operator, claimed, message):
    from slop_hf.growth import plan

    monkeypatch.setitem(INITS, operator, (*INITS[operator], "own"))
    monkeypatch.setitem(inits.WIDTH_INITS, "own", init)
    if claimed:
        monkeypatch.setattr(plan, "EXACT", inits.EXACT | {"own"})
    cases = [case for case in list_conformance_cases("llama", every=False) if case.init == "own"]
    assert cases, "a registered init has cases"
    with pytest.raises(AssertionError, match=message):
        check(cases[0])


def test_dead_slots_are_found(monkeypatch):
    """Zeros on both sides of the new slots keep the function, and never learn."""

    def dead(operator, row, role, initializer_range):
        return InitDistribution(
            0.0, 0.0 if role == "read" or row.name.endswith("gate_proj.weight") else initializer_range
        )

    monkeypatch.setitem(inits.WIDTH_INITS, "preserving", dead)
    with pytest.raises(AssertionError, match=r"new slots of .*mlp.* have no gradient in 3 steps"):
        check(Case("llama", "ffn", MHA.replace(intermediate_size=60), "preserving"))


# --- rotary embeddings ---

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
#: Its ramp, pairs 3.3 to 5.6 in a head of 12, cut to 3 to 6; in one of 24 spread pairs, 6.6 to 11.3 cut to 6 to 12.
LONG_YARN = {**YARN, "original_max_position_embeddings": 1024}
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LONG_YARN, LINEAR], ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("head_dim", [14, 24])
def test_head_dim_under_scaled_rotary_embeddings(rope, head_dim):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-10)):
        model = build_tiny_model("llama", GQA, dtype, rope_parameters=rope)
        assert compute_logit_error(model, grow_model(model, "head_dim", head_dim, init="preserving"), LONG) < tolerance


@pytest.mark.parametrize("rope", [LLAMA3, YARN, LINEAR, {**LONG_YARN, "truncate": False}], ids=str)
@pytest.mark.parametrize("head_dim", [24, 36])
def test_spread_pairs_under_scaled_rotary_embeddings(rope, head_dim):
    model = build_tiny_model("qwen2", GQA, torch.float64, rope_parameters=rope)
    grown = grow_model(model, "head_dim", head_dim, init="spread")
    assert grown.config.rope_parameters["rope_theta"] == rope["rope_theta"]
    assert compute_logit_error(model, grown, LONG) < 1e-10


@pytest.mark.parametrize(
    ("rope", "arguments", "message"),
    [
        (
            LONG_YARN,
            {"init": "spread"},
            "'spread' cannot keep yarn's frequencies .*use init 'preserving', or set trunc",
        ),
        (
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            {},
            "under rope_type 'dynamic'.*supported: defau",
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {}, "only grow under full rotary embeddings"),
        ({"rope_theta": 1e25}, {}, "would raise rope_theta 1e.25 above the largest float32; use init 'spread'"),
    ],
)
def test_refused_rotary_embeddings(rope, arguments, message):
    model = build_tiny_model("llama", rope_parameters=rope)
    with pytest.raises(GrowthError, match=message):
        grow_model(model, "head_dim", 24, **arguments)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_yarn_is_exact_or_refused(data):
    """Whatever the context, theta and truncation, `spread` and `preserving` keep all frequencies or are refused."""
    draw = data.draw
    rope = {
        **YARN,
        "rope_theta": draw(st.sampled_from([2.0, 10.0, 1e4, 5e5])),
        "original_max_position_embeddings": draw(st.integers(8, 100_000)),
        "truncate": draw(st.booleans()),
    }
    model = build_tiny_model(
        "llama", dataclasses.replace(MQA, num_hidden_layers=1), torch.float64, rope_parameters=rope
    )
    init = draw(st.sampled_from(["preserving", "spread"]))
    try:
        grown = grow_model(model, "head_dim", draw(st.sampled_from([24, 36])), init=init)
    except GrowthError as refusal:
        assert "yarn" in str(refusal)
        return
    assert compute_logit_error(model, grown) < 1e-10


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_partial_rotary_embeddings_of_gpt_neox(share):
    settings = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": share, "rope_type": "default"}}
    dims = ModelDims(64, 40, 2, 4)
    for init in ("preserving", "copy"):
        new = dims.replace(hidden_size=128, num_attention_heads=8, num_key_value_heads=8)
        assert check(Case("gpt_neox", "hidden", new, init, dims, settings=settings)).error < 1e-5
    for parallel in (False, True):
        settings["use_parallel_residual"] = parallel
        assert check(Case("gpt_neox", "layer", dims.replace(num_hidden_layers=3), "preserving", dims)).error < 1e-5


# --- layers of several types ---

WINDOWED = {
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {},
    "olmo3": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    "mistral": {},
}


@pytest.mark.parametrize("family", WINDOWED)
def test_sliding_windows_stay_with_their_layers(family):
    dims = GQA.replace(num_hidden_layers=3)
    extra = dict(WINDOWED[family])
    if family != "mistral":
        extra["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    model = build_tiny_model(family, dims, torch.float64, **extra)
    assert model.config.sliding_window == 8
    unwindowed = build_tiny_model(family, dims, torch.float64, **{**extra, "sliding_window": 4096})
    assert compute_logit_error(model, unwindowed, LONG) > 0.01, "the window does not matter, so the test shows nothing"
    growths = (("layer", "preserving", 5), ("ffn", "copy", 80), ("hidden", "preserving", 72))
    for operator, init, size in growths if family in ("gemma2", "qwen2", "mistral") else growths[::2]:
        grown = grow_model(model, operator, size, init=init)
        assert compute_logit_error(model, grown, LONG) < 1e-10, operator
    if family == "mistral":
        return
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    for init, types in (("preserving", "ssffs"), ("interleave", "ssffs"), ("stack", "sfssf")):
        grown = grow_model(model, "layer", 5, init=init)
        assert grown.config.layer_types == [kinds[letter] for letter in types]
        if family not in ("gemma3_text", "olmo3"):
            check(Case(family, "layer", dims.replace(num_hidden_layers=5), init, dims, settings=extra))


def test_layers_without_positions_stay_so():
    """SmolLM3: `no_rope_layers` follows the layers, and a deeper model begins with the pattern repeated."""
    dims = GQA.replace(num_hidden_layers=3)
    model = build_tiny_model("smollm3", dims, torch.float64, no_rope_layers=[1, 0, 1])
    rotated = build_tiny_model("smollm3", dims, torch.float64, no_rope_layers=[1, 1, 1])
    assert compute_logit_error(model, rotated) > 0.01
    for init, pattern in (("preserving", [1, 1, 0, 0, 1]), ("stack", [1, 0, 1, 1, 0])):
        grown = grow_model(model, "layer", 5, init=init)
        assert grown.config.no_rope_layers == pattern and len(grown.config.layer_types) == 5
        assert [layer.self_attn.use_rope for layer in grown.model.layers] == pattern
    assert compute_logit_error(model, grow_model(model, "layer", 5, init="preserving")) < 1e-10
    assert dims.replace(num_hidden_layers=4).to_config(model.config).no_rope_layers == [1, 0, 1, 1]


def test_an_inserted_layer_learns_in_new_hidden_slots():
    """The gains of its post-norms are zero, and its branches write zeros to new slots: one of them must not be 0."""
    new = GQA.replace(num_hidden_layers=3, hidden_size=72)
    for init in ("preserving", "copy"):
        inits = {"layer": "preserving", "hidden": init}
        result = check(Case("gemma2", ("layer", "hidden"), new, inits, GQA, dtype=torch.float64))
        assert result.preserves and result.error < 1e-10


def test_noise_of_copies_sums_to_zero_in_float64():
    for operator, size in (("ffn", 120), ("mha", 12)):
        model = build_tiny_model("llama", GQA, torch.float64)
        assert 0 < compute_logit_error(model, grow_model(model, operator, size, init="copy", noise=5.0)) < 1e-12


def test_noise_writes_nothing_to_new_hidden_slots():
    """The rounding of a zero sum would be magnified by every later post-norm."""
    dims, new = ModelDims(2, 17, 3, 1, 1, 4), ModelDims(18, 28, 4, 6, 2, 4)
    inits = {"layer": "preserving", "mha": "copy", "ffn": "copy", "hidden": "preserving"}
    model = build_tiny_model("gemma2", dims, torch.float64)
    grown = grow_model(model, GrowthStage(tuple(inits), new, init=inits), noise=5.0)
    assert compute_logit_error(model, grown) < 1e-12
    assert not grown.model.layers[0].mlp.down_proj.weight[2:].any()


# --- heads and their keys ---


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("init", ["preserving", "copy"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((4, 2), (4, 4)),  # GQA to MHA
        ((4, 1), (4, 2)),  # MQA to GQA
        ((4, 2), (8, 4)),  # key/value heads at a constant group
        ((4, 2), (6, 3)),
        ((4, 2), (8, 2)),  # query heads at constant key/value heads
        ((4, 1), (6, 1)),
        ((4, 2), (12, 4)),  # both
        ((4, 4), (8, 4)),  # MHA to GQA by more query heads
    ],
    ids=str,
)
def test_query_and_key_value_heads(family, init, old, new):
    dims = ModelDims(48, 40, 2, *old, 12)
    grown = dims.replace(num_attention_heads=new[0], num_key_value_heads=new[1])
    source = build_tiny_model(family, dims, torch.float64)
    assert compute_logit_error(source, grow_model(source, "mha", grown, init=init)) < 1e-10


def test_query_heads_cannot_leave_their_keys():
    with pytest.raises(GrowthError, match="would separate query heads from their keys; keep num_key_value_heads at 2"):
        grow_model(build_tiny_model("llama", ModelDims(48, 40, 1, 12, 2, 12)), "mha", ModelDims(48, 40, 1, 12, 3, 12))


# --- fused and transposed weights ---


def fuse(llama, phi3):
    """Copy the weights of a Llama into a Phi-3, whose matrices hold queries, keys and values, or gates and factors."""
    weights = dict(llama.named_parameters())
    for name, parameter in phi3.named_parameters():
        if (layer := name.partition("self_attn.qkv_proj")[0]) != name:
            parts = [weights[f"{layer}self_attn.{part}_proj.weight"] for part in "qkv"]
        elif (layer := name.partition("mlp.gate_up_proj")[0]) != name:
            parts = [weights[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        else:
            parts = [weights[name]]
        with torch.no_grad():
            parameter.copy_(torch.cat(parts))
    return phi3


@pytest.mark.parametrize(
    ("operator", "new", "init"),
    [
        ("mha", 6, "copy"),
        ("mha", {"num_attention_heads": 8, "num_key_value_heads": 4}, "copy"),
        ("mha", {"num_attention_heads": 4, "num_key_value_heads": 4}, "preserving"),
        ("ffn", 60, "rms_copy"),
        ("hidden", 96, "copy"),
        ("layer", 3, "stack"),
    ],
    ids=str,
)
def test_a_fused_weight_grows_like_its_parts(operator, new, init):
    llama = build_tiny_model("llama", GQA, torch.float64)
    phi3 = fuse(llama, build_tiny_model("phi3", GQA, torch.float64))
    assert compute_logit_error(llama, phi3) < 1e-12
    grown = grow_model(phi3, operator, new, init=init, noise=0.0)
    expected = fuse(grow_model(llama, operator, new, init=init, noise=0.0), copy.deepcopy(grown))
    for (name, one), other in zip(grown.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_queries_of_a_fused_weight_are_scaled_alone():
    model = build_tiny_model("phi3", GQA, torch.float64)
    grown = grow_model(model, "head_dim", 24, init="spread")
    old, new = (item.model.layers[0].self_attn.qkv_proj.weight for item in (model, grown))
    queries, keys, values = new.split([96, 48, 48])
    assert torch.equal(queries[0:24:2], old[:12] * math.sqrt(2)) and queries[1:24:2].abs().min() > 0
    assert torch.equal(keys[0:24:2], old[48:60]) and not keys[1:24:2].any()
    assert torch.equal(values[0:24:2], old[72:84]) and values[1:24:2].abs().min() > 0
    assert compute_logit_error(model, grown) < 1e-10


def test_a_transposed_weight_writes_its_last_dimension():
    model = build_tiny_model("gpt2", MHA, torch.float64)
    assert model.config.n_inner == 40 and ModelDims.from_config({"model_type": "gpt2", **SMALL_GPT2}) == MHA
    ffn = grow_model(model, "ffn", 80, init="copy", noise=0.0)
    old, new = (item.transformer.h[0].mlp for item in (model, ffn))
    assert torch.equal(new.c_fc.weight, torch.cat([old.c_fc.weight] * 2, dim=1))
    assert torch.equal(new.c_proj.weight, torch.cat([old.c_proj.weight] * 2) / 2)
    noisy = grow_model(model, "ffn", 80, init="copy", noise=5.0)
    assert 0 < compute_logit_error(model, noisy) < 1e-12 and ffn.config.n_inner == 80
    wide = {"hidden_size": 72, "num_attention_heads": 6}
    hidden = grow_model(model, "hidden", wide, init="preserving")
    assert compute_logit_error(model, hidden) < 1e-10 and hidden.config.n_embd == 72
    old, new = (item.transformer.h[0].attn.c_attn.weight for item in (model, hidden))
    assert [part.shape for part in new.split(72, dim=1)] == [(72, 72)] * 3
    for before, after in zip(old.split(48, dim=1), new.split(72, dim=1), strict=True):
        assert torch.equal(after[:48, :48], before)


SMALL_GPT2 = {"n_embd": 48, "n_inner": 40, "n_layer": 2, "n_head": 4}


def test_an_ffn_of_four_times_the_width_need_not_be_named():
    plain = {name: size for name, size in SMALL_GPT2.items() if name != "n_inner"}
    assert ModelDims.from_config({"model_type": "gpt2", **plain}) == MHA.replace(intermediate_size=192)
    model = build_tiny_model("gpt2", MHA, n_inner=None)
    grown = grow_model(model, "hidden", {"hidden_size": 96, "num_attention_heads": 8}, init="copy")
    assert grown.config.n_inner == 192 and compute_logit_error(model, grown) < 1e-5


# --- norms over all heads ---


def test_new_heads_do_not_change_the_mean_square_of_all_heads():
    """OLMo 2: old queries grow by sqrt(3 / 2), the gain takes it back, and new ones are 0."""
    model = build_tiny_model("olmo2", MQA, torch.float64)
    grown = grow_model(model, "mha", 6, init="preserving")
    old, new = (item.model.layers[0].self_attn for item in (model, grown))
    assert torch.allclose(new.q_proj.weight[:48], old.q_proj.weight * math.sqrt(1.5), rtol=1e-12)
    assert torch.allclose(new.q_norm.weight[:48], old.q_norm.weight / math.sqrt(1.5), rtol=1e-12)
    assert not new.q_proj.weight[48:].any() and new.q_norm.weight[48:].std() > 0
    assert torch.equal(new.k_proj.weight, old.k_proj.weight)
    assert compute_logit_error(model, grown) < 1e-10


@pytest.mark.parametrize(
    ("dims", "new", "init", "message"),
    [
        (MHA, 8, "preserving", "keep num_key_value_heads at 4, or use init 'copy' and a whole multiple, or 'random'"),
        (GQA, 6, "copy", "grow 4 query and 2 key/value heads to whole multiples, or use init 'rms_copy'"),
    ],
)
def test_heads_that_a_norm_over_all_heads_forbids(dims, new, init, message):
    with pytest.raises(GrowthError, match=f"olmo2 normalises all heads together.*{message}"):
        grow_model(build_tiny_model("olmo2", dims), "mha", new, init=init)


def test_heads_that_a_norm_over_all_heads_sees_grow_apart_from_their_size():
    inits = {"mha": "preserving", "head_dim": "random"}
    larger = GQA.replace(num_attention_heads=8, head_dim=GQA.head_dim * 2)
    stage = GrowthStage(("mha", "head_dim"), larger, init=inits)
    with pytest.raises(GrowthError, match="grow head_dim and the heads in growths of their own"):
        plan_growth(build_tiny_model("olmo2", GQA).config, stage)


def test_uneven_copies_of_normalised_heads_are_not_exact():
    case = Case("olmo2", "mha", GQA.replace(num_attention_heads=6), "rms_copy", GQA)
    assert not check(case).preserves
    assert check(dataclasses.replace(case, new_dims=GQA.replace(num_attention_heads=8))).preserves


# --- refusals ---


@pytest.mark.parametrize(
    ("family", "flag", "message"),
    [
        ("stablelm", "qk_layernorm", "stablelm with qk_layernorm cannot grow: each head has a norm of its own"),
        ("gpt2", "scale_attn_by_inverse_layer_idx", "the attention of a layer would change with its number; set it"),
        (
            "qwen3_moe",
            "mlp_only_layers",
            "the layers that it lists have no experts, and growth needs layers of one kind",
        ),
        ("gpt2", "add_cross_attention", "it belongs to an encoder; use a model without it"),
    ],
)
def test_settings_that_a_family_cannot_grow_with(family, flag, message):
    with pytest.raises(GrowthError, match=message):
        plan_growth({**build_tiny_model(family, MHA).config.to_dict(), flag: True}, "ffn", 60)


@pytest.mark.parametrize("init", ["preserving", "copy"])
def test_a_tied_layer_norm_cannot_be_padded(init):
    model = build_tiny_model("gpt_neox", MHA, tied=True)
    uneven = MHA.replace(hidden_size=72, num_attention_heads=6, num_key_value_heads=6)
    with pytest.raises(GrowthError, match="tied embeddings cannot be padded exactly"):
        grow_model(model, "hidden", uneven, init=init)
    assert grow_model(model, "hidden", uneven, init="random").config.hidden_size == 72
    double = MHA.replace(hidden_size=96, num_attention_heads=8, num_key_value_heads=8)
    if init == "copy":
        assert compute_logit_error(model, grow_model(model, "hidden", double, init=init)) < 1e-5


def test_an_unknown_family():
    with pytest.raises(
        ArchitectureError, match=r"no axis table for model_type 'opt' \(supported: llama, .*docs/growth"
    ):
        check_conformance("opt")
    with pytest.raises(ArchitectureError, match="'bloom'"):
        plan_growth({"model_type": "bloom"}, "ffn", 64)


def test_a_third_partys_family(monkeypatch):
    """Qwen 2's model with Llama's table and the biases."""
    qwen2 = ARCHITECTURES["qwen2"]
    table = dataclasses.replace(LLAMA, model_type="qwen2", parameters=qwen2.parameters)
    monkeypatch.setitem(ARCHITECTURES, "qwen2", table)
    cases = list_conformance_cases("qwen2", every=False)[4::3]
    assert all(check(case).refused == "" for case in cases)


# --- the tools and the page ---


def test_models_and_errors():
    one, same, other = build_tiny_model("llama"), build_tiny_model("llama"), build_tiny_model("llama", seed=1)
    assert compute_logit_error(one, same) == 0 and compute_logit_error(one, other) > 0.1
    gains = build_tiny_model("gemma2").model.norm.weight + 1
    assert 0.5 <= gains.min() < gains.max() <= 1.5
    assert build_tiny_model("llama", tied=True).lm_head.weight.shape == (64, 48)
    assert make_probe_tokens().shape == (2, 20) and torch.equal(make_probe_tokens(), make_probe_tokens())
    refused = check(Case("llama", "head_dim", MHA.replace(head_dim=18), "spread"))
    assert "whole multiple" in refused.refused and math.isnan(refused.error)
    assert isinstance(
        build_tiny_model("mistral"), type(AutoModelForCausalLM.from_config(build_tiny_model("mistral").config))
    )


def rows(page, heading="# "):
    """Return the cells of the table below a heading."""
    section = f"\n{page}".partition(f"\n{heading}")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_in_docs_has_the_suites_rows():
    """Run `python -m slop_hf.testing --output docs/exactness.md` after a change of families, operators or inits."""
    page = EXACTNESS.read_text(encoding="utf-8")
    expected = [[family, name, init] for family in ARCHITECTURES for name in INITS for init in INITS[name]]
    assert [row[:3] for row in rows(page)] == expected
    for family, _, init, keeps, double, single, *_ in rows(page):
        assert keeps in ("yes", "no", "", *(["if whole"] if init == "rms_copy" else [])), (family, init)
        if keeps == "yes":
            assert float(double) <= 1e-10 and float(single) <= 1e-5
    of_experts = rows(page, "## Experts")
    assert [(row[0], row[2], row[4]) for row in of_experts] == [
        (family, str(sizes["num_experts"]), init) for family, sizes, init in EXPERT_GROWTHS
    ]
    for _, _, _, _, init, keeps, double, *_ in of_experts:
        assert (keeps == "yes") == (init == "preserving") == (float(double) <= 1e-10)


@pytest.mark.slow
def test_the_page_is_the_same_each_time():
    assert rows(build_exactness_page(["gpt_neox"])) == rows(build_exactness_page(["gpt_neox"]))
