"""Steps that runs share under a learning rate over the run: found, trained once, and the same bit for bit."""

import dataclasses

import numpy as np
import pytest
from safetensors.torch import load_file

from slop_hf import RunDirectory
from slop_hf.experiments import running
from slop_hf.experiments.collect import collect_comparison
from slop_hf.experiments.config import Experiment
from slop_hf.experiments.jobs import add_shared_prefixes, build_jobs, count_own_flops
from slop_hf.experiments.running import run_experiment, train_job
from slop_hf.experiments.trunks import Trace, Trunk, find_trunks
from slop_hf.training.config import build_trainer

WSD = {
    "lr_span": "run",
    "warmup_steps": 2,
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": {"num_decay_steps": 0.2, "decay_type": "linear"},
}
LADDER = (0.0625, 0.125, 0.25, 0.5, 1.0)


def trace(*stages):
    """A run of stages, each a name and its learning rates."""
    return Trace(tuple(name for name, _ in stages), tuple(np.array(rates, dtype=float) for _, rates in stages))


FLAT = [1.0] * 100


@pytest.mark.parametrize(
    ("runs", "trunks", "parents"),
    [
        pytest.param([[("a", FLAT)], [("b", FLAT)]], [], [None, None], id="other settings"),
        pytest.param(
            [[("a", FLAT)], [("a", FLAT)]], [Trunk(0, 0, 100, None)], [0, 0], id="equal runs share the whole run"
        ),
        pytest.param(
            [[("a", [*FLAT[:40], 0.5])], [("a", [*FLAT[:80], 0.5])], [("a", [*FLAT[:80], 0.4])]],
            [Trunk(0, 0, 40, None), Trunk(1, 40, 80, 0)],
            [0, 1, 1],
            id="decays at several moments",
        ),
        pytest.param(
            [[("a", FLAT[:40]), ("b", FLAT)], [("a", FLAT[:40]), ("c", FLAT)]],
            [Trunk(0, 0, 40, None)],
            [0, 0],
            id="a stage that ends in all runs ends in the trunk",
        ),
        pytest.param(
            [[("a", FLAT[:40]), ("b", FLAT)], [("a", FLAT)]],
            [Trunk(1, 0, 39, None)],
            [0, 0],
            id="a stage that continues in one run has a checkpoint a step earlier",
        ),
        pytest.param(
            [[("a", FLAT), ("b", [*FLAT[:50], 0.5])], [("a", FLAT), ("b", [*FLAT[:70], 0.5])], [("a", FLAT[:50])]],
            [Trunk(0, 0, 49, None), Trunk(0, 49, 150, 0)],
            [1, 1, 0],
            id="a trunk may cross a growth",
        ),
        pytest.param([[("a", [0, 1] * 200)], [("a", [0, 2] * 200)]], [], [None, None], id="one step is not worth it"),
    ],
)
def test_trunks_end_before_the_first_difference(runs, trunks, parents):
    assert find_trunks([trace(*stages) for stages in runs]) == (trunks, parents)


@pytest.fixture(scope="module")
def experiment(tiny_experiment):
    """A ladder from scratch, with growth at two moments, with two inits, and a copy of one run."""
    read = Experiment.from_yaml(tiny_experiment, overrides={"scales.tiny.flops": 6e8})
    slop = dataclasses.replace(read.arms["slop"], order="l-h", plan=None, shares=(4, 1, 3), training=dict(WSD))
    grown = {**WSD, "growth_init": {"hidden": "preserving", "mha": "preserving"}}
    arms = {
        "scratch": dataclasses.replace(read.arms["from-scratch"], budgets=LADDER, training=WSD),
        "again": dataclasses.replace(read.arms["from-scratch"], budgets=(0.5,), training=WSD),
        "slop": slop,
        "preserving": dataclasses.replace(slop, training=grown),
        "later": dataclasses.replace(slop, shares=(6, 1, 2)),
    }
    return dataclasses.replace(read, arms=arms, reference=None)


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    return run_experiment(experiment, root), root


def read_end(root, job):
    """Weights, optimizer and log at the end of a run, without what depends on the clock."""
    run = RunDirectory(root)
    stage = run.stage_dir(len(job.schedule.stages))
    clock = ("second", "runtime", "tflops", "mfu", "eta")
    log = [
        {name: value for name, value in entry.items() if not any(word in name for word in clock)}
        for entry in run.history()
    ]
    return load_file(stage / "model.safetensors"), load_file(stage / "optimizer.safetensors"), log


def assert_same_run(root, other, job):
    for one, two in zip(read_end(root, job)[:2], read_end(other, job)[:2], strict=True):
        assert one.keys() == two.keys()
        assert all(bool((one[name] == two[name]).all()) for name in one)
    assert read_end(root, job)[2] == read_end(other, job)[2]


def test_a_branch_equals_a_run_that_was_never_shared(trained, tmp_path):
    jobs, root = trained
    runs = [job for job in jobs if job.arm]
    assert [job.name for job in runs if not job.first_step] == ["scratch ×0.0625, seed 0"]  # its decay begins at once
    for number, job in enumerate(runs):
        alone = tmp_path / str(number)
        build_trainer(job.config, alone).train()
        assert_same_run(root / job.directory, alone, job)


def test_a_ladder_of_five_budgets_costs_at_most_half_more_than_its_longest_run(trained, experiment):
    jobs, root = trained
    ladder = dataclasses.replace(experiment, arms={"scratch": experiment.arms["scratch"]})
    planned = add_shared_prefixes(build_jobs(ladder))
    longest = max(job.flops for job in planned)
    assert sum(count_own_flops(planned).values()) <= 1.5 * longest
    record = collect_comparison(experiment, jobs, root)
    paid, whole = sum(cost.flops for cost in record.ledger), sum(run.flops for run in record.runs)
    assert paid == pytest.approx(sum(count_own_flops(jobs).values()), rel=0.02)
    assert paid < 0.7 * whole and not record.missing


def test_a_killed_graph_resumes_where_it_stopped(experiment, trained, tmp_path, monkeypatch):
    _jobs, root = trained
    arms = {"scratch": dataclasses.replace(experiment.arms["scratch"], budgets=(0.5, 1.0))}
    begun = []

    def killed(job, where):
        begun.append(job)
        if len(begun) == 2:
            raise KeyboardInterrupt
        train_job(job, where)

    monkeypatch.setattr(running, "train_job", killed)
    smaller = dataclasses.replace(experiment, arms=arms)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(smaller, tmp_path)
    monkeypatch.setattr(running, "train_job", train_job)
    again = run_experiment(smaller, tmp_path)
    for job in again:
        if job.arm:
            assert_same_run(root / job.directory, tmp_path / job.directory, job)
    run_experiment(smaller, tmp_path, on_job_end=lambda *_: pytest.fail("all had finished"))


def test_arms_that_are_added_use_the_trunks_that_exist(experiment, trained, tmp_path, monkeypatch):
    _, root = trained
    scratch = dataclasses.replace(experiment.arms["scratch"], budgets=(0.25, 1.0))
    begun = []

    def train(job, where):
        begun.append(job)
        train_job(job, where)

    monkeypatch.setattr(running, "train_job", train)
    run_experiment(dataclasses.replace(experiment, arms={"scratch": scratch}), tmp_path)
    assert [job.name.partition(",")[0] for job in begun] == ["trunk to step 8", "scratch ×0.25", "scratch"]
    begun.clear()
    more = dataclasses.replace(scratch, budgets=(0.25, 1.0, 0.125, 0.5))
    jobs = run_experiment(dataclasses.replace(experiment, arms={"scratch": more}), tmp_path)
    added = [job.name for job in begun if job.arm]
    assert added == ["scratch ×0.125, seed 0", "scratch ×0.5, seed 0"]
    assert all(job.end_step != 8 for job in begun), "its state is there already"
    for job in jobs:
        if job.arm:
            assert_same_run(root / job.directory, tmp_path / job.directory, job)


def test_trunks_that_no_run_needs_any_more_are_not_trained(experiment, trained, monkeypatch):
    """An arm that is added may cut a trunk in two, and all its runs have finished."""
    _, root = trained
    scratch = dataclasses.replace(experiment.arms["scratch"], budgets=(0.25, 0.5, 1.0))
    fewer = dataclasses.replace(experiment, arms={"scratch": scratch})
    monkeypatch.setattr(running, "train_job", lambda job, _: pytest.fail(f"{job.name} is not needed"))
    run_experiment(fewer, root)
