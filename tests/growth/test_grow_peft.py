"""LoRA adapters grow with their base: compared with the source's logits, and with merging first."""

import copy
import sys
from importlib import util

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
)

from slop_hf import ModelDims, grow_model
from slop_hf.errors import GrowthError
from slop_hf.growth import build_model, extract_base_model, grow_weights, is_peft_model, plan_growth
from slop_hf.testing import GQA, MHA, MQA, build_tiny_model

peft = pytest.importorskip("peft")
LoraConfig, PeftModel, get_peft_model = peft.LoraConfig, peft.PeftModel, peft.get_peft_model

GROUPED = ModelDims(16, 24, 2, 4, 2, 4)
PLAIN = ModelDims(16, 24, 2, 4)
CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gpt_neox": GPTNeoXConfig,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEOX = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TOKENS = torch.arange(24).view(2, 12)
HIDDEN_HEADS = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 10}
EXACT = [
    (operator, new, init)
    for operator, new, inits in [
        ("layer", 5, ("preserving",)),
        ("mha", 8, ("preserving", "copy")),
        ("mha", {"num_attention_heads": 4, "num_key_value_heads": 4}, ("preserving",)),
        ("mha", {"num_attention_heads": 8, "num_key_value_heads": 4}, ("preserving", "copy")),
        ("ffn", 60, ("preserving", "copy")),
        ("hidden", 40, ("preserving", "copy")),
        ("hidden", 48, ("copy",)),
        ("head_dim", 8, ("preserving", "spread")),
    ]
    for init in inits
]


def base_model(family="llama", dims=GROUPED, **settings):
    torch.manual_seed(0)
    if family == "llama":
        settings = {"attention_bias": True, **settings}
    config = dims.to_config(CONFIGS[family](vocab_size=40, initializer_range=0.1, **settings))
    if family == "gpt_neox":
        config.rope_parameters["partial_rotary_factor"] = 1.0
    model = AutoModelForCausalLM.from_config(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model.eval()


def adapted(model=None, adapters=("default",), targets=LINEAR, **settings):
    """A model with adapters that look trained: A and B are random, and strong enough to matter."""
    model = base_model() if model is None else model
    plain = logits(model)
    settings = {"r": 3, "lora_alpha": 6, "target_modules": list(targets), **settings}
    result = get_peft_model(model, LoraConfig(**settings), adapters[0])
    for name in adapters[1:]:
        result.add_adapter(name, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape).mul_(0.2).to(parameter) + 0.1)
    result.double().eval()
    assert error(logits(result), plain) > 0.05, "the adapter does nothing"
    return result


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def error(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize(("operator", "new", "init"), EXACT)
def test_logits_stay(operator, new, init):
    model = adapted(base_model(tie_word_embeddings=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grown = grow_model(model, operator, new, init=init)
    assert isinstance(grown, PeftModel) and type(grown.get_base_model()) is LlamaForCausalLM
    assert all(value.requires_grad == ("lora_" in name) for name, value in grown.named_parameters())
    assert error(logits(grown), logits(model)) < 1e-6
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with grown.disable_adapter(), model.disable_adapter():
        assert error(logits(grown), logits(model)) < 1e-6


@pytest.mark.parametrize("family", [pytest.param("qwen2", marks=pytest.mark.slow), "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(("operator", "new", "init"), EXACT)
def test_logits_stay_in_every_family(family, operator, new, init):
    dims, targets = GROUPED, LINEAR
    if family == "gpt_neox":
        dims, targets = PLAIN, NEOX
        new = HIDDEN_HEADS if operator == "hidden" else new
    if (family, operator) in (("qwen3", "head_dim"), ("gpt_neox", "head_dim"), ("gpt_neox", "mha")):
        pytest.skip("this family cannot grow so")
    model = adapted(base_model(family, dims), targets=targets)
    assert error(logits(grow_model(model, operator, new, init=init)), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("family", "targets", "operator", "new", "init"),
    [
        ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], "mha", 8, "preserving"),
        ("phi3", ["qkv_proj", "gate_up_proj", "o_proj"], "head_dim", 24, "spread"),
        ("phi3", ["qkv_proj", "gate_up_proj"], "ffn", 80, "copy"),
        ("gpt2", ["c_attn", "c_proj", "c_fc"], "ffn", 80, "preserving"),
        ("gpt2", ["c_attn", "c_proj"], "hidden", {"hidden_size": 96, "num_attention_heads": 8}, "copy"),
        ("olmo2", LINEAR, "mha", 6, "preserving"),
        ("stablelm", LINEAR, "layer", 3, "preserving"),
    ],
)
def test_adapters_of_fused_and_transposed_weights(family, targets, operator, new, init):
    dims = MQA if family == "olmo2" else MHA if family == "gpt2" else GQA
    model = adapted(build_tiny_model(family, dims), targets=targets)
    assert error(logits(grow_model(model, operator, new, init=init)), logits(model)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["preserving", "copy"])
@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about tied targets
def test_adapters_of_embeddings_and_head(family, tied, init, end):
    model = adapted(base_model(family, tie_word_embeddings=tied), targets=[end, "q_proj"])
    assert error(logits(grow_model(model, "hidden", 40, init=init)), logits(model)) < 1e-5


@pytest.mark.parametrize(("operator", "new"), [("layer", 4), ("hidden", 40), ("ffn", 60)])
def test_modules_to_save_and_biases(operator, new):
    model = adapted(targets=["q_proj", "up_proj"], modules_to_save=["lm_head", "norm", "down_proj"], bias="all")
    grown = grow_model(model, operator, new, init="preserving")
    assert error(logits(grown), logits(model)) < 1e-6
    trained = {name for name, parameter in grown.named_parameters() if parameter.requires_grad}
    assert any("lm_head.modules_to_save" in name for name in trained) and any(
        name.endswith("bias") for name in trained
    )
    model = adapted(targets=["q_proj", "o_proj"], lora_bias=True)
    assert error(logits(grow_model(model, operator, new, init="preserving")), logits(model)) < 1e-6


@pytest.mark.parametrize(("operator", "new", "init"), EXACT)
def test_merging_commutes_with_growing(operator, new, init):
    model = adapted()
    merged = copy.deepcopy(model).merge_and_unload()
    plan = plan_growth(merged.config, operator, new, init=init, noise=0.0)
    expected = build_model(merged, plan, grow_weights(dict(merged.named_parameters()), plan))
    merged_after = grow_model(model, operator, new, init=init, noise=0.0).merge_and_unload()
    assert error(logits(merged_after), logits(expected)) < 1e-6
    weights = dict(merged_after.named_parameters())
    for parameter in plan.parameters():  # old entries agree one by one; new ones are random on either side
        old = torch.ones([], dtype=torch.bool)
        for axis in parameter.maps:
            old = old.unsqueeze(-1) & torch.tensor([slot is not None for slot in axis.source])
        expected_weight = dict(expected.named_parameters())[parameter.name]
        assert torch.allclose(weights[parameter.name][old], expected_weight[old], atol=1e-12), parameter.name


@pytest.mark.parametrize(("operator", "init"), [("layer", "preserving"), ("hidden", "copy"), ("ffn", None)])
def test_saving_and_loading(operator, init, tmp_path):
    model = adapted(adapters=("one", "two"))
    grown = grow_model(model, operator, {"layer": 5, "hidden": 40, "ffn": 60}[operator], init=init)
    grown.save_pretrained(tmp_path / "adapters")
    base, weights = extract_base_model(grown)
    stock = type(base)(base.config).double()
    stock.load_state_dict({**stock.state_dict(), **{name: value.detach() for name, value in weights.items()}})
    stock.save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "adapters" / "one", adapter_name="one")
    loaded.load_adapter(tmp_path / "adapters" / "two", "two")
    for adapter in ("one", "two"):
        grown.set_adapter(adapter)
        loaded.set_adapter(adapter)
        assert torch.equal(logits(loaded.double().eval()), logits(grown))


def test_several_adapters_flags_and_mode():
    model = adapted(adapters=("one", "two"))
    model.set_adapter("two")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    state = torch.get_rng_state()
    grown = grow_model(model.train(), "layer", 5, init="preserving")
    assert torch.equal(state, torch.get_rng_state())
    assert grown.training and grown.active_adapter == "two" and grown.active_adapters == ["two"]
    flags = {name: parameter.requires_grad for name, parameter in grown.get_base_model().named_parameters()}
    assert flags["model.norm.weight"] and not flags["lm_head.weight"]
    assert all(flag == ("two" in name) for name, flag in flags.items() if "lora_" in name)
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        grown.set_adapter(adapter)
        assert error(logits(grown.eval()), logits(model.eval())) < 1e-6


def test_deterministic_and_dtypes_kept():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data = parameter.data.float()
    one, same = (grow_model(model, "hidden", 40, init="copy", seed=1).state_dict() for _ in range(2))
    other = grow_model(model, "hidden", 40, init="copy", seed=2).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert all(value.dtype == (torch.float32 if "lora_A" in name else torch.float64) for name, value in one.items())


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.(0|2)\.self_attn\.(q|v)_proj"},
        {"target_modules": ["model.layers.1.mlp.down_proj", "lm_head"]},
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 5}},
        {"alpha_pattern": {r"layers\.2\..*": 30}, "use_rslora": False},
        {"exclude_modules": ["model.layers.0.mlp.up_proj"]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 9}},
    ],
)
@pytest.mark.parametrize("init", ["preserving", "stack"])
def test_configs_that_name_layers(settings, init, tmp_path):
    model = adapted(base_model(dims=ModelDims(16, 24, 3, 4, 2, 4)), **settings)
    grown = grow_model(model, "layer", 7, init=init)
    plan = plan_growth(model.get_base_model().config, "layer", 7, init=init)

    def modules(model):
        named = model.get_base_model().named_modules()
        return {name: (module.r, module.scaling) for name, module in named if hasattr(module, "lora_A")}

    old, new = modules(model), modules(grown)
    for layer, source in enumerate(plan.layers):
        here, there = f"layers.{layer}.", f"layers.{source}."
        of_source = {name.replace(there, here): value for name, value in old.items() if there in name}
        assert {name: value for name, value in new.items() if here in name} == of_source
    assert ("lm_head" in new) == ("lm_head" in old)
    if init == "preserving":
        assert error(logits(grown), logits(model)) < 1e-6
    grown.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build_model_of(grown), tmp_path).double().eval()
    assert modules(again) == new and torch.equal(logits(again), logits(grown))
    assert model.peft_config["default"].layers_to_transform == settings.get("layers_to_transform")


def build_model_of(grown):
    base, weights = extract_base_model(grown)
    stock = type(base)(base.config).double()
    stock.load_state_dict({**stock.state_dict(), **{name: value.detach() for name, value in weights.items()}})
    return stock


def test_an_init_that_changes_the_base_is_not_run_again():
    model = adapted(base_model().float(), init_lora_weights="pissa")
    grown = grow_model(model, "ffn", 60, init="preserving")
    assert grown.peft_config["default"].init_lora_weights is True
    assert error(logits(grown), logits(model)) < 1e-6


def test_adapters_bring_new_slots_to_life():
    """Under `preserving`, what the frozen base reads with zeros gets a gradient through the adapters."""
    model = adapted(targets=["gate_proj", "up_proj", "down_proj", "o_proj"])
    grown = grow_model(model, "ffn", 60, init="preserving")
    grown(input_ids=TOKENS, labels=TOKENS).loss.backward()
    down = grown.get_base_model().model.layers[0].mlp.down_proj
    assert (down.lora_A["default"].weight[:, 24:] == 0).all()
    assert (down.lora_A["default"].weight.grad[:, 24:] != 0).all() and down.base_layer.weight.grad is None
    deeper = grow_model(model, "layer", 4, init="preserving")
    deeper(input_ids=TOKENS, labels=TOKENS).loss.backward()
    inserted = deeper.get_base_model().model.layers[1].self_attn.o_proj
    assert (inserted.lora_B["default"].weight == 0).all() and (inserted.lora_B["default"].weight.grad != 0).any()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(target_modules=["q_proj"], use_dora=True), "adapter 'default' uses use_dora"),
        (LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)]), "uses layer_replication"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]), "uses trainable_token_indices"),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "of type IA3, only LORA can grow"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "of type PROMPT_TUNING"),
        (LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[1]), "a variant of LoRA"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(GrowthError, match=message):
        extract_base_model(get_peft_model(base_model(), config))


def test_more_refusals(monkeypatch):
    model = adapted()
    model.merge_adapter()
    with pytest.raises(GrowthError, match="merged into the base; call unmerge_adapter"):
        grow_model(model, "ffn", 60)
    model = adapted(base_model(tie_word_embeddings=True), modules_to_save=["lm_head"])
    with pytest.raises(GrowthError, match="modules_to_save holds lm_head, which is tied"):
        grow_model(model, "ffn", 60)
    model = adapted(targets=["layers.1.mlp.up_proj"], modules_to_save=["layers.0.mlp.up_proj"])
    with pytest.raises(GrowthError, match="names layers by number"):
        grow_model(model, "layer", 4)
    with pytest.raises(GrowthError, match="expected a PeftModel, got LlamaForCausalLM"):
        extract_base_model(base_model())
    find_spec = util.find_spec
    monkeypatch.setattr("slop_hf.growth.peft.find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(GrowthError, match=r"needs peft; pip install 'slop-hf\[peft\]'"):
        extract_base_model(adapted())


def test_peft_is_not_loaded_to_ask(monkeypatch):
    assert is_peft_model(adapted()) and not is_peft_model(base_model())
    monkeypatch.delitem(sys.modules, "peft")
    assert not is_peft_model(base_model()) and "peft" not in sys.modules
