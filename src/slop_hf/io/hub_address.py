"""`Address`: a revision of a repository on the Hub, written as `user/name@revision` wherever a model is named."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import HubError

MAIN = "main"
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_LONGEST_NAME = 96
_ADDRESS = re.compile(r"(?P<repo_id>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Address:
    """A revision of a repository.

    Args:
        repo_id: repository, such as `user/name`.
        revision: branch, tag or commit.

    >>> Address.parse("user/name@stage-2-ffn")
    Address(repo_id='user/name', revision='stage-2-ffn')
    >>> str(Address.parse("user/name"))
    'user/name@main'
    """

    repo_id: str
    revision: str = MAIN

    @classmethod
    def find(cls, text: str) -> Address | None:
        """Read `user/name` or `user/name@revision`; return None for anything else."""
        match = _ADDRESS.fullmatch(text)
        return None if match is None else cls(match["repo_id"], match["revision"] or MAIN)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `user/name` or `user/name@revision`.

        Raises:
            HubError: for anything else.
        """
        if (address := cls.find(text)) is None:
            raise HubError(f"{text!r} is not an address on the Hub: expected user/name, or user/name@revision")
        return address

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"


def check_repository(name: str, argument: str = "") -> str:
    """Return the name of a repository, `user/name` or `name`, if the Hub accepts such names.

    Args:
        argument: argument that gave the name, for the message.

    Raises:
        HubError: if it does not.

    >>> check_repository("user/my-model.v2")
    'user/my-model.v2'
    """
    parts = name.split("/") if isinstance(name, str) else []
    is_valid = 1 <= len(parts) <= 2 and len(name) <= _LONGEST_NAME and all(map(_NAME.fullmatch, parts))
    if not is_valid or "--" in name or ".." in name or name.endswith(".git"):
        subject = f"{argument}: {name!r}" if argument else repr(name)
        raise HubError(
            f"{subject} is not a valid repository name: expected user/name, of letters, digits, -, _ and . "
            f"(at most {_LONGEST_NAME} characters, no -- or .. inside, no - or . at an end)"
        )
    return name


def locate(source: str | os.PathLike[str]) -> dict[str, str]:
    """Return keyword arguments for `from_pretrained`: an existing directory, or a repository at a revision.

    >>> locate("user/name@stage-2-ffn")
    {'pretrained_model_name_or_path': 'user/name', 'revision': 'stage-2-ffn'}
    """
    address = None if Path(source).exists() else Address.find(os.fspath(source))
    if address is None:  # not on disk either: `from_pretrained` reports it
        return {"pretrained_model_name_or_path": os.fspath(source)}
    return {"pretrained_model_name_or_path": address.repo_id, "revision": address.revision}
