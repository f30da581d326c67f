"""The reference pages cover every YAML key, training argument, command and public name."""

import dataclasses
import doctest
import importlib.util
import re
import typing
from pathlib import Path

import pytest

import slop_hf
from slop_hf import RunConfig, SlopTrainingArguments
from slop_hf.cli import _build_command
from slop_hf.experiments.config import ExperimentConfig
from slop_hf.training.config import ExpertOptions

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
make_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_reference)
FILES = {**make_reference.RUN_FILE, **make_reference.EXPERIMENT_FILE}


def find_records(kind):
    """Return a dataclass, and those in the types of its fields, at any depth."""
    if dataclasses.is_dataclass(kind):
        return {kind}.union(*map(find_records, typing.get_type_hints(kind).values()))
    return set().union(*map(find_records, typing.get_args(kind)))


@pytest.mark.parametrize("kind", [*FILES.values(), SlopTrainingArguments], ids=lambda kind: kind.__name__)
def test_every_key_has_a_type_a_default_and_a_description(kind):
    keys = make_reference.list_keys(kind)
    assert [key.name for key in keys] == [field.name for field in dataclasses.fields(kind)]
    assert all(all(key) for key in keys), [key for key in keys if not all(key)]


def test_a_key_without_a_description_would_be_found():
    @dataclasses.dataclass
    class Point:
        """A point.

        Args:
            x: distance to the right,
                in metres.
        """

        x: float
        y: tuple[int, ...] = (1, 2)

    x, y = make_reference.list_keys(Point)
    assert x == ("x", "float", "required", "distance to the right, in metres.")
    assert y == ("y", "tuple[int, ...]", "default `[1, 2]`", "")


def test_every_section_of_a_file_is_described():
    in_a_mapping = {ExpertOptions}  # `model` holds the fields of any family's config too
    assert find_records(RunConfig) | find_records(ExperimentConfig) | in_a_mapping == set(FILES.values())


def test_every_training_argument_is_listed_once():
    listed = re.findall(r"^`(\w+)` \(", make_reference.write_arguments(), re.MULTILINE)
    assert sorted([*listed, "output_dir"]) == sorted(field.name for field in dataclasses.fields(SlopTrainingArguments))


def test_every_command_is_described_with_its_options():
    command, name = _build_command(), "slop"
    parts = re.split(r"^#+ `(.+)`$", make_reference.write_commands(), flags=re.MULTILINE)
    sections = dict(zip([name, *parts[1::2]], parts[::2], strict=True))
    rest = [(name, command)]
    while rest:
        name, command = rest.pop()
        rest += [(f"{name} {word}", part) for word, part in getattr(command, "commands", {}).items()]
        for option in (option for parameter in command.params for option in parameter.opts if option[0] == "-"):
            assert re.search(rf"^\* `[^`]*(?<![\w-]){option}(?![\w-])", sections[name], re.MULTILINE), (name, option)


def test_every_public_name_is_listed_and_described():
    listed = re.findall(r"^\.\. auto\w+:: slop_hf\.(\w+)", make_reference.write_api(), re.MULTILINE)
    assert sorted(listed) == sorted(slop_hf.__all__)
    assert all(getattr(slop_hf, name).__doc__ for name in listed)


def test_every_text_is_on_one_page():
    pages = [path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md")]
    markers = [marker for page in pages for marker in re.findall(r"<!-- reference: (\w+) -->", page)]
    assert sorted(markers) == sorted(make_reference.TEXTS)


def test_examples_of_the_script():
    failed, attempted = doctest.testmod(make_reference)
    assert attempted and not failed
