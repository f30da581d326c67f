"""Trial training at a size of seconds: the measured order, common starts, interruption, the ledger, errors."""

import dataclasses
import itertools
import json

import pytest
import yaml
from safetensors.torch import load_file

from slop_hf import ConfigSpace, GrowthSchedule, GrowthStage, ModelDims, Probe, RunDirectory, SlopPlanner
from slop_hf.errors import DivergedError, RunError, SlopError
from slop_hf.experiments import running
from slop_hf.experiments.comparison import Cost
from slop_hf.experiments.results import Spread
from slop_hf.experiments.running import train_job
from slop_hf.probing.candidates import (
    Candidate,
    Start,
    build_init_candidates,
    build_next_candidates,
    build_schedule_candidates,
    continue_schedule,
    plan_candidates,
)
from slop_hf.probing.report import CandidateResult, ProbeReport, describe_probe, tabulate_probe
from slop_hf.training.config import RunConfig, build_trainer

SMALL, LARGE = ModelDims(16, 32, 2, 2), ModelDims(32, 64, 3, 4)
DEEP = SMALL.replace(num_hidden_layers=3)
THICK = DEEP.replace(intermediate_size=64)
STEP = 64  # tokens of an optimizer step
SCHEDULE = GrowthSchedule(
    SMALL,
    (
        GrowthStage(("layer",), DEEP, 4 * STEP),
        GrowthStage(("ffn",), THICK, 4 * STEP),
        GrowthStage(("hidden", "mha"), LARGE, 4 * STEP),
    ),
    initial_tokens=8 * STEP,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of four short stages over a few text files."""
    home = tmp_path_factory.mktemp("probe")
    (home / "texts").mkdir()
    for number in range(40):
        (home / "texts" / f"{number}.txt").write_text(" ".join(str(number * k) for k in range(60)))
    data = {"source": str(home / "texts"), "vocab_size": 300, "block_size": 32, "held_out": 0.2}
    content = {
        "schedule": yaml.safe_load(SCHEDULE.to_yaml()),
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": {**data, "cache_dir": str(home / "cache")},
        "training": {
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "use_cpu": True,
            "disable_tqdm": True,
            "carry_optimizer_state": True,
            "keep_optimizer_states": True,
            "seed": 0,
        },
    }
    (home / "run.yaml").write_text(yaml.safe_dump(content))
    return RunConfig.from_yaml(home / "run.yaml")


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """The run that the config describes."""
    path = tmp_path_factory.mktemp("finished") / "run"
    build_trainer(config, path).train()
    return RunDirectory(path)


@pytest.fixture(scope="module")
def candidates(config):
    """The planner's three best orders; two begin with the same growth."""
    return plan_candidates(config, SCHEDULE, 3)


@pytest.fixture(scope="module")
def tried(config, candidates, tmp_path_factory):
    """A probe that has run."""
    probe = Probe(config, tmp_path_factory.mktemp("tried"), share=0.5, by="loss")
    probe.run(candidates)
    return probe


def with_rate(config, rate):
    return dataclasses.replace(config, training={**config.training, "learning_rate": rate})


def weights(run, number):
    return load_file(run.stage_dir(number) / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


def without_seconds(report):
    results = [dataclasses.replace(one, seconds=Spread((1.0,)), utility_per_hour=None) for one in report.results]
    return dataclasses.replace(report, results=tuple(results), cost=dataclasses.replace(report.cost, seconds=0.0))


# ---- What is measured -----------------------------------------------------------------------------------------------


def test_the_order_returned_is_the_measured_one(config, candidates, tried):
    """In whatever order candidates come: returning the planner's order would fail for all but one of these."""
    schedules = [one.schedule for one in candidates]
    losses = {one.schedule.sequence: one.loss.mean for one in tried.report.results}
    assert len(set(losses.values())) == 3
    for order in itertools.permutations(schedules):
        found = tried(order)
        assert [one.sequence for one in found] == sorted(losses, key=losses.__getitem__)
        assert [one.scores["probe_loss"] for one in found] == sorted(losses.values())
        assert all(one in schedules for one in found), "what comes back is what was given"


def test_a_planner_gives_its_schedules_in_the_measured_order(config, candidates, tried):
    space = ConfigSpace(
        targets=[LARGE],
        config={"model_type": "llama", "vocab_size": 300, "tie_word_embeddings": True},
        sequence_length=32,
    )
    planner, tokens = SlopPlanner(SMALL, space, objective="delta_params"), [float(count) for count in SCHEDULE.tokens]
    found = planner.plan(3, tokens=tokens, probe=tried)
    assert [one.sequence for one in found] == [one.name for one in tried.report.results]
    assert {"delta_params", "probe_loss", "probe_loss_at_growth", "probe_utility"} <= found[0].scores.keys()
    assert {one.name: one.rank for one in tried.report.results} == {
        one.sequence: rank for rank, one in enumerate(planner.plan(3, tokens=tokens), 1)
    }


def test_numbers_are_those_of_the_trials(candidates, tried):
    by_place = {
        job.directory: RunDirectory(f"{tried.output_dir}/{job.directory}")
        for job in tried.build_jobs(candidates)
        if job.arm
    }
    records = {run.schedule.sequence: run.records() for run in by_place.values()}
    for one in tried.report.results:
        initial, *grown = records[one.name]
        assert one.start_loss.mean == pytest.approx(initial.eval_loss, abs=1e-6)
        assert one.loss_at_growth.mean == pytest.approx(grown[0].eval_loss_after_growth, abs=1e-6)
        assert one.loss.mean == pytest.approx(grown[-1].eval_loss, abs=1e-6)
        assert [record.tokens for record in grown] == [2 * STEP] * 3 and one.tokens == 6 * STEP
        assert one.flops == pytest.approx(sum(record.flops for record in grown))
        losses = [record.eval_loss for record in (initial, *grown)]
        drops = [before - after for before, after in itertools.pairwise(losses)]
        utility = sum(1e12 * drop / record.flops for drop, record in zip(drops, grown, strict=True))
        assert one.utility.mean == pytest.approx(utility, rel=1e-3)


def test_stages_that_trials_share_are_trained_and_counted_once(candidates, tried):
    jobs = tried.build_jobs(candidates)
    trunks = [job.schedule.sequence for job in jobs if not job.arm]
    assert sorted(trunks) == ["", "f"], "the initial model, and the growth that two orders begin with"
    (cost,) = tried.ledger
    assert (cost.what, cost.count) == ("probes", 3)
    assert cost.tokens == (4 + 2 + 3 * 6 - 2 * 2) * STEP
    assert cost.tokens == sum(trial.tokens for trial in tried.preview(candidates))
    assert cost.flops == pytest.approx(sum(trial.flops for trial in tried.preview(candidates)))
    assert cost.seconds > 0


def test_the_report_comes_back_from_its_file(config, tried, tmp_path):
    report = tried.report
    report.to_json(tmp_path / "again.json")
    assert ProbeReport.from_json(tmp_path / "again.json") == report
    assert Probe(config, tmp_path / "empty").ledger == ()
    with pytest.raises(RunError, match="no such file; `slop probe` writes one"):
        _ = Probe(config, tmp_path / "empty").report
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        ProbeReport.from_json(tmp_path / "bad.json")


def test_the_earlier_name_of_on_job_end_still_works_and_says_so(config):
    with pytest.warns(DeprecationWarning, match="now Probe") as caught:
        probe = Probe(config, "none", told=print)
    assert probe == Probe(config, "none", on_job_end=print) and len(caught) == 1
    assert dataclasses.replace(probe, lag=STEP, share=None).on_job_end is print


def test_a_killed_probe_resumes(config, candidates, tried, tmp_path, monkeypatch):
    ended, reported = [], []

    def interrupted(job, root):
        if len(ended) == 2:
            raise KeyboardInterrupt
        train_job(job, root)
        ended.append(job.directory)

    probe = Probe(config, tmp_path, share=0.5, by="loss", on_job_end=lambda job, *_: reported.append(job.directory))
    monkeypatch.setattr(running, "train_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe.run(candidates)
    assert probe.ledger == () and reported == ended
    monkeypatch.setattr(running, "train_job", train_job)
    report = probe.run(candidates)
    assert reported == [job.directory for job in probe.build_jobs(candidates)], (
        "what had finished was not trained again"
    )
    assert without_seconds(report) == without_seconds(tried.report)


def test_diverged_candidates_come_last(config, candidates, tmp_path, monkeypatch):
    schedules = [one.schedule for one in candidates]
    wild = schedules[0].sequence

    def diverging(job, root):
        if job.arm == wild:
            raise DivergedError("the loss is not finite any more")
        train_job(job, root)

    monkeypatch.setattr(running, "train_job", diverging)
    probe = Probe(config, tmp_path, share=0.5, by="loss")
    found = probe(schedules)
    assert found[-1] is schedules[0] and {one.sequence for one in found} == {one.sequence for one in schedules}
    assert probe.report.diverged == (wild,) and wild not in {one.name for one in probe.report.results}
    assert f"Diverged, and therefore not ranked: {wild}." in describe_probe(probe.report)
    assert probe.report.cost.count == 2
    with pytest.raises(RunError, match="the trials of all 3 candidates diverged; lower learning_rate"):
        Probe(with_rate(config, 1e30), tmp_path / "wild", lag=4 * STEP).run(candidates)


# ---- From a finished stage ------------------------------------------------------------------------------------------


def test_a_trial_from_a_stage_equals_the_runs_next_stage(config, finished, tmp_path):
    """With all tokens and the same seed and init, weights, AdamW's state and data continue, bit for bit."""
    files = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    start = Start(finished, 1)
    probe = Probe(config, tmp_path, share=1.0, start=start)
    inits = build_init_candidates(SCHEDULE, ["random", "preserving"], start)
    report = probe.run(inits)
    runs = {job.arm: RunDirectory(tmp_path / job.directory) for job in probe.build_jobs(inits)}
    assert runs.keys() == {"random", "preserving"}
    assert same(weights(runs["random"], 2), weights(finished, 2))
    assert not same(weights(runs["preserving"], 2), weights(finished, 2))
    assert report.cost.tokens == 2 * 4 * STEP, "what the run had trained is not paid for again"
    at_growth = {one.name: one.loss_at_growth.mean for one in report.results}
    assert at_growth["preserving"] == pytest.approx(finished.records()[1].eval_loss, abs=1e-4)
    assert {one.schedule.tokens for one in report.results} == {SCHEDULE.tokens}, "schedules are complete"
    assert files == {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}


def test_a_start_is_given_by_number_or_name(finished):
    assert Start.parse(finished.path).stage == 3
    assert Start.parse(f"{finished.path}@1") == Start.parse(f"{finished.path}@stage-1-layer") == Start(finished, 1)
    with pytest.raises(
        RunError, match="no finished stage '4'; the finished stages are stage-0-initial, stage-1-layer"
    ):
        Start.parse(f"{finished.path}@4")
    with pytest.raises(RunError, match="is not a run"):
        Start.parse(finished.path / "nothing")


def test_starts_from_different_training_have_different_trials(config, finished, tmp_path):
    probe = Probe(config, tmp_path, lag=STEP, start=Start(finished, 1))
    inits = build_init_candidates(SCHEDULE, ["random", "preserving"], Start(finished, 1))
    other = RunDirectory(tmp_path / "other")
    running.inherit(finished, other, SCHEDULE, name="other")
    places = {job.directory for job in probe.build_jobs(inits)} | {job.parent for job in probe.build_jobs(inits)}
    again = dataclasses.replace(probe, start=Start(other, 1)).build_jobs(inits)
    assert not places & ({job.directory for job in again} | {job.parent for job in again})


def test_schedules_continue_from_a_start(finished):
    start = Start(finished, 1)
    rest = GrowthSchedule(DEEP, SCHEDULE.stages[1:])
    assert continue_schedule(start, rest) == continue_schedule(start, SCHEDULE) == SCHEDULE
    with pytest.raises(RunError, match=r"does not pass through .*@stage-1-layer.*slop plan --from"):
        continue_schedule(
            start, GrowthSchedule(SMALL, (GrowthStage(("ffn",), SMALL.replace(intermediate_size=64), 9),))
        )
    with pytest.raises(RunError, match="there is nothing to try"):
        continue_schedule(Start(finished, 3), SCHEDULE)


# ---- What is tried --------------------------------------------------------------------------------------------------


def test_next_stages_grow_one_dimension_each(config):
    found = build_next_candidates(SCHEDULE, ["layer", "ffn", "hidden"])
    stages = {one.name: one.schedule.stages for one in found}
    assert stages["layer"] == (GrowthStage(("layer",), DEEP, 4 * STEP),)
    assert stages["hidden"] == (
        GrowthStage(
            ("hidden", "mha"), SMALL.replace(hidden_size=32, num_attention_heads=4, num_key_value_heads=4), 4 * STEP
        ),
    )
    trials = {one.name: Probe(config, "none", lag=5 * STEP).build_trial(one).tokens for one in found}
    assert set(trials.values()) == {(5 * STEP, 5 * STEP)}
    with pytest.raises(RunError, match="head_dim does not grow from"):
        build_next_candidates(SCHEDULE, ["layer", "head_dim"])


def test_dimensions_that_follow_hidden_get_no_stage(config):
    wide = SMALL.replace(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
    stages = GrowthStage(("hidden", "ffn", "mha"), wide, STEP), GrowthStage(("layer",), LARGE, STEP)
    schedule = GrowthSchedule(SMALL, stages, STEP)
    assert {one.name for one in plan_candidates(config, schedule, 9)} == {"hf-l", "l-hf"}
    assert build_next_candidates(schedule, ["layer", "hidden"])[1].schedule.target == wide


def test_inits_are_of_the_next_stage_alone(config):
    found = build_init_candidates(SCHEDULE, ["stack", "preserving"])
    probe = Probe(config, "none", share=0.25)
    assert [probe.build_trial(one).tokens for one in found] == [(2 * STEP, STEP)] * 2
    assert [one.schedule.stages[0].init for one in found] == ["stack", "preserving"]
    with pytest.raises(SlopError, match="unknown init 'copied' for operator 'layer'"):
        build_init_candidates(SCHEDULE, ["stack", "copied"])


def test_with_a_lag_candidates_that_grow_alike_share_a_trial(config, candidates):
    jobs = Probe(config, "none", lag=STEP, seeds=(0, 1)).build_jobs(candidates)
    assert [(job.schedule.sequence, job.seed) for job in jobs if job.arm] == [("f", 0), ("l", 0), ("f", 1), ("l", 1)]
    alike = [one for one in candidates if one.name.startswith("f")]
    with pytest.raises(RunError, match=r"all 2 candidates have the same trial; .* try every stage by a share"):
        Probe(config, "none", lag=STEP).build_jobs(alike)


def test_a_pretrained_model_is_not_trained_first(config):
    trained = dataclasses.replace(config, model={**config.model, "pretrained": "a-model"})
    found = build_schedule_candidates(
        [dataclasses.replace(one.schedule, initial_tokens=0) for one in plan_candidates(config, SCHEDULE, 6)[::3]]
    )
    jobs = Probe(trained, "none", lag=STEP).build_jobs(found)
    assert [job.schedule.tokens for job in jobs] == [(0, STEP), (0, STEP)]
    jobs = Probe(trained, "none", lag=STEP, initial_tokens=2 * STEP).build_jobs(found)
    assert [job.schedule.tokens for job in jobs] == [(2 * STEP,), (2 * STEP, STEP), (2 * STEP, STEP)]


def test_arguments_by_stage_are_those_of_the_stages_tried(config, candidates):
    rates = {**config.training, "stage_learning_rates": [4e-3, 3e-3, 2e-3, 1e-3], "growth_init": {"layer": "stack"}}
    probe = Probe(dataclasses.replace(config, training=rates), "none", lag=STEP)
    trials = [job for job in probe.build_jobs(candidates) if job.arm]
    assert [job.config.training["stage_learning_rates"] for job in trials] == [[4e-3, 3e-3]] * 2
    assert [job.schedule.stages[0].init for job in trials] == [None, {"layer": "stack"}]


# ---- What is made of it ---------------------------------------------------------------------------------------------


def result(name, loss, utility, at_growth=5.0, rank=None, start=4.0):
    spreads = {"start_loss": start, "loss": loss, "utility": utility, "seconds": 1.0, "loss_at_growth": at_growth}
    values = {key: Spread((value,)) for key, value in spreads.items()}
    return CandidateResult(name, SCHEDULE, tokens=1, flops=1.0, rank=rank, **values)


def report_of(*results, by="utility"):
    return ProbeReport.rank(
        results, by, length="a while", start="x", cost=Cost("probes", len(results), 1, 1.0, 3600.0)
    )


def test_candidates_that_have_not_improved_come_last_by_their_loss():
    """A loss that went up looks the better the more it cost: -0.2 for one FLOP is less than -0.3 for four."""
    found = report_of(result("dear", 4.3, -0.3 / 4), result("cheap", 4.2, -0.2), result("gains", 3.9, 0.1))
    assert [one.name for one in found.results] == ["gains", "cheap", "dear"]
    assert found.not_improved == ("cheap", "dear")
    assert any("not yet below" in sentence and "cheap, dear" in sentence for sentence in describe_probe(found))


def test_by_loss_the_lowest_is_best_and_by_utility_the_highest():
    results = result("low", 3.0, 0.1), result("useful", 3.5, 0.5)
    assert report_of(*results, by="loss").best.name == "low"
    assert report_of(*results, by="utility").best.name == "useful"
    hourly = [dataclasses.replace(one, utility_per_hour=Spread((place,))) for place, one in enumerate(results, 1)]
    assert report_of(*hourly, by="utility_per_hour").best.name == "useful"


def test_agreement_is_with_the_order_given_and_with_losses_at_growth():
    results = [result("a", 3.3, 0.1, at_growth=4.1, rank=1), result("b", 3.2, 0.2, at_growth=4.2, rank=2)]
    assert report_of(*results).order_agreement is None, "two are in order or are not"
    found = report_of(*results, result("c", 3.1, 0.3, at_growth=4.0, rank=3))
    assert found.order_agreement == -1.0 and found.growth_agreement == 0.5
    assert describe_probe(found)[0].endswith("-1.00 with the planner's order, 0.50 with losses right after growth.")
    unranked = report_of(*(dataclasses.replace(one, rank=None) for one in found.results))
    assert unranked.order_agreement is None and unranked.growth_agreement == 0.5
    assert len(tabulate_probe(unranked).columns) == len(tabulate_probe(found).columns) - 1


# ---- What cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lag": 0}, "lag must be a whole number, 1 or more, got 0"),
        ({"lag": 5, "share": 0.1}, "expected one of them, got lag=5 and share=0.1"),
        ({"share": 0.0}, "share must be above 0 and at most 1"),
        ({"share": 1.5}, "share must be above 0 and at most 1"),
        ({"initial_tokens": 0}, "initial_tokens must be a whole number, 1 or more"),
        ({"by": "speed"}, "by must be one of utility, utility_per_hour, loss, got 'speed'"),
        ({"seeds": (0, 0)}, "seeds must be one or more different whole numbers"),
        ({"start": "nothing-here"}, "is not a run"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, settings, message):
    with pytest.raises(RunError, match=message):
        Probe(config, "none", **settings)


def test_trials_that_cannot_begin_are_refused_before_any_training(config, candidates, finished, tmp_path):
    def refused(message, candidates=candidates, config=config, **settings):
        with pytest.raises(SlopError, match=message):
            Probe(config, tmp_path / "out", **settings).run(candidates)

    refused("two candidates or more, got 1", candidates[:1])
    refused("have the same trial; give candidates that differ", [candidates[0]] * 2)
    untrained = [dataclasses.replace(one.schedule.with_shares([8, 0, 8, 8])) for one in candidates]
    refused("stage-1-.* has no tokens to take a share of", build_schedule_candidates(untrained))
    random = [one.schedule.with_shares([0, 8, 8, 8]) for one in candidates]
    refused("give the tokens for it", build_schedule_candidates(random))
    refused("give either start or initial_tokens", start=finished.path, initial_tokens=5)
    blocks = dataclasses.replace(config, data=dataclasses.replace(config.data, block_size=64))
    refused("block_size 64 is above", config=blocks)
    unmeasured = dataclasses.replace(config, data=dataclasses.replace(config.data, held_out=0.0))
    refused("set data.held_out", config=unmeasured)
    short = [Candidate("none", GrowthSchedule(SMALL)), Candidate("layer", continue_schedule(None, SCHEDULE))]
    assert not list(tmp_path.rglob("stage-*"))
    with pytest.raises(RunError, match="nothing to try"):
        build_schedule_candidates([one.schedule for one in short])


# ---- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_file(config, tmp_path):
    path = tmp_path / "run.yaml"
    plain = {"model": config.model, "training": config.training, "schedule": yaml.safe_load(SCHEDULE.to_yaml())}
    data = {
        name: getattr(config.data, name) for name in ("source", "vocab_size", "block_size", "held_out", "cache_dir")
    }
    path.write_text(yaml.safe_dump({**plain, "data": data}))
    return path


def test_slop_probe_dry_run_shows_trials_and_trains_nothing(output_of, run_file, tmp_path):
    out = output_of("probe", run_file, "-o", tmp_path / "out", "--top-k", 3, "--dry-run")
    assert "Trials of 3 candidates" in out and "stage-2-layer" in out
    rows = json.loads(
        output_of(
            "probe", run_file, "-o", tmp_path / "out", "--next", "layer,ffn", "--lag", "128", "--dry-run", "--json"
        )
    )
    assert [(row["name"], row["tokens"]) for row in rows[1:]] == [("layer, seed 0", 128), ("ffn, seed 0", 128)]
    assert rows[0]["stages"] == ["stage-0-initial"] and rows[1]["begins_with"] == rows[2]["begins_with"]
    assert not (tmp_path / "out").exists()


def test_slop_probe_tries_inits_from_a_stage_and_writes_the_best(output_of, run_file, finished, tmp_path):
    best = tmp_path / "best.yaml"
    arguments = ["probe", run_file, "-o", tmp_path / "out", "--from", f"{finished.path}@1", "--lag", "64"]
    arguments += ["--inits", "random,preserving", "--write-schedule", best]
    out = output_of(*arguments)
    assert "Trials of 64 tokens of the next stage" in out and "The probe cost 128 tokens" in out
    report = json.loads(output_of(*arguments, "--json"))
    first = report["results"][0]
    assert first["utility"]["values"][0] >= report["results"][1]["utility"]["values"][0]
    written = GrowthSchedule.from_yaml(best)
    assert written.stages[1].init == first["name"] and written.structures == SCHEDULE.structures
    assert written.scores["probe_loss"] == first["loss"]["values"][0]


def test_slop_probe_refuses_in_one_line(error_of, run_file, tmp_path):
    out = tmp_path / "out"
    assert "give only one of --top-k, --inits and --next" in error_of(
        "probe", run_file, "-o", out, "-k", 2, "--next", "ffn"
    )
    assert "whole number of tokens" in error_of("probe", run_file, "-o", out, "--lag", "1.5")
    assert "--lag must be a whole number of tokens, 1 or more" in error_of("probe", run_file, "-o", out, "--lag", "0")
    assert "two candidates or more, got 1" in error_of("probe", run_file, "-o", out, "-k", 1)
    assert not out.exists()
