"""`RunStatus`: the state of a run, read from its files while it trains and after that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import RunError
from ..io.record import Record
from ..io.serialization import Json, read_json
from .directory import STATE_FILE, RunDirectory, find_newest_model, list_checkpoints
from .lock import LOCK_DIRECTORY, Writers, find_writers
from .records import EVAL_LOSS, INCOMPLETE

PROGRESS_FILE = "progress.json"
#: Values of a trainer's log that `LiveProgress` keeps.
LIVE_VALUES = ("loss", EVAL_LOSS, "tokens_per_second", "seconds_left")


@dataclass(frozen=True)
class LiveProgress(Record, error=RunError):
    """The progress of a training process, stored next to the run's lock: it means nothing after the process has ended.

    Args:
        time: when it was written, in seconds since 1970.
        stage: number of the stage in training.
        step, steps: optimizer steps done, and in the whole run.
        tokens, total_tokens: tokens trained on, and in the whole run.
        loss: newest training loss, in nats per token.
        eval_loss: newest held-out loss, in nats per token.
        tokens_per_second: newest speed.
        seconds_left: estimate of the time left.
    """

    time: float
    stage: int
    step: int
    steps: int
    tokens: int
    total_tokens: int
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    def save(self, directory: Path) -> None:
        """Write the record of a run directory."""
        self.to_json(directory / LOCK_DIRECTORY / PROGRESS_FILE)

    @classmethod
    def load(cls, directory: Path) -> LiveProgress | None:
        """Read the record of a run directory; return None if it has none."""
        path = directory / LOCK_DIRECTORY / PROGRESS_FILE
        return cls.from_json(path) if path.is_file() else None


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    Args:
        run: run directory.
        state: `running` while a process writes into it, `finished`, or `stopped`.
        stage, stages: number of the stage in training, or of the last one if all have finished; number of stages.
        stage_name: name of its directory.
        step, steps: optimizer steps done, and in the whole run; None if unknown.
        tokens, total_tokens: tokens trained on, and in the whole run.
        loss: newest training loss, in nats per token; None if unknown, as the next three.
        eval_loss: newest held-out loss, in nats per token.
        tokens_per_second: newest speed, of all devices together.
        seconds_left: estimate of the time left while it trains.
        writers: the processes that write into the directory; None if there are none.
    """

    run: str
    state: Literal["running", "finished", "stopped"]
    stage: int
    stages: int
    stage_name: str
    step: int | None
    steps: int | None
    tokens: int
    total_tokens: int
    loss: float | None
    eval_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    writers: Writers | None

    @property
    def share(self) -> float:
        """Share of the run's tokens that it has trained on."""
        return min(self.tokens / self.total_tokens, 1.0) if self.total_tokens else 1.0


def read_status(run: RunDirectory) -> RunStatus:
    """Return the state of a run: from its process if one is alive, or else from its newest checkpoint or stage.

    Raises:
        RunError: if the directory is not a run, or a file of it is not valid.
    """
    names = run.schedule.stage_names
    finished = run.finished_stages
    writers = find_writers(run.path)
    live = LiveProgress.load(run.path) if writers is not None else None
    step, log = _read_newest_log(run, finished)
    if live is not None and live.step < (step or 0):  # of an earlier process: this one has not logged anything yet
        live = None
    planned = run.schedule.tokens
    state: Literal["running", "finished", "stopped"] = "stopped"
    if finished == len(names):
        state = "finished"
    elif writers is not None:
        state = "running"
    stage = min(finished if live is None else max(live.stage, finished), len(names) - 1)
    tokens = _find_newest(log, "tokens")
    values = {name: _find_newest(log, name) for name in LIVE_VALUES}
    if live is not None:
        values = {name: getattr(live, name) for name in LIVE_VALUES}
    return RunStatus(
        run=str(run.path),
        state=state,
        stage=stage,
        stages=len(names),
        stage_name=names[stage],
        step=step if live is None else live.step,
        steps=None if live is None else live.steps,
        tokens=int(tokens or 0) if live is None else live.tokens,
        total_tokens=sum(planned) if live is None else live.total_tokens,
        loss=values["loss"],
        eval_loss=values[EVAL_LOSS],
        tokens_per_second=values["tokens_per_second"],
        seconds_left=values["seconds_left"] if state == "running" else None,
        writers=writers,
    )


def _read_newest_log(run: RunDirectory, finished: int) -> tuple[int | None, Sequence[Mapping[str, Json]]]:
    """Return step and log of the newest checkpoint, or of the last finished stage if there is none."""
    if not finished and not list_checkpoints(run, 0):
        return None, ()
    model = find_newest_model(run)
    try:
        state = read_json(model / STATE_FILE, if_missing=INCOMPLETE, error=RunError)
    except RunError:
        if model.exists():
            raise
        return _read_newest_log(run, run.finished_stages)  # a newer checkpoint has replaced it meanwhile
    if not isinstance(state, dict):
        return None, ()
    step, log = state.get("global_step"), state.get("log_history")
    return (step if isinstance(step, int) else None), (log if isinstance(log, list) else ())


def _find_newest(log: Sequence[Mapping[str, Json]], name: str) -> float | None:
    """Return the last value that a log has of a name."""
    for entry in reversed(log):
        value = entry.get(name)
        if isinstance(value, (int, float)):
            return value
    return None
