"""`RunProgress`: progress bars of the run and its stage, and logs as readable lines; `ProgressFile`: a run's state."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import has_length

from ..io.serialization import Json
from ..io.units import format_count
from ..runs.status import LIVE_VALUES, LiveProgress
from .spans import StageSpan

Bar: TypeAlias = "tqdm[Any]"

# Without tqdm's estimate of the time left: it takes all tokens to cost the same, and stages grow.
_RUN_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"

_SHOWN: dict[str, Callable[[Json], str]] = {
    "loss": lambda value: f"loss {value:.4g}",
    "learning_rate": lambda value: f"lr {value:.1e}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "seconds_left": lambda value: f"left {timedelta(seconds=round(value))}",
    "train_loss": lambda value: f"mean loss {value:.4g}",
    "train_runtime": lambda value: f"took {timedelta(seconds=round(value))}",
}
_IN_BAR = ("loss", "tokens_per_second", "mfu", "seconds_left")
# Shown at the beginning of the line or in the bars, or meant for curves.
_HIDDEN = frozenset({"stage", "tokens", "train_flops", "total_flos", "epoch", "grad_norm", "num_input_tokens_seen"})
_HIDDEN_ENDINGS = ("_per_second", "_runtime", "_preparation_time")
_MAX_CHARACTERS = 100
#: Least seconds between two writes of the progress file, which wait for the disk.
PROGRESS_SECONDS = 2.0


def format_log_line(stage: str, step: int, steps: int, logs: Mapping[str, Json]) -> str:
    """Return what a trainer logged as one line.

    Args:
        step, steps: optimizer steps done, and in the whole run.
        logs: values as `Trainer.log` receives them; unknown names are shown unchanged.

    >>> logs = {"loss": 4.2134, "tokens_per_second": 12345.6, "seconds_left": 191.7}
    >>> format_log_line("stage-1-layer", 120, 460, logs)
    'stage-1-layer  step 120/460  loss 4.213  12,346 tok/s  left 0:03:12'
    >>> format_log_line("stage-1-layer", 120, 460, {"eval_loss": 4.1, "eval_perplexity": 60.34})
    'stage-1-layer  step 120/460  held-out loss 4.1, perplexity 60.34'
    """
    parts = [stage, f"step {step:,}/{steps:,}", *_format_shown(logs, _SHOWN)]
    hidden = _HIDDEN | _SHOWN.keys()
    others = {key: logs[key] for key in logs if key not in hidden and not key.endswith(_HIDDEN_ENDINGS)}
    if held_out := [key for key in others if key.startswith("eval_")]:
        held_out.sort(key=lambda key: not key.endswith(("loss", "perplexity")))  # these first
        names = [key.removeprefix("eval_").replace("_", " ") for key in held_out]
        values = [f"{name} {_format_value(others.pop(key))}" for name, key in zip(names, held_out, strict=True)]
        parts.append("held-out " + ", ".join(values))
    return "  ".join([*parts, *(f"{key} {_format_value(value)}" for key, value in others.items())])


def describe_run(spans: Sequence[StageSpan], directory: str, step: int) -> str:
    """Return the line that training begins with: directory, parameters, tokens, FLOPs, and how to stop it.

    Args:
        spans: stages of the run.
        directory: run directory.
        step: optimizer steps already done.
    """
    first, last = spans[0], spans[-1]
    count = format_count
    sizes = count(last.parameters)
    if len(spans) > 1:
        sizes = f"{count(first.parameters)} to {sizes} parameters in {len(spans)} stages"
    else:
        sizes += " parameters"
    begun = f", continued at step {step:,} of {last.end_step:,}" if step else ""
    amount = f"{count(last.end_token)} tokens, {last.first_flops + last.flops:.2e} FLOPs"
    return f"training {directory}: {sizes}, {amount}{begun}; Ctrl-C saves the state and stops"


def _format_shown(logs: Mapping[str, Json], names: Iterable[str]) -> list[str]:
    return [_SHOWN[name](logs[name]) for name in names if logs.get(name) is not None]


def _format_value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:_MAX_CHARACTERS]


class ProgressFile(TrainerCallback):
    """Writes the progress of a training into the run's directory, for `slop status`; only the main process writes.

    Args:
        directory: run directory.
        get_span: function that returns the stage in training.
        last: the last stage of the run.
        clock: function that returns seconds since 1970.
    """

    def __init__(
        self,
        directory: Path,
        get_span: Callable[[], StageSpan],
        last: StageSpan,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory, self.get_span, self.last, self.clock = directory, get_span, last, clock
        self._values: dict[str, float] = {}
        self._written = float("-inf")

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Mapping[str, Json] | None, **kwargs: object
    ) -> None:
        """Remember the newest values, and write them if the file is older than `PROGRESS_SECONDS`."""
        if not state.is_world_process_zero or not logs:
            return
        self._values |= {name: logs[name] for name in LIVE_VALUES if logs.get(name) is not None}
        now, span = self.clock(), self.get_span()
        if now - self._written < PROGRESS_SECONDS:
            return
        self._written = now
        tokens, _ = span.count_until(state.global_step)
        progress = LiveProgress(
            time=now,
            stage=span.number,
            step=state.global_step,
            steps=self.last.end_step,
            tokens=tokens,
            total_tokens=self.last.end_token,
            **self._values,
        )
        with suppress(OSError):  # training does not end because of it
            progress.save(self.directory)


class RunProgress(ProgressCallback):
    """Shows the progress of a staged run; replaces transformers' `ProgressCallback`.

    There is a bar for the tokens of the run, one for the steps of its stage, and one for a running evaluation; logs
    are lines above them. If the output is not a terminal there are only lines. Only the main process writes.

    Args:
        get_span: function that returns the stage in training.
        file: file that lines and bars are written to; None for standard output and standard error.
    """

    def __init__(
        self, get_span: Callable[[], StageSpan], spans: Sequence[StageSpan], file: TextIO | None = None
    ) -> None:
        super().__init__()
        self.get_span = get_span
        self.spans = tuple(spans)
        self.file = file
        self.run_bar: Bar | None = None
        self.training_bar: Bar | None = None  # of the stage: what one `train()` of the base class shows
        self.prediction_bar: Bar | None = None

    def close(self) -> None:
        """Close the open bars. There is no event for an interruption: whoever catches one has to call this."""
        for bar in (self.prediction_bar, self.training_bar, self.run_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = self.run_bar = None

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Open a bar for the stage, and before the first stage one for the run."""
        if not state.is_world_process_zero:
            return
        if self.training_bar is not None:  # of an interrupted stage: the run begins again
            self.close()
        span, last = self.get_span(), self.spans[-1]
        if self.run_bar is None:
            tqdm.write(describe_run(self.spans, str(getattr(args, "output_dir", "")), state.global_step), self.file)
            done, _ = span.count_until(state.global_step)
            self.run_bar = self._open_bar(
                desc="run", total=last.end_token, initial=done, unit="tokens", unit_scale=True, bar_format=_RUN_BAR
            )
        done = state.global_step - span.first_step
        self.training_bar = self._open_bar(desc=span.name, total=span.steps, initial=done, unit="step", leave=False)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.run_bar is not None and self.training_bar is not None:
            span = self.get_span()
            self.run_bar.update(span.count_until(state.global_step)[0] - self.run_bar.n)
            self.training_bar.update(state.global_step - span.first_step - self.training_bar.n)

    def on_prediction_step(
        self, args: object, state: TrainerState, control: object, eval_dataloader: Any = None, **kwargs: object
    ) -> None:
        """As in `ProgressCallback`, but with a name."""
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            self.prediction_bar = self._open_bar(
                desc="held out", total=len(eval_dataloader), unit="batch", leave=False
            )
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self, args: object, state: TrainerState, control: object, logs: Mapping[str, Json] | None, **kwargs: object
    ) -> None:
        """Write a line above the bars, and the new values into the run's bar."""
        if not state.is_world_process_zero or not logs:
            return
        if self.run_bar is not None and "loss" in logs:
            self.run_bar.set_postfix_str(", ".join(_format_shown(logs, _IN_BAR)), refresh=False)  # the line redraws it
        span = self.get_span()
        if "train_loss" in logs and not span.steps:
            return  # a stage without tokens has no mean loss
        is_untrained = span.growth is not None and state.global_step == span.first_step
        stage = f"{span.name} after growth" if is_untrained else span.name
        line = format_log_line(stage, state.global_step, self.spans[-1].end_step, logs)
        tqdm.write(line, file=self.file)

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        """Close the stage's bar, and the run's bar after the last stage or an early stop."""
        if self.training_bar is None:
            return
        super().on_train_end(args, state, control, **kwargs)
        span = self.get_span()
        if state.global_step < span.end_step or span.number == self.spans[-1].number:
            self.close()

    def _open_bar(self, **settings: Any) -> Bar:
        # disable=None: no bars if `file` is not a terminal; they would fill a log file with half-drawn lines.
        return tqdm(dynamic_ncols=True, disable=None, file=self.file, **settings)
