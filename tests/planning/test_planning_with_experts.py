"""Plans of models with experts: their own counts, and refusals of what is fitted to models without."""

import json

import pytest

from slop_hf import ConfigSpace, ModelDims, SlopPlanner
from slop_hf.cli.model_config import read_config
from slop_hf.cost.flops import count_flops_per_token, count_paper_params, count_parameters
from slop_hf.errors import PlanError
from slop_hf.planning.advice import Question
from slop_hf.planning.structures import CostInputs, DimsArray, DimsTable

DIMS = ModelDims(256, 96, 4, 4)
QWEN = {"model_type": "qwen3_moe", "vocab_size": 500, "num_experts": 16, "num_experts_per_tok": 4}


def test_the_config_keeps_its_experts(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**QWEN, **DIMS.as_dict(), "intermediate_size": 999, "moe_intermediate_size": 96}))
    dims, config = read_config(str(path), "--from")
    assert dims == DIMS and config == QWEN
    path.write_text(json.dumps({**QWEN, **DIMS.as_dict(), "decoder_sparse_step": 2}))
    with pytest.raises(PlanError, match=r"--from .*decoder_sparse_step 2 cannot grow, expected 1"):
        read_config(str(path), "--from")


def test_costs_and_candidates():
    table = DimsTable(DimsArray.of([DIMS]), CostInputs(QWEN, 128))
    assert table.paper_params == count_paper_params(DIMS, 16) == 4 * (6 * 256**2 + 3 * 256 * 96 * 16)
    assert table.parameters == count_parameters(DIMS, QWEN)
    assert table.flops_per_token == count_flops_per_token(DIMS, QWEN, 128)
    target = 3 * count_parameters(DIMS, QWEN)
    space = ConfigSpace(target_params=target, tolerance=0.2, config=QWEN, ffn_multiple=16)
    structures = space.structures(DIMS)
    assert structures and all(8 * dims.intermediate_size == 3 * dims.hidden_size for dims in structures)
    schedule = SlopPlanner(DIMS, space, objective="delta_params").plan(top_k=1)[0]
    assert count_parameters(schedule.target, QWEN) == pytest.approx(target, rel=0.2)


def test_no_forecast_of_a_loss():
    space = ConfigSpace(targets=[DIMS.replace(num_hidden_layers=8)], config=QWEN)
    for objective in ("final_loss", "loss_per_hour"):
        with pytest.raises(PlanError, match=f"objective '{objective}' needs a law of the loss, and no law is fitted"):
            SlopPlanner(DIMS, space, objective=objective)
    with pytest.raises(PlanError, match="it has no forecast for qwen3_moe; compare schedules with `slop plan"):
        Question(1e18, start=DIMS, config=QWEN)
