"""Every mode and objective of the planner, compared with plain enumeration of all paths in small spaces."""

import math
from fractions import Fraction
from itertools import pairwise, permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slop_hf import ConfigSpace, ModelDims, SlopPlanner
from slop_hf.cost.flops import count_flops_per_token, count_paper_params, count_parameters
from slop_hf.cost.hours import CostModel
from slop_hf.cost.scaling_law import ScalingLaw
from slop_hf.errors import PlanError
from slop_hf.operators import find_operators
from slop_hf.planning.objectives import OBJECTIVES

INITIAL = ModelDims(64, 128, 2, 4)
COST = CostModel(3e-9, 2e-3)
LAW = ScalingLaw()
CONFIG = {"model_type": "llama", "vocab_size": 96, "tie_word_embeddings": False}
HIDDEN_MULTIPLE, FFN_MULTIPLE, SEQUENCE_LENGTH = 16, 48, 32


def space_of(targets):
    return ConfigSpace(
        targets=targets,
        config=CONFIG,
        sequence_length=SEQUENCE_LENGTH,
        hidden_multiple=HIDDEN_MULTIPLE,
        ffn_multiple=FFN_MULTIPLE,
    )


def steps(first, last, multiple, others):
    between = {size for size in range(first + 1, last) if size % multiple == 0}
    return sorted({first, last} | between | {size for size in others if first <= size <= last})


def kv_heads_between(initial, target, heads):
    """Key/value heads of a structure between two ends: groups as at the start, or larger ones if the end has fewer."""
    group = initial.num_attention_heads // initial.num_key_value_heads
    if heads == target.num_attention_heads:
        group = heads // target.num_key_value_heads
    if heads % group or heads // group <= target.num_key_value_heads:
        return 0 if heads % group else heads // group
    few = range(initial.num_key_value_heads, target.num_key_value_heads + 1)
    return max((number for number in few if heads % number == 0), default=0)


def head_pairs(initial, target, operators, hidden):
    """Query heads and key/value heads that structures of a hidden size may have."""
    ends = {dims: (dims.num_attention_heads, dims.num_key_value_heads) for dims in (initial, target)}
    if "mha" in operators:
        group = initial.num_attention_heads // initial.num_key_value_heads
        between = steps(4, target.num_attention_heads, group, [])
        others = set(between) - {heads for heads, _ in ends.values()}
        return {*ends.values(), *((heads, kv_heads_between(initial, target, heads)) for heads in others)}
    if at_end := [pair for dims, pair in ends.items() if dims.hidden_size == hidden]:
        return {at_end[-1]}
    return set() if hidden % 16 else {(hidden // 16, kv_heads_between(initial, target, hidden // 16))}


def vertices(initial, target, targets, operators):
    """Every loadable structure on the way to a target, by plain loops."""
    hiddens = steps(64, target.hidden_size, HIDDEN_MULTIPLE, [dims.hidden_size for dims in targets])
    ffns = steps(128, target.intermediate_size, FFN_MULTIPLE, [dims.intermediate_size for dims in targets])
    layers = range(2, target.num_hidden_layers + 1)
    structures = set()
    for h, f, depth in product(hiddens, ffns, layers):
        if "ffn" not in operators:
            ratio = Fraction(target.intermediate_size, target.hidden_size)
            f = math.ceil(ratio * h / FFN_MULTIPLE) * FFN_MULTIPLE
            f = {64: 128, target.hidden_size: target.intermediate_size}.get(h, f)
            f = min(max(f, 128), target.intermediate_size)
        for heads, kv_heads in head_pairs(initial, target, operators, h):
            if kv_heads and h % heads == 0:
                structures.add(ModelDims(h, f, depth, heads, kv_heads, 16))
    return structures


def may_grow(before, after, operators, joint, max_factor, through):
    if before == after:
        return False
    try:
        grown = set(find_operators(before, after))
    except ValueError:
        return False
    if not joint and len(grown & set(operators)) != 1:
        return False
    if max_factor and count_parameters(after, CONFIG) > max_factor * count_parameters(before, CONFIG):
        return False

    def is_at_most(dims, bound):
        return all(size <= bound.as_dict()[name] for name, size in dims.as_dict().items())

    return all(is_at_most(after, waypoint) or is_at_most(waypoint, before) for waypoint in through)


def value(objective, path, tokens):
    """An objective of one path, in plain Python."""
    if objective.startswith("delta"):
        bases = [path[0]] * len(path) if objective == "delta_params" else path
        return math.prod(
            max(1, count_paper_params(b) - count_paper_params(a)) for a, b in zip(bases, path[1:], strict=False)
        )
    flops = [count_flops_per_token(dims, CONFIG, SEQUENCE_LENGTH) for dims in path]
    if objective == "flops":
        return sum(per_token * count for per_token, count in zip(flops, tokens, strict=True))
    hours = [
        count * (per_token * COST.hours_per_flop + COST.hours_per_token)
        for per_token, count in zip(flops, tokens, strict=True)
    ]
    if objective == "hours":
        return sum(hours)
    losses = [LAW.loss(count_parameters(dims, CONFIG), sum(tokens[: i + 1])) for i, dims in enumerate(path)]
    return sum((a - b) / hour for a, b, hour in zip(losses, losses[1:], hours[1:], strict=False))


def all_paths(initial, target, targets, operators, stages, joint, max_factor, through):
    points = vertices(initial, target, targets, operators)

    def follow(path):
        if len(path) == stages + 1:
            if path[-1] == target:
                yield path
            return
        for after in points:
            if may_grow(path[-1], after, operators, joint, max_factor, through):
                yield from follow((*path, after))

    yield from follow((initial,))


def paths_once(initial, target, operators, max_factor, through):
    """Every order in which each operator grows once, all the way, and every structure loads."""
    fields = {
        "layer": ["num_hidden_layers"],
        "ffn": ["intermediate_size"],
        "mha": ["num_attention_heads", "num_key_value_heads"],
        "hidden": ["hidden_size"],
    }
    for order in permutations(operators):
        path = [initial]
        for name in order:
            followers = [other for other in ("ffn", "mha") if name == "hidden" and other not in operators]
            sizes = {field: target.as_dict()[field] for grown in (name, *followers) for field in fields[grown]}
            try:
                path.append(path[-1].replace(**sizes))
            except ValueError:  # heads that do not divide the hidden size
                break
        complete = len(path) == len(order) + 1 and path[-1] == target
        if complete and all(may_grow(a, b, operators, False, max_factor, through) for a, b in pairwise(path)):
            yield tuple(path)


def every_path(problem, target, count):
    initial, operators, mode, targets, _, _, _, max_factor, through = problem
    if mode == "once":
        return paths_once(initial, target, operators, max_factor, through) if count == len(operators) else ()
    return all_paths(initial, target, targets, operators, count, mode == "joint", max_factor, through)


@st.composite
def problems(draw, grouped=False):
    operators = draw(
        st.sampled_from([("layer", "ffn", "hidden"), ("layer", "hidden"), ("ffn", "hidden", "mha"), ("layer", "mha")])
    )
    mode = draw(st.sampled_from(["once", "repeated", "joint"]))
    initial = INITIAL.replace(num_key_value_heads=draw(st.sampled_from([1, 2, 4]))) if grouped else INITIAL
    targets = []
    for _ in range(1 if grouped else draw(st.integers(1, 2))):
        heads = 4 + draw(st.integers(0, 4)) if "hidden" in operators or "mha" in operators else 4
        hidden = 16 * heads if "hidden" in operators else 64
        if "mha" in operators:
            heads = draw(st.sampled_from([heads for heads in range(4, 9) if hidden % heads == 0]))
        ffn = 128 + draw(st.integers(0, 240)) if "ffn" in operators or "hidden" in operators else 128
        depth = 2 + draw(st.integers(0, 3)) if "layer" in operators else 2
        kv_heads = heads
        if grouped:
            few = range(initial.num_key_value_heads, heads + 1) if {"hidden", "mha"} & {*operators} else (heads,)
            kv_heads = draw(st.sampled_from([number for number in few if heads % number == 0]))
            if "mha" not in operators and hidden == 64:
                kv_heads = initial.num_key_value_heads
        target = ModelDims(hidden, ffn, depth, heads, kv_heads, 16)
        if target not in (initial, *targets) and not (hidden == 64 and ffn > 128 and "ffn" not in operators):
            targets.append(target)
    objective = draw(st.sampled_from(sorted(OBJECTIVES)))
    stages = draw(st.integers(1, 4))
    if mode == "once":
        stages = len(operators)
    elif mode == "repeated":  # each growing dimension takes at least one stage
        stages = max([stages, *(len(set(operators) & set(find_operators(initial, dims))) for dims in targets)])
    if mode != "once" and OBJECTIVES[objective].compares_stages and draw(st.booleans()):
        stages = None
    price = draw(st.sampled_from([0.0, 1e5])) if OBJECTIVES[objective].compares_stages else 0.0
    max_factor = draw(st.sampled_from([None, None, 1.4, 2.0]))
    through = ()
    if targets and draw(st.integers(0, 3)) == 0:
        through = tuple(
            draw(st.sampled_from(sorted(vertices(initial, targets[0], targets, operators), key=str))) for _ in range(1)
        )
    return initial, operators, mode, targets, objective, stages, price, max_factor, through


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 6))
def test_equals_enumeration(problem, top_k):
    check_against_enumeration(problem, top_k)


@settings(max_examples=100, deadline=None)
@given(problems(grouped=True), st.integers(1, 6))
def test_equals_enumeration_with_grouped_heads(problem, top_k):
    check_against_enumeration(problem, top_k)


def check_against_enumeration(problem, top_k):
    initial, operators, mode, targets, objective, stages, price, max_factor, through = problem
    if not targets:
        return
    planner = SlopPlanner(
        initial,
        space_of(targets),
        operators=operators,
        objective=objective,
        cost_model=COST,
        mode=mode,
        stages=stages,
        max_stages=3,
        stage_price=price,
        max_factor=max_factor,
        through=through,
    )
    expected = []
    for count in [stages] if stages else [1, 2, 3]:
        share = 700_000 / (count + 2.5)
        tokens = [round(2.5 * share), *[round(share)] * count]
        for target in targets:
            for path in every_path(problem, target, count):
                expected.append((value(objective, path, tokens) + price * count, path))
    largest = OBJECTIVES[objective].best == "largest"
    expected.sort(key=lambda entry: -entry[0] if largest else entry[0])
    if not expected:
        with pytest.raises(PlanError):
            planner.plan(top_k, tokens=700_000)
        return
    schedules = planner.plan(top_k, tokens=700_000)
    totals = [schedule.scores[objective] + price * len(schedule.stages) for schedule in schedules]
    assert totals == pytest.approx([total for total, _ in expected[:top_k]], rel=1e-9)
    paths = [schedule.structures for schedule in schedules]
    assert len(set(paths)) == len(paths)
    assert set(paths) <= {path for _, path in expected}
    again = planner.plan(top_k, tokens=700_000)
    assert [schedule.structures for schedule in again] == paths


def test_enumeration_is_not_empty():
    """The enumeration that the planner is compared with finds all orders."""
    target = ModelDims(96, 240, 3, 6)
    paths = list(all_paths(INITIAL, target, [target], ("layer", "ffn", "hidden"), 3, False, None, ()))
    assert len(paths) == 6
    assert all(len(set(path)) == 4 for path in paths)
    assert all(find_operators(a, b) for path in paths for a, b in pairwise(path))
