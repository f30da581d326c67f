"""`Record`: the base of frozen dataclasses stored in JSON and YAML files."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from typing_extensions import Self

from ..errors import SlopError
from .files import write_text
from .serialization import Json, parse, read_json, read_yaml, to_json, to_yaml


class Record:
    """Base of a dataclass whose fields are checked when it is read; unknown keys are errors.

    Subclasses say which error a malformed file raises, and what to add if a JSON file does not exist:

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Point(Record, error=SlopError, if_missing="measure it first"):
    ...     x: int
    >>> Point(3).to_yaml()
    'x: 3\\n'
    >>> Point.from_json("nowhere.json")
    Traceback (most recent call last):
    slop_hf.errors.SlopError: nowhere.json: no such file; measure it first
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}
    _error: ClassVar[type[SlopError]] = SlopError
    _if_missing: ClassVar[str] = "correct the path"

    def __init_subclass__(cls, error: type[SlopError] | None = None, if_missing: str | None = None) -> None:
        super().__init_subclass__()
        if error is not None:
            cls._error = error
        if if_missing is not None:
            cls._if_missing = if_missing

    @classmethod
    def from_plain(cls, content: Json, where: str) -> Self:
        """Build the value from plain data (nested dicts, lists, scalars).

        Args:
            content: content of a YAML or JSON file.
            where: name of the file or argument, for the error message.

        Raises:
            SlopError: of the subclass's kind, naming every unknown, missing or malformed key.
        """
        return parse(cls, content, where=where, error=cls._error)

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read the value from a JSON file.

        Raises:
            SlopError: of the subclass's kind, if the file does not exist or does not hold such a value.
        """
        return cls.from_plain(read_json(path, if_missing=cls._if_missing, error=cls._error), str(path))

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Read the value from a YAML file.

        Raises:
            SlopError: of the subclass's kind, if the file does not exist or does not hold such a value.
        """
        content = read_yaml(path, error=cls._error)
        return cls.from_plain({} if content is None else content, str(path))  # an empty file has no keys

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the value as JSON text; also write it to `path`, atomically, if one is given."""
        return _write(to_json(self), path)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the value as YAML text; also write it to `path`, atomically, if one is given."""
        return _write(to_yaml(self), path)


def _write(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        write_text(path, text)
    return text
