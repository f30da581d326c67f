"""The held-out loss is the mean over all predicted tokens, whatever the batch and the number of ranks."""

import json
import math

import launched_evaluation
import pytest
import torch
from launched_evaluation import CASES, evaluate_cases, mask_some
from launching import launch_forked
from training_runs import BLOCK, blocks, small_model, trainer
from transformers import Trainer


def compute_mean_loss(rows):
    """Return the mean loss of all predicted tokens, one row at a time, in float64 from the logits on."""
    model, losses = small_model(dropout=0.0).eval(), []
    for row in rows:
        with torch.no_grad():
            logs = model(input_ids=row["input_ids"][None]).logits[0].double().log_softmax(-1)
        pairs = zip(logs[:-1], row["labels"][1:], strict=True)
        losses += [-float(log[label]) for log, label in pairs if label != -100]
    return math.fsum(losses) / len(losses)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process."""
    return evaluate_cases(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(("count", "batch"), CASES)
def test_the_loss_is_the_mean_over_all_predicted_tokens(alone, count, batch):
    metrics, masked = alone[f"{count} in {batch}"], mask_some(blocks(count + 1, seed=count))
    assert metrics["eval_full_loss"] == pytest.approx(compute_mean_loss(blocks(count, seed=count)), rel=1e-6)
    assert metrics["eval_masked_loss"] == pytest.approx(compute_mean_loss(masked), rel=1e-6)
    assert (metrics["eval_full_rows"], metrics["eval_masked_rows"]) == (count, count + 1)


@pytest.mark.parametrize(("count", "batch"), [(8, 8), (13, 4)])
def test_blocks_without_masked_labels_have_the_loss_of_trainer_to_the_bit(tmp_path, count, batch):
    run = trainer(tmp_path, model=small_model(), eval_dataset=blocks(count), per_device_eval_batch_size=batch)
    plain = Trainer(small_model(), run.args, eval_dataset=blocks(count), data_collator=run.data_collator)
    assert run.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]


def test_a_diverged_model_has_no_finite_loss(tmp_path):
    model = small_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert math.isnan(trainer(tmp_path, model=model).evaluate(blocks(6, size=BLOCK))["eval_loss"])


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [pytest.param("ddp", 3, marks=pytest.mark.slow), pytest.param("zero3", 2, marks=pytest.mark.deepspeed)],
)
def test_several_ranks_measure_what_one_process_does(alone, tmp_path, kind, ranks):
    """In batches of the given size, as many on each rank, and with the predictions of each row once."""
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    ended = launch_forked(kind, ranks, main=launched_evaluation.main, output=tmp_path, use_cpu=kind == "ddp")
    assert ended.code == 0, ended.text[-4000:]
    results = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(ranks)]
    assert all(result == results[0] for result in results)
    for count, batch in CASES:
        metrics, expected = results[0][f"{count} in {batch}"], dict(alone[f"{count} in {batch}"])
        passes = [math.ceil(rows / (batch * ranks)) for rows in (count, count + 1)]
        assert metrics.pop("passes") == sum(passes) and expected.pop("passes") >= sum(passes)
        assert metrics == pytest.approx(expected, rel=2e-6), (count, batch)
