"""Writing stages and checkpoints, all ranks together: each directory is complete or absent."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.trainer_callback import ExportableState

from ..errors import RunError
from ..growth import WEIGHT, hide_progress_bars
from ..io.files import flush_to_disk, make_temporary_path, write_text
from ..io.serialization import Json
from ..runs.directory import CHECKPOINT, RECORD_FILE, STATE_FILE, RunDirectory
from ..runs.records import StageRecord
from .checkpoints import RESUME_FILE, Resumption, remove_checkpoint, remove_old_checkpoints
from .checksums import Checksum, write_checksums
from .random_state import get_random_state
from .ranks import Ranks
from .stage_reports import write_first_notes
from .state_io import save_states
from .states import States

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerState


@contextmanager
def write_directory_on_all_ranks(target: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield an empty directory that all ranks write into; rename it to `target` when the block ends without an error.

    If the block fails on any rank, the directory is removed. `io.files.write_directory` is the same for one process;
    here `write_checksums` and `state_io` flush the files, each rank its own.
    """
    temporary = ranks.from_first(make_temporary_path(target))
    with ranks.raise_on_all():
        if ranks.is_first:
            temporary.mkdir(parents=True)
    try:
        with ranks.raise_on_all():
            if not temporary.is_dir():
                raise RunError(
                    f"rank {ranks.rank} does not see {temporary}; all nodes need output_dir on a shared disk"
                )
        yield temporary
        with ranks.raise_on_all():
            if ranks.is_first:
                temporary.rename(target)
                flush_to_disk(target.parent)
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Snapshot:
    """The model in training, as it is written to a stage or a checkpoint.

    Args:
        states: its weights and AdamW's state.
        model: the model, for its config.
        model_class: class of the stock model; FSDP2 puts the model into a class of its own.
        trainer_state: state of the trainer, with the log so far.
        max_shard_size: largest file of weights or optimizer state, such as "2GB".
    """

    states: States
    model: PreTrainedModel
    model_class: type[PreTrainedModel]
    processing_class: PreTrainedTokenizerBase | None
    trainer_state: TrainerState
    max_shard_size: str

    def write(self, directory: Path) -> dict[str, Checksum]:
        """Write a stock model, AdamW's state and the log; return checksums of this rank's files with tensors."""
        states = self.states
        config = copy.deepcopy(self.model.config)
        config.use_cache = True  # Trainer turns it off, and would leave it so in every published config
        config.architectures = [self.model_class.__name__]
        config.dtype = states.get_dtype(next(iter(states.shapes)), WEIGHT)
        written = save_states(states, config, directory, self.max_shard_size)
        with states.ranks.raise_on_all(), hide_progress_bars():
            if states.ranks.is_first:
                config.save_pretrained(directory)
                if self.model.generation_config is not None:
                    self.model.generation_config.save_pretrained(directory)
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(directory)
                self.trainer_state.save_to_json(str(directory / STATE_FILE))
        return written


def save_stage(run: RunDirectory, record: StageRecord, snapshot: Snapshot, *, keep_checkpoints: bool = False) -> None:
    """Write the directory of a finished stage, complete or not at all, and remove or keep the stage's checkpoints."""
    ranks = snapshot.states.ranks
    with write_directory_on_all_ranks(run.stage_dir(record.stage), ranks) as directory:
        written = snapshot.write(directory)
        with ranks.raise_on_all():
            if ranks.is_first:
                record.to_json(directory / RECORD_FILE)
        write_checksums(directory, written, ranks)
        with ranks.raise_on_all():
            if ranks.is_first:
                write_first_notes(directory)  # after the checksums, because the notes change
    if ranks.is_first and not keep_checkpoints:
        shutil.rmtree(run.running_dir(record.stage), ignore_errors=True)


def save_checkpoint(
    run: RunDirectory, stage: int, resumption: Resumption, snapshot: Snapshot, keep: int | None
) -> None:
    """Write a checkpoint inside a stage, complete or not at all; then remove all but the newest `keep`.

    Args:
        resumption: what else the run needs to resume; the random state of each rank is added.
        keep: number of checkpoints to keep; None or 0 for all.
    """
    ranks = snapshot.states.ranks
    target = run.running_dir(stage) / f"{CHECKPOINT}{snapshot.trainer_state.global_step}"
    with write_directory_on_all_ranks(target, ranks) as directory:
        written = snapshot.write(directory)
        random_states = ranks.gather_all(get_random_state())
        with ranks.raise_on_all():
            if ranks.is_first:
                write_text(directory / RESUME_FILE, json.dumps({**resumption, "random": random_states}))
        write_checksums(directory, written, ranks)
        with ranks.raise_on_all():
            if ranks.is_first and target.exists():  # of the run before it was resumed from an earlier checkpoint
                remove_checkpoint(target)
    if ranks.is_first:
        remove_old_checkpoints(run, stage, keep)


def store_callback_states(trainer: Trainer) -> None:
    """Put the states that callbacks export into the trainer's state, where `Trainer` looks for them."""
    states: dict[str, list[Json]] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    trainer.state.stateful_callbacks = {name: group if len(group) > 1 else group[0] for name, group in states.items()}
