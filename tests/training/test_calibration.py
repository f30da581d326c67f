"""Calibration: measurements and refusals; no test depends on actual speeds."""

import tempfile
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from slop_hf import ModelDims
from slop_hf.cost.flops import count_flops_per_token, count_parameters
from slop_hf.cost.hours import CostModel
from slop_hf.errors import ArchitectureError, DataError, PlanError, RunError
from slop_hf.training import calibration
from slop_hf.training.calibration import StepTimes, calibrate

# So far apart in FLOPs that noise cannot turn their order around.
SIZES = [ModelDims(128, 256, 2, 4), ModelDims(256, 1024, 4, 4), ModelDims(16, 32, 1, 2)]
CONFIG = {"model_type": "llama", "vocab_size": 64}
LENGTH, BATCH, STEPS = 32, 4, 3


def measure(structures=SIZES, config=CONFIG, **changes):
    settings = {"sequence_length": LENGTH, "batch_size": BATCH, "steps": STEPS, "warmup_steps": 1}
    training = {"use_cpu": True, **changes.pop("training", {})}
    return calibrate(structures, config, **{**settings, **changes}, training=training)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A calibration, the times that it observed, and its folder for temporary files."""
    times, folder = [], tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        return measure(observe=times.append), times, folder


def test_every_structure_is_measured_in_the_order_given(measured):
    cost_model, times, _ = measured
    assert [measurement.label for measurement in cost_model.measurements] == [str(dims) for dims in SIZES]
    for dims, measurement in zip(SIZES, cost_model.measurements, strict=True):
        assert measurement.flops_per_token == count_flops_per_token(dims, CONFIG, LENGTH)
        assert measurement.tokens == BATCH * LENGTH and measurement.hours > 0
    assert cost_model.hours_per_flop > 0 and cost_model.mean_error >= 0
    assert [step_times.dims for step_times in times] == [SIZES[1], SIZES[0], SIZES[2]], "the largest first"


def test_times_leave_the_warm_up_out(measured):
    for times in measured[1]:
        assert len(times.seconds) == STEPS and min(times.seconds) > 0
        assert times.parameters == count_parameters(times.dims, CONFIG)
        assert times.devices == 1 and times.peak_bytes is None, "torch counts no memory of a CPU"
        assert times.measurement.hours == pytest.approx(times.seconds_per_step / 3600)


def test_the_hardware_is_named(measured):
    hardware = measured[0].hardware
    assert f"torch {torch.__version__}, float32, batches of {BATCH} × {LENGTH} tokens" in hardware
    assert f"{torch.get_num_threads()} thread" in hardware and not hardware.startswith(",")


def test_nothing_is_left_on_disk(measured):
    assert list(measured[2].iterdir()) == []


class Event:
    """An event of a device on which every step takes 3 s."""

    count = 0

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        Event.count += 1
        self.seconds = 3 * Event.count

    def elapsed_time(self, end):
        return 1000.0 * (end.seconds - self.seconds)


def test_the_clock_waits_for_a_device_only_at_the_end(monkeypatch):
    """As training does; the times between steps are the device's own."""
    waits = []
    device = SimpleNamespace(Event=Event, synchronize=lambda: waits.append(Event.count))
    monkeypatch.setattr(calibration, "_get_backend", lambda kind: device)
    clock, args = calibration._Clock(lambda: None), SimpleNamespace(device=torch.device("xpu"))
    clock.on_train_begin(args, None, None)
    for _ in range(4):
        clock.on_step_end(args, None, None)
    assert not waits
    assert clock.seconds == [3.0] * 4
    assert waits == [5]


def test_as_yaml(measured, tmp_path):
    cost_model = measured[0]
    cost_model.to_yaml(tmp_path / "cost.yaml")
    assert CostModel.from_yaml(tmp_path / "cost.yaml") == cost_model


def test_a_step_counts_all_of_its_batches(capfd):
    times = []
    training = {"gradient_accumulation_steps": 2}
    settings = {"warmup_steps": 0, "precision": "bf16", "checkpointing": True, "training": training}
    sizes = [ModelDims(16, 32, 1, 2), ModelDims(128, 256, 4, 4)]
    cost_model = measure(sizes, steps=2, **settings, observe=times.append)
    assert [len(step_times.seconds) for step_times in times] == [2, 2]
    assert [measurement.tokens for measurement in cost_model.measurements] == [2 * BATCH * LENGTH] * 2
    assert "bfloat16" in cost_model.hardware
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "qwen3"])
def test_other_families(family, monkeypatch):
    """Their special tokens are outside of the vocabulary, and their defaults are not Llama's."""
    measured = []
    monkeypatch.setattr(calibration, "_fit", lambda times: measured.extend(times))
    sizes = [ModelDims(16, 32, 1, 2), ModelDims(32, 64, 2, 2)]
    measure(sizes, {"model_type": family, "vocab_size": 40}, steps=1, warmup_steps=0)
    assert [times.dims for times in measured] == sizes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"structures": []}, PlanError, "at least 2 structures of different FLOPs, got none"),
        ({"structures": SIZES[:1]}, PlanError, r"got \(128, 256, 2, 4\): give more sizes"),
        ({"structures": [*SIZES, SIZES[0]]}, PlanError, r"\(128, 256, 2, 4\) is given twice"),
        ({"steps": 0}, PlanError, "steps must be a whole number, 1 or more, got 0"),
        ({"steps": 1.5}, PlanError, "got 1.5"),
        ({"warmup_steps": -1}, PlanError, "warmup_steps must be a whole number, 0 or more"),
        ({"batch_size": 0}, PlanError, "batch_size must be a whole number, 1 or more"),
        ({"sequence_length": 1}, PlanError, "sequence_length must be a whole number, 2 or more"),
        ({"config": {"vocab_size": 0}}, PlanError, "vocab_size must be a whole number, 2 or more"),
        ({"precision": "fp8"}, PlanError, "precision must be one of bf16, fp32, got 'fp8'"),
        ({"config": {"model_type": "mamba"}}, ArchitectureError, "mamba"),
        ({"config": {"hiden_act": "relu"}}, RunError, "did you mean 'hidden_act'"),
        ({"config": {"max_position_embeddings": 8}}, DataError, "max_position_embeddings is 8"),
        ({"training": {"learning_rte": 1}}, RunError, "did you mean 'learning_rate'"),
    ],
)
def test_refused_before_anything_is_measured(changes, error, message):
    times = []
    with pytest.raises(error, match=message):
        measure(**changes, observe=times.append)
    assert times == []


def test_out_of_memory_names_the_structure(monkeypatch, tmp_path):
    def exhausted(config, **_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", exhausted)
    with pytest.raises(RunError, match=r"\(256, 1024, 4, 4\) does not fit in memory with 4 sequences of 32 tokens"):
        measure()
    assert list(tmp_path.iterdir()) == []


def test_other_failures_stay_what_they_are(monkeypatch):
    def broken(config, **_):
        raise RuntimeError("something else")

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", broken)
    with pytest.raises(RuntimeError, match="something else"):
        measure()


def test_hours_that_do_not_rise_say_what_was_measured(monkeypatch):
    def backwards(self, dims, tick):
        flops = float(count_flops_per_token(dims, CONFIG, LENGTH))
        return StepTimes(dims, 1, flops, 128, 1, (1e6 / flops,), "a strange machine")

    monkeypatch.setattr(calibration._Bench, "time", backwards)
    message = r"do not rise with the FLOPs.*\(a step took: \(128, 256, 2, 4\) [0-9.]+ s, \(256, 1024"
    with pytest.raises(PlanError, match=message):
        measure()


def test_one_slow_step_does_not_count():
    times = StepTimes(SIZES[0], 1, 1e6, 100, 4, (1.0, 1.5, 60.0), "", None)
    assert times.seconds_per_step == 1.5
    assert times.measurement.hours == pytest.approx(1.5 * 4 / 3600)
