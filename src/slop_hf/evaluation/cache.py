"""Results of evaluations, kept by what they depend on: nothing is scored twice."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..errors import SlopError
from ..io.files import write_text
from ..io.serialization import hash_json, parse, read_yaml, to_json
from ..runs.records import EvalRecord


class ResultCache:
    """Records by what they depend on, each in a file of its own.

    Args:
        directory: default, `slop_hf/evaluations` in the Hugging Face home.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory or os.path.join(constants.HF_HOME, "slop_hf", "evaluations")).expanduser()

    def load(self, ingredients: Mapping[str, Any]) -> list[EvalRecord] | None:
        """What was kept; None where nothing was, or where it cannot be read."""
        path = self._path(ingredients)
        if not path.is_file():
            return None
        try:
            return parse(list[EvalRecord], read_yaml(path), where=str(path))
        except (SlopError, OSError):  # of another release, or damaged: it is scored anew, and written over
            return None

    def save(self, ingredients: Mapping[str, Any], records: Sequence[EvalRecord]) -> None:
        """Keep records."""
        write_text(self._path(ingredients), to_json(list(records)))

    def _path(self, ingredients: Mapping[str, Any]) -> Path:
        return self.directory / f"{hash_json(dict(ingredients))}.json"


def digest_of(directory: Path) -> str:
    """A hash of all files in a directory, by name and content."""
    found = blake2b(digest_size=16)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        found.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()
