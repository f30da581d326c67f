import dataclasses
import json
from itertools import permutations
from pathlib import Path

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slop_hf import ConfigSpace, ModelDims, SlopPlanner, explain
from slop_hf.cost.flops import count_paper_params, count_parameters
from slop_hf.errors import PlanError
from slop_hf.operators import find_operators

PAPER = json.loads((Path(__file__).parent / "paper_products.json").read_text())
INITIAL = ModelDims(768, 2048, 6, 6)


def paper_target(hidden, ffn, layers):
    return ModelDims(hidden, ffn, layers, hidden // 128)


def agrees(printed, computed):
    """Whether numbers agree up to one in the last printed digit: the paper rounds, and once cuts off (1.5258e26)."""
    exponent = len(f"{computed:.0f}") - 1
    return abs(printed - computed) <= 10.0 ** (exponent - 2)


def product_of(row, operators, objective):
    space = ConfigSpace(targets=[paper_target(*row["target"])])
    schedules = SlopPlanner(INITIAL, space, operators=operators, objective=objective).plan(top_k=24)
    return next(s.scores[objective] for s in schedules if s.sequence == row["sequence"])


@pytest.mark.parametrize("row", PAPER["table_1"], ids=lambda row: f"{row['target']} {row['sequence']}")
def test_table_1(row):
    assert agrees(row["product"], product_of(row, ("layer", "ffn", "hidden"), "delta_params"))


@pytest.mark.parametrize("row", PAPER["table_4"], ids=lambda row: row["sequence"])
def test_table_4(row):
    assert agrees(row["product"], product_of(row, ("layer", "hidden"), "delta_params_eq3"))


def test_optimum_of_table_1():
    targets = {tuple(row["target"]) for row in PAPER["table_1"]}
    space = ConfigSpace(targets=[paper_target(*target) for target in sorted(targets)])
    best, second = SlopPlanner(INITIAL, space).plan(top_k=2)
    assert (best.sequence, best.target) == ("l-f-h", paper_target(2816, 7680, 8))
    assert (second.sequence, second.target) == ("f-h-l", paper_target(1280, 3584, 40))
    by_stage = SlopPlanner(INITIAL, space, objective="delta_params_eq3").plan(top_k=1)[0]
    assert (by_stage.sequence, by_stage.target) == ("f-h-l", paper_target(1280, 3584, 40))


def grown(dims, name, target, followers):
    fields = {
        "layer": ["num_hidden_layers"],
        "ffn": ["intermediate_size"],
        "mha": ["num_attention_heads", "num_key_value_heads"],
        "hidden": ["hidden_size", *followers],
    }[name]
    return dims | {field: target[field] for field in fields}


def brute_force(initial, targets, operators, convention):
    """Enumerate all loadable schedules over plain dicts, as (product, target, order)."""
    schedules = []
    for target in targets:
        goal = target.as_dict()
        followers = [] if "mha" in operators else ["num_attention_heads", "num_key_value_heads"]
        for order in permutations(operators):
            dims, product, loadable = initial.as_dict(), 1.0, True
            for name in order:
                before, dims = dims, grown(dims, name, goal, followers)
                loadable &= dims["hidden_size"] % dims["num_attention_heads"] == 0
                base = initial.as_dict() if convention == "delta_params" else before
                product *= max(1.0, float(count(dims) - count(base)))
            if loadable:
                schedules.append((product, str(target), order))
    return sorted(schedules)


def count(dims):
    h, f, layers = dims["hidden_size"], dims["intermediate_size"], dims["num_hidden_layers"]
    return layers * (6 * h * h + 3 * h * f)


SIZES = st.integers(1, 4)


@st.composite
def spaces(draw):
    size = 16
    initial = ModelDims(4 * size, 8 * size, draw(SIZES), 4)
    targets = []
    for _ in range(draw(st.integers(1, 4))):
        heads = 4 * draw(st.integers(2, 6))
        ffn, layers = 8 * size + draw(st.integers(1, 200)), initial.num_hidden_layers + draw(SIZES)
        targets.append(ModelDims(heads * size, ffn, layers, heads))
    return initial, targets


@settings(max_examples=60, deadline=None)
@given(
    spaces(),
    st.sampled_from([("layer", "ffn", "hidden"), ("layer", "ffn", "hidden", "mha")]),
    st.sampled_from(["delta_params", "delta_params_eq3"]),
    st.integers(1, 30),
)
def test_equals_brute_force(space, operators, objective, top_k):
    initial, targets = space
    expected = brute_force(initial, targets, operators, objective)[:top_k]
    planner = SlopPlanner(initial, ConfigSpace(targets=targets), operators=operators, objective=objective)
    if not expected:
        with pytest.raises(PlanError, match="heads do not"):
            planner.plan(top_k)
        return
    schedules = planner.plan(top_k)
    assert [s.scores[objective] for s in schedules] == pytest.approx([product for product, _, _ in expected], rel=1e-9)
    known = {(target, order) for _, target, order in brute_force(initial, targets, operators, objective)}
    assert all((str(s.target), tuple(stage.operators[0] for stage in s)) in known for s in schedules)


def test_equals_dijkstra_on_the_papers_graph():
    """By Eq. 3 the best schedule is the shortest path in the graph of log weights; networkx finds it too."""
    import math

    target = paper_target(2816, 7680, 8)
    graph = networkx.DiGraph()
    for order in permutations(("layer", "ffn", "hidden")):
        dims = INITIAL
        for name in order:
            goal = grown(dims.as_dict(), name, target.as_dict(), ["num_attention_heads", "num_key_value_heads"])
            after = ModelDims(**goal)
            graph.add_edge(dims, after, weight=math.log(max(1, count_paper_params(after) - count_paper_params(dims))))
            dims = after
    length = networkx.dijkstra_path_length(graph, INITIAL, target)
    best = SlopPlanner(INITIAL, ConfigSpace(targets=[target]), objective="delta_params_eq3").plan(1)[0]
    assert math.log(best.scores["delta_params_eq3"]) == pytest.approx(length, rel=1e-12)


def test_space_meets_its_constraints():
    space = ConfigSpace(target_params=1e9, tolerance=0.05)
    structures = space.structures(INITIAL)
    assert paper_target(2816, 7680, 8) in structures
    for dims in structures:
        assert abs(count_parameters(dims) / 1e9 - 1) <= 0.05
        assert dims.hidden_size % 128 == 0 and dims.head_dim == 128
        assert dims.intermediate_size in (-(-dims.hidden_size * 8 // 3 // 256) * 256, 4 * dims.hidden_size)
        assert 24 <= dims.hidden_size / dims.num_hidden_layers <= 384
    assert len(set(structures)) == len(structures)


def test_space_equals_enumeration():
    structures = set(ConfigSpace(target_params=3e8, tolerance=0.03, count="paper").structures(INITIAL))
    expected = set()
    for hidden in range(768, 6000, 128):
        for ffn in {-(-hidden * 8 // 3 // 256) * 256, 4 * hidden}:
            for layers in range(6, 65):
                dims = ModelDims(hidden, ffn, layers, hidden // 128)
                close = abs(count_paper_params(dims) / 3e8 - 1) <= 0.03
                if close and 24 <= hidden / layers <= 384 and ffn >= 2048:
                    expected.add(dims)
    assert structures == expected and structures


def test_grouped_query_attention_keeps_its_group():
    structures = ConfigSpace(target_params=5e8).structures(ModelDims(768, 2048, 6, 6, 2))
    assert structures and all(dims.num_attention_heads == 3 * dims.num_key_value_heads for dims in structures)


def test_tokens_and_flops():
    space = ConfigSpace(targets=[paper_target(2816, 7680, 8)])
    best = SlopPlanner(INITIAL, space, objective="flops").plan(1, tokens=55e9)[0]
    assert best.tokens == (25 * 10**9, 10 * 10**9, 10 * 10**9, 10 * 10**9)
    assert best.scores["flops"] == pytest.approx(best.flops())
    others = SlopPlanner(INITIAL, space).plan(6, tokens=55e9)
    assert best.scores["flops"] == min(schedule.flops() for schedule in others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operators": ("depth",)}, "unknown operator 'depth'"),
        ({"operators": ()}, "one or more different names"),
        ({"operators": ("ffn", "ffn")}, "one or more different names"),
        ({"objective": "luck"}, r"unknown objective 'luck' \(known: delta_params, "),
    ],
)
def test_bad_planners(arguments, message):
    with pytest.raises(ValueError, match=message):
        SlopPlanner(INITIAL, ConfigSpace(target_params=1e9), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either targets or target_params"),
        ({"targets": [INITIAL], "target_params": 1e9}, "either targets or target_params"),
        ({"target_params": -1}, "must be a positive number"),
        ({"target_params": float("nan")}, "must be a positive number"),
        ({"target_params": 1e9, "tolerance": 1.5}, "tolerance must be a share"),
        ({"target_params": 1e9, "min_layers": 9, "max_layers": 8}, "bounds contradict: min_layers 9 and max_layers 8"),
        ({"target_params": 1e9, "min_aspect": 0}, "min_aspect must be a positive number, got 0"),
        ({"target_params": 1e9, "hidden_multiple": 0}, "hidden_multiple must be a whole number, 1 or more, got 0"),
        ({"target_params": 1e9, "count": "some"}, "'model' or 'paper'"),
    ],
)
def test_bad_spaces(arguments, message):
    with pytest.raises(PlanError, match=message):
        ConfigSpace(**arguments)


@pytest.mark.parametrize(
    ("space", "operators", "message"),
    [
        (ConfigSpace(target_params=1e6), ("layer", "ffn", "hidden"), "no structure .* the nearest is"),
        (ConfigSpace(targets=[ModelDims(384, 2048, 8, 3)]), ("layer",), "hidden_size would shrink"),
        (ConfigSpace(targets=[INITIAL.replace(num_hidden_layers=8)]), ("layer", "ffn"), "ffn would grow nothing"),
        (ConfigSpace(targets=[paper_target(2816, 7680, 8)]), ("layer", "ffn"), "needs .*hidden.* among the operators"),
        (ConfigSpace(targets=[paper_target(2816, 7680, 8)]), ("layer", "ffn", "hidden", "mha"), "heads do not"),
    ],
)
def test_impossible_plans(space, operators, message):
    with pytest.raises(PlanError, match=message):
        SlopPlanner(INITIAL, space, operators=operators).plan()


GROUPED = {
    "kv heads that would shrink on the way": (ModelDims(512, 1536, 8, 8), ModelDims(1024, 4096, 16, 16, 8), 2.2),
    "fewer groups on the way": (ModelDims(768, 2048, 6, 6), ModelDims(4096, 14336, 8, 32, 8), 12),
    "same query heads": (ModelDims(512, 1536, 8, 8, 2), ModelDims(512, 2048, 8, 8, 4), None),
    "same query heads of a wider model": (ModelDims(512, 1024, 4, 8, 2), ModelDims(1024, 2048, 4, 8, 8, 128), None),
}


@pytest.mark.parametrize("operators", [("layer", "ffn", "hidden"), ("layer", "ffn", "hidden", "mha")])
@pytest.mark.parametrize("mode", ["repeated", "joint"])
@pytest.mark.parametrize(("initial", "target", "max_factor"), GROUPED.values(), ids=GROUPED)
def test_key_value_heads_never_shrink(initial, target, max_factor, mode, operators):
    space = ConfigSpace(targets=[target], hidden_multiple=512, ffn_multiple=2048)
    if initial.hidden_size == target.hidden_size:
        operators = ("layer", "ffn", "hidden", "mha")
    stages = 6 if max_factor else len({*find_operators(initial, target)} & {*operators})
    planner = SlopPlanner(initial, space, operators=operators, mode=mode, stages=stages, max_factor=max_factor)
    best = planner.plan(1)[0]
    assert (best.initial, best.target) == (initial, target)


def test_a_head_size_does_not_grow_without_the_hidden_size():
    initial = ModelDims(384, 512, 2, 3)
    space = ConfigSpace(targets=[initial.replace(num_hidden_layers=3, head_dim=256)])
    for mode in ("once", "repeated", "joint"):
        stages = None if mode == "once" else 1
        operators = ("layer",) if mode == "once" else ("layer", "hidden")
        with pytest.raises(PlanError, match=r"needs head_dim among the operators"):
            SlopPlanner(initial, space, operators=operators, mode=mode, stages=stages).plan()


def test_bad_requests():
    planner = SlopPlanner(INITIAL, ConfigSpace(target_params=1e9), objective="flops")
    with pytest.raises(PlanError, match="needs a token budget"):
        planner.plan()
    with pytest.raises(PlanError, match="top_k must be a whole number, 1 or more"):
        planner.plan(0, tokens=1e9)


def test_a_probe_reranks_the_schedules():
    planner = SlopPlanner(INITIAL, ConfigSpace(targets=[paper_target(2816, 7680, 8)]))
    by_prediction = planner.plan(3)
    assert planner.plan(3, probe=lambda schedules: schedules[::-1]) == by_prediction[::-1]
    for wrong in (lambda schedules: schedules[1:], lambda schedules: [schedules[0]] * 3):
        with pytest.raises(PlanError, match="given 3 schedules and returned others"):
            planner.plan(3, probe=wrong)


def test_explain_skips_structures_that_no_model_can_have():
    """The grid has a hidden size of 80, which heads of 32 do not fill."""
    space = ConfigSpace(targets=[ModelDims(128, 256, 3, 4)], hidden_multiple=16)
    planner = SlopPlanner(ModelDims(64, 256, 2, 2), space, operators=("layer", "hidden"), mode="joint", stages=2)
    schedules = planner.plan(2)
    assert {dims.hidden_size for schedule in schedules for dims in schedule.structures} <= {64, 96, 128}
    choices = explain(planner, schedules[0])
    assert [choice.taken.stage for choice in choices] == list(schedules[0].stages)
    assert all(choice.taken.value <= other.value for choice in choices for other in choice.others)


def test_explain_refuses_a_growth_that_the_planner_does_not_allow():
    planner = SlopPlanner(INITIAL, ConfigSpace(targets=[paper_target(2816, 7680, 8)]))
    schedule = planner.plan(1)[0]
    limited = dataclasses.replace(planner, mode="joint", stages=3, max_factor=2)
    with pytest.raises(PlanError, match=r"no schedule of this planner grows \(768, .*\) in stage 1; explain a"):
        explain(limited, schedule)
