"""Parameters that a growth adds: their steps, moments and learning rates, in one process and on several ranks."""

import json
import math
from dataclasses import replace

import pytest
import torch
from launching import largest_difference, launch_forked
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, TOKENS, Interrupt, arguments, freeze, small_model, trainer
from transformers import TrainerCallback

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory
from slop_hf.errors import RunError
from slop_hf.training.checks import describe_uncorrected_updates
from slop_hf.training.parameter_groups import IS_NEW, list_adding_stages
from slop_hf.training.spans import compute_stage_spans

#: Layers are added twice, so that parameters of three ages train together, and a width grows last.
DEEP = GrowthSchedule(
    ModelDims(16, 32, 1, 2),
    (
        GrowthStage(("layer",), ModelDims(16, 32, 2, 2), TOKENS),
        GrowthStage(("layer",), ModelDims(16, 32, 3, 2), TOKENS, init="interleave"),
        GrowthStage(("ffn",), ModelDims(16, 48, 3, 2), TOKENS, init="copy"),
    ),
    initial_tokens=TOKENS,
)
KEPT = {
    "carry_optimizer_state": None,
    "optimizer_state_at_growth": "kept",
    "new_parameter_rate": 1.5,
    "new_parameter_steps": 3,
    "learning_rate": 1e-3,
    "schedule": DEEP,
}
#: The stage that added each layer, for each stage: layer 1 copies layer 0, then layers 0 1 become 0 0 1.
ADDED = [[0], [0, 1], [0, 2, 1], [0, 2, 1]]


class Watch(TrainerCallback):
    """Records steps, moments and learning rates at the beginning of each step."""

    def __init__(self):
        self.trainer = None
        self.seen = {}

    def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self.seen[state.global_step] = {
            names[id(parameter)]: {
                "lr": group["lr"],
                "is_new": group.get(IS_NEW, False),
                "decay": group["weight_decay"],
                "step": float(optimizer.state[parameter]["step"]) if parameter in optimizer.state else 0.0,
                "moment": float(optimizer.state[parameter]["exp_avg"].abs().sum()) if optimizer.state else 0.0,
            }
            for group in optimizer.param_groups
            for parameter in group["params"]
        }


def list_layers(seen, layer):
    return [facts for name, facts in seen.items() if f"layers.{layer}." in name]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to its end, watched."""
    path, watch = tmp_path_factory.mktemp("whole") / "out", Watch()
    trainer(path, callbacks=[watch], model=small_model(DEEP.initial, dropout=0.0), **KEPT).train()
    return path, watch.seen


def test_steps_and_moments_are_those_of_each_parameter(whole):
    _, seen = whole
    for stage in (1, 2, 3):
        first = seen[stage * STEPS]
        for layer, added in enumerate(ADDED[stage]):
            for facts in list_layers(first, layer):
                assert facts["step"] == (stage - added) * STEPS
                assert (facts["moment"] == 0) == (added == stage)
        assert first["model.embed_tokens.weight"]["step"] == stage * STEPS


def test_only_new_parameters_have_the_new_rate_and_only_at_first(whole):
    _, seen = whole
    for stage in (1, 2, 3):
        for step in range(STEPS):
            facts = seen[stage * STEPS + step]
            old = facts["model.embed_tokens.weight"]["lr"]
            for layer, added in enumerate(ADDED[stage]):
                expected = old * 1.5 if added == stage and step < 3 else old
                assert all(math.isclose(entry["lr"], expected) for entry in list_layers(facts, layer))
                assert {entry["is_new"] for entry in list_layers(facts, layer)} == {added == stage}
    decayed = {name for name, entry in seen[0].items() if entry["decay"]}
    assert {name for name, entry in seen[STEPS].items() if entry["decay"]} >= decayed


def test_an_added_layer_updates_as_under_a_fresh_adamw(tmp_path):
    """The first update of a fresh AdamW has the size of the learning rate, whatever the gradient."""
    before = {}

    class Updates(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == STEPS:
                before.update({name: value.detach().clone() for name, value in model.named_parameters()})

        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == STEPS + 1:
                name = "model.layers.1.self_attn.q_proj.weight"
                rate = 1e-3 * 1.5
                change = model.get_parameter(name).detach() - before[name] * (1 - rate * args.weight_decay)
                before["ratio"] = float(change.abs().median()) / rate
                control.should_training_stop = True

    settings = {**KEPT, "lr_scheduler_type": "constant"}
    trainer(tmp_path / "out", callbacks=[Updates()], **settings).train()
    assert before["ratio"] == pytest.approx(1.0, abs=1e-3)


def test_interrupted_runs_end_with_the_same_bits(whole, tmp_path):
    """In a stage with new parameters, in one with three ages, and after its factor has ended."""
    path = tmp_path / "out"
    for step in (STEPS + 4, 2 * STEPS + 5, 3 * STEPS):
        run = trainer(
            path, callbacks=[Interrupt(step)], model=small_model(DEEP.initial, dropout=0.0), save_steps=1, **KEPT
        )
        with pytest.raises(KeyboardInterrupt):
            run.train(resume_from_checkpoint=RunDirectory(path).exists)
    watch = Watch()
    run = trainer(path, callbacks=[watch], model=small_model(DEEP.initial, dropout=0.0), **KEPT)
    run.train(resume_from_checkpoint=True)
    assert largest_difference(path, whole[0], "stage-3-ffn") == 0
    assert all(watch.seen[step] == whole[1][step] for step in watch.seen)


def test_frozen_parameters_are_in_no_group_and_have_no_state(tmp_path):
    watch = Watch()
    model = freeze(small_model(DEEP.initial), ["layers.0.mlp"])
    trainer(tmp_path / "out", callbacks=[watch], model=model, **KEPT).train()
    last = watch.seen[3 * STEPS]
    assert not any(".mlp." in name for name in last) and any("self_attn" in name for name in last)


def test_new_optimizer_states_go_with_rates_of_their_own(tmp_path):
    """The factor needs no state: with a fresh AdamW too, only what the newest growth has added is in a group apart."""
    watch = Watch()
    trainer(tmp_path / "out", callbacks=[watch], **{**KEPT, "optimizer_state_at_growth": "new"}).train()
    first = watch.seen[2 * STEPS]
    assert {entry["step"] for entry in first.values()} == {0.0}
    assert [list_layers(first, layer)[0]["is_new"] for layer in range(3)] == [False, True, False]


def test_stages_that_added_each_parameter_follow_the_copies():
    spans = compute_stage_spans(DEEP, small_model(DEEP.initial).config, 16, [BATCH] * 4)
    stages = list_adding_stages(spans, small_model(DEEP.initial).config)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert [[added.get(name.format(i), 0) for i in range(len(ADDED[s]))] for s, added in enumerate(stages)] == ADDED
    assert all("norm.weight" not in name or "layers" in name for added in stages for name in added)


ANSWERS = [
    ({}, "new", False),
    ({"carry_optimizer_state": True}, "carried", True),
    ({"carry_optimizer_state": False}, "new", False),
    ({"optimizer_state_at_growth": "carried"}, "carried", True),
    ({"optimizer_state_at_growth": "kept"}, "kept", False),
    ({"optimizer_state_at_growth": "kept", "carry_optimizer_state": False}, "kept", False),
]


@pytest.mark.parametrize(("given", "state", "carried"), ANSWERS)
def test_the_earlier_boolean_and_its_successor_agree(tmp_path, given, state, carried):
    args = arguments(tmp_path, **{"carry_optimizer_state": None, **given})
    assert (args.optimizer_state_at_growth, args.carry_optimizer_state) == (state, carried)
    assert replace(args, seed=3).optimizer_state_at_growth == state


REFUSED = [
    ({"optimizer_state_at_growth": "keep"}, "unknown optimizer_state_at_growth 'keep'; did you mean 'kept'"),
    ({"optimizer_state_at_growth": "kept", "carry_optimizer_state": True}, "contradicts optimizer_state_at_growth"),
    ({"optimizer_state_at_growth": "carried", "carry_optimizer_state": False}, "carry_optimizer_state false contra"),
    ({"optimizer_state_at_growth": "kept", "optim": "adafactor"}, "keeps a state that cannot be grown"),
    ({"new_parameter_rate": -1.0}, "new_parameter_rate must be a number, at least 0"),
    ({"new_parameter_steps": float("nan")}, "new_parameter_steps must be a number"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_wrong_values_are_refused(tmp_path, given, message):
    with pytest.raises(RunError, match=message):
        arguments(tmp_path, **{"carry_optimizer_state": None, **given})


def test_schedules_that_depend_on_more_than_the_step_have_no_factor(tmp_path):
    with pytest.raises(RunError, match="leave out new_parameter_rate"):
        trainer(tmp_path / "out", **KEPT, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")


@pytest.mark.parametrize(("beta2", "schedule", "warned"), [(0.999, SCHEDULE, True), (0.95, SCHEDULE, False)])
def test_too_large_first_updates_of_new_entries_are_warned_of(tmp_path, beta2, schedule, warned):
    run = trainer(tmp_path / "out", **{**KEPT, "schedule": schedule}, adam_beta2=beta2)
    assert bool(warning := describe_uncorrected_updates(run.args, run.plan)) == warned
    assert not warned or "up to 6.6 times the learning rate" in warning


LAUNCHED = {name: value for name, value in KEPT.items() if name != "schedule"}


@pytest.mark.slow
def test_ddp_agrees_with_one_process(whole, tmp_path):
    DEEP.to_yaml(tmp_path / "schedule.yaml")
    settings = {"schedule": tmp_path / "schedule.yaml", "batch": BATCH // 2, "arguments": LAUNCHED}
    ended = launch_forked("ddp", 2, output=tmp_path / "out", **settings)
    assert ended.code == 0, ended.text[-4000:]
    assert largest_difference(tmp_path / "out", whole[0], "stage-3-ffn") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"])
def test_shards_count_the_steps_of_each_age(kind, tmp_path):
    """Each age is a group of its own, because ZeRO-3 counts the steps of a group."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    stages = [replace(stage, tokens=BATCH * BLOCK) for stage in DEEP.stages[:2]]
    short = GrowthSchedule(DEEP.initial, tuple(stages), initial_tokens=BATCH * BLOCK)
    short.to_yaml(tmp_path / "schedule.yaml")
    (tmp_path / "dump").mkdir()
    settings = {**LAUNCHED, "save_steps": 100}
    trainer(tmp_path / "one", model=small_model(DEEP.initial, dropout=0.0), **{**settings, "schedule": short}).train()
    ended = launch_forked(
        kind,
        2,
        output=tmp_path / "two",
        schedule=tmp_path / "schedule.yaml",
        batch=BATCH // 2,
        arguments=settings,
        dump=tmp_path / "dump",
    )
    assert ended.code == 0, ended.text[-4000:]
    assert largest_difference(tmp_path / "one", tmp_path / "two", "stage-2-layer") < 1e-6
    facts = json.loads((tmp_path / "dump" / "2-rank-0.json").read_text())
    counts = [{step for name, step in facts["steps"].items() if f"layers.{layer}." in name} for layer in range(3)]
    assert counts == [{2 - added} for added in ADDED[2]]
    assert len(facts["groups"]) == 6  # matrices and norms of three ages


@pytest.mark.slow
@pytest.mark.deepspeed
def test_zero3_interrupted_in_a_stage_of_three_ages_agrees_with_one_process(whole, tmp_path):
    pytest.importorskip("deepspeed")
    DEEP.to_yaml(tmp_path / "schedule.yaml")
    (tmp_path / "dump").mkdir()
    settings = {"schedule": tmp_path / "schedule.yaml", "batch": BATCH // 2, "arguments": LAUNCHED}
    ended = launch_forked("zero3", 2, output=tmp_path / "out", **settings, at={2 * STEPS + 5: "interrupt"})
    assert ended.code != 0
    ended = launch_forked("zero3", 2, output=tmp_path / "out", **settings, dump=tmp_path / "dump")
    assert ended.code == 0, ended.text[-4000:]
    assert largest_difference(tmp_path / "out", whole[0], "stage-3-ffn") < 1e-6
    facts = json.loads((tmp_path / "dump" / "3-rank-0.json").read_text())
    assert facts["steps"] == {name: entry["step"] for name, entry in whole[1][3 * STEPS].items()}


def test_deepspeeds_own_optimizer_has_no_groups():
    from slop_hf.training.checks import check_deepspeed_config

    config = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}
    check_deepspeed_config(config)
    with pytest.raises(RunError, match="leave it out of DeepSpeed's configuration"):
        check_deepspeed_config(config, needs_groups=True)


def test_torch_keeps_zeros_as_a_fresh_state():
    """A step of 0 and moments of 0 are what AdamW begins with, to the last bit."""
    weights = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([weight], lr=0.1) for weight in weights]
    optimizers[1].state[weights[1]] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(3),
        "exp_avg_sq": torch.zeros(3),
    }
    for weight, optimizer in zip(weights, optimizers, strict=True):
        for step in range(1, 4):
            weight.grad = torch.tensor([0.1, -2.0, 3.0]) * step
            optimizer.step()
    assert torch.equal(*weights)
