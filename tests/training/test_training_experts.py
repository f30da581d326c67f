"""A staged run of a model with experts, on one rank and on several; Muon is refused before it begins."""

import pytest
import torch
from launching import largest_difference, launch_forked
from safetensors.torch import load_file
from training_runs import BATCH, BLOCK, SCHEDULE, small_model, trainer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, set_seed

from slop_hf import (
    GrowthSchedule,
    GrowthStage,
    ModelDims,
    RunConfig,
    RunDirectory,
    build_trainer,
    grow_adamw_state,
    grow_model,
    prepare_data,
    preview_run,
)
from slop_hf.data.order import list_first_batches
from slop_hf.errors import PlanError, RunError
from slop_hf.growth import load_adamw_file, measure_expert_utility, plan_growth

TOKENS = 2 * BLOCK * BATCH
WIDER = SCHEDULE.initial.replace(intermediate_size=48)
SHORT = GrowthSchedule(SCHEDULE.initial, (GrowthStage(("ffn",), WIDER, TOKENS, init="copy"),), initial_tokens=TOKENS)

#: A dense model of width 32, and the run of what it becomes with experts of width 16, which grow to 24.
DENSE = ModelDims(16, 32, 2, 2)
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 16}
FINER = [ModelDims(16, 16, 2, 2), ModelDims(16, 24, 2, 2), ModelDims(32, 24, 2, 4)]
STAGES = (
    GrowthStage(("ffn",), FINER[1], TOKENS, init="copy"),
    GrowthStage(("hidden", "mha"), FINER[2], TOKENS, init="preserving"),
)


def build_mixtral():
    set_seed(0)
    config = MixtralConfig(vocab_size=40, max_position_embeddings=BLOCK, num_local_experts=4, num_experts_per_tok=2)
    return MixtralForCausalLM(SCHEDULE.initial.to_config(config))


def test_a_run_of_a_model_with_experts(tmp_path):
    run = trainer(tmp_path / "out", schedule=SHORT, model=build_mixtral())
    assert run.train().global_step == 4
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "stage-1-ffn", output_loading_info=True)
    assert not any(info.values()) and loaded.config.num_local_experts == 4
    for (name, one), other in zip(loaded.named_parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert loaded.get_parameter("model.layers.1.mlp.experts.down_proj").shape == (4, 16, 48)


def test_muon_is_refused(tmp_path):
    with pytest.raises(PlanError, match="mixtral stacks those of its experts in one; use AdamW"):
        trainer(tmp_path / "out", schedule=SHORT, model=build_mixtral(), optim="muon")
    assert not any((tmp_path / "out").rglob("*.*")), "something was written"


def test_a_run_gives_the_pretrained_model_experts(tmp_path, config):
    """A dense model, and then the result, whose experts are copied by their utility on the run's first blocks."""
    corpus = prepare_data(RunConfig.from_yaml(config).data)
    dense = small_model(DENSE, vocab_size=len(corpus.tokenizer), max_position_embeddings=32)
    path = tmp_path / "initial"
    corpus.tokenizer.save_pretrained(path)
    schedule = GrowthSchedule(FINER[0], STAGES[:1], initial_tokens=TOKENS)

    def build(model, **experts):
        model.save_pretrained(path)
        keys = {"model.pretrained": str(path), "model.experts": experts, "data.tokenizer": str(path)}
        run = RunConfig.from_yaml(config, keys).with_schedule(schedule)
        spans = preview_run(run, tmp_path / "preview")
        trained = build_trainer(run, tmp_path / f"out-{len(experts)}").model
        assert spans[0].parameters == trained.num_parameters()
        return trained

    first = build(dense, **EXPERTS)
    expected = grow_model(dense, "experts", EXPERTS)
    assert all(map(torch.equal, first.parameters(), expected.parameters()))
    second = build(first, num_experts=8, probe_blocks=2)
    utility = measure_expert_utility(first, list_first_batches(corpus.train, 2, seed=42))
    expected = grow_model(first, "experts", 8, utility=utility)
    assert all(map(torch.equal, second.parameters(), expected.parameters()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"experts": {"num_experts": 8}}, "model.experts grows a pretrained model; give model.pretrained, or else"),
        ({"experts": {"experts": 8}, "pretrained": "."}, "model.experts: .*'experts'"),
        (
            {"experts": {"num_experts": 8, "probe_blocks": -1}, "pretrained": "."},
            "probe_blocks must be a whole number",
        ),
    ],
    ids=["no model", "unknown key", "negative"],
)
def test_refused_experts_of_a_run(model, message):
    with pytest.raises(RunError, match=message):
        _ = RunConfig(model=model).experts


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("zero3", marks=pytest.mark.deepspeed), "fsdp2"])
def test_experts_of_a_dense_model_grow_on_two_ranks(kind, tmp_path):
    """As in one process; every stage begins with the bits of growth in memory, and the files are stock checkpoints."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    schedule, settings = GrowthSchedule(FINER[0], STAGES, initial_tokens=TOKENS), {"learning_rate": 1e-3}
    settings["keep_optimizer_states"] = True
    model = grow_model(small_model(DENSE, dropout=0.0), "experts", EXPERTS)
    trainer(tmp_path / "alone", schedule=schedule, model=model, **settings).train()
    schedule.to_yaml(tmp_path / "schedule.yaml")
    (tmp_path / "dump").mkdir()
    launched = {"output": tmp_path / "out", "schedule": tmp_path / "schedule.yaml", "dump": tmp_path / "dump"}
    launched["initial"] = DENSE.as_dict()
    ended = launch_forked(kind, 2, **launched, batch=BATCH // 2, experts=EXPERTS, arguments=settings)
    assert ended.code == 0, ended.text[-4000:]
    one, two = (RunDirectory(tmp_path / run) for run in ("alone", "out"))
    for stage in schedule.stage_names:
        assert largest_difference(one.path, two.path, stage) < 1e-6, "sums over ranks come in another order"
    losses = [[record.eval_loss for record in run.records()] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for number, stage in enumerate(STAGES, start=1):
        before, entered = two.stage_dir(number - 1), load_file(tmp_path / "dump" / f"{number}.safetensors")
        old, found = AutoModelForCausalLM.from_pretrained(before, output_loading_info=True)
        assert not any(found.values())
        for name, weight in grow_model(old, stage, seed=number).named_parameters():
            assert torch.equal(entered[f"weight/{name}"], weight), name
        moments = grow_adamw_state(load_adamw_file(before), plan_growth(old.config, stage, seed=number))
        assert all(torch.equal(entered[f"exp_avg/{name}"], state["exp_avg"]) for name, state in moments.items())
