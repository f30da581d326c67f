"""Counts against models that transformers builds."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from slop_hf import ModelDims
from slop_hf.architectures import get_architecture
from slop_hf.cost.flops import (
    count_active_parameters,
    count_flops_per_token,
    count_layer_matrices,
    count_muon_flops,
    count_paper_params,
    count_parameters,
)
from slop_hf.errors import ArchitectureError, PlanError
from slop_hf.planning.space import DimsArray

STRUCTURES = [ModelDims(64, 96, 2, 4), ModelDims(96, 200, 3, 6, 2), ModelDims(64, 96, 1, 8, 2, 16)]


@pytest.mark.parametrize("dims", STRUCTURES, ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_count_equals_the_models(dims, tied, biases):
    config = dims.to_config(
        LlamaConfig(vocab_size=130, tie_word_embeddings=tied, attention_bias=biases, mlp_bias=biases)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(dims, config) == model.num_parameters()
    assert count_parameters(dims, config.to_dict()) == model.num_parameters()


def test_table_names_every_parameter_with_its_shape():
    dims = ModelDims(96, 200, 2, 6, 2)
    config = dims.to_config(LlamaConfig(vocab_size=130, attention_bias=True, mlp_bias=True))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    from slop_hf.cost.flops import compute_axis_sizes

    sizes = compute_axis_sizes(dims, config)
    described = {
        row.name.replace("{layer}", str(layer)): tuple(sizes[axis] for axis in row.axes)
        for row in get_architecture(config).rows(config)
        for layer in range(2 if row.is_in_layer else 1)
    }
    assert described == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_flops_equal_torchs_count_of_a_step():
    """torch counts the full square of attention, the formula its causal half."""
    from torch.utils.flop_counter import FlopCounterMode

    dims, length = ModelDims(96, 256, 3, 6, 2), 64
    config = dims.to_config(LlamaConfig(vocab_size=130))
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    tokens = torch.zeros(2, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    full_attention = 6 * dims.num_hidden_layers * dims.hidden_size * length
    ours = (count_flops_per_token(dims, config, length) + full_attention) * tokens.numel()
    # The first layer's input needs no gradient through the embedding; rotary tables are in torch's count alone.
    assert counter.get_total_flops() == pytest.approx(ours, rel=5e-3)


def test_arrays_answer_like_single_structures():
    many = DimsArray.of(STRUCTURES)
    for function in (count_paper_params, count_parameters, count_flops_per_token):
        assert list(function(many)) == [function(dims) for dims in STRUCTURES]


def test_unknown_family_names_the_known_ones():
    with pytest.raises(ArchitectureError, match=r"'gpt_j' \(supported: llama, "):
        count_parameters(STRUCTURES[0], {"model_type": "gpt_j", "vocab_size": 10})


@pytest.mark.parametrize(
    ("fields", "dims"),
    [
        ({"model_type": "gpt2", "n_positions": 32}, ModelDims(64, 256, 2, 4)),
        ({"model_type": "phi3"}, STRUCTURES[1]),
        ({"model_type": "seed_oss", "attention_out_bias": True}, STRUCTURES[2]),
        ({"model_type": "starcoder2", "use_bias": False}, STRUCTURES[1]),
        ({"model_type": "mixtral", "num_local_experts": 3}, STRUCTURES[1]),
        ({"model_type": "qwen3_moe", "num_experts": 5}, STRUCTURES[1]),
        ({"model_type": "stablelm", "use_parallel_residual": True}, STRUCTURES[1]),
    ],
    ids=lambda value: value.get("model_type") if isinstance(value, dict) else None,
)
def test_count_equals_the_models_of_other_families(fields, dims):
    fields = {**fields, "vocab_size": 130, "tie_word_embeddings": False}
    config = dims.to_config(AutoConfig.for_model(**fields, pad_token_id=None))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(dims, config) == count_parameters(dims, fields) == model.num_parameters()
    assert ModelDims.from_config(config.to_dict()) == dims


def test_only_active_experts_cost_flops():
    """Mixtral with one expert of which one is active costs a Mistral and its router; four times two cost twice."""
    dims, length = STRUCTURES[1], 64
    mistral, mixtral = ({"model_type": name, "vocab_size": 130} for name in ("mistral", "mixtral"))
    dense = count_flops_per_token(dims, mistral, length)
    network = dims.num_hidden_layers * 3 * dims.hidden_size * dims.intermediate_size
    for experts, active in ((1, 1), (4, 2), (8, 2)):
        config = {**mixtral, "num_local_experts": experts, "num_experts_per_tok": active}
        router = dims.num_hidden_layers * experts * dims.hidden_size
        more = (active - 1) * network + router
        assert count_flops_per_token(dims, config, length) == dense + 6 * more
        assert count_active_parameters(dims, config) == count_parameters(dims, mistral) + more
    with pytest.raises(PlanError, match="num_experts_per_tok must be a whole number from 1 to 4, got 5"):
        count_flops_per_token(dims, {**mixtral, "num_local_experts": 4, "num_experts_per_tok": 5}, length)
    for count in (count_layer_matrices, count_muon_flops):
        with pytest.raises(PlanError, match="mixtral stacks those of its experts in one; use AdamW"):
            count(dims, mixtral)
