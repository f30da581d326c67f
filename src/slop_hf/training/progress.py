"""`RunProgress`: bars for the run and its stage, and logs as lines that people can read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TextIO

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from .spans import StageSpan

# tqdm's own time left is left out: it takes every token to last as long as those before, and stages grow.
_RUN_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}{postfix}]"

_SHOWN: dict[str, Callable[[Any], str]] = {
    "loss": lambda value: f"loss {value:.4g}",
    "learning_rate": lambda value: f"lr {value:.1e}",
    "tokens_per_second": lambda value: f"{value:,.0f} tok/s",
    "mfu": lambda value: f"MFU {value:.1%}",
    "seconds_left": lambda value: f"left {timedelta(seconds=round(value))}",
    "train_loss": lambda value: f"mean loss {value:.4g}",
    "train_runtime": lambda value: f"took {timedelta(seconds=round(value))}",
}
_IN_BAR = ("loss", "tokens_per_second", "mfu", "seconds_left")
# Said by the beginning of the line or the bars, or for curves rather than for reading.
_HIDDEN = frozenset({"stage", "tokens", "train_flops", "total_flos", "epoch", "grad_norm", "num_input_tokens_seen"})
_HIDDEN_ENDINGS = ("_per_second", "_runtime", "_preparation_time")
_LONGEST = 100


def log_line(stage: str, step: int, steps: int, logs: Mapping[str, Any]) -> str:
    """What a trainer logged, as one line.

    Args:
        stage: the name of the stage in training.
        step, steps: optimizer steps done, and of the whole run.
        logs: as `Trainer.log` gets them; names that are not known are shown as they are.

    >>> log_line("stage-1-layer", 120, 460, {"loss": 4.2134, "tokens_per_second": 12345.6, "seconds_left": 191.7})
    'stage-1-layer  step 120/460  loss 4.213  12,346 tok/s  left 0:03:12'
    >>> log_line("stage-1-layer", 120, 460, {"eval_loss": 4.1, "eval_perplexity": 60.34})
    'stage-1-layer  step 120/460  held-out loss 4.1, perplexity 60.34'
    """
    parts = [stage, f"step {step:,}/{steps:,}", *_figures(logs, _SHOWN)]
    others = {key: value for key, value in logs.items() if not _is_hidden(key)}
    held_out = [key for key in others if key.startswith("eval_")]
    if held_out:
        held_out.sort(key=lambda key: not key.endswith(("loss", "perplexity")))  # these first
        names = [key.removeprefix("eval_").replace("_", " ") for key in held_out]
        figures = [f"{name} {_text(others.pop(key))}" for name, key in zip(names, held_out, strict=True)]
        parts.append("held-out " + ", ".join(figures))
    return "  ".join([*parts, *(f"{key} {_text(value)}" for key, value in others.items())])


def _figures(logs: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    return [_SHOWN[name](logs[name]) for name in names if logs.get(name) is not None]


def _is_hidden(key: str) -> bool:
    return key in _SHOWN or key in _HIDDEN or key.endswith(_HIDDEN_ENDINGS)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:_LONGEST]


class RunProgress(ProgressCallback):
    """Shows how far a staged run has come; takes the place of transformers' `ProgressCallback`.

    A bar for the tokens of the run, one for the steps of its stage, and one for an evaluation while it lasts; logs
    are lines above them. Where the output is no terminal there are no bars, only lines. Only the main process
    writes.

    Args:
        span: tells the stage in training.
        spans: all stages.
        file: where lines and bars go. Otherwise lines go to standard output and bars to standard error.
    """

    def __init__(self, span: Callable[[], StageSpan], spans: Sequence[StageSpan], file: TextIO | None = None) -> None:
        super().__init__()
        self.span = span
        self.spans = tuple(spans)
        self.file = file
        self.run_bar: tqdm[Any] | None = None
        self.training_bar: tqdm[Any] | None = None  # of the stage: what one `train()` of the base class shows
        self.prediction_bar: tqdm[Any] | None = None

    def close(self) -> None:
        """Close the bars that are open. No event tells of an interruption: who catches one calls this."""
        for bar in (self.prediction_bar, self.training_bar, self.run_bar):
            if bar is not None:
                bar.close()
        self.prediction_bar = self.training_bar = self.run_bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new bar for the stage, beside that of the run."""
        if not state.is_world_process_zero:
            return
        if self.training_bar is not None:  # a stage that never ended: the run was interrupted, and begins again
            self.close()
        span, last = self.span(), self.spans[-1]
        if self.run_bar is None:
            self.run_bar = self._bar(
                desc="run",
                total=last.first_token + last.tokens,
                initial=span.at_step(state.global_step)[0],
                unit="tokens",
                unit_scale=True,
                bar_format=_RUN_BAR,
            )
        done = state.global_step - span.first_step
        self.training_bar = self._bar(desc=span.name, total=span.steps, initial=done, unit="step", leave=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move both bars."""
        if self.run_bar is not None and self.training_bar is not None:
            span = self.span()
            self.run_bar.update(span.at_step(state.global_step)[0] - self.run_bar.n)
            self.training_bar.update(state.global_step - span.first_step - self.training_bar.n)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """As in `ProgressCallback`, with a name."""
        if state.is_world_process_zero and self.prediction_bar is None and has_length(eval_dataloader):
            self.prediction_bar = self._bar(desc="held out", total=len(eval_dataloader), unit="batch", leave=False)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line above the bars, and what is new behind that of the run."""
        if not state.is_world_process_zero or not logs:
            return
        if self.run_bar is not None and "loss" in logs:
            self.run_bar.set_postfix_str(", ".join(_figures(logs, _IN_BAR)), refresh=False)  # the line draws it anew
        tqdm.write(log_line(self.span().name, state.global_step, self.spans[-1].end_step, logs), file=self.file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the stage's bar, and with the last stage, or one that was stopped, that of the run."""
        if self.training_bar is None:
            return
        super().on_train_end(args, state, control, **kwargs)
        span = self.span()
        if state.global_step < span.end_step or span.number == self.spans[-1].number:
            self.close()

    def _bar(self, **settings: Any) -> tqdm[Any]:
        # disable=None: none where `file` is no terminal, as a log file would be flooded with half-drawn bars.
        return tqdm(dynamic_ncols=True, disable=None, file=self.file, **settings)
