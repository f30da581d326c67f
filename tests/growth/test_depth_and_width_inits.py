"""Values of a grown model under the inits `middle`, `scaled` and `random` of layers and `rms_copy` of widths."""

import pytest
import torch
from transformers import Gemma2Config, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from slop_hf import ModelDims, grow_adamw_state, grow_model
from slop_hf.growth import plan_growth
from slop_hf.growth.inits import interleave, middle
from slop_hf.testing import build_tiny_model

DIMS = ModelDims(32, 48, 4, 4)
TOKENS = torch.randint(60, (2, 24), generator=torch.Generator().manual_seed(0))


def build_llama(dims=DIMS, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, initializer_range=0.1, **settings)
    return LlamaForCausalLM(dims.to_config(config)).eval()


def compute_error(model, grown):
    with torch.no_grad():
        return float((grown(TOKENS).logits - model(TOKENS).logits).abs().max())


@pytest.mark.parametrize("old", range(1, 7))
@pytest.mark.parametrize("more", range(1, 8))
def test_middle_spares_the_ends(old, more):
    layers = middle(old, old + more)
    counts = [layers.count(layer) for layer in range(old)]
    assert layers == sorted(layers) and len(layers) == old + more
    assert max(counts) - min(counts) <= 1
    if more % old == 0:
        assert layers == interleave(old, old + more)
    elif old - more % old > 1:
        assert counts[0] == counts[-1] == min(counts)


def test_scaled_divides_what_a_layer_adds_by_its_copies():
    model = build_llama(attention_bias=True, mlp_bias=True)
    grown = grow_model(model, "layer", 6, init="scaled")
    copied = [0, 0, 1, 2, 2, 3]
    for new, old in enumerate(copied):
        for (name, weight), before in zip(
            grown.model.layers[new].named_parameters(), model.model.layers[old].parameters(), strict=True
        ):
            adds = name.startswith(("self_attn.o_proj", "mlp.down_proj"))
            assert torch.allclose(weight * (copied.count(old) if adds else 1), before), name


def test_scaled_divides_the_gains_behind_branches_that_end_in_norms():
    torch.manual_seed(0)
    model = build_tiny_model("gemma2", DIMS)
    grown = grow_model(model, "layer", 8, init="scaled")
    gains = {name: 1 + weight for name, weight in grown.model.layers[3].named_parameters() if "norm" in name}
    before = {name: 1 + weight for name, weight in model.model.layers[1].named_parameters() if "norm" in name}
    for name, gain in gains.items():
        behind = name.startswith(("post_attention", "post_feedforward"))
        assert torch.allclose(gain, before[name] / 2 if behind else before[name], atol=1e-6), name
    assert torch.equal(grown.model.layers[3].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)


def test_scaled_copies_keep_the_function_to_first_order():
    """If branches are tenfold smaller, copies err tenfold less, and scaled copies a hundredfold."""
    errors = {}
    for init in ("interleave", "scaled"):
        for size in (0.1, 0.01):
            model = build_llama().double()
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.o_proj.weight *= size
                    layer.mlp.down_proj.weight *= size
            errors[init, size] = compute_error(model, grow_model(model, "layer", 8, init=init))
    assert 5 < errors["interleave", 0.1] / errors["interleave", 0.01] < 20
    assert 50 < errors["scaled", 0.1] / errors["scaled", 0.01] < 200


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_moments_of_scaled_copies_are_those_of_their_gradients(family):
    """With small branches, the gradients of the grown model are the grown gradients, in every parameter."""
    model = build_tiny_model(family, ModelDims(48, 96, 2, 4)).double()
    plan = plan_growth(model.config, "layer", 5, init="scaled")
    scaled = {p.source: p.gain_offset for p in plan.parameters() if p.scale != 1}
    with torch.no_grad():
        for name, offset in scaled.items():
            model.get_parameter(name).add_(offset).mul_(1e-4).sub_(offset)
    grown = grow_model(model, "layer", 5, init="scaled")
    for one in (model, grown):
        one(TOKENS, labels=TOKENS).loss.backward()
    state = {name: {"exp_avg": p.grad, "step": torch.tensor(1.0)} for name, p in model.named_parameters()}
    expected = grow_adamw_state(state, plan)
    for name, parameter in grown.named_parameters():
        error = float((parameter.grad - expected[name]["exp_avg"]).abs().max() / parameter.grad.abs().max())
        assert error < 0.02, name


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_random_layers_are_those_of_a_new_model(family):
    """Old layers come first, unchanged; of the added ones nothing depends on old entries."""
    dims = ModelDims(48, 96, 2, 4)
    settings = {"llama": {"attention_bias": True}, "gpt_neox": {"attention_bias": True}}.get(family, {})
    model = build_tiny_model(family, dims, **settings)
    grown, other = (grow_model(model, "layer", 4, init="random", seed=seed) for seed in (1, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    tripled = grow_model(model, "layer", 4, init="random", seed=1)
    std = model.config.initializer_range
    rows = {p.name: p for p in plan_growth(model.config, "layer", 4, init="random").parameters() if p.is_added}
    assert len(rows) == len(list(grown.parameters())) - len(list(model.parameters()))
    for name, parameter in grown.named_parameters():
        if name not in rows:
            assert torch.allclose(parameter * 3, model.get_parameter(name))
            continue
        kind = rows[name].row.kind
        assert torch.equal(parameter, tripled.get_parameter(name))
        if kind == "projection":
            assert abs(float(parameter.std()) / std - 1) < 0.1 and abs(float(parameter.mean())) < std / 5
            assert not torch.equal(parameter, other.get_parameter(name))
        else:
            effective = parameter + rows[name].gain_offset
            assert torch.equal(effective, torch.ones_like(effective) * (kind == "norm"))


def capture_residual(model):
    """Return the root mean square of the residual stream before the final norm."""
    seen = {}
    norm = getattr(model.base_model, "norm", None) or model.base_model.final_layer_norm
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.update(rms=inputs[0].square().mean().sqrt()))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    return float(seen["rms"])


@pytest.mark.parametrize("tied", [False, True])
def test_rms_copies_leave_norms_alone_and_keep_the_mean_square(tied):
    model = build_llama(tie_word_embeddings=tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    grown = grow_model(model, "hidden", 48, init="rms_copy")
    assert grown.config.rms_norm_eps == model.config.rms_norm_eps
    slots = [*range(32), *range(16)]
    for name, gain in model.named_parameters():
        if "norm" in name:
            factor = 32 / 48 if tied and name == "model.norm.weight" else 1.0
            assert torch.allclose(grown.get_parameter(name), gain[slots] * factor)
    assert torch.equal(grown.model.embed_tokens.weight, model.model.embed_tokens.weight[:, slots])
    assert capture_residual(grown) == pytest.approx(capture_residual(model), rel=0.1)
    padded = grow_model(model, "hidden", 48, init="copy")
    assert capture_residual(padded) < 0.9 * capture_residual(model)  # `copy` fills up with zeros, and scales gains


@pytest.mark.parametrize("config", [LlamaConfig, Gemma2Config, GPTNeoXConfig])
def test_whole_rms_copies_preserve_the_function(config):
    family = config.model_type
    model = build_tiny_model(family, ModelDims(48, 96, 2, 4))
    dims = {"hidden_size": 96, "num_attention_heads": 8, "num_key_value_heads": 8} if family == "gpt_neox" else 96
    grown = grow_model(model, "hidden", dims, init="rms_copy")
    assert plan_growth(model.config, "hidden", dims, init="rms_copy").preserves
    with torch.no_grad():
        before = model(TOKENS).logits
        assert float((grown(TOKENS).logits - before).abs().max() / before.abs().max()) < 1e-5


def test_random_layers_take_no_moments():
    model = build_llama()
    plan = plan_growth(model.config, "layer", 6, init="random")
    state = {
        name: {"exp_avg": torch.ones_like(p), "exp_avg_sq": torch.ones_like(p) * 4, "step": torch.tensor(7.0)}
        for name, p in model.named_parameters()
    }
    name = "model.layers.5.mlp.up_proj.weight"
    carried, kept = (grow_adamw_state(state, plan, step=step)[name] for step in ("keep", "per_parameter"))
    assert not carried["exp_avg"].any() and (carried["exp_avg_sq"] == 4).all() and carried["step"] == 7
    assert not kept["exp_avg"].any() and not kept["exp_avg_sq"].any() and kept["step"] == 0
