"""Unequal copies of experts, by the squared gradient of each on a batch of text."""

import json

import pytest
import torch
from saved_models import assert_same
from transformers import AutoModelForCausalLM

from slop_hf import RunConfig, grow_adamw_state, grow_checkpoint, grow_model, prepare_data
from slop_hf.data.order import list_first_batches
from slop_hf.errors import GrowthError
from slop_hf.growth import GrowthReceipt, measure_expert_utility, plan_growth
from slop_hf.testing import GQA, build_tiny_model, compute_logit_error, make_probe_tokens

STACKS = [f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]
ROUTER = "model.layers.1.mlp.gate.weight"
#: For each layer, utilities and the copies that they lead to, from 4 experts to 6 and to 12.
UTILITY = [[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]]
SOURCES = {
    6: [[0, 1, 2, 3, 1, 1], [0, 1, 2, 3, 0, 0]],
    12: [[0, 1, 2, 3, 1, 1, 1, 2, 2, 3, 3, 3], [0, 1, 2, 3, 0, 0, 0, 1, 1, 1, 2, 2]],
}


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_utility_is_the_squared_norm_of_the_mean_gradient(family):
    model = build_tiny_model(family, GQA, torch.float64).train()
    model.lm_head.weight.requires_grad_(False)
    batches = [{"input_ids": make_probe_tokens()}, {"input_ids": make_probe_tokens(8)}]
    utility = measure_expert_utility(model, batches)
    assert (
        model.training and not model.lm_head.weight.requires_grad and all(p.grad is None for p in model.parameters())
    )
    for batch in batches:
        (model(**batch, labels=batch["input_ids"]).loss / 2).backward()
    norms = [model.get_parameter(name).grad.square().sum((1, 2)) for name in STACKS]
    expected = torch.stack([norms[0] + norms[1], norms[2] + norms[3]])
    assert torch.allclose(torch.tensor(utility, dtype=torch.float64), expected, rtol=1e-10)


@pytest.mark.parametrize("experts", [6, 12])
def test_experts_of_high_utility_are_copied(tmp_path, experts):
    model = build_tiny_model("mixtral", GQA)
    model.save_pretrained(tmp_path / "source")
    grown = grow_model(model, "experts", experts, utility=UTILITY)
    assert (grown.config.num_local_experts, grown.config.num_experts_per_tok) == (experts, 2)
    for number, name in enumerate(STACKS):
        assert torch.equal(grown.get_parameter(name), model.get_parameter(name)[SOURCES[experts][number // 2]]), name
    old, new = model.get_parameter(ROUTER), grown.get_parameter(ROUTER)
    noise = (new - old[SOURCES[experts][1]]).abs().amax(1)
    assert torch.equal(new[:4], old) and noise[4:].min() > 0 and noise.max() < 0.1
    receipt = grow_checkpoint(tmp_path / "source", tmp_path / "grown", "experts", experts, utility=UTILITY)
    assert_same(tmp_path / "grown", grow_model(AutoModelForCausalLM.from_pretrained(tmp_path / "source"), "experts",
                                               experts, utility=UTILITY))  # fmt: skip
    assert receipt.inits == {"experts": "noisy"} and not receipt.preserves
    assert receipt.expert_copies == tuple(tuple(map(row.count, range(4))) for row in SOURCES[experts])
    assert GrowthReceipt.load(tmp_path / "grown") == receipt


def test_moments_are_shared_between_the_copies():
    model = build_tiny_model("mixtral", GQA)
    plan = plan_growth(model.config, "experts", 6, utility=UTILITY)
    ones = {p.source: {"exp_avg": torch.ones(p.old_shape)} for p in plan.parameters()}
    state = grow_adamw_state(ones, plan)
    for name in (STACKS[0], ROUTER.replace("1", "0")):
        expected = torch.tensor([1, 1 / 3, 1, 1, 1 / 3, 1 / 3])
        assert torch.allclose(state[name]["exp_avg"].flatten(1).amax(1), expected), name


def test_unequal_copies_change_the_function_and_equal_ones_do_not():
    """Copies without noise, all experts active: only their shares change, as derived in `growth.experts`."""
    model = build_tiny_model("mixtral", GQA, torch.float64, num_experts_per_tok=4)
    for utility, is_exact in (([[1.0] * 4] * 2, False), (None, True)):
        sizes = {"num_experts": 8, "num_experts_per_tok": 8}
        grown = grow_model(model, "experts", sizes, init="noisy", noise=0.0, utility=utility)
        assert (compute_logit_error(model, grown) < 1e-10) == is_exact


REFUSED = [
    ("mixtral", 8, "preserving", UTILITY, "needs equally many copies of each expert, .*; use init 'noisy'"),
    ("mixtral", 8, None, UTILITY[:1], r"utility must have a list per layer \(2\) with a number per expert \(4\)"),
    ("mixtral", 8, None, [[1.0, 2.0, 3.0, float("nan")]] * 2, "utility must be finite numbers, 0 or more"),
    ("mixtral", 4, None, UTILITY, "num_experts is 4, and growth can only enlarge it, got 4; ask for more"),
    ("llama", 8, None, UTILITY, "a dense model has no experts whose utility could decide on copies; leave it out"),
]


@pytest.mark.parametrize(("family", "experts", "init", "utility", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(family, experts, init, utility, message):
    with pytest.raises(GrowthError, match=message):
        plan_growth(build_tiny_model(family, GQA).config, "experts", experts, init=init, utility=utility)


def test_refusals_of_models_and_batches():
    config = build_tiny_model("mixtral", GQA).config
    with pytest.raises(GrowthError, match="leave it out, or grow with the operator 'experts'"):
        plan_growth(config, "ffn", 80, utility=UTILITY)
    with pytest.raises(GrowthError, match="llama has no experts to compare; take a model with experts"):
        measure_expert_utility(build_tiny_model("llama", GQA), [])
    with pytest.raises(GrowthError, match="there is no batch to measure utilities on; give at least one"):
        measure_expert_utility(build_tiny_model("mixtral", GQA), [])


def test_the_command_measures_on_the_text_of_a_run(tmp_path, config, output_of, error_of):
    corpus = prepare_data(RunConfig.from_yaml(config).data)
    model = build_tiny_model("mixtral", GQA, vocab_size=len(corpus.tokenizer))
    for part in (model, corpus.tokenizer):
        part.save_pretrained(tmp_path / "source")
    command = ("grow", tmp_path / "source", "-o", tmp_path / "grown")
    probe = ("--probe-data", config, "--probe-blocks", 4)
    assert "--probe-data belongs to --experts" in error_of(*command, *probe)
    assert "use --init 'noisy'" in error_of(*command, *probe, "--experts", 8, "--init", "preserving")
    assert json.loads(output_of(*command, *probe, "--experts", 6, "--dry-run", "--json"))["num_experts"] == 6
    output_of(*command, *probe, "--experts", 6)
    utility = measure_expert_utility(model, list_first_batches(corpus.train, 4))
    plan = plan_growth(model.config, "experts", 6, utility=utility)
    copies = GrowthReceipt.load(tmp_path / "grown").expert_copies
    assert copies == tuple(tuple(map(layer.count, range(4))) for layer in plan.experts.sources)
    assert [sorted(layer) for layer in copies] == [[1, 1, 1, 3]] * 2
