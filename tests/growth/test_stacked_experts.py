"""Experts: one parameter in memory, one tensor per matrix on disk; each expert grows like a network of its own."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import assert_same
from transformers import AutoModelForCausalLM

from slop_hf import ModelDims, grow_checkpoint, grow_model
from slop_hf.architectures import ARCHITECTURES
from slop_hf.errors import GrowthError
from slop_hf.growth import GrownStateReader, hash_stored_weights, plan_growth
from slop_hf.testing import GQA, MHA, build_tiny_model, compute_logit_error
from slop_hf.training.ranks import Ranks
from slop_hf.training.state_io import load_states, save_states
from slop_hf.training.states import ReplicatedStates

GATE_UP, DOWN = "model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"


def save(path, family, dtype=torch.float32, **settings):
    model = build_tiny_model(family, GQA, dtype)
    model.save_pretrained(path, **settings)
    return path


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager")


@pytest.mark.parametrize(
    ("family", "operator", "size", "init", "dtype"),
    [
        ("mixtral", "ffn", 60, "copy", torch.float32),
        ("mixtral", "hidden", 72, "preserving", torch.bfloat16),
        ("qwen3_moe", "layer", 3, "random", torch.float32),
        ("qwen3_moe", "layer", 3, "preserving", torch.float32),
        ("olmoe", "ffn", 60, "random", torch.float32),
    ],
    ids=str,
)
def test_on_disk_as_in_memory(tmp_path, family, operator, size, init, dtype):
    source = save(tmp_path / "source", family, dtype)
    receipt = grow_checkpoint(
        source, tmp_path / "grown", operator, size, init=init, max_shard_size="30KB", verify=True
    )
    expected = grow_model(load(source), operator, size, init=init)
    assert_same(tmp_path / "grown", expected)
    assert receipt.parameters == expected.num_parameters()
    assert receipt.source_hash == hash_stored_weights(source) or family == "mixtral"  # whose router is renamed


def test_the_first_layers_of_a_model_with_experts(tmp_path):
    """They take nothing from the model, on disk and in memory."""
    empty = build_tiny_model("mixtral", MHA.replace(num_hidden_layers=0))
    empty.save_pretrained(tmp_path / "empty")
    for init in ("random", "preserving"):
        grow_checkpoint(tmp_path / "empty", tmp_path / init, "layer", 2, init=init, progress=False)
        assert_same(tmp_path / init, grow_model(load(tmp_path / "empty"), "layer", 2, init=init))
    weight = load(tmp_path / "random").get_parameter(GATE_UP)
    assert weight.std() > 0.1 and not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_checkpoint_with_whole_stacks_grows_alike(tmp_path, family):
    source = save(tmp_path / "source", family)
    whole = save(tmp_path / "whole", family, save_original_format=False)
    assert GATE_UP in load_file(whole / "model.safetensors")
    for path in (source, whole):
        grow_checkpoint(path, tmp_path / f"grown {path.name}", "ffn", 60, progress=False)
    one, other = (tmp_path / f"grown {path.name}" / "model.safetensors" for path in (source, whole))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("operator", "new", "init"), [("ffn", 60, "copy"), ("hidden", 96, "copy"), ("layer", 3, "stack")], ids=str
)
def test_each_expert_grows_like_a_network_of_its_own(operator, new, init):
    """Mixtral, compared with a Mistral that has the expert in place of its network."""
    mixtral = build_tiny_model("mixtral", GQA, torch.float64)
    grown = grow_model(mixtral, operator, new, init=init, noise=0.0)
    for expert in range(4):
        mistral = build_tiny_model("mistral", GQA, torch.float64)
        for layer, other in zip(mistral.model.layers, mixtral.model.layers, strict=True):
            gate, up = other.mlp.experts.gate_up_proj[expert].chunk(2)
            layer.mlp.gate_proj.weight.data, layer.mlp.up_proj.weight.data = gate.clone(), up.clone()
            layer.mlp.down_proj.weight.data = other.mlp.experts.down_proj[expert].clone()
        expected = grow_model(mistral, operator, new, init=init, noise=0.0)
        for layer, other in zip(grown.model.layers, expected.model.layers, strict=True):
            experts, network = layer.mlp.experts, other.mlp
            fused = torch.cat([network.gate_proj.weight, network.up_proj.weight])
            assert torch.equal(experts.gate_up_proj[expert], fused)
            assert torch.equal(experts.down_proj[expert], network.down_proj.weight)


def test_experts_get_different_new_entries():
    grown = grow_model(build_tiny_model("mixtral", GQA), "ffn", 60, init="random")
    weight = grown.get_parameter(GATE_UP)
    new = torch.cat([weight[:, 40:60], weight[:, 100:]], dim=1).flatten(1)
    assert torch.corrcoef(torch.cat([new[:, :960], new[:, 960:]])).fill_diagonal_(0).abs().max() < 0.2


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_states_of_a_stage(tmp_path, family):
    """Training writes the tensors that transformers reads, and reads and grows them again."""
    model = build_tiny_model(family, GQA)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(16)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    save_states(ReplicatedStates(model, optimizer, Ranks()), model.config, tmp_path, "30KB")
    model.config.save_pretrained(tmp_path)
    stock = load(tmp_path)
    assert compute_logit_error(model, stock) == 0
    plan = plan_growth(model.config, "ffn", 60, init="copy")
    grown, expected = (
        build_tiny_model(family, GQA.replace(intermediate_size=60)),
        grow_model(stock, "ffn", 60, init="copy"),
    )
    load_states(ReplicatedStates(grown, torch.optim.AdamW(grown.parameters()), Ranks()),
                GrownStateReader(tmp_path, model.config, plan))  # fmt: skip
    for (name, one), other in zip(grown.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_without_an_expert_is_refused(tmp_path):
    source = save(tmp_path / "source", "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    del tensors[name]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GrowthError, match=f"has no {name}"):
        grow_checkpoint(source, tmp_path / "grown", "ffn", 60)
    with pytest.raises(GrowthError, match=r"differ from the model being grown, as in model\.layers\.1\.mlp\.experts"):
        config = load(save(tmp_path / "whole", "qwen3_moe")).config
        GrownStateReader(source, config, plan_growth(config, "ffn", 60), moments=False)


def test_refusals(tmp_path):
    config = build_tiny_model("qwen3_moe").config.to_dict()
    with pytest.raises(GrowthError, match="decoder_sparse_step 2 cannot grow, expected 1: its layers are of sev"):
        plan_growth({**config, "decoder_sparse_step": 2}, "ffn", 60)
    with pytest.raises(GrowthError, match="with 0 experts cannot grow; expected a whole number, 1 or more"):
        plan_growth({**config, "num_local_experts": 0}, "ffn", 60)


def test_the_number_of_experts_has_two_names():
    """Qwen3-MoE on the Hub has `num_experts`, transformers 5 writes `num_local_experts`."""
    config = {"model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 512, "moe_intermediate_size": 32,
              "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}  # fmt: skip
    table = ARCHITECTURES["qwen3_moe"]
    assert [table.read({**config, name: 16}, "num_experts") for name in ("num_experts", "num_local_experts")] == [
        16
    ] * 2
    assert table.read(config, "num_experts") == 128 and ModelDims.from_config(config).intermediate_size == 32
