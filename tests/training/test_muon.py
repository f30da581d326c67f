"""Muon for the matrices of the layers: what it updates, how its momentum grows, what it costs."""

from dataclasses import replace

import pytest
import torch
from launching import largest_difference, launch_forked, weights
from torch.utils.flop_counter import FlopCounterMode
from training_runs import BATCH, SCHEDULE, STEPS, TOKENS, Interrupt, arguments, same_weights, small_model, trainer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from slop_hf import GrowthSchedule, ModelDims, RunConfig, RunDirectory, SlopTrainingArguments, grow_adamw_state
from slop_hf.cost.flops import count_flops_per_token, count_muon_flops
from slop_hf.cost.memory import estimate_training_memory
from slop_hf.errors import RunError
from slop_hf.growth import load_adamw_file, plan_growth
from slop_hf.training.muon import ALGORITHM, MOMENTUM, MUON, MatrixPart, MuonWithAdamW, build_muon, compute_direction
from slop_hf.training.ranks import Ranks
from slop_hf.training.run_plan import plan_run

ONE_STAGE = GrowthSchedule(SCHEDULE.initial, (), initial_tokens=TOKENS)
TWO_STEPS = replace(ONE_STAGE, initial_tokens=TOKENS * 2 // STEPS)
#: Layers are added in the second stage, and are then of another age than the others.
MUON_RUN = {
    "optim": "muon",
    "learning_rate": 1e-3,
    "keep_optimizer_states": True,
    "carry_optimizer_state": None,
    "optimizer_state_at_growth": "kept",
    "new_parameter_rate": 1.5,
}
#: Bfloat16 in the iteration makes a rounded gradient into a difference of up to 2**-8 of an update.
TOLERANCE = 4 * STEPS * 1e-3 * 2**-7


def is_matrix(name: str) -> bool:
    return "layers" in name and "norm" not in name


def run_muon(path, **settings):
    settings = {**MUON_RUN, "model": small_model(dropout=0.0), **settings}
    trainer(path, **settings).train()
    return RunDirectory(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out"
    run_muon(path)
    return path


def find_changed(path):
    """Return the parameters that a run of one stage has changed."""
    begun = dict(small_model(dropout=0.0).named_parameters())
    ended = weights(path, "stage-0-initial")
    return {name for name, weight in begun.items() if not torch.equal(weight, ended[name])}


@pytest.mark.parametrize(
    "kind",
    [
        "plain",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.deepspeed),
        pytest.param("fsdp2", marks=pytest.mark.slow),
    ],
)
def test_muon_updates_the_matrices_of_the_layers_and_nothing_else(kind, tmp_path):
    """With a rate of 0 for AdamW, what moves is what Muon moves; counted in numbers."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    settings = {**MUON_RUN, "adamw_learning_rate": 0.0, "weight_decay": 0.0, "save_steps": 100}
    if kind == "plain":
        run_muon(tmp_path / "out", schedule=TWO_STEPS, **settings)
    else:
        TWO_STEPS.to_yaml(tmp_path / "schedule.yaml")
        one = {"schedule": tmp_path / "schedule.yaml", "batch": BATCH // 2, "arguments": settings}
        ended = launch_forked(kind, 2, output=tmp_path / "out", **one)
        assert ended.code == 0, ended.text[-4000:]
    sizes = {name: parameter.numel() for name, parameter in small_model().named_parameters()}
    dims = SCHEDULE.initial
    expected = dims.num_hidden_layers * (4 * dims.hidden_size**2 + 3 * dims.hidden_size * dims.intermediate_size)
    changed = find_changed(tmp_path / "out")
    assert sum(sizes[name] for name in changed) == expected
    assert changed == {name for name in sizes if is_matrix(name)}
    states = load_adamw_file(RunDirectory(tmp_path / "out").stage_dir(0))
    assert {name for name, state in states.items() if set(state) == {MOMENTUM}} == changed
    assert all(set(states[name]) == {"exp_avg", "exp_avg_sq", "step"} for name in sizes.keys() - changed)


def test_adamw_updates_all_others(tmp_path):
    run_muon(tmp_path / "out", schedule=TWO_STEPS, learning_rate=0.0, adamw_learning_rate=1e-3)
    names = {name for name, _ in small_model().named_parameters()}
    assert find_changed(tmp_path / "out") == {name for name in names if not is_matrix(name)}


def test_interrupted_runs_end_with_the_same_bits(whole, tmp_path):
    path = tmp_path / "out"
    for step in (STEPS - 2, 2 * STEPS + 5):
        run = trainer(path, callbacks=[Interrupt(step)], model=small_model(dropout=0.0), **MUON_RUN)
        with pytest.raises(KeyboardInterrupt):
            run.train(resume_from_checkpoint=RunDirectory(path).exists)
    trainer(path, model=small_model(dropout=0.0), **MUON_RUN).train(resume_from_checkpoint=True)
    assert same_weights(whole, path)


@pytest.mark.slow
def test_ddp_agrees_with_one_process(whole, tmp_path):
    ended = launch_forked("ddp", 2, output=tmp_path / "out", batch=BATCH // 2, arguments=MUON_RUN)
    assert ended.code == 0, ended.text[-4000:]
    assert largest_difference(tmp_path / "out", whole) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"])
def test_interrupted_on_shards_agrees_with_one_process(kind, whole, tmp_path):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    settings = {"output": tmp_path / "out", "batch": BATCH // 2, "arguments": MUON_RUN}
    assert launch_forked(kind, 2, **settings, at={STEPS + 5: "interrupt"}).code != 0
    ended = launch_forked(kind, 2, **settings)
    assert ended.code == 0, ended.text[-4000:]
    assert largest_difference(tmp_path / "out", whole) < TOLERANCE


@pytest.mark.parametrize("settings", ["", "nesterov=false, adjust_lr_fn=original", "momentum=0.5, ns_steps=3"])
def test_matrices_in_a_flat_tensor_get_the_bits_of_torchs_muon(settings, tmp_path):
    """As under ZeRO-3: tall, wide and square matrices, one after another in one tensor, with padding."""
    shapes = [(12, 4), (4, 10), (6, 6)]
    args = arguments(tmp_path, optim="muon", optim_args=settings)
    config = LlamaConfig(**small_model().config.to_dict())
    options = build_muon(LlamaForCausalLM(config), args, (), Ranks(), adamw_rate=0.1).param_groups[0]
    options = {name: value for name, value in options.items() if name not in ("params", ALGORITHM)}
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    starts = [0, 50, 92]  # 2 numbers of padding behind each matrix
    flat = torch.nn.Parameter(torch.zeros(130))
    for matrix, start in zip(matrices, starts, strict=True):
        flat.data[start : start + matrix.numel()] = matrix.data.flatten()
    plain = torch.optim.Muon([{"params": matrices, **options}])
    sharded = MuonWithAdamW([], [{"params": [flat], "lr": 0.1}], Ranks())
    sharded.param_groups = [{"params": [flat], **options, ALGORITHM: MUON}]
    sharded.shards[flat] = [
        MatrixPart(shape, start, shape[0] * shape[1]) for shape, start in zip(shapes, starts, strict=True)
    ]
    for _ in range(3):
        flat.grad = torch.zeros(130)
        for matrix, start in zip(matrices, starts, strict=True):
            matrix.grad = torch.randn(matrix.shape)
            flat.grad[start : start + matrix.numel()] = matrix.grad.flatten()
        plain.step()
        sharded.step()
    for matrix, start in zip(matrices, starts, strict=True):
        assert torch.equal(flat[start : start + matrix.numel()].view(matrix.shape), matrix)
        momentum = sharded.state[flat][MOMENTUM][start : start + matrix.numel()].view(matrix.shape)
        assert torch.equal(momentum, plain.state[matrix][MOMENTUM])


@pytest.mark.parametrize("state", ["carried", "kept", "new"])
def test_a_stage_begins_with_the_grown_momentum(tmp_path, state):
    class Begin(TrainerCallback):
        def __init__(self):
            self.states = {}

        def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step % STEPS == 0:
                optimizer = getattr(optimizer, "optimizer", optimizer)
                self.states[state.global_step // STEPS] = {
                    name: {key: value.clone() for key, value in optimizer.state.get(parameter, {}).items()}
                    for name, parameter in model.named_parameters()
                }

    begin = Begin()
    settings = {"optimizer_state_at_growth": state, "callbacks": [begin]}
    run = run_muon(tmp_path / "out", **settings)
    for stage, growth in enumerate(SCHEDULE.stages, 1):
        begun = begin.states[stage]
        if state == "new":
            assert not any(begun.values())
            continue
        before = load_adamw_file(run.stage_dir(stage - 1))
        plan = plan_growth(small_model(SCHEDULE.structures[stage - 1]).config, growth, seed=stage)
        step = {"carried": "keep", "kept": "per_parameter"}[state]
        expected = grow_adamw_state(before, plan, step=step)
        assert begun.keys() == expected.keys()
        for name, entries in expected.items():
            assert entries.keys() == begun[name].keys() and (set(entries) == {MOMENTUM}) == is_matrix(name)
            assert all(torch.equal(begun[name][key], value) for key, value in entries.items()), name


def test_the_ledger_counts_the_flops_of_the_iteration(whole):
    config = small_model().config
    for record, dims in zip(RunDirectory(whole).records(), SCHEDULE.structures, strict=True):
        training = count_flops_per_token(dims, config, 16) * TOKENS
        assert record.flops == training + STEPS * count_muon_flops(dims, config)
    plan = plan_run(SCHEDULE, arguments(whole, optim="muon"), config, block_size=16, devices=1)  # as a preview does
    assert [span.flops for span in plan.spans] == [record.flops for record in RunDirectory(whole).records()]
    last = RunDirectory(whole).history()[-1]
    assert last["train_flops"] == pytest.approx(RunDirectory(whole).records()[-1].total_flops)


def test_counted_flops_are_those_that_torch_counts(tmp_path):
    model = small_model(ModelDims(16, 48, 2, 4, 2, 8))
    group = build_muon(model, arguments(tmp_path, optim="muon"), (), Ranks(), adamw_rate=0.1).param_groups[0]
    with FlopCounterMode(display=False) as counter:
        for matrix in group["params"]:
            compute_direction(torch.randn(matrix.shape), group)
    assert counter.get_total_flops() == count_muon_flops(ModelDims.from_config(model.config), model.config)


def test_the_estimate_of_memory_counts_the_numbers_of_the_state(tmp_path):
    model = small_model(ModelDims(16, 48, 2, 4, 2, 8))
    optimizer = build_muon(model, arguments(tmp_path, optim="muon"), (), Ranks(), adamw_rate=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for name, value in state.items() if name != "step")
    settings = {"precision": "fp32", "optimizer": "muon"}
    dims = ModelDims.from_config(model.config)
    assert estimate_training_memory(dims, model.config, 16, **settings).optimizer == held
    sharded = estimate_training_memory(dims, model.config, 16, zero_stage=1, devices=2, **settings)
    assert sharded.optimizer == held // 2


def test_rates_of_both_follow_the_schedule_and_the_stages(tmp_path):
    class Rates(TrainerCallback):
        def __init__(self):
            self.seen = {}

        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            self.seen[state.global_step] = [(group[ALGORITHM], group["lr"]) for group in optimizer.param_groups]

    rates = Rates()
    settings = {"stage_learning_rates": [0.02, 0.02, 0.01, 0.01], "adamw_learning_rate": 0.004, "rewarm_steps": 0}
    settings["new_parameter_rate"] = 1.0
    run_muon(tmp_path / "out", callbacks=[rates], lr_scheduler_type="constant", **settings)
    for step, groups in rates.seen.items():
        half = 2 if step >= 2 * STEPS else 1
        assert set(groups) == {("muon", 0.02 / half), ("adamw", 0.004 / half)}


def test_fused_queries_keys_and_values_are_a_matrix_and_an_untied_head_is_none(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = GPTNeoXForCausalLM(config)
    optimizer = build_muon(model, arguments(tmp_path, optim="muon"), ["embed_out.weight"], Ranks(), adamw_rate=0.1)
    matrices, *others = optimizer.param_groups
    assert [tuple(matrix.shape) for matrix in matrices["params"]] == [(48, 16), (16, 16), (32, 16), (16, 32)]
    assert sum(len(group["params"]) for group in others) == len(list(model.parameters())) - 4


def test_a_run_goes_down_and_a_frozen_matrix_is_left_alone(tmp_path):
    model = small_model(dropout=0.0)
    frozen = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    data = [{"input_ids": torch.arange(16) % 7, "labels": torch.arange(16) % 7}] * 40
    run = trainer(tmp_path / "out", model=model, schedule=ONE_STAGE, data=data, **{**MUON_RUN, "learning_rate": 1e-2})
    before = frozen.detach().clone()
    run.train()
    history = [entry["loss"] for entry in RunDirectory(tmp_path / "out").history() if "loss" in entry]
    assert history[-1] < history[0] - 0.5
    assert torch.equal(weights(tmp_path / "out", "stage-0-initial")["model.layers.0.mlp.up_proj.weight"], before)


REFUSED = [
    ({"optim": "muon", "optim_args": "momentun=0.9"}, "did you mean 'momentum'"),
    ({"optim": "muon", "optim_args": "ns_steps=many"}, "ns_steps cannot be 'many'; the default is 5"),
    ({"optim": "muon", "optim_args": "adjust_lr_fn=adam"}, "adjust_lr_fn cannot be 'adam'"),
    ({"optim": "muon", "optim_args": "momentum=1"}, "momentum must be at least 0 and below 1"),
    ({"adamw_learning_rate": 1e-3}, "adamw_learning_rate is for optim muon"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_wrong_settings_are_refused(tmp_path, given, message):
    with pytest.raises(RunError, match=message):
        arguments(tmp_path, **given)


def test_muon_is_known_to_configs_and_command_lines(tmp_path):
    words = ["--output_dir", str(tmp_path), "--optim", "muon", "--report_to", "none"]
    (args,) = HfArgumentParser(SlopTrainingArguments).parse_args_into_dataclasses(words)
    assert args.optim == "muon" and replace(args, seed=1).optim == "muon"
    with pytest.raises(RunError, match=r"training.optim: 'moun' is unknown; did you mean 'muon'"):
        RunConfig(training={"optim": "moun"}).arguments(tmp_path)
    assert RunConfig(training={"optim": "muon"}).arguments(tmp_path).optim == "muon"


def test_adamws_run_is_not_resumed_with_muon(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "out", callbacks=[Interrupt(5)]).train()
    with pytest.raises(RunError, match="was begun with optimizer adamw, not muon"):
        trainer(tmp_path / "out", optim="muon").train(resume_from_checkpoint=True)
