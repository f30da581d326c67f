"""`RunLaunches`: when a run was launched, with which commands, and on which data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from ..errors import RunError
from ..io.network_errors import hide_secrets
from ..io.record import Record
from .directory import RunFile
from .records import INCOMPLETE

#: Programs under the name by which users call them.
_PROGRAMS = {"slop": "slop", "__main__.py": "slop", "launch.py": "python -m slop_hf.launch"}


@dataclass(frozen=True)
class Launch(Record, error=RunError, if_missing=INCOMPLETE):
    """A launch of a run, or of its continuation.

    Args:
        time: when training began, in UTC, as in `2025-01-31 12:00 UTC`.
        command: the command, without tokens and passwords.
        data: the data, by source: files, folders, URLs or Hub data sets.
    """

    time: str
    command: str
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunLaunches(RunFile, error=RunError, if_missing=INCOMPLETE):
    """The launches of a run, in order. Stored as `launches.json`; runs of earlier releases have none."""

    file_name = "launches.json"

    launches: tuple[Launch, ...] = ()

    def add(self, arguments: Sequence[str], data: Sequence[str] = ()) -> RunLaunches:
        """Return the launches with another one, which begins now.

        Args:
            arguments: the words of the command, its program first, as in `sys.argv`.
            data: the data, by source.
        """
        time = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        launch = Launch(time, describe_command(arguments), tuple(map(hide_secrets, data)))
        return RunLaunches((*self.launches, launch))


def describe_command(arguments: Sequence[str]) -> str:
    """Return a command as one types it, without tokens, passwords and the directory of the program.

    >>> describe_command(["/opt/bin/slop", "train", "run.yaml", "--set", "training.hub_token=abc"])
    'slop train run.yaml --set training.hub_token=...'
    """
    program, *words = arguments
    name = Path(program).name
    return " ".join([_PROGRAMS.get(name, shlex.quote(name)), *(shlex.quote(hide_secrets(word)) for word in words)])
