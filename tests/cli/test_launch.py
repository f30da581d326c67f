"""`slop launch` and `python -m slop_hf.launch`: accelerate's command line, from anywhere."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from slop_hf import RunDirectory, launch
from slop_hf.cli import launch as command
from slop_hf.cli.recipe_files import find_recipes, list_launch_configs

CONFIGS = {config.name: config.path for config in list_launch_configs()}


@pytest.fixture
def launched(monkeypatch, slop):
    """Run `slop launch`; return the words that accelerate gets."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())

    def run(*arguments):
        calls = []
        monkeypatch.setattr(os, "execv", lambda program, words: calls.append((program, words)))
        code, _, err = slop("launch", *arguments)
        assert code == 0, err
        [(program, words)] = calls
        assert program == sys.executable and words[:3] == [program, "-m", "accelerate.commands.launch"]
        return words[3:]

    return run


def test_the_names_of_the_configurations():
    assert {"one-gpu", "zero3-8gpu", "zero3-multi-node", "zero3-cpu"} <= CONFIGS.keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_a_configuration_from_anywhere(launched, config, monkeypatch, tmp_path, name):
    """Its own parser gets the file of DeepSpeed, which the working directory does not have."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    words = launched(config, "--config", name, "--machine-rank", 0, "--main-process-ip", "10.0.0.1", "--resume")
    parser = launch_command_parser()
    arguments = parser.parse_args(words)
    arguments, _, _ = _validate_launch_command(arguments)
    assert (arguments.module, arguments.training_script) == (True, "slop_hf.launch")
    assert arguments.training_script_args == [str(config), "--output-dir", "runs/run", "--resume"]
    content = yaml.safe_load(CONFIGS[name].read_text())
    assert arguments.num_processes == content["num_processes"]
    named = content.get("deepspeed_config", {}).get("deepspeed_config_file")
    if named is not None:
        path = Path(arguments.deepspeed_config_file)
        assert path.is_absolute() and path == find_recipes() / Path(named).relative_to("recipes") and path.is_file()


def test_options_reach_the_run(launched, config):
    words = launched(config, "-o", "runs/a b", "--from-scratch", "--set", "data.seed=1", "--num-processes", 2)
    end = ["-m", "slop_hf.launch", str(config), "--output-dir", "runs/a b", "--from-scratch", "--set", "data.seed=1"]
    assert words == ["--num_processes", "2", *end]
    options = launch.build_parser().parse_args(end[2:])
    assert (options.config, options.output_dir, options.set) == (config, Path("runs/a b"), ["data.seed=1"])


def test_a_dry_run_prints_the_command(output_of, config):
    words = shlex.split(output_of("launch", config, "--dry-run", "--config", "one-gpu"))
    assert words[:4] == ["accelerate", "launch", "--config_file", str(CONFIGS["one-gpu"])]


def test_a_configuration_of_your_own(launched, config, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(CONFIGS["zero3-8gpu"].read_text())
    assert launched(config, "--config", own)[:2] == ["--config_file", str(own)]
    assert "--deepspeed_config_file" not in launched(config, "--config", own)


def test_wrong_launches_are_refused(error_of, config, monkeypatch):
    assert "did you mean 'zero3-8gpu'" in error_of("launch", config, "--config", "zero3-8gp")
    assert "no such file" in error_of("launch", "missing.yaml")
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'slop-hf[deepspeed]'" in error_of("launch", config, "--config", "zero3-8gpu")


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.parametrize("name", ["zero3-cpu", "fsdp2-cpu"])
def test_two_ranks_train_from_any_directory(config, tmp_path, name):
    """The files of accelerate and DeepSpeed are found, although the working directory has no recipes."""
    if name.startswith("zero3"):
        pytest.importorskip("deepspeed")
    run = [sys.executable, "-m", "slop_hf", "launch", config, "-o", "run", "--config", name, "--set"]
    done = subprocess.run([*run, "training.use_cpu=false"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 stages" in done.stdout and {record.devices for record in RunDirectory(tmp_path / "run").records()} == {2}


def test_the_module_trains(monkeypatch, capfd, config, tmp_path):
    monkeypatch.setattr(sys, "argv", ["launch", str(config), "--output-dir", str(tmp_path / "run"), "--json"])
    launch.launch_run()
    out, err = capfd.readouterr()
    assert [record["name"] for record in json.loads(out)] == ["stage-0-initial", "stage-1-layer", "stage-2-ffn"], err


def test_the_module_refuses_in_one_line(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["launch"])
    with pytest.raises(SystemExit):
        launch.launch_run()
    err = capfd.readouterr().err
    assert err.startswith("error: ") and "config" in err and len(err.splitlines()) == 1
