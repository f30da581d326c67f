"""Frozen parameters grow into frozen ones."""

import pytest

from slop_hf import grow_model
from slop_hf.growth import plan_growth
from slop_hf.testing import build_tiny_model

GROWTHS = {
    "layer": 5,
    "mha": 8,
    "ffn": 60,
    "hidden": {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4},
    "head_dim": 16,
}


def list_frozen(model):
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("operator", GROWTHS)
def test_frozen_parameters_stay_frozen(operator, tied):
    model = build_tiny_model("llama", tied=tied)
    model.model.layers[1].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    frozen = list_frozen(model)
    grown = grow_model(model, operator, GROWTHS[operator])
    plan = plan_growth(model.config, operator, GROWTHS[operator])
    assert list_frozen(grown) == {parameter.name for parameter in plan.parameters() if parameter.source in frozen}
    assert list_frozen(model) == frozen and list_frozen(grown) >= frozen


def test_copies_of_a_frozen_layer_are_frozen():
    model = build_tiny_model("gpt_neox")
    model.gpt_neox.layers[1].requires_grad_(False)
    grown = grow_model(model, "layer", 4, init="stack")
    layers = [{parameter.requires_grad for parameter in layer.parameters()} for layer in grown.gpt_neox.layers]
    assert layers == [{True}, {False}, {True}, {False}]
    assert grown.lm_head.weight.requires_grad
