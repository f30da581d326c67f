"""The learning rate over each stage, over the run with its growths, and over interruptions."""

import json
import math
from itertools import chain

import pytest
import torch
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, TOKENS, Interrupt, arguments, small_model, trainer
from transformers import get_scheduler

from slop_hf import GrowthSchedule, RunDirectory
from slop_hf.errors import RunError
from slop_hf.training.learning_rate import build_stage_scheduler, compute_end_rate, resolve_steps, restore_scheduler
from slop_hf.training.spans import compute_stage_spans

PEAK = 1e-2
SPANS = compute_stage_spans(SCHEDULE, small_model().config, BLOCK, [BATCH] * 4)
RUN_STEPS = 4 * STEPS
#: Three stages of four steps.
SHORT = GrowthSchedule(SCHEDULE.initial, SCHEDULE.stages[:2]).with_shares([TOKENS // 2] * 3)
WSD = {"lr_scheduler_type": "warmup_stable_decay"}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {}, "eval_strategy": "steps"}


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=PEAK)


def scheduler(tmp_path, span, **settings):
    return build_stage_scheduler(arguments(tmp_path, **settings), optimizer(), span, RUN_STEPS)


def advance(lr_scheduler, steps):
    """The learning rate of each of the next steps."""
    rates = []
    for _ in range(steps):
        rates.append(lr_scheduler.optimizer.param_groups[0]["lr"])
        lr_scheduler.optimizer.step()
        lr_scheduler.step()
    return rates


def rates(tmp_path, **settings):
    """The learning rate of each step, a list for each stage."""
    return [advance(scheduler(tmp_path, span, **settings), STEPS) for span in SPANS]


def plain_rates(name, warmup, steps, **kwargs):
    """The learning rate of each step of a plain run."""
    lr_scheduler = get_scheduler(name, optimizer(), warmup, steps, scheduler_specific_kwargs=kwargs)
    return advance(lr_scheduler, steps)


def cosine(step, warmup, steps):
    """The paper's schedule: a linear warm-up, then half a cosine down to a tenth."""
    if step < warmup:
        return PEAK * step / warmup
    return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def close(values):
    return pytest.approx(values, rel=1e-9, abs=1e-15)


def test_a_share_or_a_number_of_steps():
    assert [resolve_steps(value, 25) for value in (0, 0.01, 0.5, 1, 3.0, 2000)] == [0, 1, 13, 1, 3, 2000]


# ---- Over each stage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0.3, 3), (2, 2), (0, 0)])
def test_a_cosine_per_stage(tmp_path, warmup_steps, expected):
    of_stage = close([cosine(step, expected, STEPS) for step in range(STEPS)])
    assert rates(tmp_path, warmup_steps=warmup_steps) == [of_stage] * 4


@pytest.mark.parametrize(("rewarm_steps", "expected"), [(0.5, 4), (1, 1), (0, 0)])
def test_grown_stages_may_warm_up_otherwise(tmp_path, rewarm_steps, expected):
    first, *grown = rates(tmp_path, warmup_steps=2, rewarm_steps=rewarm_steps)
    assert first == close([cosine(step, 2, STEPS) for step in range(STEPS)])
    assert grown == [close([cosine(step, expected, STEPS) for step in range(STEPS)])] * 3


@pytest.mark.parametrize("decay", [0.25, 2])
def test_a_stable_rate_that_decays_at_the_end_of_every_stage(tmp_path, decay):
    actual = rates(tmp_path, **WSD, lr_scheduler_kwargs={"num_decay_steps": decay}, warmup_steps=2)
    half_way = PEAK / 2  # of a cosine to 0
    assert actual == [close([0, PEAK / 2, PEAK, PEAK, PEAK, PEAK, PEAK, half_way])] * 4


def test_steps_that_stay_stable_may_be_a_share_too(tmp_path):
    kwargs = {"num_decay_steps": 0.25, "num_stable_steps": 0.5, "decay_type": "linear", "min_lr_ratio": 0.2}
    with pytest.warns(UserWarning, match="num_stable_steps will be used"):
        actual = rates(tmp_path, **WSD, lr_scheduler_kwargs=kwargs, warmup_steps=1)
    assert actual[1] == close([0.2 * PEAK, *[PEAK] * 5, 0.6 * PEAK, 0.2 * PEAK])


# ---- Over the run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0.4, 13), (5, 5)])
def test_a_cosine_over_the_run_ignores_growths(tmp_path, warmup_steps, expected):
    actual = list(chain(*rates(tmp_path, lr_span="run", warmup_steps=warmup_steps)))
    assert actual == close(plain_rates("cosine_with_min_lr", expected, RUN_STEPS, min_lr_rate=0.1))
    assert actual == close([cosine(step, expected, RUN_STEPS) for step in range(RUN_STEPS)])


@pytest.mark.parametrize(("rewarm_steps", "ramp"), [(0.25, [0, 1 / 2]), (3, [0, 1 / 3, 2 / 3]), (0, [])])
def test_growths_may_be_warmed_up_under_a_cosine_over_the_run(tmp_path, rewarm_steps, ramp):
    actual = rates(tmp_path, lr_span="run", warmup_steps=2, rewarm_steps=rewarm_steps)
    plain = plain_rates("cosine_with_min_lr", 2, RUN_STEPS, min_lr_rate=0.1)
    assert actual[0] == close(plain[:STEPS])
    factors = ramp + [1] * (STEPS - len(ramp))
    for span in SPANS[1:]:
        of_stage = plain[span.first_step : span.end_step]
        assert actual[span.number] == close([rate * factor for rate, factor in zip(of_stage, factors, strict=True)])


@pytest.mark.parametrize("decay", [0.3, 10])
def test_a_stable_rate_that_decays_at_the_end_of_the_run(tmp_path, decay):
    """Growths fall into the stable part, in which the model is still plastic; only the last stages decay."""
    settings = {"lr_scheduler_kwargs": {"num_decay_steps": decay, "decay_type": "linear"}, "warmup_steps": 4}
    actual = list(chain(*rates(tmp_path, **WSD, **settings, lr_span="run")))
    warm, decaying = [PEAK * step / 4 for step in range(4)], [PEAK * (1 - step / 10) for step in range(10)]
    assert actual == close(warm + [PEAK] * 18 + decaying)


@pytest.mark.parametrize(
    ("settings", "end"),
    [
        ({}, 0.1),
        ({"lr_span": "run"}, 0.1),
        ({"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}}, 1.0),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}}, 0.0),
        ({**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 0.2, "min_lr_ratio": 0.1}}, 0.1),
        ({**WSD, "lr_scheduler_kwargs": {"num_decay_steps": 1, "decay_type": "linear"}, "lr_span": "run"}, 0.0),
    ],
)
def test_the_rate_that_a_schedule_ends_with(tmp_path, settings, end):
    assert compute_end_rate(arguments(tmp_path, **settings), SPANS) == pytest.approx(end)


def test_a_schedule_that_is_more_than_a_function_of_the_step_cannot_span_the_run(tmp_path):
    for span in SPANS[:2]:
        with pytest.raises(RunError, match=r"reduce_lr_on_plateau.* depends on more than the step; use lr_span stage"):
            scheduler(tmp_path, span, **PLATEAU, lr_span="run")


@pytest.mark.parametrize(
    "settings",
    [
        {**PLATEAU, "lr_span": "run"},
        {**WSD, "lr_scheduler_kwargs": {}},  # without num_decay_steps
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ],
)
def test_schedules_that_cannot_be_made_are_refused_before_anything_is_written(tmp_path, settings):
    with pytest.raises(RunError, match=str(settings["lr_scheduler_type"])):
        trainer(tmp_path / "out", schedule=SHORT, **settings).train()
    assert not (tmp_path / "out" / "schedule.yaml").exists()


def test_another_schedule_does_not_take_the_defaults_arguments(tmp_path):
    actual = rates(tmp_path, lr_scheduler_type="linear", warmup_steps=0)
    assert actual == [close([PEAK * (1 - step / STEPS) for step in range(STEPS)])] * 4


# ---- Over interruptions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 1, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}},
        {"lr_span": "run", "rewarm_steps": 3},
        {"lr_span": "run", **WSD, "lr_scheduler_kwargs": {"num_decay_steps": 0.6}},
    ],
)
def test_a_scheduler_resumes_from_its_state(tmp_path, settings, done):
    whole = rates(tmp_path, **settings)[2]
    interrupted = scheduler(tmp_path, SPANS[2], **settings)
    advance(interrupted, done)
    resumed = scheduler(tmp_path, SPANS[2], **settings)
    restore_scheduler(resumed, json.loads(json.dumps(interrupted.state_dict())))
    assert advance(resumed, STEPS - done) == whole[done:]


def test_a_scheduler_that_follows_the_loss_resumes_from_its_state(tmp_path):
    kwargs = {"factor": 0.5, "patience": 1}
    settings = {**PLATEAU, "lr_scheduler_kwargs": kwargs}
    one, other = (scheduler(tmp_path, SPANS[1], **settings) for _ in range(2))
    for loss in (3.0, 3.0, 3.0, 3.0):
        one.step(loss)
    restore_scheduler(other, json.loads(json.dumps(one.state_dict())))
    actual = []
    for either in (one, other):
        actual.append([either.optimizer.param_groups[0]["lr"]])
        for loss in (3.0, 2.0, 2.5, 2.5):
            either.step(loss)
            actual[-1].append(either.optimizer.param_groups[0]["lr"])
    assert actual[0] == actual[1] == [PEAK / 2, PEAK / 4, PEAK / 4, PEAK / 4, PEAK / 8]


def test_an_interrupted_run_has_the_learning_rates_of_the_whole_schedule(tmp_path):
    """Stopped inside the first stage, and at the last step of the second."""
    settings = {"schedule": SHORT, "lr_span": "run", "warmup_steps": 2, "save_steps": 2}
    path = tmp_path / "out"
    for step in (3, 8):
        with pytest.raises(KeyboardInterrupt):
            run = trainer(path, **settings, callbacks=[Interrupt(step)])
            run.train(resume_from_checkpoint=RunDirectory(path).exists)
    trainer(path, **settings).train(resume_from_checkpoint=True)
    logged = [entry["learning_rate"] for entry in RunDirectory(path).history() if "loss" in entry]
    assert logged == close(plain_rates("cosine_with_min_lr", 2, 12, min_lr_rate=0.1))


def test_growths_of_an_interrupted_run_are_warmed_up_once(tmp_path):
    settings = {"schedule": SHORT, "lr_span": "run", "warmup_steps": 0, "rewarm_steps": 3, "save_steps": 2}
    path = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer(path, **settings, callbacks=[Interrupt(7)]).train()
    trainer(path, **settings).train(resume_from_checkpoint=True)
    logged = [entry["learning_rate"] for entry in RunDirectory(path).history() if "loss" in entry]
    ramp = [1] * 4 + [0, 1 / 3, 2 / 3, 1] * 2
    assert logged == close([factor * cosine(step, 0, 12) for step, factor in enumerate(ramp)])


def test_each_stage_may_have_its_own_peak_over_an_interruption(tmp_path):
    peaks = [PEAK, PEAK / 2, PEAK * 2]
    settings = {"schedule": SHORT, "stage_learning_rates": peaks, "warmup_steps": 0, "save_steps": 2}
    path = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        trainer(path, **settings, callbacks=[Interrupt(7)]).train()
    trainer(path, **settings).train(resume_from_checkpoint=True)
    logged = [entry["learning_rate"] for entry in RunDirectory(path).history() if "loss" in entry]
    assert logged == close([peak / PEAK * cosine(step, 0, 4) for peak in peaks for step in range(4)])


def test_peaks_for_another_number_of_stages_are_refused(tmp_path):
    with pytest.raises(RunError, match="stage_learning_rates has 2 values, but the run has 3 stages"):
        trainer(tmp_path, schedule=SHORT, stage_learning_rates=[1e-2, 1e-3])
