import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from slop_hf import ModelDims, grow_adamw_state, grow_optimizer_file, grow_optimizer_state_dict
from slop_hf.architectures import ARCHITECTURES
from slop_hf.errors import GrowthError
from slop_hf.growth import (
    GrownStateReader,
    build_model,
    grow_weights,
    load_adamw_file,
    plan_growth,
    save_adamw_state,
)
from slop_hf.growth.adamw import compute_first_updates, grow_moment
from slop_hf.training.ranks import Ranks
from slop_hf.training.states import ReplicatedStates

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


def read_adamw_state(optimizer, model):
    """Return AdamW's state by parameter name."""
    states = {name: optimizer.state.get(parameter) for name, parameter in model.named_parameters()}
    return {
        name: {key: value.clone() for key, value in entries.items()} for name, entries in states.items() if entries
    }


def load_adamw_state(optimizer, model, state):
    """Put a state into a fresh AdamW, as a stage's training does."""
    states = ReplicatedStates(model, optimizer, Ranks())
    states.make_moments({name: float(entries["step"]) for name, entries in state.items()})
    for name, entries in state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            states.put(name, key, entries[key], 0)
    states.finish()


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
    """No new entry moves by more than about the learning rate in its first step: the stale step does no harm."""
    model, optimizer = trained(steps=60, tie_word_embeddings=tied)
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
    state["wte.weight"] = state.pop("lm_head.weight")
    with pytest.raises(GrowthError, match=r"has wte.weight, unlike the model being grown"):
        grow_adamw_state(state, plan_growth(model.config, "ffn", 80))


# --- the rule for old entries, compared with gradients ---

PLAIN, GROUPED, OWN_HEAD = ModelDims(16, 24, 2, 4), ModelDims(16, 24, 2, 4, 2), ModelDims(16, 24, 2, 4, 2, 6)
GROWTHS = [
    ("layer", 5, "preserving"),
    ("mha", 8, "preserving"),
    ("mha", 8, "copy"),
    ("mha", {"num_attention_heads": 8, "num_key_value_heads": 4}, "copy"),
    ("ffn", 60, "preserving"),
    ("ffn", 60, "copy"),
    ("hidden", 40, "preserving"),
    ("hidden", 40, "copy"),
    ("hidden", 48, "copy"),
    ("head_dim", 12, "preserving"),
    ("head_dim", 12, "spread"),
]


def random_model(family, dims, **settings):
    torch.manual_seed(0)
    if family == "llama":
        settings.update(attention_bias=True, mlp_bias=True)
    config = dims.to_config(AutoConfig.for_model(family, vocab_size=50, initializer_range=0.2, **settings))
    config._attn_implementation = config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model


def gradients(model):
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def index_old_entries(parameter):
    slots = [[slot for slot, old in enumerate(axis.source) if old is not None] for axis in parameter.maps]
    return torch.meshgrid(*map(torch.tensor, slots), indexing="ij")


def compared(model, operator, new, init):
    """Yield each parameter's plan, the gradient of its old entries after growth, and the one that the rule predicts.

    Parameters with new entries only are skipped. The last value is the largest entry of the old gradient.
    """
    plan = plan_growth(model.config, operator, new, init=init, noise=0.0)
    grown = build_model(model, plan, grow_weights(dict(model.named_parameters()), plan))
    old, new_gradients = gradients(model), gradients(grown)
    rule = grow_adamw_state({name: {"exp_avg": gradient} for name, gradient in old.items()}, plan)
    for parameter in plan.parameters():
        if not parameter.zeroed:
            index = index_old_entries(parameter)
            scale = old[parameter.source].abs().max()
            yield parameter, new_gradients[parameter.name][index], rule[parameter.name]["exp_avg"][index], scale


@pytest.mark.parametrize(
    ("family", "dims", "tied"),
    [("llama", PLAIN, False), ("llama", OWN_HEAD, True), ("gemma2", GROUPED, True), ("qwen3", GROUPED, False)],
)
@pytest.mark.parametrize(("operator", "new", "init"), GROWTHS)
def test_old_entries_take_the_moments_of_their_new_gradient(family, dims, tied, operator, new, init):
    if family == "qwen3" and operator == "head_dim":
        pytest.skip("its norms forbid it")
    if dims == PLAIN and isinstance(new, dict):
        pytest.skip("a smaller share of key/value heads")
    model = random_model(family, dims, tie_word_embeddings=tied)
    for parameter, actual, expected, scale in compared(model, operator, new, init):
        # The families compute their norms in float32.
        assert (actual - expected).abs().max() < 2e-5 * scale, parameter.name


@pytest.mark.parametrize(
    ("family", "dims", "operator", "new", "init"),
    [
        ("phi3", GROUPED, "mha", 8, "copy"),
        ("phi3", OWN_HEAD, "head_dim", 12, "preserving"),
        ("phi3", GROUPED, "ffn", 60, "copy"),
        ("gpt2", PLAIN, "ffn", 60, "copy"),
        ("gpt2", PLAIN, "hidden", {"hidden_size": 48, "num_attention_heads": 12}, "copy"),
        ("olmo2", GROUPED, "mha", 8, "preserving"),
        ("olmo2", GROUPED, "mha", 8, "copy"),
        ("olmo2", GROUPED, "hidden", 40, "preserving"),
        ("gemma3_text", GROUPED, "hidden", 40, "preserving"),
        ("granite", GROUPED, "hidden", 40, "copy"),
        ("starcoder2", GROUPED, "layer", 5, "preserving"),
        ("mixtral", GROUPED, "ffn", 60, "copy"),
        ("qwen3_moe", GROUPED, "hidden", 40, "preserving"),
        ("stablelm", GROUPED, "hidden", {"hidden_size": 48, "num_attention_heads": 12}, "copy"),
    ],
)
def test_moments_of_other_families_are_those_of_their_gradients(family, dims, operator, new, init):
    """Of parts of fused weights, transposed weights, and heads under a common norm too."""
    table = ARCHITECTURES[family]
    settings = {**table.test_settings, "tie_word_embeddings": False, "pad_token_id": None}
    if operator == "hidden" and table.norm == "layer":
        new = {"num_key_value_heads": new["num_attention_heads"] * dims.num_key_value_heads // 4, **new}
    model = random_model(family, dims, **settings)
    for parameter, actual, expected, scale in compared(model, operator, new, init):
        assert (actual - expected).abs().max() < 2e-5 * scale, parameter.name


def test_key_value_heads_shared_out_add_up():
    """Grouped to plain attention: each copy has the gradient of its own queries; the rule holds for their sum."""
    model = random_model("llama", OWN_HEAD)
    new = {"num_attention_heads": 4, "num_key_value_heads": 4}
    for parameter, actual, expected, scale in compared(model, "mha", new, "preserving"):
        if parameter.row.axes[0] == "key_value":
            assert (actual - expected).abs().max() > 0.1 * scale
            actual, expected = (value.unflatten(0, (2, 2, 6)).sum(1) for value in (actual, expected))
        assert (actual - expected).abs().max() < 2e-5 * scale, parameter.name


def test_padding_under_layer_norm_adds_a_constant():
    """LayerNorm takes the mean over new slots too; the other parameters, and whole copies, follow the rule."""
    new = {"hidden_size": 40, "num_attention_heads": 10, "num_key_value_heads": 10}
    model = random_model("gpt_neox", PLAIN)
    for parameter, actual, expected, scale in compared(model, "hidden", new, "preserving"):
        if parameter.is_centred:
            dimension = parameter.row.axes.index("hidden")
            assert (actual - expected).std(dimension).max() < 2e-5 * scale
        else:
            assert (actual - expected).abs().max() < 2e-5 * scale, parameter.name


@pytest.mark.parametrize("power", [1, 2])
def test_second_moments_take_the_square(power):
    model = random_model("gemma2", GROUPED)
    for operator, new, init in GROWTHS[1:]:
        for parameter in plan_growth(model.config, operator, new, init=init).parameters():
            moment = torch.rand([axis.old_size for axis in parameter.maps]).double()
            index = index_old_entries(parameter)
            first, grown = grow_moment(moment, parameter, 1)[index], grow_moment(moment**power, parameter, power)
            assert torch.allclose(first**power, grown[index])


def largest_updates(how, steps=60):
    """The largest step of a new entry of the up projection over the next updates, in units of the learning rate."""
    model, optimizer = trained(steps=60)
    plan = plan_growth(model.config, "ffn", 80)
    state = read_adamw_state(optimizer, model)
    for moments in state.values():  # as after many steps, when no bias is left to correct
        moments["exp_avg_sq"] /= 1 - 0.999**60
        moments["step"].fill_(10_000)
    state = grow_adamw_state(state, plan, step="reset" if how == "reset" else "keep")
    if how == "zeros":
        for parameter in plan.parameters():
            for dimension, axis in enumerate(parameter.maps):
                new = torch.tensor([i for i, slot in enumerate(axis.source) if slot is None], dtype=torch.long)
                state[parameter.name]["exp_avg_sq"].index_fill_(dimension, new, 0.0)
    grown = build_model(model, plan, grow_weights(dict(model.named_parameters()), plan))
    lr = 1e-6  # so small that the gradient hardly changes: the worst case
    optimizer = torch.optim.AdamW(grown.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    load_adamw_state(optimizer, grown, state)
    weight, largest = grown.model.layers[0].mlp.up_proj.weight, 0.0
    # Updates are read from the state: float32 weights would round them away.
    for _ in range(steps):
        step(grown, optimizer)
        entry = optimizer.state[weight]
        count = float(entry["step"])
        mean, square = entry["exp_avg"] / (1 - 0.9**count), entry["exp_avg_sq"] / (1 - 0.999**count)
        update = mean / (square.sqrt() + 1e-8)
        largest = max(largest, update[48:].abs().max().item())
    return largest


def test_a_stale_step_harms_zero_moments_only():
    assert largest_updates("zeros") > 4
    assert largest_updates("mean") < 1.5
    assert largest_updates("reset") < 2


def test_reset_counts_from_zero():
    model, optimizer = trained()
    plan = plan_growth(model.config, "ffn", 80)
    grown = grow_adamw_state(read_adamw_state(optimizer, model), plan, step="reset")
    down = grown["model.layers.1.mlp.down_proj.weight"]
    assert down["step"] == 0 and (down["exp_avg_sq"][:, :48] != 0).any() and (down["exp_avg_sq"][:, 48:] == 0).all()
    with pytest.raises(GrowthError, match="step must be one of keep, reset, per_parameter, got 'stale'"):
        grow_adamw_state(read_adamw_state(optimizer, model), plan, step="stale")


def test_inserted_layers_have_no_momentum_yet():
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    grown = grow_adamw_state(state, plan_growth(model.config, "layer", 4, init="preserving"))
    source, name = state["model.layers.0.mlp.up_proj.weight"], "model.layers.1.mlp.up_proj.weight"
    assert (grown[name]["exp_avg"] == 0).all() and torch.equal(grown[name]["exp_avg_sq"], source["exp_avg_sq"])
    silent = grown["model.layers.1.mlp.down_proj.weight"]
    assert (silent["exp_avg"] == 0).all() and silent["exp_avg_sq"].unique().numel() == 1


def in_groups(model):
    """As Trainer has them: weight decay for matrices, none for norms; the head has a rate of its own."""
    named = dict(model.named_parameters())
    heads = [name for name in named if name == "lm_head.weight"]
    norms = [name for name in named if "norm" in name]
    matrices = [name for name in named if name not in {*heads, *norms}]
    settings = [{"weight_decay": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 0.1, "lr": 5e-4}]
    groups = [
        {"params": [named[name] for name in names], **setting}
        for names, setting in zip((matrices, norms, heads), settings, strict=True)
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.95), amsgrad=True), [*matrices, *norms, *heads]


@pytest.mark.parametrize("growth", [("layer", 5), ("ffn", 80), ("hidden", 64)])
def test_state_dicts_keep_their_groups(growth):
    model, _ = trained()
    optimizer, names = in_groups(model)
    step(model, optimizer, 3)
    plan = plan_growth(model.config, *growth)
    before = optimizer.state_dict()
    state_dict, new_names = grow_optimizer_state_dict(before, names, plan)
    grown = build_model(model, plan, grow_weights(dict(model.named_parameters()), plan))
    fresh, expected_names = in_groups(grown)
    assert new_names == expected_names
    fresh.load_state_dict(state_dict)
    assert [group["lr"] for group in fresh.param_groups] == [1e-3, 1e-3, 5e-4]
    assert [group["weight_decay"] for group in fresh.param_groups] == [0.1, 0.0, 0.1]
    state = grow_adamw_state(read_adamw_state(optimizer, model), plan)
    loaded = read_adamw_state(fresh, grown)
    assert loaded.keys() == state.keys()
    for name, entries in state.items():
        assert set(entries) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert all(torch.equal(loaded[name][key], value) for key, value in entries.items())
    assert before["param_groups"] == optimizer.state_dict()["param_groups"]
    step(grown, fresh)


@pytest.mark.parametrize("tied", [False, True])
def test_one_group_comes_in_the_order_of_the_model(tied):
    model, optimizer = trained(tie_word_embeddings=tied)
    plan = plan_growth(model.config, "layer", 4)
    names = [name for name, _ in model.named_parameters()]
    _, new_names = grow_optimizer_state_dict(optimizer.state_dict(), names, plan)
    grown = build_model(model, plan, grow_weights(dict(model.named_parameters()), plan))
    assert new_names == [name for name, _ in grown.named_parameters()]


def test_frozen_and_unused_parameters():
    model, _ = trained()
    model.lm_head.weight.requires_grad_(False)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(list(named.items()))
    plan = plan_growth(model.config, "layer", 4)
    state_dict, new_names = grow_optimizer_state_dict(optimizer.state_dict(), list(named), plan)
    assert state_dict["state"] == {} and "lm_head.weight" not in new_names
    assert state_dict["param_groups"][0].get("param_names", new_names) == new_names
    with pytest.raises(GrowthError, match="the optimizer has 20 parameters, got 19 names"):
        grow_optimizer_state_dict(optimizer.state_dict(), list(named)[1:], plan)
    with pytest.raises(GrowthError, match="has no parameter wte"):
        grow_optimizer_state_dict(optimizer.state_dict(), ["wte", *list(named)[1:]], plan)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda moments: moments.update(state1=torch.ones(2)), "has the state 'state1', unknown to AdamW"),
        (lambda moments: moments.update(exp_avg=torch.ones(3)), r"has shape \[3\], the model's has \[32\]"),
    ],
)
def test_other_optimizers_and_shards_are_refused(spoil, message):
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    spoil(state["model.norm.weight"])
    with pytest.raises(GrowthError, match=message):
        grow_adamw_state(state, plan_growth(model.config, "ffn", 80))
    state = {**read_adamw_state(optimizer, model), "wte": {}}
    with pytest.raises(GrowthError, match="the optimizer state has wte, unlike the model"):
        grow_adamw_state(state, plan_growth(model.config, "ffn", 80))


@pytest.mark.parametrize("growth", [("layer", 4), ("hidden", 64)])
def test_parameters_without_a_state_get_none(growth, tmp_path):
    """Frozen ones, or ones that had no gradient yet, and their copies: by name and on disk."""
    model, optimizer = trained()
    state, plan = read_adamw_state(optimizer, model), plan_growth(model.config, *growth)
    whole = grow_adamw_state(state, plan)
    frozen = {name for name in state if "embed" in name or "layers.1." in name}
    part = {name: entries for name, entries in state.items() if name not in frozen}
    expected = {one.name: whole[one.name] for one in plan.parameters() if one.source not in frozen}
    assert same(grow_adamw_state(part, plan), expected)
    source = save_adamw_state(part, tmp_path / "source.safetensors")
    assert same(load_adamw_file(grow_optimizer_file(source, tmp_path, plan)), expected)


def same(one, other):
    pairs = [(one[name][key], other[name][key]) for name in one for key in one[name]]
    return {name: set(one[name]) for name in one} == {name: set(other[name]) for name in other} and all(
        torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs
    )


def test_files_are_stock_safetensors(tmp_path):
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    leftover = tmp_path / ".optimizer.safetensors.writing"  # of a killed run of an earlier release
    leftover.mkdir()
    (leftover / "exp_avg").write_text("half")
    path = save_adamw_state(state, tmp_path / "optimizer.safetensors")
    stock = load_file(path)
    assert torch.equal(stock["exp_avg_sq/lm_head.weight"], state["lm_head.weight"]["exp_avg_sq"])
    assert len(stock) == 3 * len(state)
    assert same(load_adamw_file(path), state) and same(load_adamw_file(tmp_path), state)
    assert [file.name for file in tmp_path.iterdir()] == ["optimizer.safetensors"]


@pytest.mark.parametrize("policy", ["keep", "reset"])
@pytest.mark.parametrize("growth", [("layer", 5), ("hidden", 64, "copy")])
def test_files_grow_as_in_memory(growth, policy, tmp_path):
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    operator, new, init = (*growth, None)[:3]
    plan = plan_growth(model.config, operator, new, init=init)
    expected = grow_adamw_state(state, plan, step=policy)
    source = save_adamw_state(state, tmp_path / "source" / "optimizer.safetensors")
    assert same(load_adamw_file(grow_optimizer_file(source.parent, tmp_path / "grown", plan, step=policy)), expected)
    entries = list(load_file(source).items())
    (tmp_path / "shards").mkdir()
    for number in (1, 2):
        part = dict(entries[number - 1 :: 2])
        save_file(part, tmp_path / "shards" / f"optimizer-0000{number}-of-00002.safetensors")
    path = grow_optimizer_file(tmp_path / "shards", tmp_path / "one.safetensors", plan, step=policy)
    assert path == tmp_path / "one.safetensors" and same(load_adamw_file(path), expected)


def test_files_are_complete_or_absent(tmp_path):
    model, optimizer = trained()
    state = read_adamw_state(optimizer, model)
    plan = plan_growth(model.config, "ffn", 80)
    source, target = tmp_path / "optimizer.safetensors", tmp_path / "grown.safetensors"
    with pytest.raises(GrowthError, match=r"has no optimizer state: expected optimizer.safetensors, or shards of it"):
        grow_optimizer_file(tmp_path, target, plan)
    save_adamw_state({**state, "lm_head.weight": {"exp_avg": torch.ones(3)}}, source)
    with pytest.raises(GrowthError, match=r"a moment of lm_head.weight has shape"):
        grow_optimizer_file(source, target, plan)
    save_adamw_state({}, source)
    with pytest.raises(GrowthError, match=r"optimizer.safetensors holds no state; grow the state of an AdamW"):
        grow_optimizer_file(source, target, plan)
    save_adamw_state(state, source)
    source.write_bytes(source.read_bytes()[:-10])
    with pytest.raises(GrowthError, match="truncated or corrupt"):
        grow_optimizer_file(source, target, plan)
    save_file({"weight": torch.ones(2)}, source)
    with pytest.raises(GrowthError, match="weight of dtype F32 is not AdamW's state; expected"):
        grow_optimizer_file(source, target, plan)
    assert [file.name for file in tmp_path.iterdir()] == ["optimizer.safetensors"]
    with pytest.raises(GrowthError, match="exists already"):
        grow_optimizer_file(source, source, plan)


KEPT = {
    "ffn": ("ffn", 80, "random"),
    "copies of ffn": ("ffn", 120, "copy"),
    "copies of heads in groups": ("mha", {"num_attention_heads": 8}, "copy"),
    "groups cut in two": ("mha", {"num_attention_heads": 8, "num_key_value_heads": 8}, "copy"),
    "hidden": ("hidden", 48, "preserving"),
    "copies of hidden": ("hidden", 80, "copy"),
    "stacked layers": ("layer", 5, "stack"),
    "interleaved layers": ("layer", 5, "interleave"),
    "scaled layers": ("layer", 5, "scaled"),
    "inserted layers": ("layer", 3, "preserving"),
}


@pytest.mark.parametrize("growth", KEPT.values(), ids=KEPT.keys())
def test_per_parameter_keeps_what_was_there_and_starts_the_rest_at_zero(growth, tmp_path):
    """Of the copies of a slot or a layer, the first is what was there; the reader and the file have the same bits."""
    model, optimizer = trained(num_key_value_heads=2)
    config = model.config
    operator, dims, init = growth
    plan = plan_growth(config, operator, dims, init=init)
    state = read_adamw_state(optimizer, model)
    kept, carried = (grow_adamw_state(state, plan, step=step) for step in ("per_parameter", "keep"))
    first_layers = [plan.layers.index(layer) for layer in range(config.num_hidden_layers)]
    for parameter in plan.parameters():
        masks = []
        for axis in parameter.maps:
            sources = axis.source
            is_first = [old is not None and sources.index(old) == slot for slot, old in enumerate(sources)]
            assert sum(is_first) == axis.old_size
            masks.append(torch.tensor(is_first))
        is_old = masks[0][:, None] & masks[1] if len(masks) == 2 else masks[0]
        if match := re.search(r"layers\.(\d+)", parameter.name):
            is_old = is_old & (int(match[1]) in first_layers)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(kept[parameter.name][key], torch.where(is_old, carried[parameter.name][key], 0.0))
        assert kept[parameter.name]["step"] == (3 if is_old.any() else 0)

    model.save_pretrained(tmp_path / "model")
    save_adamw_state(state, tmp_path / "model" / "optimizer.safetensors")
    written = load_adamw_file(grow_optimizer_file(tmp_path / "model", tmp_path / "grown", plan, step="per_parameter"))
    reader = GrownStateReader(tmp_path / "model", config, plan, step="per_parameter")
    assert reader.read_steps() == {name: float(entries["step"]) for name, entries in kept.items()}
    for name, entries in kept.items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(written[name][key], entries[key])
            assert torch.equal(reader.read(name, key, reader.allocate(name, key)), entries[key])


def test_new_entries_update_as_compute_first_updates_says():
    """Under a steady gradient, an entry that begins at zero in a tensor of many steps, over a fresh AdamW's entry."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(0.9, 0.99), weight_decay=0.0, eps=0.0)
    optimizer.state[weight] = {"step": torch.tensor(1e6), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    updates = []
    for _ in range(30):
        before, weight.grad = weight.item(), torch.tensor([0.25])
        optimizer.step()
        updates.append(before - weight.item())
    assert updates == pytest.approx(compute_first_updates(0.9, 0.99, 30), rel=1e-5)
