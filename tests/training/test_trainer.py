import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, TOKENS, arguments, blocks, small_model, trainer
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunDirectory, grow_model
from slop_hf.cost.flops import count_flops_per_token
from slop_hf.errors import DataError, GrowthError, RunError


class Watch(TrainerCallback):
    """Records the events that a user's callback sees."""

    def __init__(self):
        self.steps, self.begins, self.logs, self.parameters = [], 0, [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.begins += 1
        self.parameters.append(model.num_parameters())

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its callback and its trainer; the tests below read them."""
    path = tmp_path_factory.mktemp("run") / "out"
    watch = Watch()
    run = trainer(path, callbacks=[watch])
    output = run.train()
    return RunDirectory(path), watch, run, output


def test_one_axis_of_steps_tokens_and_flops(finished):
    run, watch, staged, output = finished
    assert watch.steps == list(range(1, 4 * STEPS + 1)) and output.global_step == 4 * STEPS
    history = run.history()
    losses = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in losses] == watch.steps
    assert [entry["tokens"] for entry in losses] == [BLOCK * BATCH * step for step in watch.steps]
    assert [entry["stage"] for entry in losses] == [(step - 1) // STEPS for step in watch.steps]
    flops = [entry["train_flops"] for entry in losses]
    per_step = [
        count_flops_per_token(dims, staged.model.config, BLOCK) * BLOCK * BATCH
        for dims in SCHEDULE.structures
        for _ in range(STEPS)
    ]
    assert flops == pytest.approx([sum(per_step[: step + 1]) for step in range(4 * STEPS)])
    assert staged.state.total_flos == pytest.approx(flops[-1], rel=1e-6)


def test_learning_rate_warms_up_and_falls_to_a_tenth_in_every_stage(tmp_path):
    watch = Watch()
    trainer(tmp_path / "out", callbacks=[watch], warmup_steps=2).train()
    rates = [entry["learning_rate"] for entry in watch.logs if "learning_rate" in entry]
    for stage in range(4):
        of_stage = rates[stage * STEPS : (stage + 1) * STEPS]
        assert of_stage[0] == 0.0 and of_stage[2] == pytest.approx(1e-2) == max(of_stage)
        assert of_stage[2:] == sorted(of_stage[2:], reverse=True)
        # the last step's rate lies one step before the end of the cosine
        assert 1e-3 < of_stage[-1] == pytest.approx(1e-3 + 9e-3 * (1 + math.cos(math.pi * 5 / 6)) / 2)


def test_paper_recipe_is_the_default(tmp_path):
    from slop_hf import SlopTrainingArguments

    args = SlopTrainingArguments(output_dir=str(tmp_path))
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (3e-4, 0.9, 0.95)
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_kwargs) == (0.1, 1.0, {"min_lr_rate": 0.1})


def test_records_and_layout(finished):
    run, watch, *_ = finished
    assert sorted(path.name for path in run.path.iterdir()) == [
        ".lock",
        "run.json",
        "schedule.yaml",
        "settings.json",
        *sorted(SCHEDULE.stage_names),
    ]
    assert run.schedule == SCHEDULE and run.is_finished
    records = run.records()
    for number, record in enumerate(records):
        assert (record.stage, record.name, record.dims) == (
            number,
            SCHEDULE.stage_name(number),
            SCHEDULE.structures[number],
        )
        assert (record.tokens, record.total_tokens) == (TOKENS, TOKENS * (number + 1))
        assert record.parameters == watch.parameters[number]
        assert record.perplexity == pytest.approx(math.exp(record.eval_loss)) and record.seconds > 0
        assert (record.eval_loss_after_growth is not None) == (number > 0)
    assert records[3].operators == ("hidden", "mha") and records[1].init == {"layer": "stack"}
    assert records[-1].total_flops == pytest.approx(sum(record.flops for record in records))
    with_state = [number for number in range(4) if (run.stage_dir(number) / "optimizer.safetensors").exists()]
    assert with_state == [3], "the optimizer's state stays until the next stage has something to resume from"


def test_held_out_loss_is_the_models(finished):
    run, *_ = finished
    model = AutoModelForCausalLM.from_pretrained(run.stage_dir(2)).eval()
    rows = torch.stack([block["input_ids"] for block in blocks(8, seed=1)])
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert run.records()[2].eval_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_stages_are_stock_checkpoints(finished):
    run, *_ = finished
    code = (
        "import sys, transformers as t\n"
        "for path in sys.argv[1:]: m = t.AutoModelForCausalLM.from_pretrained(path); assert m.config.use_cache\n"
        "assert not any('slop' in name for name in sys.modules)"
    )
    paths = [str(run.stage_dir(number)) for number in range(4)]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


def test_a_stage_begins_with_the_grown_weights_and_moments(tmp_path):
    class Freeze(TrainerCallback):
        moments = None

        def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
            if state.global_step == STEPS and self.moments is None:
                state_of = optimizer.state[model.model.layers[2].mlp.up_proj.weight]
                self.moments = {key: value.clone() for key, value in state_of.items()}
                self.weights = {name: value.clone() for name, value in model.named_parameters()}

    freeze = Freeze()
    trainer(tmp_path / "out", callbacks=[freeze], keep_optimizer_states=True).train()
    first = RunDirectory(tmp_path / "out").stage_dir(0)
    expected = grow_model(AutoModelForCausalLM.from_pretrained(first), "layer", 3, seed=1)
    assert all(torch.equal(freeze.weights[name], value) for name, value in expected.named_parameters())
    saved = load_file(first / "optimizer.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(freeze.moments["exp_avg"], saved[f"exp_avg/{name}"])
    assert torch.equal(freeze.moments["exp_avg_sq"], saved[f"exp_avg_sq/{name}"])
    assert freeze.moments["step"] == STEPS
    assert freeze.moments["exp_avg"].abs().max() > 0


def test_moments_can_be_dropped(tmp_path):
    states = []

    class First(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            if state.global_step % STEPS == 0:
                states.append(len(optimizer.state))

    trainer(tmp_path / "out", callbacks=[First()], carry_optimizer_state=False).train()
    assert states == [0, 0, 0, 0]


def test_no_block_comes_twice_in_a_pass(tmp_path):
    indices = []

    class Spy(torch.utils.data.Dataset):
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, index):
            indices.append(index)
            return self.rows[index]

    needed = 4 * BATCH * STEPS
    data = Spy(blocks(needed))
    run = trainer(tmp_path / "out", data=data)
    indices.clear()
    run.train()
    assert sorted(indices) == list(range(needed)) and indices != sorted(indices)


def test_more_tokens_than_the_corpus_has_is_a_warning(tmp_path, monkeypatch):
    from slop_hf.training import trainer as module

    warnings = []
    monkeypatch.setattr(module.logger, "warning", warnings.append)
    trainer(tmp_path / "out", data=blocks(BATCH * STEPS)).train()
    assert any("will make 4.0 passes over it" in text for text in warnings)


def test_one_stage_equals_plain_trainer(tmp_path):
    """Without growth, and with data in the same order, transformers' own Trainer ends with the same weights."""
    from slop_hf.data import MixedBlocks
    from slop_hf.data.order import BlockOrder

    schedule = GrowthSchedule(SCHEDULE.initial, initial_tokens=TOKENS)
    ours = trainer(tmp_path / "ours", schedule=schedule)
    ours.train()
    args = arguments(tmp_path / "plain")
    data = BlockOrder(MixedBlocks.wrap(blocks(4 * BATCH * STEPS + 8)), 0, BATCH * STEPS, seed=args.seed)
    plain = Trainer(small_model(), args, train_dataset=data)
    plain.train()
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True))


def test_compute_metrics_and_early_stop_work_as_in_trainer(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == STEPS + 4

    def metrics(prediction):
        return {"right": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    run = trainer(tmp_path / "out", callbacks=[Stop()], compute_metrics=metrics, use_cache=False)
    output = run.train()
    directory = RunDirectory(tmp_path / "out")
    assert output.global_step == STEPS + 4 and directory.finished_stages == 1
    assert all("eval_right" in entry for entry in directory.history() if "eval_loss" in entry)


def test_a_trained_model_begins_without_training(tmp_path):
    schedule = SCHEDULE.with_tokens(3 * TOKENS, initial_share=0)
    model = small_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer(tmp_path / "out", schedule=schedule, model=model).train()
    run = RunDirectory(tmp_path / "out")
    first = AutoModelForCausalLM.from_pretrained(run.stage_dir(0)).state_dict()
    assert all(torch.equal(first[name], value) for name, value in before.items())
    assert [record.tokens for record in run.records()] == [0, TOKENS, TOKENS, TOKENS]


def test_gradient_accumulation_counts_whole_steps(tmp_path):
    run = trainer(tmp_path / "out", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert [span.steps for span in run.spans] == [STEPS] * 4
    run.train()
    assert RunDirectory(tmp_path / "out").records()[-1].global_step == 4 * STEPS


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"model": small_model(ModelDims(16, 32, 4, 2))},
            RunError,
            r"the model has \(16, 32, 4, 2\), the schedule begins",
        ),
        ({"model": None}, RunError, "give the initial model"),
        ({"data": []}, DataError, "train_dataset is empty"),
        ({"data": iter([])}, DataError, "must be map-style"),
        ({"data": blocks(8, size=2 * BLOCK)}, DataError, "blocks have 32 tokens, .* max_position_embeddings is 16"),
        ({"schedule": GrowthSchedule(SCHEDULE.initial)}, RunError, "no tokens to train on"),
        ({"optimizers": (object(), None)}, RunError, "choose it with the argument `optim`"),
        (
            {"processing_class": range(41)},
            RunError,
            "tokenizer has 41 entries, more than the model's vocabulary of 40",
        ),
        ({"max_steps": 5}, RunError, "max_steps and num_train_epochs have no meaning"),
        ({"num_train_epochs": 3}, RunError, "max_steps and num_train_epochs have no meaning"),
        ({"optim": "adafactor"}, RunError, "'adafactor' keeps a state that cannot be grown"),
        ({"train_sampling_strategy": "random"}, RunError, "must stay 'sequential'"),
        ({"push_to_hub": True}, RunError, "needs a callback that publishes finished stages"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
            RunError,
            "cannot work across stages",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path / "out", **settings).train()
    assert not (tmp_path / "out" / "schedule.yaml").exists()


def test_a_schedule_that_would_fail_at_a_late_boundary_is_refused(tmp_path):
    *stages, last = SCHEDULE.stages
    wide = GrowthStage(("head_dim",), stages[-1].dims.replace(head_dim=128), last.tokens)
    schedule = GrowthSchedule(SCHEDULE.initial, (*stages, wide), TOKENS)
    with pytest.raises(GrowthError, match="head_dim from 8 to 128 would raise rope_theta"):
        trainer(tmp_path / "out", schedule=schedule).train()
    assert not (tmp_path / "out" / "schedule.yaml").exists()


def test_another_run_is_not_overwritten(finished):
    run, *_ = finished
    before = (run.stage_dir(3) / "stage.json").read_text()
    with pytest.raises(RunError, match="holds another run, with 4 stages finished; resume it"):
        trainer(run.path).train()
    other = SCHEDULE.with_tokens(10 * TOKENS)
    with pytest.raises(RunError, match="holds a run of another schedule"):
        trainer(run.path, schedule=other).train(resume_from_checkpoint=True)
    output = trainer(run.path).train(resume_from_checkpoint=True)  # a finished run has nothing left to do
    assert output.global_step == 4 * STEPS
    assert (run.stage_dir(3) / "stage.json").read_text() == before
    assert json.loads(before)["stage"] == 3


def test_nothing_to_resume(tmp_path):
    with pytest.raises(RunError, match="nothing to resume"):
        trainer(tmp_path / "out").train(resume_from_checkpoint=True)


@pytest.mark.parametrize("init", ["preserving", "copy"])
def test_exact_growth_keeps_the_held_out_loss_over_a_boundary(tmp_path, init):
    stages = tuple(replace(stage, init="preserving" if stage.label == "layer" else init) for stage in SCHEDULE)
    trainer(tmp_path / "out", schedule=replace(SCHEDULE, stages=stages)).train()
    records = RunDirectory(tmp_path / "out").records()
    for before, after in itertools.pairwise(records):
        assert after.eval_loss_after_growth == pytest.approx(before.eval_loss, abs=1e-5)
        assert set(after.init.values()) <= {"preserving", init}


@pytest.mark.parametrize(
    "family",
    ["gpt_neox", "gemma2", "qwen3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "olmo2"))],
)
def test_every_familys_stages_load_as_they_were(tmp_path, family):
    """Names on disk, ties, biases and several norms per layer: the loaded model computes the same."""
    config = AutoConfig.for_model(family, vocab_size=40, max_position_embeddings=BLOCK)
    model = AutoModelForCausalLM.from_config(SCHEDULE.initial.to_config(config))
    run = trainer(tmp_path / "out", model=model)
    run.train()
    tokens = torch.stack([block["input_ids"] for block in blocks(4)])
    loaded, info = AutoModelForCausalLM.from_pretrained(run.run.stage_dir(3), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, run.model.eval()(tokens).logits)
    assert ModelDims.from_config(loaded.config) == SCHEDULE.target
