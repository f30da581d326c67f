"""The YAML of an experiment: what it takes, and what it refuses."""

import pytest
import yaml

from slop_hf.dims import ModelDims
from slop_hf.errors import DimsError, RunError
from slop_hf.experiments.config import ArmConfig, Experiment, ScaleConfig

RUN = {"data": {"source": "python-stdlib", "vocab_size": 300, "block_size": 32}, "training": {"learning_rate": 1e-3}}
SCALE = {"run": RUN, "structures": {"initial": "16,32,2,2", "target": "32,64,3,4"}, "flops": 1e9}


@pytest.fixture
def read(tmp_path):
    """Write an experiment of parts and read it."""

    def make(*, scale=None, overrides=None, **content):
        path = tmp_path / "some.yaml"
        whole = {"title": "Some", "arms": {"slop": {"plan": "best"}}, "scales": {"tiny": SCALE}} | content
        path.write_text(yaml.safe_dump(whole, sort_keys=False))
        return Experiment.from_yaml(path, scale, overrides)

    return make


def test_an_experiment_is_read_from_its_file(read):
    arms = {"slop": {"plan": "best", "seeds": [4]}, "scratch": {"control": "from_scratch", "budgets": [0.5, 1]}}
    experiment = read(arms=arms, about="Why", printed={"slop": {"perplexity": 30.61}})
    assert (experiment.name, experiment.scale, experiment.title, experiment.about) == ("some", "tiny", "Some", "Why")
    assert experiment.arms == {
        "slop": ArmConfig(plan="best", seeds=(4,)),
        "scratch": ArmConfig(control="from_scratch", budgets=(0.5, 1.0)),
    }
    assert (experiment.sizes.equal, experiment.sizes.budget, experiment.sizes.seeds) == ("flops", 1e9, (0,))
    assert experiment.run.data.vocab_size == 300 and experiment.run.training == {"learning_rate": 1e-3}
    assert experiment.printed == {"slop": {"perplexity": 30.61}}


def test_structures_have_names_or_are_spelled_out(read):
    experiment = read()
    assert experiment.get_structure("target") == ModelDims(32, 64, 3, 4)
    assert experiment.get_structure("32,64,3,2,1,32") == ModelDims(32, 64, 3, 2, 1, 32)
    with pytest.raises(RunError, match=r"scale tiny has no structure 'targte' \(known: initial, target\)"):
        experiment.get_structure("targte")
    with pytest.raises(DimsError, match="cannot read dims '32,64'"):
        experiment.get_structure("32,64")
    with pytest.warns(DeprecationWarning, match="Experiment.structure is now Experiment.get_structure"):
        assert experiment.structure("target") == experiment.get_structure("target")


def test_the_reference_is_the_first_from_scratch_or_the_one_named(read):
    scratch = {"control": "from_scratch"}
    arms = {"slop": {"plan": "best"}, "one": scratch, "other": scratch}
    assert read().reference is None
    assert read(arms=arms).reference == "one"
    assert read(arms=arms, reference="slop").reference == "slop"
    assert read(arms=arms, scales={"tiny": SCALE | {"arms": ["slop", "other"]}}).reference == "other"
    assert read(arms=arms, reference="one", scales={"tiny": SCALE | {"arms": ["slop"]}}).reference is None


def test_a_scale_must_be_chosen_if_there_are_several(read):
    scales = {"tiny": SCALE, "large": SCALE | {"flops": 2e9}}
    assert read(scales=scales, scale="large").sizes.flops == 2e9
    with pytest.raises(RunError, match=r"some\.yaml: choose a scale of tiny, large$"):
        read(scales=scales)
    with pytest.raises(RunError, match="choose a scale of tiny, large, not 'tyni'"):
        read(scales=scales, scale="tyni")


def test_a_scale_leaves_out_arms_and_has_its_own_budgets(read):
    scratch = {"control": "from_scratch", "budgets": [0.25, 1]}
    arms = {"slop": {"plan": "best", "budgets": [0.5, 1]}, "scratch": scratch}
    scales = {"all": SCALE, "few": SCALE | {"arms": ["scratch"]}, "once": SCALE | {"budgets": {"scratch": [1]}}}

    def budgets(scale):
        return {name: arm.budgets for name, arm in read(arms=arms, scales=scales, scale=scale).arms.items()}

    assert budgets("all") == {"slop": (0.5, 1.0), "scratch": (0.25, 1.0)}
    assert budgets("few") == {"scratch": (0.25, 1.0)}
    assert budgets("once") == {"slop": (0.5, 1.0), "scratch": (1.0,)}
    with pytest.raises(RunError, match="there is no arm 'scrap'; the arms are slop, scratch"):
        read(arms=arms, scales={"once": SCALE | {"budgets": {"scrap": [1]}}})
    with pytest.raises(RunError, match="budgets must be different positive multiples"):
        read(arms=arms, scales={"once": SCALE | {"budgets": {"scratch": [0]}}})


def test_a_run_may_be_a_file_and_be_changed_in_places(read, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "common.yaml").write_text(yaml.safe_dump(RUN))
    changes = {"model": {"model_type": "gpt_neox"}, "training": {"warmup_steps": 5, "logging_steps": 3}}
    for run in ("runs/common.yaml", RUN):
        scales = {"tiny": SCALE | {"run": run} | changes}
        overrides = {"run.data.vocab_size": 500, "run.training.logging_steps": 4, "scales.tiny.flops": 2e9}
        experiment = read(scales=scales, overrides=overrides)
        assert experiment.run.model == {"model_type": "gpt_neox"}
        assert experiment.run.training == {"learning_rate": 1e-3, "warmup_steps": 5, "logging_steps": 4}
        assert (experiment.run.data.vocab_size, experiment.run.data.block_size) == (500, 32)
        assert experiment.sizes.budget == 2e9
    with pytest.raises(RunError, match=r"common\.yaml: unknown key 'data\.vocab'"):
        read(scales={"tiny": SCALE | {"run": "runs/common.yaml"}}, overrides={"run.data.vocab": 1})


def test_the_path_of_a_schedule_is_relative_to_the_experiment(read, tmp_path):
    assert read(arms={"own": {"schedule": "own.yaml"}}).arms["own"].schedule == str(tmp_path / "own.yaml")


def test_overrides_reach_arms_and_scales(read):
    experiment = read(overrides={"scales.tiny.seeds": [1, 2], "arms.slop.training": {"learning_rate": 2e-3}})
    assert experiment.sizes.seeds == (1, 2) and experiment.arms["slop"].training == {"learning_rate": 2e-3}
    with pytest.raises(RunError, match=r"cannot set title\.x: title is not a section of .*some\.yaml"):
        read(overrides={"title.x": 1})
    with pytest.raises(RunError, match=r"arms\.slop\.sharse"):
        read(overrides={"arms.slop.sharse": [1]})


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({}, "an arm needs one of plan, order, control, schedule, chain, got none"),
        ({"plan": "best", "order": "l-f-h"}, "an arm needs one of .*, got plan, order"),
        ({"control": "from_scrap"}, "unknown control arm 'from_scrap'; did you mean 'from_scratch'"),
        ({"plan": "good"}, "plan must be a rank from 1, 'best' or 'worst', got 'good'"),
        ({"plan": 0}, "plan must be a rank from 1"),
        ({"plan": True}, "plan must be a rank from 1"),
        ({"order": "l-x-h"}, "order must be letters of a, d, f, h, l such as l-f-h, got 'l-x-h'"),
        ({"order": "lfh"}, "order must be letters"),
        ({"plan": "best", "budgets": (0.0,)}, r"budgets must be different positive multiples, got \[0.0\]"),
        ({"plan": "best", "budgets": (1.0, 1.0)}, "budgets must be different"),
        ({"plan": "best", "budgets": ()}, "budgets must be different"),
        ({"plan": "best", "shares": (0.0, 0.0)}, "shares must be 0 or more, and not all of them 0"),
        ({"plan": "best", "shares": (2.0, -1.0)}, "shares must be 0 or more"),
        ({"plan": "best", "shares": ()}, "shares must be 0 or more"),
        ({"plan": "best", "training": {"seed": 3}}, "training sets seed, which follow"),
    ],
)
def test_arms_that_mean_nothing_are_refused(arm, message):
    with pytest.raises(RunError, match=message):
        ArmConfig(**arm)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 1e6}, "a scale needs either flops or tokens"),
        ({"flops": None}, "a scale needs either flops or tokens"),
        ({"flops": 0.0}, "a budget must be positive and finite, got flops 0"),
        ({"flops": -1.0}, "a budget must be positive"),
        ({"seeds": ()}, "seeds must be one or more different whole numbers"),
        ({"seeds": (1, 1)}, "seeds must be one or more different whole numbers"),
    ],
)
def test_scales_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(RunError, match=message):
        ScaleConfig(**SCALE | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"reference": "scratch"}, "there is no arm 'scratch'; the arms are slop"),
        ({"printed": {"msg": {"hours": 1.0}}}, "there is no arm 'msg'"),
        ({"scales": {"tiny": SCALE | {"arms": ["msg"]}}}, "there is no arm 'msg'"),
        ({"arms": {"a/b": {"plan": "best"}}}, "'a/b' cannot name an arm"),
        ({"arms": {".": {"plan": "best"}}}, "cannot name an arm"),
        ({"scales": {"tiny": SCALE | {"flop": 1}}}, r"some\.yaml: unknown key 'scales\.tiny\.flop'"),
        ({"scales": {"tiny": SCALE | {"run": "missing.yaml"}}}, r"missing\.yaml"),
    ],
)
def test_experiments_that_mean_nothing_are_refused(read, content, message):
    with pytest.raises(RunError, match=message):
        read(**content)


def test_a_file_without_keys_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(RunError, match=r"list\.yaml: expected a mapping with the keys title, arms and scales"):
        Experiment.from_yaml(tmp_path / "list.yaml")
