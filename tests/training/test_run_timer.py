"""Speeds and the time left, to the digit, with a clock that the tests move."""

from types import SimpleNamespace

import pytest
import torch
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, TOKENS, small_model

from slop_hf import CostModel, GrowthSchedule, ModelDims
from slop_hf.cost.device_peaks import look_up_peak_flops
from slop_hf.training.run_timer import RunTimer, find_peak_flops
from slop_hf.training.spans import StageSpan, compute_stage_spans


class Clock:
    """Stands still until it is moved; it does not begin at 0."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


def span_of(steps, *, tokens, flops, first_step=0, first_token=0, first_flops=0.0):
    """A stage with `tokens` and `flops` per step."""
    return StageSpan(
        number=0,
        name="stage",
        growth=None,
        dims=SCHEDULE.initial,
        parameters=1,
        first_step=first_step,
        steps=steps,
        first_block=first_token,
        blocks=steps * tokens,
        first_token=first_token,
        tokens=steps * tokens,
        first_flops=first_flops,
        flops=steps * flops,
    )


def begin(clock, span, *, step=0, seconds=0.0, **settings):
    timer = RunTimer([span], clock=clock, **settings)
    timer.begin_stage(span, step, seconds)
    return timer


# ---- Throughput ------------------------------------------------------------------------------------------------


def test_each_measurement_ends_an_interval(clock):
    timer = begin(clock, span_of(10, tokens=100, flops=4e6), devices=4, peak_flops=1e6)
    clock.tick(2)
    assert timer.throughput(1) == {"tokens_per_second": 50.0, "mfu": 0.5}
    clock.tick(4)
    assert timer.throughput(2) == {"tokens_per_second": 25.0, "mfu": 0.25}


def test_no_mfu_without_a_peak(clock):
    timer = begin(clock, span_of(10, tokens=100, flops=4e6), devices=4)
    clock.tick(2)
    assert timer.throughput(1) == {"tokens_per_second": 50.0}


def test_nothing_before_it_begins(clock):
    assert RunTimer([span_of(10, tokens=100, flops=4e6)], clock=clock).throughput(1) == {}


def test_no_new_tokens_leave_the_interval_open(clock):
    """The held-out loss is logged at the step whose training loss was logged."""
    timer = begin(clock, span_of(10, tokens=20, flops=1e6), step=5, peak_flops=1e6)
    clock.tick(1)
    assert timer.throughput(5) == {}
    clock.tick(1)
    assert timer.throughput(6) == {"tokens_per_second": 10.0, "mfu": 0.5}
    assert timer.throughput(7) == {}, "no time has passed"


def test_excluded_seconds_do_not_count(clock):
    timer = begin(clock, span_of(10, tokens=10, flops=5e5), peak_flops=1e6)
    clock.tick(1)
    with timer.exclude():  # saves
        clock.tick(50)
        with timer.exclude():  # and evaluates meanwhile
            clock.tick(7)
            assert timer.throughput(1) == {}, "logged inside the block"
        clock.tick(3)
        assert timer.throughput(1) == {}, "the outer block continues"
        assert timer.stage_seconds == 1.0
    clock.tick(1)
    assert timer.throughput(2) == {"tokens_per_second": 10.0, "mfu": 0.5}
    clock.tick(2)
    assert timer.throughput(3) == {"tokens_per_second": 5.0, "mfu": 0.25}, "the block has ended"
    assert timer.stage_seconds == 4.0


def test_a_block_that_ends_in_an_error_has_ended(clock):
    timer = begin(clock, span_of(10, tokens=10, flops=0.0))
    with pytest.raises(KeyboardInterrupt), timer.exclude():
        clock.tick(5)
        raise KeyboardInterrupt
    clock.tick(1)
    assert timer.throughput(1) == {"tokens_per_second": 10.0}


def test_a_stage_that_begins_inside_an_excluded_block_starts_after_it(clock):
    timer = begin(clock, span_of(10, tokens=10, flops=0.0))
    clock.tick(5)
    with timer.exclude():
        clock.tick(20)
        timer.begin_stage(span_of(10, tokens=20, flops=0.0, first_step=10, first_token=100), 10)
        clock.tick(30)
    clock.tick(2)
    assert timer.throughput(11) == {"tokens_per_second": 10.0}
    assert timer.stage_seconds == 2.0


def test_a_resumed_run_measures_what_this_process_did(clock):
    timer = begin(clock, span_of(100, tokens=500, flops=5e6), step=18, seconds=70.0, peak_flops=1e6)
    clock.tick(10)
    assert timer.throughput(19) == {"tokens_per_second": 50.0, "mfu": 0.5}
    assert timer.stage_seconds == 80.0, "with those before the interruption"


# ---- Time left -------------------------------------------------------------------------------------------------


def spans_of(schedule=SCHEDULE):
    return compute_stage_spans(schedule, small_model().config, BLOCK, [BATCH] * 4)


@pytest.fixture(scope="module")
def spans():
    return spans_of()


#: Device hours of tokens alone: every stage of these runs then takes equally long.
PER_TOKEN = CostModel(hours_per_flop=1e-300, hours_per_token=1.0)


def test_none_before_anything_was_measured(clock, spans):
    timer = RunTimer(spans, clock=clock)
    assert timer.eta(0) is None
    timer.begin_stage(spans[0], 0)
    clock.tick(5)
    assert timer.eta(0) is None, "an evaluation before the first step"


def test_seconds_go_with_flops(clock, spans):
    """Later stages are larger: a quarter of the steps is less than a quarter of the time."""
    per_step = [span.flops / span.steps for span in spans]
    assert per_step == sorted(set(per_step))
    timer = RunTimer(spans, clock=clock)
    timer.begin_stage(spans[0], 0)
    clock.tick(10)
    rest = sum(span.flops for span in spans[1:])
    assert timer.eta(STEPS) == pytest.approx(10 * rest / spans[0].flops)
    assert rest / spans[0].flops > 3


@pytest.mark.parametrize("cost_model", [None, CostModel(1e-12), CostModel(1e-12, 1e-7), PER_TOKEN])
def test_exact_where_the_cost_model_is(clock, spans, cost_model):
    """On hardware seven times slower than the model, the end of the run is known from the first step on."""
    cost = cost_model or CostModel(1.0)
    of_step = [7 * cost.hours(span.flops / span.tokens, span.tokens / span.steps) for span in spans]
    seconds = [of_step[step // STEPS] for step in range(4 * STEPS)]
    timer = RunTimer(spans, cost_model=cost_model, clock=clock)
    timer.begin_stage(spans[0], 0)
    for step, of_this in enumerate(seconds, start=1):
        clock.tick(of_this)
        assert timer.eta(step) == pytest.approx(sum(seconds[step:]), rel=1e-6, abs=1e-6 * seconds[0])
    assert timer.eta(4 * STEPS) == 0.0


def test_the_price_of_a_token_counts(clock, spans):
    timer = RunTimer(spans, cost_model=PER_TOKEN, clock=clock)
    timer.begin_stage(spans[0], 0)
    clock.tick(10)
    assert timer.eta(STEPS) == pytest.approx(30.0)
    both = RunTimer(spans, cost_model=CostModel(1.0, spans[0].flops / TOKENS), clock=clock)  # half of stage 0 is FLOPs
    both.begin_stage(spans[0], 0)
    clock.tick(10)
    rest = sum(span.flops for span in spans[1:])
    assert both.eta(STEPS) == pytest.approx(5 * rest / spans[0].flops + 5 * 3)


def test_evaluations_and_checkpoints_are_part_of_a_run(clock, spans):
    timer = RunTimer(spans, cost_model=PER_TOKEN, clock=clock)
    timer.begin_stage(spans[0], 0)
    clock.tick(8)
    timer.eta(STEPS)
    clock.tick(2)  # logged again after an evaluation
    assert timer.eta(STEPS) == pytest.approx(3 * 10)


def test_begin_again_leaves_out_what_was_between(clock, spans):
    timer = RunTimer(spans, cost_model=PER_TOKEN, clock=clock)
    timer.begin_stage(spans[0], 0)
    clock.tick(10)
    timer.eta(STEPS)
    clock.tick(1000)  # a boundary
    timer.begin_stage(spans[1], STEPS)
    clock.tick(10)
    assert timer.eta(2 * STEPS) == pytest.approx(20.0)


def test_resumed_in_mid_stage(clock, spans):
    """The steps of another process count as done, but are not measured."""
    timer = RunTimer(spans, cost_model=PER_TOKEN, clock=clock)
    timer.begin_stage(spans[2], 2 * STEPS + 3)
    clock.tick(2)
    assert timer.eta(2 * STEPS + 4) == pytest.approx(2 * (STEPS - 4 + STEPS))


def test_recent_seconds_weigh_more(clock, spans):
    """After a tenth of the run, earlier measurements count half."""
    timer = RunTimer(spans, cost_model=PER_TOKEN, clock=clock)
    tenth = 4 * STEPS // 10
    share = 4 * STEPS / 10  # a tenth of the run is not a whole number of steps
    timer.begin_stage(spans[0], 0)
    clock.tick(6)
    first = timer.eta(tenth)
    assert first == pytest.approx(2 * (4 * STEPS - tenth))
    clock.tick(12)  # twice as slow now
    weight = 0.5 ** (tenth / share)
    per_step = (weight * 6 + 12) / (weight * tenth + tenth)
    assert timer.eta(2 * tenth) == pytest.approx(per_step * (4 * STEPS - 2 * tenth))
    assert 3.25 < per_step < 4


def test_a_stage_without_tokens_takes_no_time(clock):
    first, *rest = SCHEDULE.stages
    skipping = GrowthSchedule(SCHEDULE.initial, (first, *rest), initial_tokens=0)
    spans = spans_of(skipping)
    assert spans[0].steps == 0 and spans[0].dims == ModelDims(16, 32, 2, 2)
    timer = RunTimer(spans, cost_model=PER_TOKEN, clock=clock)
    timer.begin_stage(spans[0], 0)
    clock.tick(10)
    assert timer.eta(STEPS) == pytest.approx(20.0)


class Newer:
    """The setting of TF32 once a program has used the one of torch 2.9."""

    fp32_precision = "tf32"

    @property
    def allow_tf32(self):
        raise RuntimeError("you have used mix of the legacy and new APIs")


OLDER = SimpleNamespace(allow_tf32=True)
GPU = "NVIDIA A100-SXM4-80GB"


def make_gpu_arguments(**changes):
    arguments = {"peak_tflops": None, "device": torch.device("cuda"), "bf16": False, "fp16": False, "tf32": None}
    return SimpleNamespace(**{**arguments, **changes})


@pytest.mark.parametrize("settings", [Newer(), OLDER], ids=["newer", "older"])
def test_the_peak_depends_on_the_dtype_of_matrices(monkeypatch, settings):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    for dtype, name in [(torch.float32, "tf32"), (torch.bfloat16, "bf16")]:
        assert find_peak_flops(make_gpu_arguments(), dtype) == look_up_peak_flops(GPU, name)
    assert find_peak_flops(make_gpu_arguments(peak_tflops=2.0), torch.float32) == 2e12
    assert find_peak_flops(make_gpu_arguments(device=torch.device("cpu")), torch.float32) is None


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
def test_tf32_is_seen_as_transformers_turns_it_on(monkeypatch):
    """For `torch_compile`, on GPUs from Ampere on; the older setting can no longer be read then."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    assert find_peak_flops(make_gpu_arguments(), torch.float32) == look_up_peak_flops(GPU, "fp32")
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")
    assert find_peak_flops(make_gpu_arguments(), torch.float32) == look_up_peak_flops(GPU, "tf32")
