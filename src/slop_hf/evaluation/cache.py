"""Cache of evaluation results, keyed by everything that they depend on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

from huggingface_hub import constants

from ..errors import EvaluationError, SlopError
from ..io.files import check_output, write_text
from ..io.serialization import Json, hash_json, parse, read_yaml, to_json
from ..runs.records import EvalRecord


class ResultCache:
    """A directory with one file of records per evaluation, named by a hash of all that the scores depend on.

    The default directory is `slop_hf/evaluations` in the Hugging Face home.

    Raises:
        EvaluationError: if the directory cannot be written.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory or os.path.join(constants.HF_HOME, "slop_hf", "evaluations")).expanduser()
        check_output(self.directory, "cache_dir", EvaluationError, is_directory=True)

    def load(self, ingredients: Mapping[str, Json]) -> list[EvalRecord] | None:
        """Return the records of an evaluation; None if the cache does not hold them, or cannot read them."""
        path = self._path(ingredients)
        if not path.is_file():
            return None
        try:
            return parse(list[EvalRecord], read_yaml(path), where=str(path))
        except (SlopError, OSError):  # of another release, or damaged: `save` replaces it
            return None

    def save(self, ingredients: Mapping[str, Json], records: Sequence[EvalRecord]) -> None:
        write_text(self._path(ingredients), to_json(list(records)))

    def _path(self, ingredients: Mapping[str, Json]) -> Path:
        return self.directory / f"{hash_json(dict(ingredients))}.json"


def hash_directory(directory: Path) -> str:
    """Return a hash of the names and contents of all files in a directory."""
    digest = blake2b(digest_size=16)
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
