"""Steps that runs share under a learning rate over the run: found, trained once, and the same bit for bit."""

import dataclasses

import numpy as np
import pytest
from safetensors.torch import load_file

from slop_hf import RunDirectory
from slop_hf.experiments import running
from slop_hf.experiments.collect import collect_comparison
from slop_hf.experiments.config import Experiment
from slop_hf.experiments.jobs import add_shared_prefixes, build_jobs, count_own_flops, trace_job
from slop_hf.experiments.running import run_experiment, train_job
from slop_hf.experiments.trunks import Trace, Trunk, find_trunks
from slop_hf.runs.directory import RunFacts
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
def every_kind(tiny_experiment):
    """A ladder from scratch, a copy of one of its runs, growth at two moments, and with two inits."""
    read = Experiment.from_yaml(tiny_experiment, overrides={"scales.tiny.flops": 6e8})
    wsd = {**WSD, "eval_strategy": "no"}
    slop = dataclasses.replace(read.arms["slop"], order="l-h", plan=None, shares=(4, 1, 3), training=wsd)
    grown = {**wsd, "growth_init": {"hidden": "preserving", "mha": "preserving"}}
    arms = {
        "scratch": dataclasses.replace(read.arms["from-scratch"], budgets=LADDER, training=wsd),
        "again": dataclasses.replace(read.arms["from-scratch"], budgets=(0.5,), training=wsd),
        "slop": slop,
        "preserving": dataclasses.replace(slop, training=grown),
        "later": dataclasses.replace(slop, shares=(6, 1, 2)),
    }
    return dataclasses.replace(read, arms=arms, reference=None)


def keep_arms(experiment, **budgets):
    """Return the experiment with some of its arms, each at some budgets."""
    arms = {name: dataclasses.replace(experiment.arms[name], budgets=values) for name, values in budgets.items()}
    return dataclasses.replace(experiment, arms=arms)


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


def assert_ledger_counts_each_job_once(experiment, jobs, root):
    record = collect_comparison(experiment, jobs, root)
    assert not record.missing
    ends = [job.preview[0][-1].end_step if job.end_step is None else job.end_step for job in jobs]
    begun = [job.count_until(job.first_step)[1] if job.first_step else 0 for job in jobs]
    paid = sum(job.count_until(end)[1] - before for job, end, before in zip(jobs, ends, begun, strict=True))
    assert sum(cost.flops for cost in record.ledger) == pytest.approx(paid, rel=1e-9)
    adamw = sum(
        job.count_optimizer_flops(end) - job.count_optimizer_flops(job.first_step)
        for job, end in zip(jobs, ends, strict=True)
    )
    assert sum(cost.optimizer_flops for cost in record.ledger) == pytest.approx(adamw, rel=1e-9) and adamw > 0
    runs = {(run.arm, run.budget): run for run in record.runs}
    for job, end in zip(jobs, ends, strict=True):
        if job.arm:
            run = runs[job.arm, job.budget]
            assert (run.end_rate, run.optimizer_flops) == (0.0, job.count_optimizer_flops(end))
            facts = RunFacts.load(RunDirectory(root / job.directory))
            assert run.passes == pytest.approx(run.tokens / (facts.blocks * facts.block_size), abs=1e-4)


def sum_distinct_steps(jobs):
    """FLOPs of all runs, if steps after which runs have the same state were trained once: by brute force."""
    flops = {}
    for job in jobs:
        trace = trace_job(job)
        for step in range(1, trace.ends[-1] + 1):
            flops[trace.hash_until(step)] = job.count_until(step)[1] - (
                job.count_until(step - 1)[1] if step > 1 else 0
            )
    return sum(flops.values())


def test_trunks_cost_little_more_than_the_distinct_steps(every_kind):
    runs = build_jobs(every_kind)
    planned = sum(count_own_flops(add_shared_prefixes(runs)).values())
    least, apart = sum_distinct_steps(runs), sum(job.flops for job in runs)
    # A step is trained twice before an end that only some of the runs have, and if it is all that runs share.
    assert least <= planned <= 1.04 * least
    assert planned == pytest.approx(0.678 * apart, rel=1e-3)


def test_a_ladder_of_five_budgets_costs_a_fifth_more_than_its_longest_run(every_kind):
    planned = add_shared_prefixes(build_jobs(keep_arms(every_kind, scratch=LADDER)))
    cost = sum(count_own_flops(planned).values()) / max(job.flops for job in planned)
    # The decays: a fifth of each of the shorter runs, which are half as long as the next one; and whole steps.
    assert cost == pytest.approx(1 + 0.2 * (1 / 2 + 1 / 4 + 1 / 8 + 1 / 16), abs=0.06)


@pytest.fixture(scope="module")
def stopped_and_resumed(every_kind, tmp_path_factory):
    """Runs that branch off in a stage, at its end and a step before it; killed between two jobs, and resumed."""
    root, begun = tmp_path_factory.mktemp("trained"), []
    experiment = keep_arms(every_kind, scratch=(0.125, 0.5), preserving=(0.25,), slop=(0.25,), later=(0.25,))

    def killed(job, where):
        begun.append(job.directory)
        if len(begun) == 2:
            raise KeyboardInterrupt
        train_job(job, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "train_job", killed)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(experiment, root)
        jobs = run_experiment(experiment, root)
    assert len(begun) == len(set(begun)) + 1, "the killed job alone began twice"
    return experiment, jobs, root


@pytest.mark.parametrize(("arm", "budget"), [("scratch", 0.125), ("later", 0.25), ("preserving", 0.25)])
def test_a_branch_equals_a_run_that_was_never_shared(stopped_and_resumed, tmp_path, arm, budget):
    _, jobs, root = stopped_and_resumed
    job = next(job for job in jobs if (job.arm, job.budget) == (arm, budget))
    assert job.first_step
    build_trainer(job.config, tmp_path / "alone").train()
    assert_same_run(root / job.directory, tmp_path / "alone", job)


def test_the_ledger_counts_shared_steps_once(stopped_and_resumed):
    assert_ledger_counts_each_job_once(*stopped_and_resumed)


def test_trunks_that_no_run_needs_any_more_are_not_trained(stopped_and_resumed, monkeypatch):
    experiment, _, root = stopped_and_resumed
    monkeypatch.setattr(running, "train_job", lambda job, _: pytest.fail(f"{job.name} is not needed"))
    run_experiment(experiment, root)
    run_experiment(keep_arms(experiment, later=(0.25,), preserving=(0.25,)), root)  # their trunk has another end


@pytest.mark.slow
def test_every_branch_of_a_larger_graph_equals_a_run_that_was_never_shared(every_kind, tmp_path):
    jobs = run_experiment(every_kind, tmp_path / "shared")
    runs = [job for job in jobs if job.arm]
    assert [job.name for job in runs if not job.first_step] == ["scratch ×0.0625, seed 0"]  # its decay begins at once
    for number, job in enumerate(runs):
        alone = tmp_path / str(number)
        build_trainer(job.config, alone).train()
        assert_same_run(tmp_path / "shared" / job.directory, alone, job)
    assert_ledger_counts_each_job_once(every_kind, jobs, tmp_path / "shared")


@pytest.mark.slow
def test_arms_that_are_added_use_the_trunks_that_exist(every_kind, tmp_path, monkeypatch):
    begun = []

    def train(job, where):
        begun.append(job)
        train_job(job, where)

    monkeypatch.setattr(running, "train_job", train)
    run_experiment(keep_arms(every_kind, scratch=(0.25, 1.0)), tmp_path)
    assert [job.name.partition(",")[0] for job in begun] == ["trunk to step 8", "scratch ×0.25", "scratch"]
    begun.clear()
    jobs = run_experiment(keep_arms(every_kind, scratch=(0.25, 1.0, 0.125, 0.5)), tmp_path)
    added = [job.name for job in begun if job.arm]
    assert added == ["scratch ×0.125, seed 0", "scratch ×0.5, seed 0"]
    assert all(job.end_step != 8 for job in begun), "its state is there already"
    for number, job in enumerate(job for job in jobs if job.arm):
        build_trainer(job.config, tmp_path / f"alone-{number}").train()
        assert_same_run(tmp_path / job.directory, tmp_path / f"alone-{number}", job)
