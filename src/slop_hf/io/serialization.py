"""YAML and JSON: reading files into checked dataclasses, and writing values.

pydantic checks types and unknown keys; its errors become one line that names the file, the key and the remedy.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from numbers import Integral
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import SlopError

T = TypeVar("T")

#: Plain data, as JSON and YAML hold it: nested dicts, lists and scalars.
Json: TypeAlias = Any


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `65e9` as a string; token counts are written that way, so read it as a number."""


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
        faults = [_describe(fault, cls) for fault in _drop_faults_of_paths(caught.errors())]
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


def _describe(fault: Mapping[str, Any], cls: type) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        names = ", ".join(field.name for field in dataclasses.fields(cls)) if "." not in path else ""
        return f"unknown key '{path}'" + (f" (known: {names})" if names else "")
    if fault["type"].startswith("missing"):
        return f"missing key '{path}'"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


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
        error: if the file does not exist or is not valid YAML.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except yaml.YAMLError as caught:
        raise error(f"{path}: not valid YAML ({' '.join(str(caught).split())})") from None


def read_json(path: str | os.PathLike[str], *, if_missing: str, error: type[SlopError] = SlopError) -> Json:
    """Return the content of a JSON file.

    Args:
        path: file to read.
        if_missing: remedy to add to the message if the file does not exist.
        error: class of error to raise.

    Raises:
        error: if the file does not exist or is not valid JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file; {if_missing}") from None
    except ValueError as caught:
        raise error(f"{path}: not valid JSON ({caught})") from None


def parse_yaml(text: str) -> Json:
    """Return the content of a YAML text; numbers such as `65e9` are numbers."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds no Python objects


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
