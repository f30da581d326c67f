"""The mixing probe: κ and mixing times of analytic curves, a tiny probe from runs to report, interruption, errors."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from run_files import write_run_file

from slop_hf import GrowthSchedule, GrowthStage, MixingProbe, ModelDims
from slop_hf.errors import DivergedError, RunError, SlopError
from slop_hf.experiments import running
from slop_hf.experiments.collect import PROBES, _sum_probes
from slop_hf.experiments.running import train_job
from slop_hf.probing.catch_up import LossTrack, estimate_mixing
from slop_hf.probing.mixing import build_mixing_growths
from slop_hf.probing.mixing_report import MixingReport, build_mixing_table, describe_mixing
from slop_hf.training.config import RunConfig

SMALL_TOKENS = 4000
EVERY = 100  # tokens between evaluations of the analytic curves


def compute_loss(tokens):
    return 2 + 5 * np.asarray(tokens, dtype=float) ** -0.3


def make_tracks(kappa, decay, noise=0.0, *, evaluations=40):
    """A trunk, and a grown model whose lead approaches κ as 1 − 1.5 exp(−n / decay), in units of SMALL_TOKENS."""
    random = np.random.default_rng(3)
    after = EVERY * np.arange(1, evaluations + 1)
    tokens = EVERY * np.arange(1, int(evaluations + 1.25 * SMALL_TOKENS / EVERY) + 1)
    lead = SMALL_TOKENS * kappa * (1 - 1.5 * np.exp(-after / decay))
    curves = (tokens, compute_loss(tokens)), (after, compute_loss(np.maximum(after + lead, 1)))
    return [
        LossTrack(tuple(map(int, x)), tuple(map(float, losses + noise * random.standard_normal(len(x)))))
        for x, losses in curves
    ]


# ---- The estimator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kappa", "decay", "noise", "within"),
    [
        (0.8, 1, 0.0, 0.002),
        (0.8, 500, 0.0, 0.005),
        (0.125, 300, 0.001, 0.02),
        (0.8, 500, 0.003, 0.05),
        (0, 9, 0, 1e-3),
    ],
)
def test_kappa_and_mixing_time_of_known_curves_come_out(kappa, decay, noise, within):
    estimate = estimate_mixing(*make_tracks(kappa, decay, noise), SMALL_TOKENS)
    assert estimate.verdict == "settled" and estimate.kappa == pytest.approx(kappa, abs=within)
    assert estimate.kappa_low - within <= kappa <= estimate.kappa_high + within
    mixing = decay * np.log(1.5 * kappa / 0.1) if kappa else 0  # 1.5 κ exp(−n / decay) is the tolerance
    assert mixing <= estimate.mixing_tokens + 2 * EVERY and estimate.mixing_tokens <= mixing + 2 * EVERY
    assert estimate.mixing_low <= estimate.mixing_tokens
    assert estimate.noise == pytest.approx(noise, rel=0.4, abs=1e-4)


def test_the_interval_is_as_wide_as_the_noise_and_the_tolerance_decides_on_the_mixing_time():
    quiet, loud = (estimate_mixing(*make_tracks(0.8, 500, noise), SMALL_TOKENS) for noise in (0.001, 0.003))
    widths = [estimate.kappa_high - estimate.kappa_low for estimate in (quiet, loud)]
    assert widths[1] / widths[0] == pytest.approx(3, rel=0.3)
    strict = estimate_mixing(*make_tracks(0.8, 500), SMALL_TOKENS, tolerance=0.02)
    loose = estimate_mixing(*make_tracks(0.8, 500), SMALL_TOKENS, tolerance=0.3)
    assert loose.mixing_tokens < quiet.mixing_tokens < strict.mixing_tokens


@pytest.mark.parametrize(
    ("curves", "verdict"),
    [
        ((0.8, 2000), "not settled"),
        ((0.8, 500, 0.02), "too noisy"),
        ((1.4, 1), "below the trunk"),
        ((-1.2, 1), "above the trunk"),
    ],
)
def test_what_cannot_be_determined_is_no_number(curves, verdict):
    estimate = estimate_mixing(*make_tracks(*curves), SMALL_TOKENS)
    assert estimate.verdict == verdict
    assert estimate.kappa is None and estimate.mixing_tokens is None and estimate.mixing_high is None
    if verdict == "not settled":
        assert estimate.trend > 0.1 and 0.4 < estimate.last < 0.8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: estimate_mixing(*make_tracks(0.8, 1, evaluations=11), SMALL_TOKENS), "12 evaluations .* and 11 of"),
        (lambda: estimate_mixing(*make_tracks(0.8, 1), SMALL_TOKENS, tolerance=0), "tolerance must be positive"),
        (lambda: estimate_mixing(*make_tracks(0.8, 1), -1), "small_tokens must be positive"),
        (lambda: LossTrack((1, 1), (2.0, 2.0)), "tokens that are positive and ascend"),
        (lambda: LossTrack((1, 2), (2.0,)), "one loss per number of tokens"),
        (lambda: LossTrack((1,), (float("nan"),)), "not finite"),
    ],
)
def test_tracks_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(RunError, match=message):
        wrong()


# ---- The growths ----------------------------------------------------------------------------------------------------

SMALL, LARGE = ModelDims(16, 32, 2, 2), ModelDims(32, 64, 4, 4)
STEP = 64  # tokens of an optimizer step
SCHEDULE = GrowthSchedule(
    SMALL, (GrowthStage(("layer", "mha", "ffn", "hidden"), LARGE, 400 * STEP),), initial_tokens=200 * STEP
)


@pytest.mark.parametrize(
    ("asked", "small"),
    [
        ({}, {"layer ×2": "32,64,2,4", "ffn ×2": "32,32,4,4", "hidden ×2": "16,64,4,2"}),
        ({"dimensions": ["layer"], "factors": [4, 4 / 3]}, {"layer ×4": "32,64,1,4", "layer ×1.33": "32,64,3,4"}),
        ({"dimensions": ["layer"], "factors": [1.333]}, {"layer ×1.33": "32,64,3,4"}),
        ({"dimensions": ["hidden"], "factors": [4]}, {"hidden ×4": "8,64,4,1"}),
        (
            {"dimensions": ["layer"], "inits": ["stack", "interleave"]},
            {"layer ×2 stack": "32,64,2,4", "layer ×2 interleave": "32,64,2,4"},
        ),
    ],
)
def test_a_growth_leads_to_the_target_in_one_dimension(asked, small):
    growths = build_mixing_growths(SCHEDULE, **asked)
    assert {growth.name: growth.small for growth in growths} == {
        name: ModelDims.parse(dims) for name, dims in small.items()
    }
    assert {growth.target for growth in growths} == {LARGE}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"dimensions": ["depth"], "factors": [2]}, "unknown operator 'depth'"),
        ({"dimensions": ["layer"], "factors": [0.5]}, "factors must be above 1, .* got 0.5"),
        ({"dimensions": ["layer"], "factors": [1]}, "factors must be above 1"),
        (
            {"dimensions": ["layer"], "factors": [3]},
            r"4 cannot be divided by the factor 3; .* 4 \(size 1\) or 2 \(size 2",
        ),
        ({"dimensions": ["head_dim"]}, "head_dim does not grow from .*: leave it out, or give factors"),
        ({"dimensions": ["layer"], "factors": [2, 2.0]}, "growths must differ, got layer ×2, layer ×2"),
        ({"dimensions": ["layer"], "inits": ["rms_copy"]}, "unknown init 'rms_copy' for operator 'layer'"),
    ],
)
def test_growths_that_cannot_be_are_refused(asked, message):
    with pytest.raises(SlopError, match=message):
        build_mixing_growths(SCHEDULE, **asked)


def test_equal_numbers_for_all_stages_hold_for_all_models(config, growths):
    training = {**config.training, "stage_learning_rates": [1e-3] * 4}
    jobs = MixingProbe(dataclasses.replace(config, training=training), "none", lag=12 * STEP).build_jobs(growths)
    assert {max(rates) for job in jobs for rates in job.preview.rates} == {1e-3}


def test_a_schedule_without_growth_needs_dimensions():
    with pytest.raises(RunError, match="the schedule grows nothing; name the dimensions"):
        build_mixing_growths(GrowthSchedule(LARGE))


# ---- The probe ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_file(tmp_path_factory):
    """A run of small models over a few text files, at a constant rate."""
    home = tmp_path_factory.mktemp("mixing")
    training = {
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "lr_span": "run",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
    }
    return write_run_file(home, yaml.safe_load(SCHEDULE.to_yaml()), training)


@pytest.fixture(scope="module")
def config(run_file):
    return RunConfig.from_yaml(run_file)


@pytest.fixture(scope="module")
def growths():
    """Two growths with the same small model."""
    return build_mixing_growths(SCHEDULE, ["layer"], [2], ["stack", "interleave"])


LENGTHS = {"at": (4 * STEP,), "lag": 12 * STEP}


@pytest.fixture(scope="module")
def measured(config, growths, tmp_path_factory):
    """A probe that has been interrupted in its third run, and then run to its end."""
    probe, ended = MixingProbe(config, tmp_path_factory.mktemp("measured"), **LENGTHS), []

    def train_two(job, root):
        if len(ended) == 2:
            raise KeyboardInterrupt
        ended.append(job.directory)
        train_job(job, root)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "train_job", train_two)
        with pytest.raises(KeyboardInterrupt):
            probe.run(growths)
    assert probe.ledger == ()
    reported = []
    dataclasses.replace(probe, on_job_end=lambda job, *_: reported.append(job.directory)).run(growths)
    assert reported == [job.directory for job in probe.build_jobs(growths)][2:], "what had finished stayed"
    return probe


def test_what_growths_share_is_trained_once(config, growths, measured):
    trials = measured.preview(growths)
    assert [(trial.stages, trial.tokens // STEP) for trial in trials] == [
        (("stage-0-initial",), 4),
        (("stage-0-initial",), 17),
        (("stage-1-layer",), 12),
        (("stage-1-layer",), 12),
    ]
    assert measured.report.cost.tokens == sum(trial.tokens for trial in trials)
    assert measured.report.cost.flops == pytest.approx(sum(trial.flops for trial in trials))
    longer = dataclasses.replace(measured, largest_kappa=2.0).preview(growths)
    assert longer[1].tokens == (12 + 2 * 4) * STEP
    moments = MixingProbe(config, "none", at=(8 * STEP, 20 * STEP), lag=12 * STEP).preview(growths[:1])
    assert sum(trial.tokens for trial in moments) == STEP * (20 + 12 + 12 + 12 + 25 + 1), "one small model grows twice"


def test_estimates_are_those_of_the_losses_in_the_runs(measured, tmp_path):
    report = measured.report
    (trunk,) = report.trunks
    assert trunk.tokens == tuple(STEP * step for step in range(1, 18))
    for result in report.results:
        (track,) = result.tracks
        assert track.tokens == tuple(STEP * step for step in range(1, 13)) and result.small_tokens == 4 * STEP
        assert result.estimates == (estimate_mixing(trunk, track, 4 * STEP, tolerance=report.tolerance),)
        assert 0.5 < result.cost_ratio < 0.8
    assert report.results[0].tracks != report.results[1].tracks, "the inits differ"
    report.to_json(tmp_path / "again.json")
    assert MixingReport.from_json(tmp_path / "again.json") == report


def test_a_comparison_counts_the_probes_cost(measured, tmp_path):
    (tmp_path / PROBES / "mine").mkdir(parents=True)
    measured.report.to_json(tmp_path / PROBES / "mine" / "mixing.json")
    assert _sum_probes(tmp_path) == measured.report.cost and measured.ledger == (measured.report.cost,)


def with_estimates(result, *tracks):
    """The result of a growth with estimates of analytic curves, one per seed."""
    estimates = tuple(estimate_mixing(*make_tracks(*curves), SMALL_TOKENS) for curves in tracks)
    return dataclasses.replace(result, estimates=estimates)


def test_the_report_gives_intervals_and_says_what_is_not_known(measured):
    result = measured.report.results[0]
    settled, rising = with_estimates(result, (0.8, 500, 0.001)), with_estimates(result, (0.8, 2000))
    assert settled.kappa_interval == (settled.estimates[0].kappa_low, settled.estimates[0].kappa_high)
    assert settled.compute_cost(0.5) == pytest.approx(0.5 + 0.5 * result.cost_ratio / 0.8, abs=0.02)
    report = dataclasses.replace(measured.report, results=(settled, rising), diverged=("ffn ×2",))
    text = " ".join(describe_mixing(report))
    assert "κ(n) had not settled" in text and "95% of the noise" in text and "Diverged, and therefore" in text
    cells = [list(column.cells) for column in build_mixing_table(report).columns]
    assert [str(cell) for cell in cells[1]][1] == "not settled" and str(cells[3][1]) == "–"
    with pytest.raises(RunError, match="κ is not known"):
        rising.compute_cost(0.5)
    seeds = with_estimates(result, (0.8, 500), (0.6, 500))
    assert seeds.kappa.mean == pytest.approx(0.7, abs=0.01)
    assert seeds.kappa_interval == (seeds.kappa.low, seeds.kappa.high)
    assert with_estimates(result, (0.8, 500), (0.8, 2000)).kappa is None, "one seed has not settled"
    passed = with_estimates(result, (1.4, 1))
    table = build_mixing_table(dataclasses.replace(report, results=(passed,)))
    assert [str(cell) for cell in table.columns[1].cells] == ["above 1.25"]
    slow = with_estimates(result, (0.4, 2000, 0.001))
    assert slow.verdict == "settled" and slow.estimates[0].is_drifting and not settled.estimates[0].is_drifting
    assert "still changes by +0.0" in describe_mixing(dataclasses.replace(report, results=(settled, slow)))[2]
    assert "ranges over 2 seeds" in describe_mixing(dataclasses.replace(report, seeds=(0, 1)))[1]


def test_growths_that_diverge_are_left_out(config, growths, measured, tmp_path, monkeypatch):
    names = []

    def diverge(job, root):
        names.append(job.arm)
        if job.arm in wild:
            raise DivergedError("the loss is not finite any more")
        (root / job.directory.parent).mkdir(parents=True, exist_ok=True)
        running.inherit(
            running.RunDirectory(f"{measured.output_dir}/{job.directory}"),
            running.RunDirectory(root / job.directory),
            job.schedule,
            name="copy",
        )

    monkeypatch.setattr(running, "train_job", diverge)
    wild = {growths[0].name}
    report = MixingProbe(config, tmp_path / "one", **LENGTHS).run(growths)
    assert report.diverged == (growths[0].name,) and [one.name for one in report.results] == [growths[1].name]
    wild = {"target from scratch"}
    with pytest.raises(RunError, match="the target from scratch diverged; lower learning_rate"):
        MixingProbe(config, tmp_path / "all", **LENGTHS).run(growths)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"lag": 0}, "lag must be a whole number, 1 or more, got 0"),
        ({}, {"at": (STEP, STEP)}, "at must be different numbers of tokens"),
        ({}, {"share": 0.5, "lag": STEP}, "give one of the two"),
        ({}, {"share": 2.0}, "share must be above 0 and at most 1, got 2"),
        ({}, {"tolerance": 0.0}, "tolerance must be positive"),
        ({}, {"largest_kappa": -1.0}, "largest_kappa must be positive"),
        ({}, {"seeds": ()}, "seeds must be one or more"),
        ({"data.held_out": 0.0}, {}, "set data.held_out"),
        ({"training.lr_span": "stage"}, {}, "set training.lr_span to run"),
        ({"training.warmup_steps": 0.1}, {}, "warmup_steps is a share .* give a number of steps"),
        ({"training.stage_learning_rates": [1e-3, 2e-3]}, {}, "stage_learning_rates differs between stages"),
        ({"model.pretrained": "a-model"}, {}, "leave model.pretrained out"),
        ({"training.lr_scheduler_type": "linear"}, {}, "rate of linear does not stay constant"),
        ({}, {"share": 0.02}, "5 steps, .* 12 or more .*: raise share to 0.045 or more, or give lag 768"),
        ({}, {"at": (2 * STEP,), "lag": 12 * STEP}, "small models train for 2 steps, .* needs 3 .*: raise at to 192"),
        ({}, {"at": (9 * STEP,), "lag": 4 * STEP}, "grown models train for 4 steps, .*: raise lag to 768"),
    ],
)  # fmt: skip
def test_probes_that_cannot_measure_are_refused_before_any_training(
    config, growths, tmp_path, changes, settings, message
):
    for name, value in changes.items():
        section, key = name.split(".")
        old = getattr(config, section)
        new = {**old, key: value} if isinstance(old, dict) else dataclasses.replace(old, **{key: value})
        config = dataclasses.replace(config, **{section: new})
    with pytest.raises(RunError, match=message):
        MixingProbe(config, tmp_path / "out", **settings).preview(growths)
    assert not (tmp_path / "out").exists()


# ---- The command ----------------------------------------------------------------------------------------------------


def test_slop_probe_mixing_fits_80_columns_and_ends_in_a_report(output_of, run_file, measured, monkeypatch):
    command = ["probe", run_file, "-o", measured.output_dir, "--mixing", "--next", "layer", "--factors", "2"]
    command += ["--inits", "stack,interleave", "--at", str(4 * STEP), "--lag", str(12 * STEP)]
    monkeypatch.setenv("COLUMNS", "80")
    plan = output_of(*command, "--dry-run")
    assert "Mixing probe of 2 growths" in plan and f"{(4 + 17 + 2 * 12) * STEP:,}" in plan
    assert len(json.loads(output_of(*command, "--dry-run", "--json"))) == 4
    text = output_of(*command)
    report = json.loads((measured.output_dir / "mixing.json").read_text())
    assert report["cost"]["count"] == 3 and [one["factor"] for one in report["results"]] == [2, 2]
    assert "layer ×2 interleave" in text and "evaluations not included" in " ".join(text.split())
    assert max(map(len, plan.splitlines() + text.splitlines()[:-1])) <= 80 and "…" not in text
    assert {path.name for path in measured.output_dir.iterdir()} >= {"mixing.json", "mixing.png", "runs", "trunks"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixing", "--factors", "two"], "--factors must be numbers above 1, such as 2,4, got 'two'"),
        (["--mixing", "--at", "1e3,x"], "--at must be whole numbers of tokens"),
        (["--mixing", "--at", "1.5"], "--at must be whole numbers of tokens, such as 1e6,4e6, got '1.5'"),
        (["--mixing", "--top-k", "3"], "leave --top-k out"),
        (["--mixing", "--by", "loss"], "leave --by out"),
        (["--factors", "2"], "--factors: give --mixing too"),
        (["--mixing", "--share", "0.01"], "raise --share to 0.045 or more, or give --lag 768"),
    ],
)
def test_slop_probe_mixing_refuses_in_one_line(error_of, run_file, tmp_path, options, message):
    assert message in error_of("probe", run_file, "-o", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
