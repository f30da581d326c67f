"""`plan_revision`: the content of a published stage, decided before anything is sent."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from .. import report
from ..errors import HubError
from ..growth import hash_stored_weights
from ..io.hub_address import MAIN, check_repository
from ..runs.directory import EVAL_FILE, OPTIMIZER_STEM, RECORD_FILE, STATE_FILE, RunDirectory
from ..runs.snapshot import RunSnapshot
from ..training.checksums import CHECKSUM_FILE, find_corruption
from ..training.ranks import Ranks
from .card import render_card
from .lineage import LINEAGE_FILE, Lineage, Origin, Parent

CARD_FILE, FIGURE_FILE = "README.md", "loss.png"
_IN_LINEAGE = {RECORD_FILE, STATE_FILE, EVAL_FILE, CHECKSUM_FILE}  # not sent: lineage.json holds their content
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}


@dataclass(frozen=True)
class Revision:
    """Content of a published stage.

    Args:
        branches: its own branch, and `main` for the last stage of a schedule.
        content: local file or bytes, by path in the repository.
    """

    branches: tuple[str, ...]
    lineage: Lineage
    content: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        return {
            path: len(source) if isinstance(source, bytes) else source.stat().st_size
            for path, source in self.content.items()
        }


def plan_revision(
    run: RunDirectory | str | Path, number: int, repo_id: str, *, base_model: str | None = None
) -> Revision:
    """Decide what a finished stage is published as, without sending anything.

    The stage's files are checked against their checksums. Only files that the trainer wrote are included, without
    AdamW's and Trainer's state.

    Args:
        run: directory of the run.
        number: number of the stage; 0 is the initial model.
        repo_id: repository, for the model card.
        base_model: model on the Hub that the run started from, for the card's metadata; not needed if it is a
            published stage, which the run records.

    Raises:
        RunError: if there is no such finished stage.
        HubError: if the stage's files are not what the trainer wrote, or the repository's name is not valid.
    """
    check_repository(repo_id)
    if base_model is not None:
        check_repository(base_model, "base_model")
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    run.select_stages([number])
    snapshot, origin = RunSnapshot.read(run).up_to(number), Origin.load(run)
    files = _list_files(run.stage_dir(number))
    lineage = _trace_lineage(run, snapshot, origin)
    base_model = base_model or (origin.parent.repo if origin is not None else None)
    card = render_card(lineage, repo_id, base_model=base_model, has_tokenizer=bool(_TOKENIZER & files.keys()))
    with tempfile.TemporaryDirectory() as directory:
        figure = report.draw_run_losses([snapshot], Path(directory) / FIGURE_FILE).read_bytes()
    made = {LINEAGE_FILE: lineage.to_json().encode(), CARD_FILE: card.encode(), FIGURE_FILE: figure}
    is_last = number == len(run.schedule.stages)
    return Revision((lineage.revision, *([MAIN] if is_last else [])), lineage, {**files, **made})


def _list_files(directory: Path) -> dict[str, Path]:
    """Return the files of the model and its tokenizer that the trainer wrote, by path in the repository."""
    if fault := find_corruption(directory, Ranks(), is_stage=True):
        raise HubError(f"{directory} cannot be published: {fault}; it is not what the trainer wrote")
    checked = json.loads((directory / CHECKSUM_FILE).read_text())["files"]
    names = [name for name in checked if name not in _IN_LINEAGE and not name.startswith(OPTIMIZER_STEM)]
    templates = sorted(directory.glob("additional_chat_templates/*.jinja"))  # checksums cover the top level only
    paths = [*(directory / name for name in names), *templates]
    return {path.relative_to(directory).as_posix(): path for path in paths}


def _trace_lineage(run: RunDirectory, snapshot: RunSnapshot, origin: Origin | None) -> Lineage:
    """Return the history of the last stage of a snapshot."""
    *before, record = snapshot.records
    parent, ancestors = (origin.parent, origin.ancestors) if origin is not None else (None, ())
    if before:
        parent = Parent(before[-1].name, _hash_weights(run.path / before[-1].name))
    return Lineage(
        revision=record.name,
        weights_hash=_hash_weights(run.path / record.name),
        schedule=snapshot.schedule,
        record=record,
        run_id=snapshot.facts.run_id if snapshot.facts is not None else "",
        parent=parent,
        ancestors=(*ancestors, *before),
        evaluations=snapshot.evaluations[-1],
    )


def _hash_weights(directory: Path) -> str:
    """Return the hash of a stage's weights, reading them once unless the stage is trained again."""
    return _hash_weights_written_at(directory.resolve(), (directory / CHECKSUM_FILE).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _hash_weights_written_at(directory: Path, time_ns: int) -> str:
    return hash_stored_weights(directory)
