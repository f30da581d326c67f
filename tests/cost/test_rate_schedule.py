"""The rates that planning computes are those of training."""

import numpy as np
import pytest

from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunConfig
from slop_hf.cost.rate_schedule import RateSchedule, compute_usual_peak
from slop_hf.cost.staged_run import PARTS, average_rates
from slop_hf.data import DataConfig
from slop_hf.errors import PlanError
from slop_hf.training.config import preview_rates

SMALL = ModelDims(16, 32, 2, 2)
STAGES = (GrowthStage(("layer",), SMALL.replace(num_hidden_layers=3), 128_000),)


@pytest.mark.parametrize("span", ["run", "stage"])
@pytest.mark.parametrize("stages", [(), STAGES], ids=["from scratch", "grown"])
def test_training_has_the_rates_of_the_plan(span, stages):
    rates = RateSchedule(span, warmup=0.1, decay=0.25, rewarm=0.125)
    schedule = GrowthSchedule(SMALL, stages, initial_tokens=192_000)
    training = {"batch_tokens": [64], "learning_rate": 1.0, **rates.describe_training(grows=bool(stages))}
    config = RunConfig(schedule, data=DataConfig("texts", block_size=64, vocab_size=300), training=training)
    trained = np.array([average_rates(stage) for stage in preview_rates(config).rates])
    planned = rates.compute(np.array([schedule.tokens], dtype=float))[0]
    if span == "stage" and stages:  # training warms up again over the same share of a stage
        assert planned.shape == (2, PARTS)
    assert np.abs(trained - planned).max() < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"span": "epoch"}, "'run' or 'stage'"),
        ({"warmup": -0.1}, "warmup must be a share"),
        ({"decay": 0.99}, "lower them"),
        ({"rewarm": 2}, "lower them"),
    ],
)
def test_shares_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(PlanError, match=message):
        RateSchedule(**settings)


def test_the_usual_peak_falls_with_compute():
    peaks = [compute_usual_peak(10.0**power) for power in (9, 17, 20, 23)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] == 0.01
    with pytest.raises(PlanError, match="give the training FLOPs"):
        compute_usual_peak(0)
