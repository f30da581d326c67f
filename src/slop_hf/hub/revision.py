"""`Revision`: all that a published stage holds, decided before anything is sent."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import HubError, RunError
from ..growth import stored_weights_hash
from ..io.hub_address import MAIN
from ..report.figures import loss_figure
from ..runs.directory import EVAL_FILE, OPTIMIZER_STEM, RECORD_FILE, STATE_FILE, RunDirectory, RunFacts
from ..training.checksums import CHECKSUM_FILE, fault_of
from ..training.ranks import Ranks
from .card import model_card
from .lineage import GROWTH_FILE, Origin, Parent, PublishedGrowth

CARD_FILE, FIGURE_FILE = "README.md", "loss.png"
_OWN = {RECORD_FILE, STATE_FILE, EVAL_FILE, CHECKSUM_FILE}  # growth.json tells what they say
_TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}


@dataclass(frozen=True)
class Revision:
    """What a published stage holds.

    Args:
        branches: that are to hold it; `main` is one for the last stage of a schedule.
        growth: what is told of it.
        content: by path in the repository: a file, or bytes.
    """

    branches: tuple[str, ...]
    growth: PublishedGrowth
    content: Mapping[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by path in the repository."""
        return {path: len(one) if isinstance(one, bytes) else one.stat().st_size for path, one in self.content.items()}


def plan_revision(
    run: RunDirectory | str | Path, number: int, repo_id: str, *, base_model: str | None = None
) -> Revision:
    """What a finished stage is published as; nothing is sent.

    Its files are checked by their checksums. AdamW's state and Trainer's stay where they are, and so does whatever
    the trainer has not written itself.

    Args:
        run: its directory.
        number: of the stage, 0 for the initial model.
        repo_id: for the card.
        base_model: for the card's metadata, the model on the Hub that the run began with; a run that began with a
            published stage knows its repository.

    Raises:
        RunError: where there is no such stage.
        HubError: where its files are not what was written.
    """
    run = run if isinstance(run, RunDirectory) else RunDirectory(run)
    check_finished(run, number)
    files, origin = _files_of(run.stage_dir(number)), Origin.load(run)
    growth = _growth_of(run, number, origin)
    figure = _figure(run, number)
    has_tokenizer = bool(_TOKENIZER & files.keys())
    base_model = base_model or (origin.parent.repo if origin is not None else None)
    card = model_card(growth, repo_id, base_model=base_model, has_tokenizer=has_tokenizer)
    own = {GROWTH_FILE: growth.to_json().encode(), CARD_FILE: card.encode(), FIGURE_FILE: figure}
    is_last = number == len(run.schedule.stages)
    return Revision((growth.revision, *([MAIN] if is_last else [])), growth, {**files, **own})


def check_finished(run: RunDirectory, number: int) -> None:
    """Refuse a stage that has not finished, or that the schedule has not.

    Raises:
        RunError: with those that can be given.
    """
    finished = run.finished_stages if run.schedule else 0
    if not 0 <= number < finished:
        raise RunError(
            f"{run.path} has no finished stage {number}: "
            + (f"give one from 0 to {finished - 1}" if finished else "none is finished yet; let `slop train` go on")
        )


def _files_of(directory: Path) -> dict[str, Path]:
    """What the trainer has written of the model and its tokenizer, by name."""
    if fault := fault_of(directory, Ranks(), is_stage=True):
        raise HubError(f"{directory} is not published: {fault}; it is not what the trainer wrote")
    named = json.loads((directory / CHECKSUM_FILE).read_text())["files"]
    names = [name for name in named if name not in _OWN and not name.startswith(OPTIMIZER_STEM)]
    templates = sorted(directory.glob("additional_chat_templates/*.jinja"))  # checksums are of the top level
    return {
        **{name: directory / name for name in names},
        **{path.relative_to(directory).as_posix(): path for path in templates},
    }


def _growth_of(run: RunDirectory, number: int, origin: Origin | None) -> PublishedGrowth:
    records, facts = run.records(), RunFacts.load(run)
    parent = origin.parent if origin is not None else None
    if number:
        parent = Parent(run.schedule.stage_name(number - 1), _hash_of(run.stage_dir(number - 1)))
    return PublishedGrowth(
        revision=run.schedule.stage_name(number),
        weights_hash=_hash_of(run.stage_dir(number)),
        schedule=run.schedule,
        record=records[number],
        run_id=facts.run_id if facts is not None else "",
        parent=parent,
        ancestors=(*(origin.ancestors if origin is not None else ()), *records[:number]),
        evaluations=tuple(run.evaluations(number)),
    )


def _hash_of(directory: Path) -> str:
    """The hash of a stage's weights, which are read once, unless the stage is trained anew."""
    return _hash_at(directory.resolve(), (directory / CHECKSUM_FILE).stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _hash_at(directory: Path, written_at: int) -> str:
    return stored_weights_hash(directory)


def _figure(run: RunDirectory, number: int) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return loss_figure([_RunUpTo(run, number)], Path(directory) / FIGURE_FILE).read_bytes()


class _RunUpTo(RunDirectory):
    """A run as it was when one of its stages had just finished."""

    last: int

    def __init__(self, run: RunDirectory, last: int) -> None:
        super().__init__(run.path)
        object.__setattr__(self, "last", last)

    @property
    def finished_stages(self) -> int:
        return min(super().finished_stages, self.last + 1)
