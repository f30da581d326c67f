"""Experiments run for real at a size of seconds: shared beginnings, interruption, side by side, the record."""

import dataclasses
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from safetensors.torch import load_file

from slop_hf import RunConfig, RunDirectory
from slop_hf.errors import RunError
from slop_hf.experiments import running, write
from slop_hf.experiments.collect import collect_comparison
from slop_hf.experiments.comparison import Comparison
from slop_hf.experiments.config import Experiment
from slop_hf.experiments.jobs import add_shared_prefixes, build_jobs
from slop_hf.experiments.running import run_experiment, train_job
from slop_hf.experiments.summary_text import summarise_comparison
from slop_hf.experiments.write import compare_arms, write_comparison
from slop_hf.training.config import build_trainer


@pytest.fixture(scope="module")
def experiment(tiny_experiment):
    return Experiment.from_yaml(tiny_experiment)


@pytest.fixture(scope="module")
def trained(experiment, tmp_path_factory):
    """Its runs, and the directory that they lie in."""
    root = tmp_path_factory.mktemp("trained")
    return run_experiment(experiment, root), root


def jobs_of(experiment):
    return add_shared_prefixes(build_jobs(experiment))


def weights(root, job):
    run = RunDirectory(root / job.directory)
    return load_file(run.stage_dir(len(job.schedule.stages)) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def named(jobs, name):
    return next(job for job in jobs if job.name == name)


def test_a_shared_prefix_gives_the_weights_of_a_separate_run(experiment, trained, tmp_path):
    jobs, root = trained
    job = named(jobs, "preserving, seed 0")
    assert job.parent is not None and len(RunDirectory(root / job.parent).schedule.structures) == 3
    build_trainer(job.config, tmp_path / "alone").train()
    alone = RunDirectory(tmp_path / "alone").stage_dir(len(job.schedule.stages))
    assert same(weights(root, job), load_file(alone / "model.safetensors"))


def test_shared_stages_are_counted_once(experiment, trained):
    jobs, root = trained
    record = collect_comparison(experiment, jobs, root)
    assert [run.arm for run in record.runs] == ["slop", "preserving", "from-scratch", "from-scratch"]
    assert not record.missing
    costs = {cost.what: cost for cost in record.ledger}
    assert costs.keys() == {"runs", "trunks"} and costs["trunks"].count == 1
    slop, preserving, half, whole = record.runs
    shared = sum(stage.flops for stage in slop.stages[:3])
    assert slop.inherited == preserving.inherited == 3
    assert costs["trunks"].flops == pytest.approx(shared)
    paid = slop.flops + preserving.flops + half.flops + whole.flops - shared
    assert costs["trunks"].flops + costs["runs"].flops == pytest.approx(paid)
    assert sum(cost.tokens for cost in record.ledger) < sum(run.tokens for run in record.runs)


def test_arms_spend_alike(experiment, trained):
    jobs, root = trained
    by_arm = {(run.arm, run.budget): run.flops for run in collect_comparison(experiment, jobs, root).runs}
    budget = experiment.sizes.budget
    assert by_arm["slop", 1.0] == pytest.approx(budget, rel=0.1)  # whole steps of so small a run are coarse
    assert by_arm["from-scratch", 1.0] == pytest.approx(budget, rel=0.1)
    assert by_arm["from-scratch", 0.5] == pytest.approx(budget / 2, rel=0.1)
    assert all(job.flops <= budget * 1.01 for job in jobs)


def test_the_record_comes_back_from_its_file(experiment, trained, tmp_path):
    jobs, root = trained
    record = collect_comparison(experiment, jobs, root, "a machine")
    again = Comparison.load(record.save(tmp_path / "record.json"))
    assert again == record
    run = again.runs[0]
    assert list(run.curve.flops) == sorted(run.curve.flops) and set(run.curve.stages) == {0, 1, 2, 3}
    assert run.curve.losses[-1] == run.eval_loss
    assert run.curve.seconds[-1] == pytest.approx(run.seconds, abs=0.1)
    assert max(map(len, (tmp_path / "record.json").read_text().splitlines())) > 100  # each curve is one line


def test_earlier_names_still_work_and_say_so(experiment, trained, tmp_path, monkeypatch):
    jobs, root = trained
    record = collect_comparison(experiment, jobs, root)
    with pytest.warns(DeprecationWarning, match="Comparison.of is now Comparison.runs_of"):
        assert record.of("from-scratch", 0.5) == record.runs_of("from-scratch", 0.5) != []
    callbacks = []
    monkeypatch.setattr(write, "run_experiment", lambda *_, on_job_end, **__: callbacks.append(on_job_end))
    with pytest.warns(DeprecationWarning, match="now compare_arms") as caught:
        compare_arms(experiment, tmp_path, told=print)
    assert callbacks == [print] and len(caught) == 1


def test_an_interrupted_experiment_resumes(experiment, trained, tmp_path, monkeypatch):
    jobs, root = trained
    again = tmp_path / "again"
    ended = []

    def interrupted(job, where):
        if len(ended) == 2:
            raise KeyboardInterrupt
        ended.append(job)
        train_job(job, where)

    monkeypatch.setattr(running, "train_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, again)
    assert len(collect_comparison(experiment, jobs, again).missing) == 3
    reported = []
    monkeypatch.setattr(running, "train_job", train_job)
    run_experiment(experiment, again, on_job_end=lambda job, done, count: reported.append((job.name, done, count)))
    assert [done for _, done, _ in reported] == [3, 4, 5] and reported[-1][2] == 5
    assert all(same(weights(root, job), weights(again, job)) for job in jobs)
    run_experiment(experiment, again, on_job_end=lambda *_: pytest.fail("all had finished"))


def test_a_signal_to_stop_is_one_for_the_whole_experiment(experiment, tmp_path, monkeypatch):
    """The trainer saves its state and comes back; the next run must not begin then."""

    begun = []
    monkeypatch.setattr(running, "train_run", lambda config, *_, **__: begun.append(config))
    with pytest.raises(RunError, match="was stopped by a signal, its state saved; run the same command again"):
        run_experiment(experiment, tmp_path / "out")
    assert len(begun) == 1


def test_only_one_process_trains_in_a_directory(experiment, another_writer, tmp_path):
    root = tmp_path / "out"
    with another_writer(root), pytest.raises(RunError, match=r"is in use .training since .*process 1 on elsewhere"):
        run_experiment(experiment, root)
    assert not list(root.rglob("stage-*"))


@pytest.mark.slow
def test_runs_side_by_side_end_with_the_same_weights(experiment, trained, tmp_path):
    jobs, root = trained
    parallel, reported = tmp_path / "parallel", []
    more = dataclasses.replace(experiment, arms={**experiment.arms, **wild(experiment)})
    all_jobs = run_experiment(more, parallel, workers=2, on_job_end=lambda job, *_: reported.append(job))
    assert sorted(job.directory for job in reported) == sorted(job.directory for job in all_jobs)
    assert len(all_jobs) == len(jobs) + 3
    assert collect_comparison(more, all_jobs, parallel).diverged == ("wild, seed 0", "as wild, seed 0")
    parent = named(jobs, "slop, seed 0").parent
    order = [job.directory for job in reported]
    assert order.index(parent) < min(order.index(job.directory) for job in jobs if job.parent == parent)
    assert all(same(weights(root, job), weights(parallel, job)) for job in jobs)


class ThreadPool(ThreadPoolExecutor):
    """The pool of `running`, with threads: nothing has to be imported again."""

    def __init__(self, workers, context, initializer, arguments):
        super().__init__(workers)


def test_a_failed_run_is_named_and_the_runs_in_progress_finish(experiment, tmp_path, monkeypatch):
    failed, begun, ended = threading.Event(), [], []
    scratch = named(jobs_of(experiment), "from-scratch ×0.5, seed 0")

    def train(job, root):
        begun.append(job.name)
        if job == scratch:
            failed.set()
            raise FileExistsError("in the way")
        assert failed.wait(60)

    monkeypatch.setattr(running, "ProcessPoolExecutor", ThreadPool)
    monkeypatch.setattr(running, "train_job", train)
    with pytest.raises(RunError, match=r"×0\.5, seed 0 failed \(FileE.* in the way\); see .*log\.txt, and run"):
        run_experiment(experiment, tmp_path, workers=2, on_job_end=lambda job, *_: ended.append(job.name))
    (in_progress,) = ended
    assert begun == [in_progress, scratch.name] and in_progress.startswith("shared prefix")


def wild(experiment):
    """Two arms that diverge in the beginning that they share."""
    originals = {"wild": experiment.arms["slop"], "as wild": experiment.arms["preserving"]}
    return {
        name: dataclasses.replace(arm, training={**arm.training, "learning_rate": 1e30})
        for name, arm in originals.items()
    }


def test_diverged_runs_are_reported_and_the_others_continue(experiment, tmp_path):
    other = dataclasses.replace(experiment.arms["from-scratch"], budgets=(1.0,))
    changed, reported = dataclasses.replace(experiment, arms={**wild(experiment), "from-scratch": other}), []
    jobs = run_experiment(changed, tmp_path, on_job_end=lambda job, *_: reported.append(job.name))
    assert sorted(reported) == sorted(job.name for job in jobs) and len(jobs) == 4
    comparison = collect_comparison(changed, jobs, tmp_path)
    assert comparison.diverged == ("wild, seed 0", "as wild, seed 0") and not comparison.missing
    assert [run.arm for run in comparison.runs] == ["from-scratch"]
    assert "2 runs have diverged: wild, seed 0; as wild, seed 0." in summarise_comparison(comparison)
    write_comparison(comparison, tmp_path / "report")
    run_experiment(changed, tmp_path, on_job_end=lambda *_: pytest.fail("all have ended"))
    (note,) = tmp_path.rglob("diverged.txt")
    assert "no longer finite" in note.read_text()
    note.unlink()
    assert len(collect_comparison(changed, jobs, tmp_path).missing) == 2


def test_other_settings_are_refused_for_runs_that_have_begun(experiment, trained):
    _, root = trained
    run = dataclasses.replace(experiment.run, training={**experiment.run.training, "learning_rate": 1.0})
    with pytest.raises(RunError, match="begun with other settings"):
        run_experiment(dataclasses.replace(experiment, run=run), root)


def test_a_run_that_cannot_begin_is_refused_before_any_training(experiment, tmp_path):
    data = dataclasses.replace(experiment.run.data, block_size=64)
    other = dataclasses.replace(experiment, run=dataclasses.replace(experiment.run, data=data))
    with pytest.raises(ValueError, match=r"shared prefix .*block_size 64"):
        run_experiment(other, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("stage-*"))


def test_each_run_can_be_launched_by_itself(trained):
    jobs, root = trained
    job = named(jobs, "from-scratch, seed 0")
    assert RunConfig.from_yaml((root / job.directory).parent / "seed-0.run.yaml") == job.config


def test_stages_are_scored_as_the_config_says(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    asked = {f"run.evaluation.{name}": value for name, value in {"tasks": "perplexity", "after_growth": True}.items()}
    changed = Experiment.from_yaml(tiny_experiment, overrides=asked)
    jobs = run_experiment(dataclasses.replace(changed, arms={"slop": changed.arms["slop"]}), tmp_path / "out")
    run = RunDirectory(tmp_path / "out" / named(jobs, "slop, seed 0").directory)
    for record in run.records():
        *grown, end = run.evaluations(record.stage)
        assert end.metrics["loss"] == pytest.approx(record.eval_loss, rel=1e-5)
        assert [one.when for one in grown] == ["after_growth"] * (record.stage > 0)
    with pytest.raises(RunError, match="evaluation: limit must be a whole number, 1 or more, got 0"):
        Experiment.from_yaml(tiny_experiment, overrides={**asked, "run.evaluation.limit": 0})


def test_probes_are_in_the_ledger(experiment, trained, tmp_path):
    jobs, root = trained
    before = collect_comparison(experiment, jobs, root)
    for name, flops in (("orders", 3e6), ("inits", 1e6)):
        (root / "probes" / name).mkdir(parents=True)
        cost = {"what": "probes", "count": 2, "tokens": 100, "flops": flops, "seconds": 1.5}
        (root / "probes" / name / "probe.json").write_text(json.dumps({"cost": cost}))
    *others, probes = collect_comparison(experiment, jobs, root).ledger
    assert tuple(others) == before.ledger
    assert (probes.what, probes.count, probes.tokens, probes.flops, probes.seconds) == ("probes", 4, 200, 4e6, 3.0)
    (root / "probes/inits/probe.json").write_text("{}")
    with pytest.raises(RunError, match="is not a report of `slop probe`"):
        collect_comparison(experiment, jobs, root)
    shutil.rmtree(root / "probes")
