"""YAML and JSON: reading files into checked dataclasses, and writing values.

pydantic checks types and unknown keys; its errors become one line that names the file, the key and the remedy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import SlopError

T = TypeVar("T")

#: Plain data, as JSON and YAML hold it: nested dicts, lists and scalars.
Json: TypeAlias = Any


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80


class _Loader(yaml.SafeLoader):
    """A loader for files that people write.

    YAML 1.1 reads `65e9` as a string; token counts are written that way, so read it as a number. A key given twice is
    an error: YAML would silently keep the last one.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line, first = key.start_mark.line + 1, lines.get((key.tag, key.value))
            if first is not None:
                where = f"in line {line}" if first == line else f"in lines {first} and {line}"
                raise yaml.YAMLError(f"the key {key.value!r} is given twice, {where}; keep one of them")
            lines[key.tag, key.value] = line
        return node


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "0123456789+-":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(
        0, ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"))
    )


def parse(cls: type[T], content: Json, *, where: str, error: type[SlopError] = SlopError) -> T:
    """Build a dataclass from plain data.

    Args:
        cls: dataclass, whose `__pydantic_config__` should forbid unknown keys.
        content: content of a YAML or JSON file.
        where: name of the file or argument, for the error message.
        error: class of error to raise.

    Raises:
        error: with every fault of the content, separated by semicolons.
    """
    try:
        value: T = _make_adapter(cls).validate_python(content)  # type: ignore[arg-type]
    except ValidationError as caught:
        faults = dict.fromkeys(_describe(fault, cls) for fault in _drop_faults_of_paths(caught.errors()))
        raise error(f"{where}: " + "; ".join(faults)) from None
    return value


@cache  # making one takes longer than reading most files
def _make_adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _drop_faults_of_paths(faults: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Drop the errors that pydantic adds for the `str` branch of a `Mapping | str` field."""
    remaining = [dict(fault) for fault in faults]
    of_strings = [fault for fault in remaining if fault["type"] == "string_type" and fault["loc"][-1:] == ("str",)]
    if len(of_strings) == len(remaining):
        return remaining
    for of_string in of_strings:
        depth = len(of_string["loc"]) - 1
        remaining.remove(of_string)
        for fault in remaining:
            if fault["loc"][:depth] == of_string["loc"][:depth]:
                fault["loc"] = (*fault["loc"][:depth], *fault["loc"][depth + 1 :])
    return remaining


def _describe(fault: Mapping[str, Any], cls: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        *parents, name = fault["loc"]
        return describe_unknown_key(str(name), _list_fields(cls, parents), path=path)
    if fault["type"].startswith("missing"):
        return f"missing key '{path}'"
    if fault["type"] in ("dict_type", "dataclass_type"):
        message = "expected a section, KEY: VALUE per line"
    else:
        message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] != "value_error":  # those of our own name the value
        message += f", got {_SHORT.repr(fault['input'])}"
    return f"{path}: {message}" if path else message


def describe_unknown_key(name: str, known: Iterable[str], *, path: str = "", list_known: bool = True) -> str:
    """Return the message about a key that a section does not have, with the most similar one that it has.

    Args:
        name: the unknown key.
        known: keys of the section.
        path: dotted key from the top of the file; by default the name.
        list_known: whether to list the known keys if none of them is similar.

    >>> describe_unknown_key("sauce", ["source", "weight"], path="data.sauce")
    "unknown key 'data.sauce'; did you mean 'source'?"
    >>> describe_unknown_key("x", ["source", "weight"])
    "unknown key 'x' (known: source, weight)"
    """
    return f"unknown key '{path or name}'" + describe_alternatives(name, known, list_all=list_known)


def describe_alternatives(name: str, known: Iterable[str], *, list_all: bool = True) -> str:
    """Return the end of a message about an unknown name: the most similar known one, or else all of them.

    >>> describe_alternatives("lama", ["llama", "mistral"]), describe_alternatives("x", ["llama", "mistral"])
    ("; did you mean 'llama'?", ' (known: llama, mistral)')
    """
    known = list(known)
    begun = [other for other in known if len(name) > 2 and other.startswith(name)]
    if similar := begun or difflib.get_close_matches(name, known, n=1):
        return f"; did you mean {similar[0]!r}?"
    return f" (known: {', '.join(known)})" if known and list_all else ""


def _list_fields(cls: Any, path: Iterable[str | int]) -> list[str]:
    """Return the fields of the dataclass at a path inside a type, such as `("stages", 0)` of a schedule."""
    types = [cls]
    for part in path:
        types = [child for kind in types for child in _enter(kind, part)]
    names = (field.name for kind in types if dataclasses.is_dataclass(kind) for field in dataclasses.fields(kind))
    return list(dict.fromkeys(names))


def _enter(kind: Any, part: str | int) -> list[Any]:
    """Return the types that a key or an index of a value of this type may have; a union counts as its members."""
    if dataclasses.is_dataclass(kind):
        kinds = [hint] if (hint := get_type_hints(kind).get(str(part))) is not None else []
    else:
        kinds = [*get_args(kind)[-1:]]  # of a mapping, the values; of `tuple[X, ...]`, an ellipsis
        if kinds == [Ellipsis]:
            kinds = [*get_args(kind)[:1]]
    members = [get_args(item) if get_origin(item) in (Union, UnionType) else (item,) for item in kinds]
    return [member for group in members for member in group]


def to_plain(value: object) -> Json:
    """Return the value as dicts, lists and scalars, without None and empty fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_plain(item) for name, item in items if not _is_missing(item)}
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)  # neither YAML nor JSON can hold numpy's integers
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, (tuple, Mapping)) and not value)


def read_yaml(path: str | os.PathLike[str], *, error: type[SlopError] = SlopError) -> Json:
    """Return the content of a YAML (or JSON) file; numbers such as `65e9` are numbers.

    Raises:
        error: if the file does not exist or is not valid YAML, or a key is given twice.
    """
    return parse_yaml(read_text(path, error=error), where=str(path), error=error)


def read_json(path: str | os.PathLike[str], *, if_missing: str, error: type[SlopError] = SlopError) -> Json:
    """Return the content of a JSON file.

    Args:
        path: file to read.
        if_missing: remedy to add to the message if the file does not exist.
        error: class of error to raise.

    Raises:
        error: if the file does not exist or is not valid JSON.
    """
    text = read_text(path, if_missing=if_missing, error=error)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as caught:
        raise error(f"{path}: not valid JSON ({_summarise(caught)})") from None


def parse_yaml(text: str, *, where: str = "YAML", error: type[SlopError] = SlopError) -> Json:
    """Return the content of a YAML text; numbers such as `65e9` are numbers.

    Args:
        where: name of the file or argument, for the error message.
        error: class of error to raise.

    Raises:
        error: if the text is not valid YAML, or a key is given twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds no Python objects
    except (yaml.YAMLError, ValueError, RecursionError) as caught:  # a ValueError: a date such as 2020-13-01
        raise error(f"{where}: not valid YAML ({_summarise(caught)})") from None


def read_text(path: str | os.PathLike[str], *, error: type[SlopError], if_missing: str = "") -> str:
    """Return the text of a file in UTF-8, or refuse what stands at its place."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path}: no such file" + (f"; {if_missing}" if if_missing else "")) from None
    except UnicodeDecodeError:
        raise error(f"{path}: not a text file in UTF-8; give another file, or convert this one") from None
    except OSError as caught:
        if Path(path).is_dir():
            raise error(f"{path}: a folder, expected a file; give the path of the file in it") from None
        raise error(f"{path}: cannot be read ({caught.strerror or caught})") from None


def _summarise(caught: Exception) -> str:
    return "nested too deeply" if isinstance(caught, RecursionError) else " ".join(str(caught).split())


def set_keys(content: dict[str, Any], overrides: Mapping[str, Any], *, where: str, error: type[SlopError]) -> None:
    """Set values in the content of a file by dotted keys, in place.

    Args:
        content: nested dicts.
        overrides: values by dotted key, such as `{"training.learning_rate": 1e-3}`.
        where: name of the file, for the error message.
        error: class of error to raise.

    Raises:
        error: for a key that leads through a value other than a section.

    >>> content = {"a": {"b": 1}}
    >>> set_keys(content, {"a.c": 2, "d.e": 3}, where="file", error=SlopError)
    >>> content
    {'a': {'b': 1, 'c': 2}, 'd': {'e': 3}}
    """
    for key, value in overrides.items():
        *parents, last = key.split(".")
        section = content
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise error(f"cannot set {key}: {parent} is not a section of {where}")
        section[last] = value


def hash_json(value: Json) -> str:
    """Return a hash of plain data, whatever the order of its keys.

    >>> hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    True
    """
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def to_yaml(value: object) -> str:
    """Return a value as YAML text, fields in the order of their declaration."""
    return yaml.safe_dump(to_plain(value), sort_keys=False, allow_unicode=True, width=120)


def to_json(value: object) -> str:
    """Return a value as indented JSON text."""
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n"


def list_versions() -> dict[str, str]:
    """Return the versions of the packages that a record depends on."""
    versions = {}
    for name in ("slop-hf", "transformers", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
