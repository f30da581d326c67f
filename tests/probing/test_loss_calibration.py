"""The calibration of losses: its plan within a budget, from its runs to a law, and `slop calibrate --loss`."""

import dataclasses
import json

import pytest
import yaml
from filelock import FileLock
from run_files import write_run_file

from slop_hf import GrowthLaw, GrowthSchedule, GrowthStage, LossCalibration, ModelDims, RunConfig
from slop_hf.errors import RunError
from slop_hf.experiments import running
from slop_hf.experiments.comparison import Cost
from slop_hf.experiments.running import train_job
from slop_hf.experiments.staged_runs import plan_staged_run
from slop_hf.probing import loss_calibration
from slop_hf.probing.mixing import MixingProbe, plan_trials

SMALL, DEEP = ModelDims(16, 32, 1, 2), ModelDims(16, 32, 2, 2)
SCHEDULE = GrowthSchedule(SMALL, (GrowthStage(("layer",), DEEP, 250_000),), initial_tokens=250_000)
SHARE = 0.1


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run of tiny models over a few text files, with a cosine in each stage."""
    home = tmp_path_factory.mktemp("planned")
    training = {
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    return write_run_file(home, yaml.safe_load(SCHEDULE.to_yaml()), training)


@pytest.fixture(scope="module")
def config(run_file):
    return RunConfig.from_yaml(run_file)


@pytest.fixture(scope="module")
def calibration(config, tmp_path_factory):
    return LossCalibration(config, tmp_path_factory.mktemp("calibration") / "runs", share=SHARE)


@pytest.fixture(scope="module")
def jobs(calibration):
    return calibration.build_jobs()


def test_the_plan_costs_at_most_the_share(calibration, jobs):
    flops = sum(trial.flops for trial in plan_trials(jobs))
    assert 0.85 * SHARE < flops / calibration.planned_flops <= SHARE
    assert max(job.flops for job in jobs) <= calibration.planned_flops


def test_the_plan_has_ends_of_several_lengths_and_a_mixing_probe(jobs):
    names = [job.name.removesuffix(", seed 0") for job in jobs if job.arm]
    assert names == [
        *("initial model ×0.25", "initial model ×0.5", "initial model", "target ×0.5", "target"),
        *("schedule ×0.5", "schedule", "target from scratch", "layer ×2"),
    ]
    by_name = dict(zip(names, (job for job in jobs if job.arm), strict=True))
    for name in ("initial model", "target", "schedule"):
        assert by_name[f"{name} ×0.5"].flops == pytest.approx(by_name[name].flops / 2, rel=0.1)
    tokens = by_name["schedule"].schedule.tokens
    assert tokens[0] == pytest.approx(tokens[1], abs=1), "shares are those of the planned run"


def test_no_two_runs_share_a_directory(jobs):
    """The probe's target may have as many tokens as the target with a decay."""
    assert len({job.directory for job in jobs}) == len(jobs)
    slugs = {job.directory.parts[1].split("-")[0] for job in jobs if job.arm}
    assert slugs == {"decay", "target", "layer"}


def test_all_runs_have_one_rate_and_one_warm_up_so_that_trunks_are_shared(jobs):
    runs = [job for job in jobs if job.arm]
    warmups = {job.config.training["warmup_steps"] for job in runs}
    (warmup,) = warmups
    assert 1 <= warmup <= 0.1 * min(job.preview.spans[-1].end_step for job in runs)
    for job in runs:
        rates = [rate for stage in job.preview.rates for rate in stage]
        is_constant = job.config.training["lr_scheduler_type"] == "constant_with_warmup"
        assert max(rates) == 3e-3 and (rates[-1] == 3e-3) == is_constant
    begun = [job for job in runs if job.parent is not None]
    assert {"initial model", "target"} <= {job.arm for job in begun}


def test_a_run_without_growth_has_its_ends_only(config, tmp_path):
    alone = dataclasses.replace(config, schedule=GrowthSchedule(DEEP, (), 2_000_000))
    jobs = LossCalibration(alone, tmp_path / "runs", share=0.05).build_jobs()
    runs = [job for job in jobs if job.arm]
    assert [job.budget for job in runs] == [0.125, 0.25, 0.5, 1.0] and {job.arm for job in runs} == {"target"}


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"share": 0}, "share must be above 0 and at most 1, got 0: give a share"),
        ({}, {"share": float("nan")}, "share must be above 0"),
        ({}, {"share": 1e-4}, r"buys 0 steps of .*, and a law needs \d+ or more: raise share to 0.\d+, or"),
        (
            {"training.batch_tokens": [65536]},
            {},
            "a law needs 24 or more: lower training.batch_tokens, or plan a longer",
        ),
        ({"data.held_out": 0}, {}, "set data.held_out"),
        ({"model": {"pretrained": "model"}}, {}, "model.pretrained is set: give the fields of the model's config"),
        ({"training.stage_learning_rates": [1e-3, 2e-3]}, {}, "stage_learning_rates differs between stages"),
        ({"schedule.initial_tokens": 0, "schedule.stages": []}, {}, "the schedule has no tokens"),
        ({"schedule": None}, {}, "the run has no schedule"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(run_file, tmp_path, changes, settings, message):
    with pytest.raises(RunError, match=message):
        config = RunConfig.from_yaml(run_file, overrides=changes)
        LossCalibration(config, tmp_path / "runs", **settings).build_jobs()
    assert not (tmp_path / "runs").exists()


# ---- From runs to a law ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_calibration_resumes_and_its_law_forecasts_the_run(config, tmp_path):
    """Fifteen trainings of tiny models."""
    calibration = LossCalibration(config, tmp_path / "runs", share=SHARE)
    jobs, ended = calibration.build_jobs(), []

    def train_three(job, root):
        if len(ended) == 3:
            raise KeyboardInterrupt
        ended.append(job.directory)
        train_job(job, root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "train_job", train_three)
        with pytest.raises(KeyboardInterrupt):
            calibration.run()
    reported = []
    report = dataclasses.replace(calibration, on_job_end=lambda job, *_: reported.append(job.directory)).run()
    assert reported == [job.directory for job in jobs][3:], "what had finished stayed"
    assert calibration.report == report
    assert [run.name for run in report.runs] == [
        *("initial model ×0.25", "initial model ×0.5", "initial model", "target ×0.5", "target"),
        *("schedule ×0.5", "schedule"),
    ]
    assert report.cost.flops == pytest.approx(sum(trial.flops for trial in plan_trials(jobs)))
    assert report.law == GrowthLaw.fit(report.measured)
    assert len(report.measured) == 8, "the mixing probe's target is the target"
    planned = plan_staged_run(config)
    assert report.forecast == pytest.approx(report.law.predict(planned), abs=1e-4)
    assert report.distance > 0 and report.expected_error > 0
    assert [result.name for result in report.mixing.results] == ["layer ×2"]
    assert max(abs(run.fitted - run.loss) for run in report.runs) < 0.3
    assert calibration.run() == report, "nothing is trained again"


def patch_training(patch):
    """Let runs have the losses of a law, without training."""
    truth = GrowthLaw(references=(1e4, 16.0, 2e4, 3e-3))

    def measure(config, result, experiment):
        planned = plan_staged_run(config, experiment=experiment)
        stages = [
            dataclasses.replace(stage, losses=((0.5, float(row[7])), (1.0, float(row[-1]))))
            for stage, row in zip(planned.stages, truth.trace(planned), strict=True)
        ]
        return dataclasses.replace(planned, stages=tuple(stages))

    patch.setattr(loss_calibration, "run_jobs", lambda *_, **__: None)
    patch.setattr(loss_calibration, "read_run_result", lambda job, root: None)
    patch.setattr(loss_calibration, "measure_staged_run", measure)
    patch.setattr(loss_calibration, "sum_trials", lambda jobs, root: Cost("probes", 9, 5, 7.0, 1))
    patch.setattr(MixingProbe, "run", lambda self, growths: None)


@pytest.fixture(scope="module")
def report(calibration):
    with pytest.MonkeyPatch.context() as patch:
        patch_training(patch)
        return calibration.run()


def test_each_loss_counts_once_and_runs_are_compared_with_the_law(calibration, report):
    ends = {run.name: run for run in report.runs}
    assert len(ends) == 7 and all(abs(run.fitted - run.loss) < 0.1 for run in ends.values())
    losses = {
        name: [len(run.stages[0].losses) for run in report.measured if run.experiment == name]
        for name in ("initial model", "target", "mixing probe")
    }
    assert losses == {"initial model": [1, 1, 2], "target": [1, 2], "mixing probe": [2]}
    assert calibration.report == report
    assert report.forecast[1] < report.forecast[0] < report.forecast[2]
    assert report.expected_error == pytest.approx((report.forecast[2] - report.forecast[1]) / 2)


def test_a_directory_has_one_writer(calibration, monkeypatch):
    patch_training(monkeypatch)
    locks = calibration.output_dir / ".lock"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / "rank-0"), pytest.raises(RunError, match=r"runs is in use .*or choose another output dir"):
        calibration.run()


def test_the_fit_begins_with_the_prior(calibration, monkeypatch):
    patch_training(monkeypatch)
    monkeypatch.setattr(LossCalibration, "_plan", calibration._plan)
    prior, known = GrowthLaw(references=(1e4, 16.0, 1e5, 3e-3)), []
    monkeypatch.setattr(GrowthLaw, "fit", lambda runs, prior: known.append(prior) or prior)
    assert dataclasses.replace(calibration, prior=prior).run().law == prior and known == [prior]


# ---- The command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_the_plan_and_its_cost(output_of, run_file, calibration, jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LossCalibration, "_plan", calibration._plan)
    command = ["calibrate", "--loss", run_file, "--share", SHARE, "--dry-run"]
    out = output_of(*command)
    assert "schedule ×0.5" in out and "of the run's" in out and "layer ×2" in out
    plan = json.loads(output_of(*command, "--json"))
    assert plan["flops"] <= SHARE * plan["planned_flops"] and len(plan["runs"]) > 9
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_law_and_its_figure(output_of, run_file, calibration, report, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LossCalibration, "run", lambda self: report)
    monkeypatch.setattr(LossCalibration, "_plan", calibration._plan)
    command = ["calibrate", "--loss", run_file, "--share", SHARE, "-o", "out/law.yaml"]
    out = output_of(*command)
    assert "forecast of the run: " in out and "spent: " in out and "law written to out/law.yaml" in out
    assert GrowthLaw.from_yaml("out/law.yaml") == report.law
    assert (tmp_path / "out" / "law.png").stat().st_size > 5_000
    answer = json.loads(output_of(*command, "--json"))
    assert answer["forecast"] == list(report.forecast) and answer["expected_error"] == report.expected_error
