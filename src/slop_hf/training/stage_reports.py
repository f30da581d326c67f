"""Reports of finished stages to `StageCallback`s, once each over all interruptions of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import TrainerCallback

from ..errors import RunError
from ..io.files import write_text
from ..io.serialization import parse, read_json, to_json
from ..runs.directory import RunDirectory
from ..runs.records import INCOMPLETE
from .callbacks import StageCallback
from .ranks import Ranks

#: Notes in a stage's directory: whether the call of each callback has ended (true) or only begun (false), by name.
NOTES_FILE = "callbacks.json"


def write_first_notes(directory: Path) -> None:
    """Note in the directory of a stage being written that it has been reported to no callback yet."""
    write_text(directory / NOTES_FILE, to_json({}))


def report_stages(run: RunDirectory, callbacks: Iterable[TrainerCallback], ranks: Ranks) -> None:
    """Report each finished stage to the callbacks that it has not been reported to; `StageCallback` says more."""
    named = list(_name_callbacks(callbacks))
    for stage in range(ranks.from_first(run.finished_stages)):
        path = run.stage_dir(stage) / NOTES_FILE
        notes = _read_notes(path, ranks)
        for name, callback in named:
            if notes is None or notes.get(name):
                continue
            callback.is_repeated = name in notes
            _note(path, notes, name, ranks, has_ended=False)
            callback.on_stage_written(run, stage, ranks)
            ranks.wait()  # the call has ended on all ranks
            _note(path, notes, name, ranks, has_ended=True)


def _name_callbacks(callbacks: Iterable[TrainerCallback]) -> Iterator[tuple[str, StageCallback]]:
    counts: Counter[str] = Counter()
    ours = [callback for callback in callbacks if isinstance(callback, StageCallback)]
    for callback in sorted(ours, key=lambda callback: callback.publishes):
        name = type(callback).__qualname__
        counts[name] += 1
        yield name if counts[name] == 1 else f"{name} {counts[name]}", callback


def _read_notes(path: Path, ranks: Ranks) -> dict[str, bool] | None:
    """Return the notes on a stage, the same on all ranks; None if it was written by a release without notes."""
    notes: dict[str, bool] | None = None
    with ranks.raise_on_all():
        if ranks.is_first and path.exists():
            notes = parse(
                dict[str, bool],
                read_json(path, if_missing=INCOMPLETE, error=RunError),
                where=str(path),
                error=RunError,
            )
    return ranks.from_first(notes)


def _note(path: Path, notes: dict[str, bool], name: str, ranks: Ranks, *, has_ended: bool) -> None:
    notes[name] = has_ended
    with ranks.raise_on_all():
        if ranks.is_first:
            write_text(path, to_json(notes))
