"""A staged run of a model with experts: its stages are stock models, and Muon is refused before it begins."""

import pytest
import torch
from training_runs import BATCH, BLOCK, SCHEDULE, trainer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, set_seed

from slop_hf import GrowthSchedule, GrowthStage
from slop_hf.errors import PlanError

TOKENS = 2 * BLOCK * BATCH
WIDER = SCHEDULE.initial.replace(intermediate_size=48)
SHORT = GrowthSchedule(SCHEDULE.initial, (GrowthStage(("ffn",), WIDER, TOKENS, init="copy"),), initial_tokens=TOKENS)


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
