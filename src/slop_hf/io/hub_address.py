"""`Address`: a revision of a repository on the Hub, as one names it wherever a model is asked for."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError

MAIN = "main"
_ADDRESS = re.compile(r"(?P<repo_id>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Address:
    """A revision of a repository.

    Args:
        repo_id: such as `user/name`.
        revision: a branch, a tag or a commit.

    >>> Address.parse("user/name@stage-2-ffn")
    Address(repo_id='user/name', revision='stage-2-ffn')
    >>> str(Address.parse("user/name"))
    'user/name@main'
    """

    repo_id: str
    revision: str = MAIN

    @classmethod
    def find(cls, text: str) -> Address | None:
        """Read `user/name` or `user/name@revision`; None for anything else."""
        found = _ADDRESS.fullmatch(text)
        return None if found is None else cls(found["repo_id"], found["revision"] or MAIN)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `user/name` or `user/name@revision`.

        Raises:
            HubError: for anything else.
        """
        if (found := cls.find(text)) is None:
            raise HubError(f"{text!r} is no address on the Hub; expected user/name, or user/name@revision")
        return found

    def __str__(self) -> str:
        return f"{self.repo_id}@{self.revision}"


def located(source: str | os.PathLike[str]) -> dict[str, Any]:
    """What `from_pretrained` has to be asked for: a directory that there is, or a repository at a revision.

    >>> located("user/name@stage-2-ffn")
    {'pretrained_model_name_or_path': 'user/name', 'revision': 'stage-2-ffn'}
    """
    address = None if Path(source).exists() else Address.find(os.fspath(source))
    if address is None:  # if it is not there either, `from_pretrained` says so
        return {"pretrained_model_name_or_path": os.fspath(source)}
    return {"pretrained_model_name_or_path": address.repo_id, "revision": address.revision}
