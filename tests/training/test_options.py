"""Options of growth, and the plain Trainer's options over several stages."""

import dataclasses
import json
import os
import socket
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from training_runs import SCHEDULE, TOKENS, Interrupt, arguments, small_model, trainer
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainerCallback

from slop_hf import GrowthSchedule, RunConfig, RunDirectory, SlopTrainingArguments, build_trainer, grow_model
from slop_hf.errors import GrowthError, RunError
from slop_hf.training.launch import prepare_launch

#: Three stages of four steps.
SHORT = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:2]).with_shares([TOKENS // 2] * 3)
STEPS = 4


def train(path, *, schedule=SHORT, resume=False, **settings):
    run = trainer(path, schedule=schedule, **settings)
    run.train(resume_from_checkpoint=resume)
    return RunDirectory(path)


def weights(run, stage):
    return AutoModelForCausalLM.from_pretrained(run.stage_dir(stage), dtype="auto").state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- growth_init -----------------------------------------------------------------------------------------------


def inits(schedule):
    return [stage.init for stage in schedule]


@pytest.mark.parametrize(
    ("growth_init", "expected"),
    [
        (None, [None, None]),
        ("preserving", ["preserving", "preserving"]),
        ({"layer": "preserving"}, [{"layer": "preserving"}, None]),
        ({"layer": "stack", "ffn": "copy", "hidden": "copy"}, [{"layer": "stack"}, {"ffn": "copy"}]),
        ('{"ffn": "copy"}', [None, {"ffn": "copy"}]),
    ],
)
def test_stages_take_the_init_of_their_operators(tmp_path, growth_init, expected):
    assert inits(trainer(tmp_path, schedule=SHORT, growth_init=growth_init).schedule) == expected


def test_a_stage_keeps_its_own_init(tmp_path):
    layer, ffn = SHORT.stages
    schedule = replace(SHORT, stages=(replace(layer, init={"layer": "stack"}), ffn))
    assert inits(trainer(tmp_path, schedule=schedule, growth_init="preserving").schedule) == [
        {"layer": "stack"},
        "preserving",
    ]


@pytest.mark.parametrize(
    ("growth_init", "message"),
    [
        ("magic", "unknown init 'magic' for operator 'layer'"),
        ("copy", "unknown init 'copy' for operator 'layer'"),  # known, but not to every operator
        ({"ffn": "stack"}, "unknown init 'stack' for operator 'ffn'"),
        ({"depth": "stack"}, r"unknown operator 'depth' \(known: layer, mha, ffn, hidden, head_dim\)"),
    ],
)
def test_unknown_inits_are_refused_before_anything_is_written(tmp_path, growth_init, message):
    with pytest.raises(GrowthError, match=message):
        trainer(tmp_path / "out", schedule=SHORT, growth_init=growth_init)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_copies_are_parted_by_the_runs_noise(tmp_path, noise):
    """The last stage has no tokens, so its model is the grown one."""
    schedule = SHORT.with_shares([TOKENS // 2, TOKENS // 2, 0])
    run = train(tmp_path / "out", schedule=schedule, growth_init={"ffn": "copy"}, growth_noise=noise)
    source = AutoModelForCausalLM.from_pretrained(run.stage_dir(1), dtype="auto")
    grown = {
        strength: grow_model(
            source, "ffn", schedule.target.intermediate_size, init="copy", seed=2, noise=strength
        ).state_dict()
        for strength in (noise, 0.25)
    }
    assert same(weights(run, 2), grown[noise])
    assert not same(weights(run, 2), grown[0.25])


def test_the_run_holds_the_inits_that_it_grew_by(tmp_path):
    growth_init = {"layer": "preserving", "ffn": "copy"}
    run = train(tmp_path / "out", growth_init=growth_init)
    assert inits(run.schedule) == [{"layer": "preserving"}, {"ffn": "copy"}]
    before, *grown = run.records()
    assert [record.init for record in grown] == inits(run.schedule)
    for record in grown:
        assert record.eval_loss_after_growth == pytest.approx(before.eval_loss, abs=1e-5)
        before = record
    with pytest.raises(RunError, match=r"was begun with growth_init .*'preserving'.* in stage 1, not .*'stack'"):
        train(run.path, resume=True)
    train(run.path, schedule=run.schedule, resume=True)  # it says by itself how it grew


# ---- Evaluation, moments, files --------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False), (False, False)])
def test_evaluations_around_growth_can_be_left_out(tmp_path, before, after):
    run = train(tmp_path / "out", eval_before_growth=before, eval_after_growth=after)
    evaluated = [(entry["step"], entry["stage"]) for entry in run.history() if "eval_loss" in entry]
    ends, begins = [(4, 0), (8, 1), (12, 2)], [(4, 1), (8, 2)]
    assert evaluated == sorted(ends * before + begins * after)
    records = run.records()
    assert [record.eval_loss is not None for record in records] == [before] * 3
    assert [record.perplexity is not None for record in records] == [before] * 3
    assert [record.eval_loss_after_growth is not None for record in records] == [False, after, after]


class FirstSteps(TrainerCallback):
    """Records the number of parameters with an AdamW state before each stage, and the steps it has counted."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step % STEPS == 0:
            counted = {float(moments["step"]) for moments in optimizer.state.values()}
            self.seen.append((len(optimizer.state), counted))


def test_moments_are_carried_or_start_at_zero(tmp_path):
    carried, fresh = FirstSteps(), FirstSteps()
    train(tmp_path / "carried", callbacks=[carried])
    run = train(tmp_path / "fresh", callbacks=[fresh], carry_optimizer_state=False, keep_optimizer_states=True)
    parameters = [len(dict(small_model(dims).named_parameters())) for dims in SHORT.structures]
    assert carried.seen == [(0, set()), (parameters[1], {4.0}), (parameters[2], {8.0})]
    assert fresh.seen == [(0, set())] * 3
    names = [name for name in load_file(run.optimizer_files(2)[0]) if name.startswith("step/")]
    assert {float(load_file(run.optimizer_files(2)[0])[name]) for name in names} == {4.0}


@pytest.mark.parametrize("keep", [False, True])
def test_optimizer_states_are_kept_or_given_up(tmp_path, keep):
    run = train(tmp_path / "out", keep_optimizer_states=keep)
    assert [bool(run.optimizer_files(stage)) for stage in range(3)] == [keep, keep, True]


def test_small_files_hold_a_stock_model_that_a_run_goes_on_from(tmp_path):
    whole = train(tmp_path / "whole")
    path = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(path, max_shard_size="5KB", keep_optimizer_states=True, callbacks=[Interrupt(3 * STEPS - 1)])
    sharded = RunDirectory(path)
    directories = sharded.stage_dir(1), next(sharded.running_dir(2).iterdir())
    for directory in directories:
        weight_files, moment_files = (list(directory.glob(f"{stem}-*")) for stem in ("model", "optimizer"))
        assert len(weight_files) > 2 and len(moment_files) > 2
        assert max(file.stat().st_size for file in weight_files + moment_files) < 2 * 5_000
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in weight_files}
    assert same(weights(sharded, 1), weights(whole, 1))
    assert same(weights(train(path, resume=True), 2), weights(whole, 2))


@pytest.mark.parametrize("settings", [{"optim": "adafactor"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_another_optimizer_begins_anew_in_every_stage(tmp_path, settings):
    run = train(tmp_path / "out", carry_optimizer_state=False, **settings)
    assert run.is_finished


# ---- Arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 5}, "max_steps and num_train_epochs have no meaning"),
        ({"num_train_epochs": 0.5}, "max_steps and num_train_epochs have no meaning"),
        ({"train_sampling_strategy": "group_by_length"}, "must stay 'sequential', got 'group_by_length'"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}, "load_best_model_at_end"),
        ({"hub_revision": "main"}, "each stage has its own revision"),
        (
            {"auto_find_batch_size": True},
            "auto_find_batch_size would change the batch in the middle of a run; set stage_batch_sizes",
        ),
        ({"save_only_model": True}, "save_only_model writes checkpoints that no run can be resumed from"),
        ({"compile_layers": True}, "compile_layers says how torch_compile compiles; set torch_compile too"),
        ({"lr_span": "stages"}, "lr_span must be one of stage, run, got 'stages'"),
        ({"batch_tokens": []}, r"batch_tokens must be positive numbers, .* got \[\]"),
        ({"batch_tokens": [64, 0]}, r"batch_tokens must be positive numbers, .* got \[64, 0\]"),
        ({"stage_batch_sizes": [-1]}, r"stage_batch_sizes must be positive numbers, .* got \[-1\]"),
        (
            {"stage_learning_rates": [1e-3, 0.0]},
            r"stage_learning_rates must be positive numbers, .* got \[0.001, 0.0\]",
        ),
        ({"growth_noise": -0.1}, "growth_noise must be a number, at least 0, got -0.1"),
        ({"rewarm_steps": -0.1}, "rewarm_steps must be a number, at least 0, got -0.1"),
        ({"peak_tflops": -1}, "peak_tflops must be a number, at least 0, got -1"),
        ({"fsdp": True}, "FSDP needs the processes of a launch"),
        ({"optim": "sgd"}, "optim 'sgd' keeps a state that cannot be grown .*; set optimizer_state_at_growth to new"),
    ],
)
def test_arguments_without_meaning_are_refused(tmp_path, settings, message):
    with pytest.raises(RunError, match=message):
        arguments(tmp_path, **settings)


def unknown_host(*arguments, **settings):
    raise socket.gaierror("Name or service not known")


@pytest.mark.parametrize(
    ("environment", "resolve", "expected"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, socket.getaddrinfo, "127.0.0.1"),
        ({"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "ib0"}, socket.getaddrinfo, None),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "1"}, socket.getaddrinfo, None),
        ({"MASTER_ADDR": "elsewhere"}, unknown_host, None),
    ],
    ids=["loopback", "named by the user", "one rank", "unknown host"],
)
def test_gloo_uses_the_interface_that_leads_to_the_first_rank(tmp_path, monkeypatch, environment, resolve, expected):
    """By itself it would use that of the machine's own name, which may lead nowhere."""
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    before = {"WORLD_SIZE": "16", "GLOO_SOCKET_IFNAME": "", **environment}
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    prepare_launch(SimpleNamespace(fsdp=None, use_cpu=True, ddp_backend=None, deepspeed=None))
    interface = os.environ["GLOO_SOCKET_IFNAME"]
    if expected is None:
        assert interface == before["GLOO_SOCKET_IFNAME"]
    else:
        assert expected in [entry.address for entry in psutil.net_if_addrs()[interface]]


@pytest.mark.parametrize("name", ["batch_tokens", "stage_batch_sizes", "stage_learning_rates"])
def test_one_number_is_one_for_all_stages(tmp_path, name):
    assert getattr(arguments(tmp_path, **{name: 64}), name) == [64]


def test_arguments_from_a_mapping_and_a_file(tmp_path):
    values = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "growth_init": {"layer": "preserving"},
        "batch_tokens": [1024, 2048],
        "rewarm_steps": 0.1,
        "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
        "carry_optimizer_state": False,
    }
    path = tmp_path / "arguments.yaml"
    path.write_text(yaml.safe_dump(values))
    parser = HfArgumentParser(SlopTrainingArguments)
    for (args,) in (parser.parse_dict(values), parser.parse_yaml_file(path)):
        assert {name: getattr(args, name) for name in values} == values


COMMAND_LINE = [
    (["--growth_init", '{"layer": "preserving"}'], "growth_init", {"layer": "preserving"}),
    (["--growth_init", "preserving"], "growth_init", "preserving"),
    (["--batch_tokens", "1024", "2048"], "batch_tokens", [1024, 2048]),
    (["--batch_tokens", "1024"], "batch_tokens", [1024]),
    (["--stage_batch_sizes", "4", "2"], "stage_batch_sizes", [4, 2]),
    (["--stage_learning_rates", "1e-2", "3e-3"], "stage_learning_rates", [1e-2, 3e-3]),
    (["--growth_noise", "0"], "growth_noise", 0.0),
    (["--rewarm_steps", "0.1"], "rewarm_steps", 0.1),
    (["--lr_span", "run"], "lr_span", "run"),
    (["--lr_scheduler_kwargs", '{"num_decay_steps": 0.2}'], "lr_scheduler_kwargs", {"num_decay_steps": 0.2}),
    (["--no_eval_before_growth"], "eval_before_growth", False),
    (["--carry_optimizer_state", "false"], "carry_optimizer_state", False),
    (["--keep_optimizer_states"], "keep_optimizer_states", True),
    ([], "lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
]


@pytest.mark.parametrize(("words", "name", "expected"), COMMAND_LINE)
def test_arguments_from_a_command_line(tmp_path, words, name, expected):
    parser = HfArgumentParser(SlopTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu", *words])
    assert getattr(args, name) == expected


# ---- Stages without tokens -------------------------------------------------------------------------------------

#: A trained model that grows twice before it is trained, is trained, grows and is trained again.
GAPS = SCHEDULE.with_shares([0, 0, TOKENS // 2, TOKENS // 2])


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    return train(tmp_path_factory.mktemp("gaps") / "out", schedule=GAPS, keep_optimizer_states=True)


def test_stages_without_tokens_grow_and_are_written(gaps):
    records = gaps.records()
    assert [(record.tokens, record.steps, record.global_step) for record in records] == [
        (0, 0, 0),
        (0, 0, 0),
        (TOKENS // 2, 4, 4),
        (TOKENS // 2, 4, 8),
    ]
    assert [record.total_tokens for record in records] == [0, 0, TOKENS // 2, TOKENS]
    assert [record.flops > 0 for record in records] == [False, False, True, True]
    assert [record.train_loss is None for record in records] == [True, True, False, False]
    assert records[1].eval_loss == records[1].eval_loss_after_growth
    grown = grow_model(AutoModelForCausalLM.from_pretrained(gaps.stage_dir(0)), "layer", 3, seed=1)
    assert same(weights(gaps, 0), small_model().state_dict())
    assert same(weights(gaps, 1), grown.state_dict())
    losses = [(entry["step"], entry["tokens"], entry["stage"]) for entry in gaps.history() if "loss" in entry]
    assert losses == [(step, 64 * step, 2 if step <= 4 else 3) for step in range(1, 9)]
    assert [bool(gaps.optimizer_files(stage)) for stage in range(4)] == [False, False, True, True]


def test_a_stage_without_tokens_hands_moments_on(tmp_path):
    """The growths before and after it follow each other, for weights and moments alike."""
    schedule = SCHEDULE.with_shares([TOKENS // 2, 0, TOKENS // 2, 0])
    run = train(tmp_path / "out", schedule=schedule, keep_optimizer_states=True)
    assert [record.global_step for record in run.records()] == [4, 4, 8, 8]
    states = [load_file(run.optimizer_files(stage)[0]) for stage in range(4)]
    assert [{float(value) for name, value in state.items() if name[:5] == "step/"} for state in states] == [
        {4.0},
        {4.0},
        {8.0},
        {8.0},
    ]
    name = "exp_avg/model.layers.1.mlp.up_proj.weight"
    assert torch.equal(states[1][name.replace("1", "2")], states[0][name.replace("1", "0")])
    assert states[3][name].shape == (48, 32) and states[3][name].abs().max() > 0


def test_a_stage_without_tokens_is_not_evaluated_after_growth_unasked(tmp_path):
    run = train(tmp_path / "out", schedule=GAPS, eval_after_growth=False)
    assert [record.eval_loss_after_growth for record in run.records()] == [None] * 4


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_run_goes_on_over_stages_without_tokens(gaps, tmp_path, monkeypatch, call):
    """Interrupted before a stage is written: a first stage without tokens, a middle one, and the next."""
    from slop_hf.training import trainer as module

    real, calls = module.save_stage, []

    def interrupt(*args, **settings):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **settings)

    path = tmp_path / "out"
    monkeypatch.setattr(module, "save_stage", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(path, schedule=GAPS)
    monkeypatch.undo()
    assert RunDirectory(path).finished_stages == call - 1
    run = train(path, schedule=GAPS, resume=True)
    assert same(weights(run, 3), weights(gaps, 3))
    assert [record.eval_loss for record in run.records()] == [record.eval_loss for record in gaps.records()]


# ---- Plain Trainer arguments over stages -----------------------------------------------------------------------

PAIR = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:1]).with_shares([TOKENS // 2] * 2)
FIELDS = {item.name for item in dataclasses.fields(SlopTrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


class Facts(TrainerCallback):
    """Records properties of model and optimizer at the last step of each stage."""

    def __init__(self):
        self.stages = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step % STEPS:
            return
        moments = {state["exp_avg"].dtype for state in optimizer.state.values()}
        facts = {
            "attention": model.config._attn_implementation,
            "checkpointing": any(getattr(part, "gradient_checkpointing", False) for part in model.modules()),
            "dtypes": {parameter.dtype for parameter in model.parameters()} | moments,
            "fused": bool(optimizer.param_groups[0]["fused"]),
        }
        self.stages.append(facts)


def attention(name):
    model = small_model()
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        (lambda: {"optim": "adamw_torch_fused"}, {"fused": True}),
        (lambda: {CHECKPOINTING: True}, {"checkpointing": True}),
        (lambda: {"model": attention("eager")}, {"attention": "eager"}),
        (lambda: {"model": small_model().to(torch.bfloat16)}, {"dtypes": {torch.bfloat16}}),
        (lambda: {"model": attention("sdpa"), "lr_span": "run"}, {}),
        pytest.param(
            # The grown model is evaluated in batches of another size before its first step, a resumed one is not.
            lambda: {"torch_compile": True, "compile_layers": True, "per_device_eval_batch_size": 3},
            {},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["fused", "checkpointing", "eager", "bfloat16", "none", "compiled layers"],
)
def test_an_option_holds_in_every_stage_and_over_interruptions(tmp_path, settings, fact):
    usual = {"attention": "sdpa", "checkpointing": False, "dtypes": {torch.float32}, "fused": False}
    expected = {**usual, **fact}

    def run(path, *callbacks, resume=False):
        options = {"optim": "adamw_torch", **settings()}
        return train(path, schedule=PAIR, save_steps=2, callbacks=[*callbacks], resume=resume, **options)

    facts = Facts()
    whole = weights(run(tmp_path / "whole", facts), 1)
    assert facts.stages == [expected] * 2
    assert {weight.dtype for weight in whole.values()} == {torch.bfloat16 if "dtypes" in fact else torch.float32}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", Interrupt(STEPS + 3))
    facts = Facts()
    parts = weights(run(tmp_path / "parts", facts, resume=True), 1)
    assert facts.stages == [expected]
    assert same(whole, parts)


def test_a_runs_file_names_the_attention_of_every_stage(config, tmp_path):
    """`config` is the run's file of `tests/conftest.py`; the name is no setting that a stage's config could hold."""
    facts = Facts()
    run = build_trainer(RunConfig.from_yaml(config, {"model.attn_implementation": "eager"}), tmp_path / "out")
    run.add_callback(facts)
    run.train()
    assert {stage["attention"] for stage in facts.stages} == {"eager"} and run.run.is_finished
    assert "attn_implementation" not in json.dumps(run.plan.facts.model)


@pytest.mark.parametrize(("device", "pins"), [("cpu", False), ("mps", False), ("cuda", True)])
def test_batches_are_pinned_only_for_a_gpu_with_memory_of_its_own(tmp_path, monkeypatch, device, pins):
    monkeypatch.setattr(SlopTrainingArguments, "device", torch.device(device))
    assert SlopTrainingArguments(str(tmp_path), report_to="none").dataloader_pin_memory is pins


@pytest.mark.parametrize("compile_layers", [False, True], ids=["whole model", "layers"])
def test_each_stage_is_compiled_again(tmp_path, compile_layers):
    """With a compiler that leaves graphs unchanged, and gives up if one function has had too many shapes."""
    import torch._dynamo

    made = []

    class Graphs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % STEPS == 0:
                made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    settings = {"schedule": PAIR, "eval_dataset": None}
    plain = train(tmp_path / "plain", model=small_model(dropout=0.0), **settings)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        settings.update(torch_compile=True, torch_compile_backend="eager", callbacks=[Graphs()])
        settings["compile_layers"] = compile_layers
        compiled = train(tmp_path / "compiled", model=small_model(dropout=0.0), **settings)
    first, second = made
    assert 0 < first < second
    for stage in range(2):
        one, other = weights(compiled, stage), weights(plain, stage)
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-6)
