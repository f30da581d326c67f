"""Growth of small random models, compared with references written without axis maps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, LlamaForCausalLM

from slop_hf import GrowthStage, ModelDims, grow_model
from slop_hf.errors import ArchitectureError, DimsError, GrowthError
from slop_hf.growth import plan_growth

DIMS = ModelDims(48, 64, 2, 4)


def llama(dims=DIMS, **settings):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=80, max_position_embeddings=64, **settings)
    model = LlamaForCausalLM(dims.to_config(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model):
    return model(torch.arange(12)[None]).logits


GROWTHS = {
    "layer": 5,
    "mha": 8,
    "ffn": 100,
    "hidden": {"hidden_size": 96, "num_attention_heads": 8},
}


@pytest.mark.parametrize("operator", GROWTHS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_stock_model_with_the_old_weights_in_place(operator, tied, tmp_path):
    model = llama(tie_word_embeddings=tied)
    before = weights(model)
    grown = grow_model(model, operator, GROWTHS[operator])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "source changed"
    assert type(grown) is LlamaForCausalLM
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied
    for name, old in before.items():
        if "layers.1" in name and operator == "layer":
            continue
        new = grown.state_dict()[name]
        corner = new[tuple(slice(size) for size in old.shape)]
        assert torch.equal(corner, old), name
    grown.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ModelDims.from_config(loaded.config) == ModelDims.from_config(grown.config)
    assert torch.equal(logits(loaded), logits(grown))
    tokens = torch.arange(6)[None]
    with_cache = grown.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(with_cache, grown.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False))


def test_new_entries_follow_the_papers_distribution():
    model = llama(initializer_range=0.05)
    grown = grow_model(model, "ffn", 4000)
    down = grown.model.layers[0].mlp.down_proj.weight[:, 64:]
    up = grown.model.layers[1].mlp.up_proj.weight[64:]
    for new in (down, up):
        assert new.std().item() == pytest.approx(0.05, rel=0.02) and abs(new.mean().item()) < 1e-3
    assert not torch.equal(down.T, up), "parameters must draw their own values"
    wider = grow_model(model, "hidden", {"hidden_size": 96})
    assert torch.equal(wider.model.norm.weight[48:], torch.ones(48))
    assert torch.equal(wider.model.layers[1].input_layernorm.weight[48:], torch.ones(48))


def test_layers_are_stacked():
    model = llama(ModelDims(48, 64, 3, 4))
    grown = grow_model(model, "layer", 8)
    for index, layer in enumerate(grown.model.layers):
        assert layer.self_attn.layer_idx == index
        source = model.model.layers[index % 3].state_dict()
        assert all(torch.equal(source[name], tensor) for name, tensor in layer.state_dict().items())
    copy = grown.model.layers[3].mlp.up_proj.weight
    assert copy.data_ptr() != grown.model.layers[0].mlp.up_proj.weight.data_ptr()


def test_growing_heads_under_gqa_keeps_old_heads_with_their_keys():
    """With the outputs of the new heads set to zero, the grown model computes the old one's logits."""
    model = llama(ModelDims(48, 64, 2, 4, 2, 12))
    grown = grow_model(model, "mha", 8)
    assert grown.config.num_key_value_heads == 2
    old_heads = [0, 1, 4, 5]  # (k, j) -> k * 4 + j
    with torch.no_grad():
        for layer in grown.model.layers:
            by_head = layer.self_attn.o_proj.weight.view(48, 8, 12)
            by_head[:, [head for head in range(8) if head not in old_heads]] = 0
    assert torch.allclose(logits(grown), logits(model), atol=1e-6)


def test_new_heads_of_multi_head_attention_bring_keys():
    assert grow_model(llama(), "mha", 8).config.num_key_value_heads == 8


def test_seeds_and_order():
    model = llama()
    one, same, other = (weights(grow_model(model, "ffn", 100, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])
    torch.manual_seed(99)  # the global generator is neither used nor moved
    state = torch.get_rng_state()
    again = weights(grow_model(model, "ffn", 100, seed=1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_mode_and_generation_config_stay(dtype):
    model = llama().to(dtype).eval()
    model.generation_config.max_new_tokens = 7
    grown = grow_model(model, "ffn", 100)
    assert {parameter.dtype for parameter in grown.parameters()} == {dtype}
    assert grown.training is False and grow_model(model.train(), "ffn", 100).training is True
    assert grown.generation_config.max_new_tokens == 7
    reference = grow_model(model.float(), "ffn", 100)
    assert torch.equal(reference.to(dtype).lm_head.weight, grown.lm_head.weight)


def test_biases_grow_with_their_rows():
    model = llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    grown = grow_model(model, "hidden", {"hidden_size": 96, "num_attention_heads": 8})
    layer, old = grown.model.layers[1], model.model.layers[1]
    assert torch.equal(layer.self_attn.q_proj.bias[:48], old.self_attn.q_proj.bias)
    assert torch.equal(layer.mlp.down_proj.bias[:48], old.mlp.down_proj.bias)
    assert layer.mlp.down_proj.bias.shape == (96,) and torch.equal(layer.mlp.up_proj.bias, old.mlp.up_proj.bias)


def test_a_stage_grows_several_dimensions_at_once():
    model = llama()
    new = ModelDims(96, 100, 4, 8)
    grown = grow_model(model, GrowthStage(("layer", "mha", "ffn", "hidden"), new))
    assert ModelDims.from_config(grown.config) == new
    by_steps = model
    for operator, dims in (("layer", 4), ("ffn", 100)):
        by_steps = grow_model(by_steps, operator, dims)
    corner = grown.model.layers[3].mlp.up_proj.weight[:64, :48]
    assert torch.equal(corner, by_steps.model.layers[3].mlp.up_proj.weight[:64])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("depth", 4), GrowthError, r"unknown operator 'depth' \(known: layer, mha, ffn, hidden, head_dim\)"),
        (("ffn", 32), GrowthError, "intermediate_size would shrink from 64 to 32"),
        (("ffn", 64), GrowthError, "'ffn' has nothing to grow"),
        (("ffn", {"num_hidden_layers": 4}), GrowthError, "'ffn' has nothing to grow"),
        (("ffn", {"intermediate_size": 100, "num_hidden_layers": 4}), GrowthError, "would change layer too"),
        (("ffn", None), GrowthError, "new_dims must be the new intermediate_size"),
        (("ffn", "large"), GrowthError, "new_dims must be the new intermediate_size"),
        (("ffn", {"width": 4}), DimsError, "unknown dimension 'width'"),
        (("hidden", 50), DimsError, "not divisible by num_attention_heads"),
        (("hidden", {"hidden_size": 96, "head_dim": 24}), GrowthError, "would change head_dim too"),
        ((GrowthStage(("ffn",), ModelDims(48, 100, 4, 4)),), GrowthError, "takes layer, ffn"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        grow_model(llama(), *arguments)


def test_unknown_init_and_family():
    with pytest.raises(
        GrowthError, match=r"unknown init 'zero' for operator 'ffn' \(known: random, preserving, copy, rms_copy\)"
    ):
        grow_model(llama(), "ffn", 100, init="zero")
    bloom = AutoModelForCausalLM.from_config(BloomConfig(n_layer=1, hidden_size=32, n_head=2, vocab_size=50))
    with pytest.raises(ArchitectureError, match="no axis table for model_type 'bloom'"):
        grow_model(bloom, "layer", 2)


def test_a_model_that_its_table_does_not_describe():
    model = llama()
    model.model.layers[0].mlp.adapter = torch.nn.Linear(4, 4)
    with pytest.raises(GrowthError, match=r"has a parameter model.layers.0.mlp.adapter.bias"):
        grow_model(model, "layer", 4)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_old_entry_survives_in_random_structures(data):
    draw = data.draw
    group, kv, size = draw(st.integers(1, 3)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    heads = group * kv
    old = ModelDims(
        heads * draw(st.integers(1, 3)) * 2, draw(st.integers(1, 9)), draw(st.integers(1, 3)), heads, kv, size
    )
    more_group = group + draw(st.integers(0, 2))
    more_kv = kv + draw(st.integers(0, 2))
    new_heads = more_group * more_kv
    hidden = -(-old.hidden_size // new_heads) * new_heads + new_heads * draw(st.integers(0, 2))
    new = ModelDims(
        hidden,
        old.intermediate_size + draw(st.integers(0, 5)),
        old.num_hidden_layers + draw(st.integers(0, 3)),
        new_heads,
        more_kv,
        size,
    )
    if new == old:
        return
    model = llama(old, tie_word_embeddings=draw(st.booleans()))
    operators = tuple(name for name in ("layer", "mha", "ffn", "hidden") if name in _needed(old, new))
    plan = plan_growth(model.config, GrowthStage(operators, new))
    grown = grow_model(model, GrowthStage(operators, new))
    before, after = dict(model.named_parameters()), dict(grown.named_parameters())
    assert set(after) == {parameter.name for parameter in plan.parameters()}
    for parameter in plan.parameters():
        index = torch.meshgrid(
            *(torch.tensor([i for i, old in enumerate(axis.source) if old is not None]) for axis in parameter.maps),
            indexing="ij",
        )
        assert torch.equal(after[parameter.name][index], before[parameter.source]), parameter.name
    assert torch.isfinite(logits(grown)).all()


def _needed(old, new):
    from slop_hf.operators import find_operators

    return find_operators(old, new)
