"""Frozen parameters, and parameters without a gradient, through the stages of a run."""

import pytest
from safetensors.torch import load_file
from training_runs import BATCH, BLOCK, Interrupt, blocks, freeze, small_model, trainer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory, grow_model
from slop_hf.errors import RunError
from slop_hf.growth import grow_adamw_state, load_adamw_file, plan_growth

STEPS = 3
TOKENS = BLOCK * BATCH * STEPS
#: A stage for each operator; one head_dim for all heads, which need not add up to the hidden size.
SCHEDULE = GrowthSchedule(
    ModelDims(16, 32, 2, 2),
    (
        GrowthStage(("layer",), ModelDims(16, 32, 4, 2), TOKENS),
        GrowthStage(("mha",), ModelDims(16, 32, 4, 4, head_dim=8), TOKENS, init="preserving"),
        GrowthStage(("ffn",), ModelDims(16, 48, 4, 4, head_dim=8), TOKENS),
        GrowthStage(("head_dim",), ModelDims(16, 48, 4, 4, head_dim=12), TOKENS),
        GrowthStage(("hidden",), ModelDims(32, 48, 4, 4, head_dim=12), TOKENS, init="copy"),
    ),
    initial_tokens=TOKENS,
)
#: The same with two growths, for what does not depend on the operator.
SHORT = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:2], TOKENS)
EMBEDDINGS, FIRST_LAYER = "embed_tokens", "layers.0."


def frozen_model(*parts, model_class=LlamaForCausalLM):
    model = small_model(SCHEDULE.initial)
    model = model_class(model.config) if model_class is not LlamaForCausalLM else model
    return freeze(model, parts)


def frozen_run(path, *parts, schedule=SHORT, model=None, **settings):
    model = frozen_model(*parts) if model is None else model
    data = blocks(len(schedule.structures) * BATCH * STEPS)
    settings = {"save_steps": 2, "keep_optimizer_states": True, "eval_dataset": blocks(2), **settings}
    return trainer(path, schedule=schedule, model=model, data=data, **settings)


def names_of(model, *, frozen):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad is not frozen}


class Begins(TrainerCallback):
    """The weights, AdamW's state and the frozen parameters with which each stage begins."""

    def __init__(self):
        self.weights, self.states, self.frozen = [], [], []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        optimizer = getattr(optimizer, "optimizer", optimizer)
        named = dict(model.named_parameters())
        self.weights.append({name: parameter.detach().clone() for name, parameter in named.items()})
        self.states.append(
            {
                name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
                for name, parameter in named.items()
                if parameter in optimizer.state
            }
        )
        self.frozen.append(names_of(model, frozen=True))


@pytest.mark.parametrize("parts", [(EMBEDDINGS,), (FIRST_LAYER, "norm")])
def test_frozen_parameters_only_grow(parts, tmp_path):
    """By every operator, as `grow_model` grows them; AdamW holds no state of them."""
    begins = Begins()
    run = frozen_run(tmp_path / "out", *parts, schedule=SCHEDULE, callbacks=[begins])
    run.train()
    directory = RunDirectory(tmp_path / "out")
    for number in range(len(SCHEDULE.structures)):
        stage, frozen = directory.stage_dir(number), begins.frozen[number]
        begun, ended = begins.weights[number], load_file(stage / "model.safetensors")
        assert {name for name, weight in begun.items() if weight.equal(ended[name])} == frozen
        assert set(load_adamw_file(stage)) == begun.keys() - frozen
        if not number:
            assert frozen == {name for name in begun if any(part in name for part in parts)}
        else:
            old = AutoModelForCausalLM.from_pretrained(directory.stage_dir(number - 1))
            for name, parameter in old.named_parameters():
                parameter.requires_grad_(name not in begins.frozen[number - 1])
            grown = grow_model(old, SCHEDULE.stages[number - 1], seed=number)
            assert names_of(grown, frozen=True) == frozen
            assert all(weight.equal(begun[name]) for name, weight in grown.named_parameters())
            plan = plan_growth(old.config, SCHEDULE.stages[number - 1], seed=number)
            state = grow_adamw_state(load_adamw_file(directory.stage_dir(number - 1)), plan)
            assert state.keys() == begins.states[number].keys() == begun.keys() - frozen
            for name, entries in state.items():
                assert all(value.equal(begins.states[number][name][key]) for key, value in entries.items())
    assert names_of(run.model, frozen=True) == begins.frozen[-1]
    again = frozen_run(tmp_path / "out", *parts, schedule=SCHEDULE)
    again.train(resume_from_checkpoint=True)  # it has finished: the last model is loaded
    assert names_of(again.model, frozen=True) == begins.frozen[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run with frozen embeddings."""
    path = tmp_path_factory.mktemp("frozen") / "whole"
    frozen_run(path, EMBEDDINGS).train()
    return path


@pytest.mark.parametrize("step", [STEPS, STEPS + 3, 2 * STEPS + 2], ids=["first", "inside", "boundary"])
def test_a_resumed_run_ends_with_the_same_bits(step, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        frozen_run(tmp_path / "out", EMBEDDINGS, callbacks=[Interrupt(step)]).train()
    resumed = frozen_run(tmp_path / "out", EMBEDDINGS)
    resumed.train(resume_from_checkpoint=True)
    assert names_of(resumed.model, frozen=True) == {"model.embed_tokens.weight"}
    for name in SHORT.stage_names:
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert (tmp_path / "out" / name / file).read_bytes() == (whole / name / file).read_bytes()


def test_a_run_resumed_with_other_parameters_frozen_is_refused(whole):
    for parts, states in [((), "frozen, not trained"), ((EMBEDDINGS, "model.norm"), "trained, not frozen")]:
        with pytest.raises(RunError, match=rf"was begun with model.\S+ {states}; set requires_grad .* as it was"):
            frozen_run(whole, *parts).train(resume_from_checkpoint=True)


def test_a_model_with_everything_frozen_is_refused(tmp_path):
    with pytest.raises(RunError, match="every parameter of the model is frozen"):
        frozen_run(tmp_path / "out", "model.", "lm_head").train()
    assert not RunDirectory(tmp_path / "out").exists


def test_growth_under_another_optimizer_unfreezes_nothing(tmp_path):
    begins = Begins()
    frozen_run(
        tmp_path / "out", EMBEDDINGS, optim="adafactor", carry_optimizer_state=False, callbacks=[begins]
    ).train()
    assert begins.frozen == [{"model.embed_tokens.weight"}] * 3
    assert not RunDirectory(tmp_path / "out").optimizer_files(2)


class PartlyUnused(LlamaForCausalLM):
    """Reads the mlp of its first layer only once `is_used` is set."""

    is_used = False

    def __init__(self, config):
        super().__init__(config)
        mlp = self.model.layers[0].mlp
        self.read, mlp.forward = mlp.forward, self.skip_or_read

    def skip_or_read(self, states):
        return self.read(states) if type(self).is_used else states * 0


class UseFrom(TrainerCallback):
    """Has the mlp read from a global step on; None for never."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        PartlyUnused.is_used = self.step is not None and state.global_step >= self.step


@pytest.mark.parametrize("use", [None, STEPS + 1], ids=["never", "later"])
def test_a_parameter_without_a_gradient_has_no_moments(use, tmp_path):
    """It is trained from its first gradient on, and counts its own steps, also when the run is resumed."""

    def run(name, *callbacks):
        model = frozen_model(model_class=PartlyUnused)
        return frozen_run(tmp_path / name, model=model, callbacks=[UseFrom(use), *callbacks])

    run("whole").train()
    directory = RunDirectory(tmp_path / "whole")
    first = load_adamw_file(directory.stage_dir(0))
    assert len(first) == len(names_of(frozen_model(), frozen=False)) - 3
    last = load_adamw_file(directory.stage_dir(1))
    counts = {name: int(entries["step"]) for name, entries in last.items()}
    mlps = {layer: {n for name, n in counts.items() if f"layers.{layer}.mlp" in name} for layer in range(4)}
    of_first = set() if use is None else {2 * STEPS - use}
    assert mlps == {0: of_first, 1: {2 * STEPS}, 2: {STEPS}, 3: {2 * STEPS}}, "layer 2 is a copy of layer 0"
    assert {n for name, n in counts.items() if "mlp" not in name} == {2 * STEPS}
    with pytest.raises(KeyboardInterrupt):
        run("parts", Interrupt(2 * STEPS)).train()
    run("parts").train(resume_from_checkpoint=True)
    for name in SHORT.stage_names:
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, other = (load_file(tmp_path / kind / name / file) for kind in ("whole", "parts"))
            assert one.keys() == other.keys() and all(value.equal(other[key]) for key, value in one.items())
