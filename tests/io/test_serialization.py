"""Files that people write, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from slop_hf.errors import RunError
from slop_hf.io.record import Record
from slop_hf.io.serialization import parse_yaml, read_json, read_yaml


@dataclass(frozen=True)
class Leaf(Record, error=RunError):
    colour: str = "green"


@dataclass(frozen=True)
class Tree(Record, error=RunError):
    name: str = ""
    leaf: Leaf | str | None = None
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"nmae": "oak"}, "oak: unknown key 'nmae'; did you mean 'name'?"),
        ({"soil": "sand"}, "oak: unknown key 'soil' (known: name, leaf, leaves, by_name, notes)"),
        ({"leaf": {"color": "red"}}, "oak: unknown key 'leaf.color'; did you mean 'colour'?"),
        ({"leaves": [{}, {"color": "red"}]}, "oak: unknown key 'leaves.1.color'; did you mean 'colour'?"),
        ({"by_name": {"a": {"color": "red"}}}, "oak: unknown key 'by_name.a.color'; did you mean 'colour'?"),
        ({"name": 3}, "oak: name: Input should be a valid string, got 3"),
        ({"notes": None}, "oak: notes: expected a section, KEY: VALUE per line, got None"),
        ({"by_name": {"a": 5}}, "oak: by_name.a: expected a section, KEY: VALUE per line, got 5"),
        (["name"], "oak: expected a section, KEY: VALUE per line, got ['name']"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_the_remedy(content: Any, message: str) -> None:
    with pytest.raises(RunError) as caught:
        Tree.from_plain(content, "oak")
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice, in lines 1 and 3; keep one of them"),
        ("a: {x: 1, x: 1}", "the key 'x' is given twice, in line 1"),
        ("- a: 1\n  a: 2", "the key 'a' is given twice, in lines 1 and 2"),
        ("a: [", "not valid YAML"),
        ("a: 2020-13-01", "month must be in 1..12"),
        ("[" * 2_000, "nested too deeply"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_yaml_that_cannot_be_meant_is_refused(text: str, message: str) -> None:
    with pytest.raises(RunError) as caught:
        parse_yaml(text, where="run.yaml", error=RunError)
    assert str(caught.value).startswith("run.yaml: ") and message in str(caught.value)


def test_a_merged_mapping_may_change_keys() -> None:
    content = parse_yaml("base: &base {x: 1, y: 2}\nmore: &more {<<: *base, x: 3}\nmost: {<<: *more, y: 4}")
    assert content["most"] == {"x": 3, "y": 4} and content["more"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("größer".encode("latin-1"), "not a text file in UTF-8"),
        (None, "a folder, expected a file"),
    ],
)
def test_something_else_than_a_text_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "run.yaml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_yaml(path, error=RunError)
    with pytest.raises(RunError, match=message):
        read_json(path, if_missing="", error=RunError)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[" * 100_000, "nested too deeply")])
def test_a_malformed_json_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_json(tmp_path / "run.json", if_missing="", error=RunError)
