import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims
from slop_hf.errors import GrowthError
from slop_hf.growth import build_model, grow_weights, hash_weights, plan_growth, probe_growth

DIMS = ModelDims(48, 64, 2, 4)


def model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    made = LlamaForCausalLM(DIMS.to_config(LlamaConfig(vocab_size=80, max_position_embeddings=32, **settings)))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3)
    return made.to(dtype)


def probe(operator, new, dtype=torch.float32, **settings):
    source = model(dtype)
    plan = plan_growth(source.config, operator, new, **settings)
    return probe_growth(source, build_model(source, plan, grow_weights(dict(source.named_parameters()), plan)), plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("operator", "new"), [("ffn", 400), ("layer", 5), ("hidden", 96), ("mha", 8)])
def test_exact_growth_is_recognised(dtype, operator, new):
    exact = probe(operator, new, dtype, init="preserving")
    assert exact.is_exact and exact.live_share > 0.2
    other = probe(operator, new, dtype)
    assert not other.is_exact and other.max_logit_change > 0.01
    assert other.loss_change != 0 and exact.copies_spread is None


def test_every_new_entry_lives_except_those_behind_zeros():
    """Preserving ffn: zeros in down_proj have gradients, gate and up wait for them to move."""
    assert probe("ffn", 100, init="preserving").live_share == pytest.approx(1 / 3, abs=0.02)
    assert probe("ffn", 100).live_share > 0.99


def test_only_noise_separates_copies():
    tied = probe("ffn", 128, init="copy", noise=0.0)
    separated = probe("ffn", 128, init="copy")
    assert tied.copies_spread == 0.0 and tied.is_exact
    assert 0.01 < separated.copies_spread < 1 and separated.is_exact
    assert tied.live_share is None, "copies are no new entries"


def test_hash_depends_on_content_alone():
    one, other = (dict(model().named_parameters()) for _ in range(2))
    assert hash_weights(one.items()) == hash_weights(reversed(list(other.items())))
    with torch.no_grad():
        other["model.norm.weight"][3] += 1e-6
    assert hash_weights(one.items()) != hash_weights(other.items())
    assert hash_weights([("a", torch.zeros(4))]) != hash_weights([("a", torch.zeros(2, 2))])


def test_broken_models_are_named():
    source = model()
    plan = plan_growth(source.config, "ffn", 100)
    grown = build_model(source, plan, grow_weights(dict(source.named_parameters()), plan))
    with torch.no_grad():
        grown.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(GrowthError, match="not finite"):
        probe_growth(source, grown, plan)
