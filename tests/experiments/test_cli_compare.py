"""`slop compare`, as a user types it."""

import json

import pytest

from slop_hf.experiments.comparison import Comparison


def test_a_dry_run_shows_every_run_and_trains_nothing(tiny_experiment, output_of, tmp_path):
    shown = output_of("compare", tiny_experiment, "-o", tmp_path / "out", "--dry-run")
    for word in ("shared prefix", "slop, seed 0", "from-scratch ×0.5", "counted once"):
        assert word in shown
    rows = json.loads(output_of("compare", tiny_experiment, "-o", tmp_path / "out", "--dry-run", "--json"))
    assert [row["run"] for row in rows][1:] == [
        "slop, seed 0",
        "preserving, seed 0",
        "from-scratch ×0.5, seed 0",
        "from-scratch, seed 0",
    ]
    assert rows[1]["begins_with"] == rows[0]["place"] and rows[3]["begins_with"] is None
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("compared") / "out"


def test_arms_are_run_and_compared(tiny_experiment, output_of, slop, out, tmp_path):
    """One arm first, with a line when it has ended; then all of them, the finished one not trained again."""
    code, text, err = slop("compare", tiny_experiment, "-o", out, "--arm", "slop", "--json")
    assert code == 0, err
    first = json.loads(text)
    loss = first["runs"][0]["stages"][-1]["eval_loss"]
    begin, end = (line for line in err.splitlines() if "FLOPs" in line)
    assert begin == f"tiny: 1 of 1 runs to train, 3.00e+08 FLOPs; their logs are in {out}"
    assert end == f"1 of 1: slop, seed 0, held-out loss {loss:.4f}, 3.00e+08 FLOPs"
    assert [run["arm"] for run in first["runs"]] == ["slop"]
    trained = (out / "runs/slop/x1/seed-0/stage-3-hidden/model.safetensors").stat().st_mtime
    text = output_of("compare", tiny_experiment, "-o", out, "--record", tmp_path / "tiny.json")
    assert "from-scratch" in text and "comparison.md" in text
    assert (out / "runs/slop/x1/seed-0/stage-3-hidden/model.safetensors").stat().st_mtime == trained
    names = {path.name for path in out.iterdir()}
    assert {"comparison.json", "comparison.md"} <= names and any(name.endswith(".png") for name in names)
    record = Comparison.load(tmp_path / "tiny.json")
    assert record == Comparison.load(out / "comparison.json") and not record.missing
    assert record.device and record.settings["run"]["data"]["block_size"] == 32
    # The first arm had trained all of its stages itself, so that what the second begins with was paid twice.
    assert [run.inherited for run in record.runs] == [0, 3, 0, 0]
    assert sum(cost.flops for cost in record.ledger) == pytest.approx(sum(run.flops for run in record.runs))


def test_finished_runs_can_be_compared_before_the_others_finish(tiny_experiment, output_of, tmp_path):
    directory = tmp_path / "out"
    output_of("compare", tiny_experiment, "-o", directory, "--arm", "from-scratch")
    shown = json.loads(output_of("compare", tiny_experiment, "-o", directory, "--report-only", "--json"))
    assert shown["missing"] == ["slop, seed 0", "preserving, seed 0"]


def test_nothing_is_reported_of_a_directory_without_a_run(tiny_experiment, error_of, tmp_path):
    (tmp_path / "out").mkdir()
    message = error_of("compare", tiny_experiment, "-o", tmp_path / "out", "--report-only")
    assert "out has no finished run of this experiment; leave out --report-only" in message
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("option", ["--output", "--record"])
def test_an_output_that_cannot_be_written_is_refused_before_any_training(tiny_experiment, error_of, tmp_path, option):
    (tmp_path / "file").touch()
    message = error_of("compare", tiny_experiment, "-o", tmp_path / "out", option, tmp_path / "file" / "below")
    assert f"{option} {tmp_path / 'file' / 'below'} cannot be written" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dry-run", "--set", "arms.slop.training.learning_rte=1"],
            "slop, seed 0: training: unknown key 'learning_rte'",
        ),
        (["--dry-run", "--workers", "0"], "workers"),
        (["--scale", "huge"], "choose a scale of tiny, not 'huge'"),
        (["--arm", "slopp"], "--arm slopp: the arms at this scale are slop, preserving, from-scratch"),
        (["--seeds", "a"], "--seeds must be different whole numbers, 0 or more, such as 0,1,2, got 'a'"),
        (["--set", "scales.tiny.flops=0"], "a budget must be positive"),
        (["--set", "arms.slop.plan=never"], "plan must be a rank from 1, 'best' or 'worst', got 'never'"),
    ],
)
def test_wrong_input_is_refused_before_any_training(tiny_experiment, error_of, tmp_path, options, message):
    assert message in error_of("compare", tiny_experiment, "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
