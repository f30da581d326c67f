"""Reading and writing values: YAML and JSON files to and from frozen dataclasses.

pydantic checks types and unknown keys; its errors become one line that names file, key and remedy.
Files are written aside and renamed, so that a reader finds a whole file or none.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from ..errors import SlopError

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `65e9` as a string; token counts are written that way, so read it as a number."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
for _first in "0123456789+-":
    _Loader.yaml_implicit_resolvers.setdefault(_first, []).insert(
        0, ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"))
    )


def parse(cls: type[T], data: Any, *, where: str, error: type[SlopError] = SlopError) -> T:
    """Build a `cls` from plain data (nested dicts, lists, scalars).

    Args:
        cls: a dataclass, whose `__pydantic_config__` should forbid unknown keys.
        data: what a YAML or JSON file held.
        where: the name of the file or argument, for the error message.
        error: the class of error to raise.

    Raises:
        error: with every fault of `data` on one line each.
    """
    try:
        return cast(T, _adapter(cast(Any, cls)).validate_python(data))
    except ValidationError as caught:
        faults = [_describe(fault, cls) for fault in _without_other_kinds(caught.errors())]
        raise error(f"{where}: " + "; ".join(faults)) from None


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    """Building one takes longer than reading most files."""
    return TypeAdapter(cls)


def _without_other_kinds(faults: Iterable[Any]) -> list[Any]:
    """Faults without those that only say that a mapping, which may be a path instead, is none."""
    kept = [dict(fault) for fault in faults]
    of_paths = [fault for fault in kept if fault["type"] == "string_type" and fault["loc"][-1:] == ("str",)]
    if len(of_paths) == len(kept):
        return kept
    for other in of_paths:
        place = len(other["loc"]) - 1
        kept.remove(other)
        for fault in kept:
            if fault["loc"][:place] == other["loc"][:place]:
                fault["loc"] = (*fault["loc"][:place], *fault["loc"][place + 1 :])
    return kept


def _describe(fault: Any, cls: type) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(field.name for field in dataclasses.fields(cls)) if "." not in path else ""
        return f"unknown key '{path}'" + (f" (known: {known})" if known else "")
    if fault["type"].startswith("missing"):
        return f"missing key '{path}'"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{path}: {message}" if path else message


def plain(value: Any) -> Any:
    """The value as dicts, lists and scalars, with fields that are None or empty left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: plain(item) for name, item in items if item is not None and item != () and item != {}}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_yaml(path: str | os.PathLike[str], *, error: type[SlopError] = SlopError) -> Any:
    """The content of a YAML (or JSON) file; numbers such as `65e9` are numbers."""
    try:
        return read_yaml_text(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except yaml.YAMLError as caught:
        raise error(f"{path}: not valid YAML ({' '.join(str(caught).split())})") from None


def read_json(path: str | os.PathLike[str], *, missing: str, error: type[SlopError] = SlopError) -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        missing: what to say where there is none.
        error: the class of error to raise.

    Raises:
        SlopError: of that class, where there is no such file, or it is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file; {missing}") from None
    except ValueError as caught:
        raise error(f"{path}: not valid JSON ({caught})") from None


def read_yaml_text(text: str) -> Any:
    """What a YAML text says; numbers such as `65e9` are numbers."""
    return yaml.load(text, Loader=_Loader)  # a SafeLoader: it builds no Python objects


def change(content: dict[str, Any], overrides: Mapping[str, Any], *, where: str, error: type[SlopError]) -> None:
    """Put values into what a file held.

    Args:
        content: changed in place.
        overrides: values by dotted key, such as `{"training.learning_rate": 1e-3}`.
        where: the name of the file, for the error message.
        error: the class of error to raise.

    Raises:
        error: for a key that leads through a value which is no section.

    >>> content = {"a": {"b": 1}}
    >>> change(content, {"a.c": 2, "d.e": 3}, where="file", error=SlopError)
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


def digest(value: Any) -> str:
    """A hash of what JSON can hold, whatever the order of its keys.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    True
    """
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def to_yaml(value: Any) -> str:
    """A value as YAML text, fields in the order of their declaration."""
    return yaml.safe_dump(plain(value), sort_keys=False, allow_unicode=True, width=120)


def to_json(value: Any) -> str:
    """A value as indented JSON text."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n"


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file aside, flush it to disk and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    return path


@contextmanager
def written_aside(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A fresh directory to write into, which becomes `target` in one rename when the block ends well.

    A reader finds a whole directory or none. Where the block fails, what it wrote is removed.
    """
    target = Path(target)
    aside = target.with_name(f".{target.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for file in aside.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def versions() -> dict[str, str]:
    """The versions of the packages that a record depends on."""
    found = {}
    for name in ("slop-hf", "transformers", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
