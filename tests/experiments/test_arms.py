"""From arms to jobs: the schedule of an arm, its budget, and the stages that runs share."""

from itertools import permutations
from pathlib import Path

import pytest
import yaml

from slop_hf import GrowthSchedule
from slop_hf.baselines import ARMS, ArmRequest
from slop_hf.errors import PlanError, RunError, SlopError
from slop_hf.experiments.arms import build_arm_schedule, build_planner, get_model_fields
from slop_hf.experiments.config import Experiment
from slop_hf.experiments.jobs import add_shared_prefixes, build_jobs

FLOPS, TOKENS = 3e9, 1e6
RUN = {
    "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
    "data": {"source": "python-stdlib", "vocab_size": 300, "block_size": 32},
    "training": {"learning_rate": 1e-3, "batch_tokens": [64]},
}
STRUCTURES = {"initial": "16,32,2,2", "target": "32,128,3,4", "deep": "24,48,6,3"}


@pytest.fixture
def make(tmp_path):
    """An experiment of some arms; further arguments are of its scale."""

    def read(arms, **scale):
        spend = {} if "tokens" in scale else {"flops": FLOPS}
        tiny = {"run": RUN, "structures": STRUCTURES} | spend | scale
        content = {"title": "Some", "arms": arms, "scales": {"tiny": tiny}}
        path = tmp_path / "some.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return Experiment.from_yaml(path)

    return read


@pytest.fixture
def schedule_of(make):
    """The schedule of one arm."""

    def build(arm, **scale):
        experiment = make({"one": arm}, **scale)
        return build_arm_schedule(experiment, experiment.arms["one"])

    return build


@pytest.fixture
def planned(make):
    """All that the planner answers, best first."""
    experiment = make({"slop": {"plan": "best"}})
    return build_planner(experiment, experiment.arms["slop"]).plan(10)


# ---- Ways to a schedule --------------------------------------------------------------------------------------------


def test_an_arm_takes_the_planners_answer_of_its_rank(schedule_of, planned):
    assert len(planned) == 6
    for plan, place in {"best": 0, 1: 0, 2: 1, 6: 5, "worst": -1}.items():
        assert schedule_of({"plan": plan}).structures == planned[place].structures
    with pytest.raises(PlanError, match="the planner has 6 schedules: `plan` must be at most that, got 7"):
        schedule_of({"plan": 7})


def test_an_arm_takes_the_planners_answer_of_its_order(schedule_of):
    orders = ["-".join(letters) for letters in permutations("lfh")]
    assert [schedule_of({"order": order}).sequence for order in orders] == orders
    four = schedule_of({"order": "a-f-h-l"})
    assert four.sequence == "a-f-h-l" and four.structures[1].num_attention_heads == 4


def test_dimensions_that_follow_hidden_need_no_letter_in_an_order(schedule_of):
    assert schedule_of({"order": "l-h"}).sequence == "l-hf"
    with pytest.raises(PlanError, match="no target can be reached"):
        schedule_of({"order": "l-f"})


def test_arms_choose_among_targets_and_planner_settings(schedule_of, make):
    choice = ["target", "deep"]
    experiment = make({"slop": {"plan": "best", "target": choice}})
    best = build_planner(experiment, experiment.arms["slop"]).plan(1)[0]
    assert schedule_of({"plan": "best", "target": choice}).structures == best.structures
    assert {schedule_of({"plan": rank, "target": choice}).target for rank in range(1, 13)} == {
        experiment.get_structure(name) for name in choice
    }
    assert schedule_of({"order": "f-l", "initial": "16,32,2,2", "target": "16,64,3,2"}).sequence == "f-l"
    repeated = {"mode": "repeated", "objective": "flops", "stages": 4}
    schedule = schedule_of({"plan": "best", "planner": repeated, "space": {"hidden_multiple": 8, "ffn_multiple": 16}})
    assert len(schedule.stages) == 4


def test_an_arm_may_not_grow(schedule_of, make):
    schedule = schedule_of({"plan": "best", "target": "initial"})
    assert schedule.stages == () and schedule.initial == make({"one": {"plan": 1}}).get_structure("initial")
    assert schedule.flops(get_model_fields(make({"one": {"plan": 1}}).run), 32) == pytest.approx(FLOPS, rel=1e-4)


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("scale", [{}, {"tokens": TOKENS}], ids=["flops", "tokens"])
def test_a_control_is_one_to_the_planners_best(schedule_of, make, name, scale):
    experiment = make({"one": {"control": name}}, **scale)
    fields = get_model_fields(experiment.run)
    best = schedule_of({"plan": "best"}, **scale)
    schedule = schedule_of({"control": name}, **scale)
    assert schedule == ARMS[name](ArmRequest(best, fields, 32, experiment.sizes.equal))
    assert schedule.target == best.target


def test_a_schedule_is_given_in_place_or_as_a_file(schedule_of, planned, tmp_path):
    given = planned[3].with_shares([30, 10, 20, 20])
    given.to_yaml(tmp_path / "own.yaml")
    in_place = yaml.safe_load(given.to_yaml())
    schedules = [schedule_of({"schedule": one}, tokens=TOKENS) for one in ("own.yaml", in_place)]
    assert schedules[0] == schedules[1]
    assert schedules[0].structures == given.structures
    assert schedules[0].tokens == (375_000, 125_000, 250_000, 250_000)  # its tokens are shares
    assert schedule_of({"schedule": in_place, "shares": [1, 1, 1, 1]}, tokens=TOKENS).tokens == (250_000,) * 4
    without = yaml.safe_load(planned[3].to_yaml())
    assert schedule_of({"schedule": without}, tokens=550_000).tokens == (250_000, 100_000, 100_000, 100_000)


# ---- What it spends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", [{"plan": 2}, {"order": "h-f-l"}, *({"control": name} for name in ARMS)], ids=str)
def test_arms_spend_alike(make, arm):
    for scale, spend in (({}, FLOPS), ({"tokens": TOKENS}, TOKENS)):
        experiment = make({"one": {**arm, "budgets": [0.25, 1.0]}}, **scale)
        for run in build_jobs(experiment):
            spent = run.flops if experiment.sizes.equal == "flops" else sum(run.schedule.tokens)
            assert spent == pytest.approx(spend * run.budget, rel=2e-3)


def test_tokens_are_split_by_the_papers_shares_or_the_arms(schedule_of):
    def shares(**arm):
        tokens = schedule_of({"plan": "best", **arm}).tokens
        return pytest.approx([count / tokens[-1] for count in tokens], rel=0.02)

    assert shares() == [2.5, 1, 1, 1]
    assert shares(shares=[8, 2, 4, 2]) == [4, 1, 2, 1]
    assert shares(shares=[1, 0, 0, 1]) == [1, 0, 0, 1]


def test_utility_shares_are_the_planners(make):
    for target in ("target", ["target", "deep"]):
        arm = {"plan": "worst", "target": target}
        experiment = make({"slop": arm, "shared": arm | {"shares": "utility"}}, tokens=1e9)
        planner = build_planner(experiment, experiment.arms["slop"])
        paper, by_utility = (build_arm_schedule(experiment, arm) for arm in experiment.arms.values())
        best = {one.structures: one.tokens for one in planner.plan(20, tokens=sum(paper.tokens), sharing="utility")}
        assert by_utility.structures == paper.structures and by_utility.tokens != paper.tokens
        assert by_utility.tokens == pytest.approx(best[by_utility.structures], abs=1)


def test_a_vocabulary_is_that_of_the_tokenizer(make, monkeypatch):
    monkeypatch.setattr("slop_hf.training.config.load_tokenizer", lambda name: range(777))
    experiment = make({"slop": {"plan": "best"}}, run=RUN | {"data": {**RUN["data"], "tokenizer": "a/tokenizer"}})
    assert get_model_fields(experiment.run)["vocab_size"] == 777
    assert get_model_fields(make({"slop": {"plan": "best"}}).run)["vocab_size"] == 300


@pytest.mark.parametrize(
    ("arm", "error", "message"),
    [
        (
            {"plan": "best", "shares": [1, 1]},
            RunError,
            r"arm one: 2 shares for 4 stages \(l-f-h\): give one per stage",
        ),
        ({"plan": "best", "target": "goal"}, RunError, "arm one: some: scale tiny has no structure 'goal'"),
        (
            {"plan": "best", "planner": {"objectiv": "flops"}},
            PlanError,
            "arm one: .*did you mean 'objective'",
        ),
        ({"plan": "best", "space": {"wide": 1}}, PlanError, "arm one: unknown key 'space.wide'"),
        ({"plan": "best", "planner": {"objective": "speed"}}, PlanError, "unknown objective 'speed'"),
        (
            {"plan": "worst", "planner": {"mode": "joint", "stages": 3}},
            PlanError,
            "need the planner's mode 'once', not 'joint'",
        ),
        ({"order": "l-l-h"}, PlanError, "operators must be one or more different names"),
        ({"schedule": "none.yaml"}, SlopError, r"arm one: .*none\.yaml"),
    ],
)
def test_arms_without_a_schedule_are_named_in_the_error(make, arm, error, message):
    with pytest.raises(error, match=message):
        build_jobs(make({"one": arm}))


def test_utility_shares_of_a_given_schedule_are_refused(make, planned):
    given = yaml.safe_load(planned[0].to_yaml())
    with pytest.raises(RunError, match="shares 'utility' are the planner's"):
        build_jobs(make({"one": {"schedule": given, "shares": "utility"}}))


def test_runs_may_begin_with_a_pretrained_model(make):
    """It is not loaded to count FLOPs, and needs no trained stage of its own."""
    model = {"pretrained": "some/model", "model_type": "llama", "vocab_size": 300}
    arms = {"not grown": {"chain": ["initial"]}, "grown": {"chain": ["initial", "target"], "shares": [0, 1]}}
    plain, grown = add_shared_prefixes(build_jobs(make(arms, model=model)))
    assert plain.schedule.tokens[0] > 0 and grown.schedule.tokens[0] == 0
    assert plain.config.model == grown.config.model == {**RUN["model"], **model}
    with pytest.raises(RunError, match="pretrained needs model_type, vocab_size next to it"):
        build_jobs(make(arms, model={"pretrained": "some/model"}))
    with pytest.raises(RunError, match="experiments do not give their model experts: grow it first"):
        build_jobs(make(arms, model={**model, "experts": {"num_experts": 4}}))
    with pytest.raises(
        RunError, match=r"arm one: control from_scratch begins with random weights, .*leave the arm out"
    ):
        build_jobs(make({"one": {"control": "from_scratch"}}, model=model))


# ---- Runs ----------------------------------------------------------------------------------------------------------


def test_a_run_for_each_arm_budget_and_seed(make):
    arms = {"slop": {"plan": "best", "budgets": [0.5, 1.0]}, "again": {"plan": "best", "seeds": [7]}}
    runs = build_jobs(make(arms, seeds=[0, 2]))
    assert [(run.arm, run.budget, run.seed) for run in runs] == [
        *(("slop", budget, seed) for budget in (0.5, 1.0) for seed in (0, 2)),
        ("again", 1.0, 7),
    ]
    assert len({run.directory for run in runs}) == len(runs)
    assert runs[1].directory == Path("runs", "slop", "x0.5", "seed-2")
    assert [run.name for run in runs[1:3]] == ["slop ×0.5, seed 2", "slop, seed 0"]
    seeds = [[run.config.training[name] for name in ("seed", "data_seed", "growth_seed")] for run in runs]
    assert seeds[0] == [0, 0, 0] and seeds[1] == [2, 2, 2000] and seeds[-1] == [7, 7, 7000]


def test_an_arms_training_is_the_experiments_with_its_changes(make):
    arms = {
        "slop": {"plan": "best"},
        "fast": {"plan": "best", "training": {"learning_rate": 2e-3, "growth_init": {"layer": "preserving"}}},
    }
    slop, fast = build_jobs(make(arms))
    assert slop.config.training == {**RUN["training"], "seed": 0, "data_seed": 0, "growth_seed": 0}
    assert fast.config.training == {**slop.config.training, "learning_rate": 2e-3}
    assert [stage.init for stage in slop.schedule] == [None] * 3
    assert [stage.init for stage in fast.schedule] == [{"layer": "preserving"}, None, None]
    assert slop.config.data == fast.config.data and slop.config.model == fast.config.model


# ---- What runs have in common --------------------------------------------------------------------------------------


def slop(**training):
    """An arm of the planner's best, l-f-h."""
    return {"plan": "best", "training": training}


def inits(**operators):
    return slop(growth_init=operators)


@pytest.fixture
def shared(make):
    """Number of stages that each run or prefix inherits, by name."""

    def count_inherited(arms, **scale):
        jobs = add_shared_prefixes(build_jobs(make(arms, **scale)))
        by_directory = {job.directory: job for job in jobs}
        assert len(by_directory) == len(jobs)
        seen = set()
        for job in jobs:
            assert job.parent is None or job.parent in seen  # prefixes come before the runs that begin with them
            seen.add(job.directory)
            if job.parent is not None:
                begins_with(job, by_directory[job.parent])
        length = {job.directory: len(job.schedule.structures) for job in jobs}
        return {
            job.arm or f"prefix of {length[job.directory]}": length[job.parent] if job.parent else 0 for job in jobs
        }

    return count_inherited


def begins_with(run, prefix):
    """A prefix has the first stages of a run."""
    schedule = run.schedule
    first = schedule.stages[: len(prefix.schedule.stages)]
    assert prefix.arm == "" and prefix.seed == run.seed
    assert prefix.schedule == GrowthSchedule(schedule.initial, first, schedule.initial_tokens)
    assert (prefix.config.model, prefix.config.data) == (run.config.model, run.config.data)
    assert prefix.config.training["learning_rate"] == run.config.training["learning_rate"]


def test_studies_of_an_init_share_the_stages_before_it(shared):
    arms = {"paper": slop(), "layer": inits(layer="preserving"), "hidden": inits(hidden="copy", mha="copy")}
    assert shared(arms) == {"prefix of 1": 0, "prefix of 3": 1, "paper": 3, "layer": 1, "hidden": 3}


def test_the_longest_beginning_is_taken(shared):
    """All share two stages, and no prefix is made of the first alone."""
    arms = {"paper": slop(), "ffn": inits(ffn="preserving"), "copies": inits(ffn="copy")}
    assert shared(arms) == {"prefix of 2": 0, "paper": 2, "ffn": 2, "copies": 2}


def test_shared_prefixes_may_begin_with_shared_prefixes(shared):
    arms = {
        "paper": slop(),
        "hidden": inits(hidden="preserving"),
        "ffn": inits(ffn="preserving"),
        "layer": inits(layer="preserving"),
    }
    inherited = shared(arms)
    assert inherited == {
        "prefix of 1": 0,
        "prefix of 2": 1,
        "prefix of 3": 2,
        "paper": 3,
        "hidden": 3,
        "ffn": 2,
        "layer": 1,
    }


def test_arguments_of_growth_do_not_keep_runs_from_sharing_the_initial_model(shared):
    arms = {"paper": slop(), "dropped": slop(carry_optimizer_state=False), "warm": slop(rewarm_steps=0)}
    assert shared(arms) == {"prefix of 1": 0, "paper": 1, "dropped": 1, "warm": 1}


def test_rates_of_later_stages_do_not_part_earlier_ones(make, shared):
    arms = {
        "paper": slop(stage_learning_rates=[1e-3, 1e-3, 1e-3, 1e-3]),
        "last": slop(stage_learning_rates=[1e-3, 1e-3, 1e-3, 5e-4]),
        "later": slop(stage_learning_rates=[1e-3, 5e-4, 5e-4, 5e-4]),
    }
    assert shared(arms) == {"prefix of 1": 0, "prefix of 3": 1, "paper": 3, "last": 3, "later": 1}
    prefixes = [job for job in add_shared_prefixes(build_jobs(make(arms))) if not job.arm]
    assert [job.config.training["stage_learning_rates"] for job in prefixes] == [[1e-3], [1e-3, 1e-3, 1e-3]]
    assert all(job.config.training["batch_tokens"] == [64] for job in prefixes)


def test_a_rate_that_spans_the_run_shares_steps_not_stages(make, shared):
    arms = {"paper": slop(), "one": slop(lr_span="run"), "other": slop(lr_span="run", growth_noise=0.0)}
    trunk, *runs = add_shared_prefixes(build_jobs(make(arms)))
    assert [job.first_step for job in runs] == [0, trunk.end_step, trunk.end_step]
    assert [job.parent for job in runs] == [None, trunk.directory, trunk.directory]
    assert trunk.end_step == runs[1].preview[0][0].end_step, "growth_noise has no effect before the first growth"


def test_nothing_is_shared_between_other_rates_tokens_and_seeds(shared, make):
    alone = {"paper": slop(), "fast": slop(learning_rate=2e-3), "scratch": {"control": "from_scratch"}}
    assert shared(alone) == {"paper": 0, "fast": 0, "scratch": 0}
    assert shared({"paper": slop(), "early": {"plan": "best", "shares": [1, 1, 1, 4]}}) == {"paper": 0, "early": 0}
    assert (
        len(add_shared_prefixes(build_jobs(make({"one": {"plan": "best", "budgets": [0.5, 1]}}, seeds=[0, 1])))) == 4
    )
    jobs = add_shared_prefixes(build_jobs(make({"paper": slop(), "init": inits(layer="preserving")}, seeds=[0, 1])))
    assert [(job.arm, job.seed) for job in jobs if not job.arm] == [("", 0), ("", 1)]


def test_orders_share_at_equal_tokens(shared):
    """At equal FLOPs each order has tokens of its own."""
    arms = {order: {"order": order} for order in ("l-f-h", "l-h-f", "f-h-l")}
    assert shared(arms, tokens=TOKENS) == {"prefix of 1": 0, "prefix of 2": 1, "l-f-h": 2, "l-h-f": 2, "f-h-l": 1}
    assert set(shared(arms).values()) == {0}
