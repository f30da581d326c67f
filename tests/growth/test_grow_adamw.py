import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims, grow_adamw_state
from slop_hf.errors import GrowthError
from slop_hf.growth import build_model, grow_weights, plan_growth
from slop_hf.training.boundary import load_adamw_state, read_adamw_state

DIMS = ModelDims(32, 48, 2, 4)


def trained(steps=3, **settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(DIMS.to_config(LlamaConfig(vocab_size=50, **settings)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step(model, optimizer, steps)
    return model, optimizer


def step(model, optimizer, steps=1):
    tokens = torch.arange(24).view(2, 12)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_moments_follow_the_weights():
    model, optimizer = trained()
    plan = plan_growth(model.config, "ffn", 80)
    state = read_adamw_state(optimizer, model)
    grown = grow_adamw_state(state, plan)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(grown[name]["exp_avg"][:, :48], state[name]["exp_avg"])
    assert torch.equal(grown[name]["exp_avg"][:, 48:], torch.zeros(32, 32))
    assert torch.equal(grown[name]["exp_avg_sq"][:, :48], state[name]["exp_avg_sq"])
    mean = state[name]["exp_avg_sq"].mean()
    assert torch.allclose(grown[name]["exp_avg_sq"][:, 48:], mean.expand(32, 32), rtol=1e-5)
    assert grown[name]["step"] == 3
    assert set(grown) == {parameter.name for parameter in plan.parameters()}


def test_stacked_layers_take_the_moments_of_their_source():
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    grown = grow_adamw_state(state, plan_growth(model.config, "layer", 5))
    for key in ("exp_avg", "exp_avg_sq"):
        copied, source = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 1))
        assert torch.equal(grown[copied][key], state[source][key])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_grown_optimizer_steps_on(tied, fused):
    """No new entry moves by more than about the learning rate in its first step: the stale step does not bite."""
    model, optimizer = trained(steps=200, tie_word_embeddings=tied)
    plan = plan_growth(model.config, "ffn", 80)
    state = grow_adamw_state(read_adamw_state(optimizer, model), plan)
    grown = build_model(model, plan, grow_weights(dict(model.named_parameters()), plan))
    fresh = torch.optim.AdamW(grown.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, fused=fused)
    load_adamw_state(fresh, grown, state)
    back = read_adamw_state(fresh, grown)
    assert all(torch.equal(back[name][key], state[name][key]) for name in state for key in ("exp_avg", "exp_avg_sq"))
    before = grown.model.layers[0].mlp.up_proj.weight.detach().clone()
    for _ in range(5):
        step(grown, fresh)
    moved = (grown.model.layers[0].mlp.up_proj.weight.detach() - before)[48:].abs()
    assert 0 < moved.max() < 5 * 2e-3


def test_state_of_another_model_is_refused():
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    del state["lm_head.weight"]
    with pytest.raises(GrowthError, match=r"no lm_head.weight; grow the state of an AdamW that has taken a step"):
        grow_adamw_state(state, plan_growth(model.config, "ffn", 80))
    assert read_adamw_state(torch.optim.AdamW(model.parameters()), model) == {}
