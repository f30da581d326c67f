"""Speeds and seconds left, to the digit, on a clock that the tests move by hand."""

import pytest
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, TOKENS, small_model

from slop_hf import CostModel, GrowthSchedule, ModelDims
from slop_hf.training.spans import stage_spans
from slop_hf.training.throughput import Throughput, TimeLeft


class Clock:
    """Stands still unless told otherwise, and begins anywhere but at 0."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


# ---- Throughput ------------------------------------------------------------------------------------------------


def test_each_measurement_ends_an_interval(clock):
    speed = Throughput(peak_flops=1e6, devices=4, clock=clock)
    speed.begin(tokens=0, flops=0)
    clock.tick(2)
    assert speed.measure(tokens=100, flops=4e6) == {"tokens_per_second": 50.0, "mfu": 0.5}
    clock.tick(4)
    assert speed.measure(tokens=200, flops=6e6) == {"tokens_per_second": 25.0, "mfu": 0.125}


def test_no_mfu_without_a_peak(clock):
    speed = Throughput(peak_flops=None, devices=4, clock=clock)
    speed.begin(0, 0)
    clock.tick(2)
    assert speed.measure(100, 4e6) == {"tokens_per_second": 50.0}


def test_nothing_before_it_begins(clock):
    assert Throughput(1e6, clock=clock).measure(100, 1e6) == {}


def test_no_new_tokens_leave_the_interval_open(clock):
    """As where the held-out loss is logged at the step whose training loss was."""
    speed = Throughput(1e6, clock=clock)
    speed.begin(100, 0)
    clock.tick(1)
    assert speed.measure(100, 0) == {}
    clock.tick(1)
    assert speed.measure(120, 1e6) == {"tokens_per_second": 10.0, "mfu": 0.5}
    assert speed.measure(130, 1e6) == {}, "no time has passed"


def test_paused_seconds_do_not_count(clock):
    speed = Throughput(1e6, clock=clock)
    speed.begin(0, 0)
    clock.tick(1)
    with speed.paused():  # saves
        clock.tick(50)
        with speed.paused():  # and evaluates while it does
            clock.tick(7)
            assert speed.measure(10, 1e6) == {}, "logged in the middle of a pause"
        clock.tick(3)
        assert speed.measure(10, 1e6) == {}, "the outer pause goes on"
    clock.tick(1)
    assert speed.measure(20, 1e6) == {"tokens_per_second": 10.0, "mfu": 0.5}
    clock.tick(2)
    assert speed.measure(30, 2e6) == {"tokens_per_second": 5.0, "mfu": 0.5}, "the pause is spent"


def test_a_pause_that_ends_in_an_error_has_ended(clock):
    speed = Throughput(None, clock=clock)
    speed.begin(0, 0)
    with pytest.raises(KeyboardInterrupt), speed.paused():
        clock.tick(5)
        raise KeyboardInterrupt
    clock.tick(1)
    assert speed.measure(10, 0) == {"tokens_per_second": 10.0}


def test_a_stage_boundary_in_the_interval(clock):
    """Tokens and FLOPs count over the run, so an interval may hold the end of a stage and the next one's start."""
    small, large = 1e4, 3e4  # FLOPs of a token
    speed = Throughput(1e6, clock=clock)
    speed.begin(0, 0)
    clock.tick(3)
    with speed.paused():  # evaluates, writes the stage, grows
        clock.tick(1000)
    clock.tick(7)
    assert speed.measure(100 + 150, 100 * small + 150 * large) == {"tokens_per_second": 25.0, "mfu": 0.55}


def test_begin_within_a_pause_starts_after_it(clock):
    speed = Throughput(None, clock=clock)
    speed.begin(0, 0)
    clock.tick(5)
    with speed.paused():
        clock.tick(20)
        speed.begin(100, 0)
        clock.tick(30)
    clock.tick(2)
    assert speed.measure(120, 0) == {"tokens_per_second": 10.0}


def test_a_resumed_run_measures_what_this_process_did(clock):
    speed = Throughput(1e6, clock=clock)
    speed.begin(tokens=9_000, flops=9e12)
    clock.tick(10)
    assert speed.measure(9_500, 9e12 + 5e6) == {"tokens_per_second": 50.0, "mfu": 0.5}


# ---- TimeLeft --------------------------------------------------------------------------------------------------


def spans_of(schedule=SCHEDULE):
    return stage_spans(schedule, small_model().config, BLOCK, [BATCH] * 4)


@pytest.fixture(scope="module")
def spans():
    return spans_of()


#: Device hours of tokens alone: every stage of these runs then takes equally long.
PER_TOKEN = CostModel(hours_per_flop=1e-300, hours_per_token=1.0)


def test_none_before_anything_was_measured(clock, spans):
    left = TimeLeft(spans, clock=clock)
    assert left.seconds_left(0) is None
    left.begin(0)
    clock.tick(5)
    assert left.seconds_left(0) is None, "an evaluation before the first step"


def test_seconds_go_with_flops(clock, spans):
    """Later stages are larger: a quarter of the steps is less than a quarter of the time."""
    per_step = [span.flops / span.steps for span in spans]
    assert per_step == sorted(set(per_step))
    left = TimeLeft(spans, clock=clock)
    left.begin(0)
    clock.tick(10)
    rest = sum(span.flops for span in spans[1:])
    assert left.seconds_left(STEPS) == pytest.approx(10 * rest / spans[0].flops)
    assert rest / spans[0].flops > 3


@pytest.mark.parametrize("cost_model", [None, CostModel(1e-12), CostModel(1e-12, 1e-7), PER_TOKEN])
def test_exact_where_the_cost_model_is(clock, spans, cost_model):
    """On hardware seven times slower than the model, the end of the run is known from the first step on."""
    cost = cost_model or CostModel(1.0)
    of_step = [7 * cost.hours(span.flops / span.tokens, span.tokens / span.steps) for span in spans]
    seconds = [of_step[step // STEPS] for step in range(4 * STEPS)]
    left = TimeLeft(spans, cost_model, clock=clock)
    left.begin(0)
    for step, of_this in enumerate(seconds, start=1):
        clock.tick(of_this)
        assert left.seconds_left(step) == pytest.approx(sum(seconds[step:]), rel=1e-6, abs=1e-6 * seconds[0])
    assert left.seconds_left(4 * STEPS) == 0.0


def test_the_price_of_a_token_counts(clock, spans):
    left = TimeLeft(spans, PER_TOKEN, clock=clock)
    left.begin(0)
    clock.tick(10)
    assert left.seconds_left(STEPS) == pytest.approx(30.0)
    both = TimeLeft(spans, CostModel(1.0, spans[0].flops / TOKENS), clock=clock)  # half of stage 0 is FLOPs
    both.begin(0)
    clock.tick(10)
    rest = sum(span.flops for span in spans[1:])
    assert both.seconds_left(STEPS) == pytest.approx(5 * rest / spans[0].flops + 5 * 3)


def test_evaluations_and_checkpoints_are_part_of_a_run(clock, spans):
    left = TimeLeft(spans, PER_TOKEN, clock=clock)
    left.begin(0)
    clock.tick(8)
    left.seconds_left(STEPS)
    clock.tick(2)  # logged again after an evaluation
    assert left.seconds_left(STEPS) == pytest.approx(3 * 10)


def test_begin_again_leaves_out_what_was_between(clock, spans):
    left = TimeLeft(spans, PER_TOKEN, clock=clock)
    left.begin(0)
    clock.tick(10)
    left.seconds_left(STEPS)
    clock.tick(1000)  # a boundary
    left.begin(STEPS)
    clock.tick(10)
    assert left.seconds_left(2 * STEPS) == pytest.approx(20.0)


def test_resumed_in_mid_stage(clock, spans):
    """What another process did is not measured, but it is done."""
    left = TimeLeft(spans, PER_TOKEN, clock=clock)
    left.begin(2 * STEPS + 3)
    clock.tick(2)
    assert left.seconds_left(2 * STEPS + 4) == pytest.approx(2 * (STEPS - 4 + STEPS))


def test_recent_seconds_weigh_more(clock, spans):
    """A tenth of the run halves the weight of what was before."""
    left = TimeLeft(spans, PER_TOKEN, clock=clock)
    tenth = 4 * STEPS // 10
    share = 4 * STEPS / 10  # of a tenth that is no whole number of steps
    left.begin(0)
    clock.tick(6)
    first = left.seconds_left(tenth)
    assert first == pytest.approx(2 * (4 * STEPS - tenth))
    clock.tick(12)  # twice as slow now
    weight = 0.5 ** (tenth / share)
    per_step = (weight * 6 + 12) / (weight * tenth + tenth)
    assert left.seconds_left(2 * tenth) == pytest.approx(per_step * (4 * STEPS - 2 * tenth))
    assert 3.25 < per_step < 4


def test_a_stage_without_tokens_takes_no_time(clock):
    first, *rest = SCHEDULE.stages
    skipping = GrowthSchedule(SCHEDULE.initial, (first, *rest), initial_tokens=0)
    spans = spans_of(skipping)
    assert spans[0].steps == 0 and spans[0].dims == ModelDims(16, 32, 2, 2)
    left = TimeLeft(spans, PER_TOKEN, clock=clock)
    left.begin(0)
    clock.tick(10)
    assert left.seconds_left(STEPS) == pytest.approx(20.0)
