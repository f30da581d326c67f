"""One run at a constant rate gives a family of finished models."""

import subprocess
import sys

import pytest
from launching import environment
from run_files import write_run_file
from safetensors.torch import load_file

from slop_hf import RunConfig, RunDirectory
from slop_hf.errors import RunError
from slop_hf.pipeline import train_run
from slop_hf.runs.directory import RunFacts
from slop_hf.training.decay import plan_decay

STAGE = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
SCHEDULE = {
    "initial": {**STAGE, "num_hidden_layers": 1},
    "initial_tokens": 512,
    "stages": [{"operators": ["layer"], "tokens": 1536, "dims": {**STAGE, "num_hidden_layers": 2}}],
}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory):
    """The file of a run of 8 and 24 steps at a constant rate, and its directory, with all checkpoints."""
    home = tmp_path_factory.mktemp("trunk")
    training = {
        "per_device_train_batch_size": 2,
        "lr_span": "run",
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "save_steps": 6,
        "keep_checkpoints": True,
    }
    write_run_file(home, SCHEDULE, training, texts=40, held_out=0.2).rename(home / "trunk.yaml")
    train_run(RunConfig.from_yaml(home / "trunk.yaml"), home / "trunk")
    return home


def read_weights(run):
    return load_file(run.stage_dir(len(run.schedule.stages)) / "model.safetensors")


def same_weights(one, other):
    one, other = read_weights(one), read_weights(other)
    return one.keys() == other.keys() and all(bool((one[name] == other[name]).all()) for name in one)


@pytest.mark.parametrize(("step", "stages", "end"), [(6, 1, 8), (18, 2, 23)])
def test_a_decay_from_a_checkpoint_equals_a_run_with_that_schedule(trunk, slop, tmp_path, step, stages, end):
    before = read_weights(RunDirectory(trunk / "trunk"))
    code, _, err = slop("train", trunk / "trunk.yaml", "-o", trunk / "trunk", "--decay-from", str(step))
    assert code == 0, err
    run = RunDirectory(trunk / f"trunk-decay-{step}")
    assert run.is_finished and len(run.schedule.structures) == stages
    config = plan_decay(RunConfig.from_yaml(trunk / "trunk.yaml"), RunDirectory(trunk / "trunk"), step)
    assert same_weights(run, train_run(config, tmp_path / "alone"))
    last = run.history()[-1]
    assert last["step"] == end and last["tokens"] == end * 64
    after = read_weights(RunDirectory(trunk / "trunk"))
    assert all(bool((before[name] == after[name]).all()) for name in before), "the trunk stays as it is"


def test_a_decay_does_not_begin_twice(trunk, slop):
    command = ["train", trunk / "trunk.yaml", "-o", trunk / "trunk", "--decay-from", "12", "--decay-steps", "1"]
    run = RunDirectory(trunk / "trunk-decay-12")
    assert slop(*command, "--dry-run")[0] == 0 and not run.path.exists()
    run.path.mkdir()
    assert slop(*command)[0] == 2 and not run.exists
    run.path.rmdir()
    assert slop(*command)[0] == 0 and run.history()[-1]["step"] == 13
    code, _, err = slop(*command)
    assert code == 2 and "holds another run; resume it with --resume" in err
    assert slop(*command, "--resume")[0] == 0


@pytest.mark.parametrize(("step", "decay", "steps"), [(18, 0.2, 23), (24, 0.2, 30), (18, 0.5, 36), (18, 4, 22)])
def test_the_length_of_a_decay_is_a_number_of_steps_or_a_share_of_the_run(trunk, step, decay, steps):
    config = RunConfig.from_yaml(trunk / "trunk.yaml", {"training.per_device_train_batch_size": 1})
    schedule = plan_decay(config, RunDirectory(trunk / "trunk"), step, decay).read_schedule()
    assert sum(schedule.tokens) == steps * 64, "the trunk's tokens per step count, not those of these settings"


@pytest.mark.slow
def test_one_of_several_ranks_begins_a_decay(trunk):
    command = ["train", str(trunk / "trunk.yaml"), "-o", str(trunk / "trunk"), "--decay-from", "24"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "slop_hf"]
    pipes = {"capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, *launcher, *command], env=environment(), timeout=300, **pipes)
    assert done.returncode == 0, done.stderr
    run = RunDirectory(trunk / "trunk-decay-24")
    assert run.is_finished and run.history()[-1]["step"] == 30
    assert RunFacts.load(run).blocks_per_step == RunFacts.load(RunDirectory(trunk / "trunk")).blocks_per_step


def test_a_decay_needs_a_checkpoint_at_a_constant_rate(trunk):
    config, run = RunConfig.from_yaml(trunk / "trunk.yaml"), RunDirectory(trunk / "trunk")
    with pytest.raises(
        RunError, match=r"no checkpoint of step 7: it has those of steps 6, 12, 18, 24, 30; a trunk keeps"
    ):
        plan_decay(config, run, 7)
    with pytest.raises(RunError, match="must have a positive number of steps"):
        plan_decay(config, run, 6, 0.0)
    cosine = RunConfig.from_yaml(trunk / "trunk.yaml", {"training.lr_scheduler_type": "cosine"})
    with pytest.raises(
        RunError, match=r"learning rate at step 18 is .*, below its peak .*: a decay begins at the peak"
    ):
        plan_decay(cosine, run, 18)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decay-steps", "3"], "--decay-steps is for --decay-from"),
        (["--decay-from", "6", "--from-scratch"], "leave --from, --from-scratch, --schedule out"),
    ],
)
def test_options_of_a_decay_that_do_not_fit_are_refused(trunk, slop, options, message):
    code, _, err = slop("train", trunk / "trunk.yaml", "-o", trunk / "trunk", *options)
    assert code == 2 and message in " ".join(err.split())
