"""The operator `experts`: a dense model gets experts, and a model with experts gets more."""

import json

import pytest
import torch
from saved_models import assert_same
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from slop_hf import ModelDims, grow_adamw_state, grow_checkpoint, grow_model
from slop_hf.cli import main
from slop_hf.cost.flops import count_active_parameters, count_parameters
from slop_hf.errors import GrowthError
from slop_hf.growth import plan_growth, probe_growth
from slop_hf.growth.receipt import GrowthReceipt
from slop_hf.testing import GQA, build_tiny_model, compute_logit_error

DOWN = "model.layers.0.mlp.experts.down_proj"
ROUTER = "model.layers.0.mlp.gate.weight"


def upcycle(dense, experts, active, shards):
    """Llama to Mixtral in plain torch, as in the papers; the router stays random, with equal rows in each group."""
    old, factor = dense.config, shards**0.5
    config = MixtralConfig(
        vocab_size=old.vocab_size, hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size // shards,
        num_hidden_layers=old.num_hidden_layers, num_attention_heads=old.num_attention_heads, head_dim=old.head_dim,
        num_key_value_heads=old.num_key_value_heads, rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters, num_local_experts=experts, num_experts_per_tok=active,
    )  # fmt: skip
    grown = MixtralForCausalLM._from_config(config, dtype=dense.dtype, experts_implementation="eager").eval()
    weights = dense.state_dict()
    for name in list(weights):
        if name.endswith("mlp.gate_proj.weight"):
            layer = name.removesuffix("gate_proj.weight")
            gate, up, down = (weights.pop(f"{layer}{part}_proj.weight") for part in ("gate", "up", "down"))
            cut = [torch.cat(pair) for pair in zip(gate.chunk(shards), (factor * up).chunk(shards), strict=True)]
            weights[f"{layer}experts.gate_up_proj"] = torch.stack(cut).repeat(experts // shards, 1, 1)
            downs = torch.stack((factor * down).chunk(shards, dim=1))
            weights[f"{layer}experts.down_proj"] = downs.repeat(experts // shards, 1, 1)
            rows = torch.randn(experts // shards, old.hidden_size, dtype=dense.dtype)
            weights[f"{layer}gate.weight"] = rows.repeat_interleave(shards, 0)
    grown.load_state_dict(weights)
    return grown


@pytest.mark.parametrize(("experts", "active", "shards"), [(4, 1, 1), (8, 2, 1), (3, 3, 1), (16, 4, 4), (15, 10, 5)])
def test_a_llama_equals_its_upcycling_by_hand(experts, active, shards):
    dense = build_tiny_model("llama", GQA, torch.float64)
    expected = upcycle(dense, experts, active, shards)
    width = {"moe_intermediate_size": GQA.intermediate_size // shards} if shards > 1 else {}
    grown = grow_model(dense, "experts", {"num_experts": experts, "num_experts_per_tok": active, **width})
    assert type(grown) is MixtralForCausalLM and grown.config.num_experts_per_tok == active
    others = dict(expected.named_parameters())
    for name, weight in grown.named_parameters():
        assert torch.equal(weight, others.pop(name)) != name.endswith("gate.weight"), name
    rows = grown.get_parameter(ROUTER).view(-1, shards, GQA.hidden_size)
    assert rows.equal(rows[:, :1].expand_as(rows)), "the experts of a group share a row of the router"
    assert len(rows[:, 0].unique(dim=0)) == len(rows), "the groups have different rows"
    assert not others and 0.15 < rows.std() < 0.25
    assert compute_logit_error(dense, expected) < 1e-12 and compute_logit_error(dense, grown) < 1e-12


def test_finer_experts_of_qwen3():
    """The router learns from the first step on: the experts of a group differ. Costs follow from the config."""
    dense = build_tiny_model("qwen3", GQA, torch.float64)
    grown = grow_model(dense, "experts", {"num_experts": 12, "moe_intermediate_size": 10})
    config = grown.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (12, 8, 10)
    assert config.intermediate_size == 40 and compute_logit_error(dense, grown) < 1e-10
    dims = ModelDims.from_config(config)
    assert dims.intermediate_size == 10 and count_parameters(dims, config) == grown.num_parameters()
    dense_network, router = 3 * 48 * 40, 12 * 48
    more = count_active_parameters(dims, config) - count_parameters(GQA, dense.config)
    assert more == GQA.num_hidden_layers * (dense_network + router), "two networks are active in place of one"
    ids = torch.arange(16)[None]
    grown(ids, labels=ids).loss.backward()
    assert grown.get_parameter(ROUTER).grad.abs().amax() > 1e-3 * grown.get_parameter(DOWN).grad.abs().amax()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_other_dense_families(family, tied):
    dense = build_tiny_model(family, GQA, torch.float64, tied)
    grown = grow_model(dense, "experts", 4)
    assert compute_logit_error(dense, grown) < 1e-10
    assert grown.config.model_type == {"mistral": "mixtral", "qwen3": "qwen3_moe"}[family]
    weight = grown.get_parameter(ROUTER)
    ids = torch.arange(16)[None]
    grown(ids, labels=ids).loss.backward()
    gradients = grown.get_parameter(DOWN).grad.flatten(1).abs().amax(1)
    assert gradients.min() > 0 and gradients.std() > 0.01 * gradients.mean()
    assert weight.grad.abs().amax() < 1e-5 * gradients.min(), "the router learns nothing until the experts differ"


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_copies_of_all_active_experts_are_active(family, copies):
    """Exact, with shares that are normalised (Mixtral, Qwen3-MoE here) or not (OLMoE)."""
    model = build_tiny_model(family, GQA, torch.float64)
    grown = grow_model(model, "experts", 4 * copies, noise=1.0)
    assert grown.config.num_experts_per_tok == 2 * copies
    assert compute_logit_error(model, grown) < 1e-10
    old, new = model.get_parameter(DOWN), grown.get_parameter(DOWN).view(copies, 4, 48, 40)
    assert (new[0] - old).std() > 0.1 and torch.allclose(new.mean(0), old, atol=1e-12)
    other = grow_model(model, "experts", 4 * copies, noise=0.0)
    assert torch.equal(other.get_parameter(DOWN), old.repeat(copies, 1, 1))
    assert torch.equal(other.get_parameter(ROUTER), model.get_parameter(ROUTER).repeat(copies, 1))
    plan = plan_growth(model.config, "experts", 4 * copies)
    assert plan.preserves and not plan_growth(model.config, "experts", 4 * copies, init="noisy").preserves


def test_noise_in_the_router():
    model = build_tiny_model("mixtral", GQA, torch.float64)
    grown = grow_model(model, "experts", 8, init="noisy", noise=0.5)
    assert grown.config.num_experts_per_tok == 2 and compute_logit_error(model, grown) > 1e-3
    old, new = model.get_parameter(ROUTER), grown.get_parameter(ROUTER)
    assert torch.equal(new[:4], old) and 0.05 < (new[4:] - old).std() < 0.15
    assert torch.equal(grown.get_parameter(DOWN), model.get_parameter(DOWN).repeat(2, 1, 1))


@pytest.mark.parametrize(
    ("family", "init", "sizes"),
    [
        ("qwen3", None, {"num_experts": 8, "moe_intermediate_size": 20}),
        ("mixtral", "preserving", 8),
        ("olmoe", "noisy", 8),
    ],
)
def test_on_disk_as_in_memory(tmp_path, family, init, sizes):
    model = build_tiny_model(family, GQA)
    model.save_pretrained(tmp_path / "source")
    receipt = grow_checkpoint(
        tmp_path / "source", tmp_path / "grown", "experts", sizes, init=init, max_shard_size="40KB", verify=True
    )
    grown = grow_model(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), "experts", sizes, init=init)
    assert_same(tmp_path / "grown", grown)
    assert receipt.source_parameters == model.num_parameters() and receipt.parameters == grown.num_parameters()
    assert receipt.operators == ("experts",) and receipt.preserves == (init != "noisy")
    assert receipt.probe.is_exact == receipt.preserves


def test_each_copy_gets_its_part_of_the_moments():
    model = build_tiny_model("mixtral", GQA)
    plan = plan_growth(model.config, "experts", 8)
    ones = {p.source: {"exp_avg": torch.ones(p.old_shape), "exp_avg_sq": torch.ones(p.old_shape)}
            for p in plan.parameters()}  # fmt: skip
    state = grow_adamw_state(ones, plan)
    for name in (DOWN, ROUTER):
        assert (state[name]["exp_avg"] == 0.5).all() and (state[name]["exp_avg_sq"] == 0.25).all()
    dense = build_tiny_model("llama", GQA)
    with pytest.raises(GrowthError, match="does not grow into one of a model with experts; begin with a new one"):
        grow_adamw_state({"lm_head.weight": {}}, plan_growth(dense.config, "experts", 8))
    grown = grow_model(dense, "experts", 8)
    assert probe_growth(dense, grown, plan_growth(dense.config, "experts", 8)).is_exact


def test_frozen_networks_grow_into_frozen_experts():
    dense = build_tiny_model("llama", GQA)
    dense.model.layers[0].mlp.requires_grad_(False)
    grown = grow_model(dense, "experts", 4)
    assert not grown.get_parameter(DOWN).requires_grad
    assert grown.get_parameter(DOWN.replace("0", "1")).requires_grad and grown.get_parameter(ROUTER).requires_grad


def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build_tiny_model("llama", GQA), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(GrowthError, match="adapters do not grow with the number of experts; merge_and_unload"):
        grow_model(model, "experts", 4)


@pytest.mark.parametrize(
    ("family", "settings", "sizes", "init", "message"),
    [
        ("gemma", {}, 4, None, "gemma has no family with experts to grow into .known: llama, mistral, qwen3"),
        (
            "llama",
            {"attention_bias": True},
            4,
            None,
            "mixtral has no model.layers.{layer}.self_attn.q_proj.bias; take",
        ),
        ("llama", {}, 4, "noisy", "a dense model gets a new router, which is random; leave out the init"),
        ("llama", {}, 1, None, "num_experts must be 2 or more, got 1; ask for more"),
        ("llama", {}, 4, "copy", r"unknown init 'copy' for operator 'experts' \(known: preserving, noisy"),
        ("mixtral", {}, 6, None, "without utilities it grows to whole multiples only, got 6; ask for 8"),
        ("mixtral", {}, 2.5, None, "num_experts must be a whole number from 1 to 4,096, got 2.5"),
        ("mixtral", {}, {"experts": 8}, None, "experts have no 'experts'"),
        (
            "mixtral",
            {},
            {"num_experts": 8, "num_experts_per_tok": 2},
            None,
            "with num_experts_per_tok 4, got 2; leave",
        ),
        ("mixtral", {}, {"num_experts": 8, "num_experts_per_tok": 9}, "noisy", "num_experts_per_tok is 9, but there"),
        (
            "llama",
            {},
            {"num_experts": 8, "moe_intermediate_size": 12},
            None,
            "moe_intermediate_size must divide intermediate_size 40 of the dense model, got 12; ask for 20, or",
        ),
        (
            "llama",
            {},
            {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 10},
            None,
            "4 experts of width 10 make up a network of the dense model, so num_experts_per_tok must be a multiple of "
            "4, got 2; ask for 4",
        ),
        (
            "mixtral",
            {},
            {"num_experts": 8, "moe_intermediate_size": 20},
            None,
            "this one has experts already; leave it",
        ),
    ],
    ids=range(13),
)
def test_refusals(family, settings, sizes, init, message):
    with pytest.raises(GrowthError, match=message):
        plan_growth(build_tiny_model(family, GQA, **settings).config, "experts", sizes, init=init)


def test_the_command(tmp_path, capsys, monkeypatch):
    build_tiny_model("llama", GQA).save_pretrained(tmp_path / "source")

    def run(*options):
        arguments = ["slop", "grow", str(tmp_path / "source"), "-o", str(tmp_path / "grown"), *options]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as done:
            raise SystemExit(main())
        printed = capsys.readouterr()
        return done.value.code or 0, printed.out, printed.err

    code, out, _ = run("--experts", "4", "--dry-run")
    assert code == 0 and "experts by preserving -> 4 experts, 2 of them active" in " ".join(out.split())
    assert json.loads(run("--experts", "4", "--dry-run", "--json")[1])["num_experts"] == 4
    assert "--experts grows the experts alone" in run("--experts", "4", "--hidden-size", "64")[2]
    assert "--moe-intermediate-size belongs to --experts" in run("--moe-intermediate-size", "8")[2]
    finer = "--experts", "8", "--experts-per-token", "4", "--moe-intermediate-size", "20"
    assert "-> 8 experts, 4 of them active, of width 20" in " ".join(run(*finer, "--dry-run")[1].split())
    assert "--experts-per-token belongs to --experts" in run("--experts-per-token", "1")[2]
    assert run("--experts", "4", "--experts-per-token", "1")[0] == 0
    assert GrowthReceipt.load(tmp_path / "grown").inits == {"experts": "preserving"}
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config["model_type"] == "mixtral" and config["num_experts_per_tok"] == 1
