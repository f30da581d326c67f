"""A search by hypothesis for a structure, dtype or mixture of inits that growth gets wrong."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slop_hf import ModelDims
from slop_hf.architectures import ARCHITECTURES
from slop_hf.growth import INITS
from slop_hf.operators import find_operators
from slop_hf.testing import Case, check

DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16]
FAST = settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
THOROUGH = settings(FAST, max_examples=500)


@st.composite
def growths(draw, families):
    """Draw a case of random sizes, with one operator or several at once, each with one of its inits."""
    family = draw(st.sampled_from(families))
    table = ARCHITECTURES[family]
    exact = draw(st.sampled_from([True, True, False]))
    kv = draw(st.integers(1, 3))
    heads = kv * (draw(st.integers(1, 3)) if table.has_grouped_heads else 1)
    unit = 4 if "rope_parameters" in table.test_settings else 2  # half of a head may be rotated, and by pairs
    head_dim = unit * draw(st.integers(2, 4))
    hidden = heads * (2 * draw(st.integers(1, 4)) if table.has_own_head_dim else head_dim)
    layers, ffn = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    old = ModelDims(hidden, ffn, layers, heads, kv, head_dim)

    wanted = draw(st.sets(st.sampled_from(list(INITS)), min_size=1))
    if not table.has_own_head_dim:
        wanted -= {"head_dim"}
        wanted |= {"hidden", "mha"} if wanted & {"hidden", "mha"} else set()
    changes = {}
    if "mha" in wanted:
        more_kv = kv + draw(st.integers(0, 2))
        group = heads // kv + (draw(st.integers(0, 2)) if table.has_grouped_heads else 0)
        if table.has_projection_norms and exact:  # refused: new keys, or new slots of keys, would not learn
            more_kv = kv
            wanted -= {"head_dim"}
        changes.update(num_attention_heads=more_kv * group, num_key_value_heads=more_kv)
    new_heads = changes.get("num_attention_heads", heads)
    if not table.has_own_head_dim:
        changes["hidden_size"] = new_heads * head_dim
    elif "hidden" in wanted or hidden % new_heads:
        changes["hidden_size"] = new_heads * (-(-hidden // new_heads) + draw(st.integers(0, 3)))
    if "ffn" in wanted:
        changes["intermediate_size"] = ffn + draw(st.integers(1, 2 * ffn + 3))
    if "layer" in wanted:
        changes["num_hidden_layers"] = layers + draw(st.integers(1, 3))
    multiple = draw(st.booleans())
    if "head_dim" in wanted:
        changes["head_dim"] = (
            head_dim * draw(st.integers(2, 3)) if multiple else head_dim + 2 * draw(st.integers(1, 4))
        )
    new = old.replace(**changes)
    operators = find_operators(old, new)

    inits = {}
    tied = draw(st.booleans())
    for name in operators:
        choices = [init for init in INITS[name] if is_exact(name, init, old, new) == exact]
        if name == "head_dim" and not multiple and "spread" in choices:
            choices.remove("spread")
        if name == "head_dim" and (table.has_head_norms or table.has_projection_norms):
            choices = ["random"]
        if name == "mha" and table.has_projection_norms and exact:
            even = new.num_attention_heads % old.num_attention_heads == 0
            choices = ["preserving", "copy", "rms_copy"] if even else ["preserving"]
        if name == "hidden" and table.norm == "layer" and tied and exact:
            choices = ["copy", "rms_copy"] if new.hidden_size % old.hidden_size == 0 else ["random", "rms_copy"]
        inits[name] = draw(st.sampled_from(choices))
    flags = {row.exists_if: draw(st.booleans()) for row in table.parameters if row.exists_if}
    dtype = draw(st.sampled_from(DTYPES))
    if table.has_experts:
        experts = draw(st.integers(2, 5))  # with one active expert, whose share is always 1, the router learns nothing
        # In half precision, rounding would decide near-ties of the router.
        active = experts if dtype == torch.bfloat16 else draw(st.integers(2, experts))
        flags |= {table.config_fields.get("num_experts", "num_experts"): experts, "num_experts_per_tok": active}
    return Case(family, operators, new, inits, old, tied, dtype, flags)


def is_exact(operator, init, old, new):
    """Whether an init of an operator preserves the function; copies that fill `hidden` do if they are whole."""
    is_whole = operator != "hidden" or new.hidden_size % old.hidden_size == 0
    return init in ("preserving", "copy", "spread") or (init == "rms_copy" and is_whole)


def keeps_its_promises(case, seed):
    if not case.operator:
        return
    result = check(case, seed=seed)
    assert result.refused == "", f"{case}: {result.refused}"
    assert result.preserves == all(is_exact(name, init, case.dims, case.new_dims) for name, init in case.init.items())
    alone = case.operator[0] if len(case.operator) == 1 else None
    if alone:
        # An operator alone and a stage with this operator give the same result.
        same = dataclasses.replace(case, operator=alone, init=case.init[alone])
        assert check(same, seed=seed).error == result.error


@pytest.mark.parametrize("third", range(3))
@FAST
@given(st.data(), st.integers(0, 2**31))
def test_random_growths(third, data, seed):
    """By thirds of the families: a few examples of all of them would be of few families."""
    keeps_its_promises(data.draw(growths(list(ARCHITECTURES)[third::3])), seed)


@pytest.mark.slow
@THOROUGH
@given(growths(list(ARCHITECTURES)), st.integers(0, 2**31))
def test_many_random_growths(case, seed):
    keeps_its_promises(case, seed)
