"""What commands that train several runs have in common: lists in options, and a bar."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..errors import RunError


def listed(text: str) -> tuple[str, ...]:
    """The parts of an option that holds several, with commas.

    >>> listed("layer, ffn")
    ('layer', 'ffn')
    """
    return tuple(part.strip() for part in text.split(",") if part.strip())


def read_seeds(text: str) -> tuple[int, ...]:
    """What `--seeds` says.

    Raises:
        RunError: for what is no number.

    >>> read_seeds("0,1")
    (0, 1)
    """
    try:
        return tuple(int(seed) for seed in listed(text))
    except ValueError:
        raise RunError(f"--seeds must be whole numbers such as 0,1,2, got {text!r}") from None


def progress_bar(*, quiet: bool) -> Progress:
    """A bar on stderr that counts runs; none where `quiet`."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True), disable=quiet)
