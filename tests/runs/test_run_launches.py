"""The launches of a run: when, by which commands, on which data."""

import re

import pytest

from slop_hf.runs.directory import RunDirectory
from slop_hf.runs.launches import RunLaunches, describe_command


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/opt/x/bin/slop", "train", "run.yaml", "-o", "a b"], "slop train run.yaml -o 'a b'"),
        (["/x/slop_hf/__main__.py", "train", "run.yaml"], "slop train run.yaml"),
        (["/x/slop_hf/launch.py", "run.yaml"], "python -m slop_hf.launch run.yaml"),
        (["train.py"], "train.py"),
        (["slop", "--set", "training.hub_token=hf_abc"], "slop --set training.hub_token=..."),
        (["slop", "--set", "data.source=https://me:secret@host/a?key=b"], "slop --set data.source=https://host/a"),
    ],
)
def test_commands_are_shown_as_typed_and_without_secrets(arguments, command):
    assert describe_command(arguments) == command


def test_launches_are_kept_in_order(tmp_path):
    run = RunDirectory(tmp_path)
    assert RunLaunches.load(run) is None
    RunLaunches().add(["slop", "train", "run.yaml"], ["texts/"]).save(run)
    RunLaunches.load(run).add(["slop", "train", "run.yaml", "--resume"], ["texts/"]).save(run)
    first, second = RunLaunches.load(run).launches
    assert first.data == ("texts/",) and second.command.endswith("--resume")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", first.time)
