"""Runs that begin with a model without layers: embeddings, the final norm and the head alone."""

from dataclasses import replace

import pytest
import torch
from launching import largest_difference
from training_runs import BATCH, BLOCK, Interrupt, freeze, small_model, trainer
from transformers import AutoModelForCausalLM

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory, grow_checkpoint, grow_model
from slop_hf.errors import GrowthError
from slop_hf.growth import grow_weights, load_adamw_file, plan_growth

STEPS = 4
TOKENS = BLOCK * BATCH * STEPS
EMPTY = ModelDims(16, 32, 0, 2)
RANDOM = GrowthStage(("layer",), EMPTY.replace(num_hidden_layers=2), TOKENS, init="random")
SCHEDULE = GrowthSchedule(
    EMPTY,
    (RANDOM, GrowthStage(("layer",), EMPTY.replace(num_hidden_layers=3), TOKENS, init="stack")),
    initial_tokens=TOKENS,
)
SETTINGS = {"schedule": SCHEDULE, "carry_optimizer_state": None, "keep_optimizer_states": True, "save_steps": 2}
WAYS = {
    "kept": {"optimizer_state_at_growth": "kept", "new_parameter_rate": 1.5},
    "carried by muon": {"optimizer_state_at_growth": "carried", "optim": "muon", "learning_rate": 1e-3},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_run_from_no_layers_is_resumed_with_the_same_bits(way, tmp_path):
    settings = {**SETTINGS, **way}
    trainer(tmp_path / "whole", **settings).train()
    path = tmp_path / "parts"
    for step in (3, STEPS + 3):
        with pytest.raises(KeyboardInterrupt):
            run = trainer(path, callbacks=[Interrupt(step)], **settings)
            run.train(resume_from_checkpoint=RunDirectory(path).exists)
    trainer(path, **settings).train(resume_from_checkpoint=True)
    for stage in SCHEDULE.stage_names:
        assert largest_difference(tmp_path / "whole", path, stage) == 0
    run = RunDirectory(path)
    assert [record.dims.num_hidden_layers for record in run.records()] == [0, 2, 3]
    assert AutoModelForCausalLM.from_pretrained(run.stage_dir(0)).num_parameters() == 40 * 16 + 16
    if way["optimizer_state_at_growth"] == "kept":
        steps = {
            name: entries["step"] for name, entries in load_adamw_file(run.stage_dir(1)).items() if "step" in entries
        }
        assert steps["model.layers.1.input_layernorm.weight"] == STEPS
        assert steps["model.embed_tokens.weight"] == 2 * STEPS


def test_layers_are_those_of_a_new_model_and_the_rest_stays():
    model = small_model(EMPTY)
    grown = grow_model(model, RANDOM)
    new = small_model(RANDOM.dims)
    assert {name: p.shape for name, p in grown.named_parameters()} == {n: p.shape for n, p in new.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(grown.get_parameter(name), parameter)
    up = grown.model.layers[0].mlp.up_proj.weight.detach()
    assert up.std() == pytest.approx(model.config.initializer_range, rel=0.1)
    assert not torch.equal(up, grown.model.layers[1].mlp.up_proj.weight)


def test_all_ways_to_grow_give_the_same_layers(tmp_path):
    model = small_model(EMPTY)
    plan = plan_growth(model.config, RANDOM, seed=3)
    expected = grow_weights(dict(model.named_parameters()), plan)
    model.save_pretrained(tmp_path / "empty")
    grow_checkpoint(tmp_path / "empty", tmp_path / "grown", RANDOM, seed=3)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert all(torch.equal(stored.get_parameter(name), weight) for name, weight in expected.items())


def test_a_frozen_embedding_freezes_no_new_layer(tmp_path):
    model = freeze(small_model(EMPTY), ["embed_tokens"])
    grown = grow_model(model, RANDOM)
    assert [name for name, p in grown.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    run = trainer(tmp_path / "out", model=model, **SETTINGS)
    run.train()
    assert load_adamw_file(RunDirectory(tmp_path / "out").stage_dir(2)).keys() == {
        name for name, _ in small_model(SCHEDULE.structures[-1]).named_parameters() if "embed_tokens" not in name
    }


@pytest.mark.parametrize("init", [None, "stack", "interleave", "middle", "scaled"])
def test_there_are_no_layers_to_copy(init, tmp_path):
    message = (
        rf"init '{init or 'stack'}' copies layers, but \(16, 32, 0, 2\) has none; set the init of layer to 'random'"
    )
    schedule = replace(SCHEDULE, stages=(replace(RANDOM, init=init),))
    with pytest.raises(GrowthError, match=message):
        trainer(tmp_path / "out", **{**SETTINGS, "schedule": schedule})
    assert not RunDirectory(tmp_path / "out").exists
