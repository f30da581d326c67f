"""Progress bars and log lines of a staged run, on a terminal and in a file."""

import io
import re
from dataclasses import replace

import pytest
from training_runs import BATCH, BLOCK, SCHEDULE, STEPS, TOKENS, small_model, trainer
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from slop_hf import RunDirectory
from slop_hf.runs.status import LiveProgress
from slop_hf.training.progress import ProgressFile, RunProgress, describe_run, format_log_line
from slop_hf.training.spans import compute_stage_spans

SPANS = compute_stage_spans(SCHEDULE, small_model().config, BLOCK, [BATCH] * 4)
FIRST, SECOND, *_, LAST = SPANS


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Run:
    """Sends a callback the events of a trainer."""

    def __init__(self, file, *, step=0, main=True, spans=SPANS):
        self.span = FIRST
        self.state = TrainerState(global_step=step, max_steps=LAST.end_step, is_world_process_zero=main)
        self.shown = RunProgress(lambda: self.span, spans, file=file)

    def send(self, event, **kwargs):
        getattr(self.shown, f"on_{event}")(None, self.state, TrainerControl(), **kwargs)

    def begin(self, span):
        self.span = span
        self.send("train_begin")

    def step_to(self, step):
        while self.state.global_step < step:
            self.state.global_step += 1
            self.send("step_end")

    @property
    def bars(self):
        return self.shown.run_bar, self.shown.training_bar


def lines_of(file):
    """Return the lines that stay on screen, without cursor movements and bars."""
    text = re.sub(r"\x1b\[A", "", file.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.startswith("stage-") and "|" not in line]


# ---- Lines -----------------------------------------------------------------------------------------------------


def test_a_line_of_training():
    logs = {
        "loss": 4.21345,
        "grad_norm": 0.7,
        "learning_rate": 0.00294,
        "epoch": 0.1,
        "stage": 1,
        "tokens": 1000,
        "train_flops": 1e9,
        "tokens_per_second": 12345.4,
        "mfu": 0.4123,
        "seconds_left": 93784.2,
    }
    line = "stage-1-layer  step 1,120/4,600  loss 4.213  lr 2.9e-03  12,345 tok/s  MFU 41.2%  left 1 day, 2:03:04"
    assert format_log_line("stage-1-layer", 1120, 4600, logs) == line


def test_a_line_shows_what_it_does_not_know():
    """Values logged by a user's own callback are shown, and a missing value is skipped."""
    logs = {"loss": 1.0, "seconds_left": None, "entropy": 0.123456, "router": "balanced", "experts": 8, "x": "y" * 500}
    assert (
        format_log_line("s", 1, 2, logs)
        == f"s  step 1/2  loss 1  entropy 0.1235  router balanced  experts 8  x {'y' * 100}"
    )


def test_a_line_of_held_out_data():
    logs = {
        "eval_wiki_accuracy": 0.25,
        "eval_wiki_loss": 4.1,
        "eval_wiki_runtime": 3.0,
        "eval_wiki_samples_per_second": 12.0,
        "eval_model_preparation_time": 0.001,
        "stage": 1,
        "tokens": 1000,
        "train_flops": 1e9,
        "eval_wiki_perplexity": 60.3403,
        "epoch": 0.1,
    }
    line = "s  step 1/2  held-out wiki loss 4.1, wiki perplexity 60.34, wiki accuracy 0.25"
    assert format_log_line("s", 1, 2, logs) == line


def test_a_line_at_the_end_of_a_stage():
    logs = {"train_runtime": 61.4, "train_samples_per_second": 5.0, "train_loss": 4.5, "total_flos": 1e12, "epoch": 1}
    assert format_log_line("s", 2, 2, logs) == "s  step 2/2  mean loss 4.5  took 0:01:01"


# ---- Bars ------------------------------------------------------------------------------------------------------


def test_the_run_has_one_bar_and_each_stage_its_own():
    file = Terminal()
    run = Run(file)
    run.begin(FIRST)
    of_run, of_first = run.bars
    assert (of_run.desc, of_run.unit, of_run.n, of_run.total) == ("run", "tokens", 0, 4 * TOKENS)
    assert (of_first.desc, of_first.unit, of_first.n, of_first.total) == ("stage-0-initial", "step", 0, STEPS)
    run.step_to(3)
    assert (of_run.n, of_first.n) == (3 * BLOCK * BATCH, 3)
    run.step_to(STEPS)
    run.send("train_end")
    assert run.bars == (of_run, None) and of_first.disable and not of_run.disable, "the run continues"

    run.begin(SECOND)
    again, of_second = run.bars
    assert again is of_run and of_run.n == TOKENS
    assert (of_second.desc, of_second.n, of_second.total) == ("stage-1-layer", 0, STEPS)
    run.step_to(STEPS + 2)
    assert (of_run.n, of_second.n) == (TOKENS + 2 * BLOCK * BATCH, 2)
    run.shown.close()
    assert run.bars == (None, None) and of_run.disable and of_second.disable


def test_the_runs_bar_ends_with_the_last_stage():
    file = Terminal()
    run = Run(file)
    for span in SPANS:
        run.begin(span)
        of_run, _ = run.bars
        run.step_to(span.end_step)
        run.send("train_end")
        assert bool(of_run.disable) == (span is LAST)
    assert run.bars == (None, None)
    assert "run: 100%" in file.getvalue() and "2.05k/2.05k tokens" in file.getvalue()


def test_a_last_stage_without_tokens():
    """It begins and ends like any other stage; the run's bar stays open until then."""
    empty = replace(LAST, first_step=LAST.end_step, steps=0, blocks=0, tokens=0, flops=0.0, number=LAST.number + 1)
    run = Run(Terminal(), step=LAST.first_step, spans=(*SPANS, empty))
    run.begin(LAST)
    of_run, _ = run.bars
    run.step_to(LAST.end_step)
    run.send("train_end")
    assert run.bars == (of_run, None)
    run.begin(empty)
    run.send("train_end")
    assert run.bars == (None, None) and of_run.disable


def test_resumed_in_mid_stage():
    run = Run(Terminal(), step=STEPS + 3)
    run.begin(SECOND)
    of_run, of_stage = run.bars
    assert (of_run.initial, of_run.n, of_run.total) == (TOKENS + 3 * BLOCK * BATCH, of_run.initial, 4 * TOKENS)
    assert (of_stage.initial, of_stage.n, of_stage.total) == (3, 3, STEPS)
    run.step_to(STEPS + 4)
    assert (of_run.n, of_stage.n) == (TOKENS + 4 * BLOCK * BATCH, 4)
    run.shown.close()


def test_a_stage_that_was_stopped_ends_the_bars():
    run = Run(Terminal())
    run.begin(FIRST)
    of_run, of_stage = run.bars
    run.step_to(3)
    run.send("train_end")
    assert run.bars == (None, None) and of_run.disable and of_stage.disable


def test_an_interrupted_run_begins_with_new_bars():
    """There is no event for an interruption; the next beginning closes the old bars."""
    run = Run(Terminal())
    run.begin(FIRST)
    old = run.bars
    run.step_to(5)
    run.state.global_step = 3  # where the checkpoint was
    run.begin(FIRST)
    assert all(bar.disable for bar in old)
    of_run, of_stage = run.bars
    assert (of_run.n, of_stage.n) == (3 * BLOCK * BATCH, 3)
    run.shown.close()
    run.shown.close()


def test_the_bar_of_the_run_shows_the_last_figures():
    file = Terminal()
    run = Run(file)
    run.begin(FIRST)
    run.step_to(3)
    logs = {"loss": 4.2, "learning_rate": 1e-3, "tokens_per_second": 900.0, "mfu": 0.5, "seconds_left": 61.0}
    run.send("log", logs=logs)
    run.send("log", logs={"eval_loss": 4.1, "eval_perplexity": 60.3})
    assert run.bars[0].postfix == "loss 4.2, 900 tok/s, MFU 50.0%, left 0:01:01", "until the next training loss"
    run.shown.close()
    assert "run:   9%" in file.getvalue() and ", loss 4.2, 900 tok/s, MFU 50.0%, left 0:01:01]" in file.getvalue()
    assert lines_of(file) == [
        "stage-0-initial  step 3/32  loss 4.2  lr 1.0e-03  900 tok/s  MFU 50.0%  left 0:01:01",
        "stage-0-initial  step 3/32  held-out loss 4.1, perplexity 60.3",
    ]


def test_an_evaluation_has_a_bar_while_it_lasts():
    file = Terminal()
    run = Run(file)
    run.begin(FIRST)
    for _ in range(2):
        for _ in range(4):
            run.send("prediction_step", eval_dataloader=[None] * 4)
        of_evaluation = run.shown.prediction_bar
        assert (of_evaluation.desc, of_evaluation.n, of_evaluation.total) == ("held out", 4, 4)
        run.send("evaluate")
        assert run.shown.prediction_bar is None and of_evaluation.disable
    assert "held out: " in file.getvalue()
    run.shown.close()


def test_a_file_gets_lines_and_no_bars():
    file = io.StringIO()
    run = Run(file)
    run.begin(FIRST)
    run.step_to(3)
    run.send("prediction_step", eval_dataloader=[None] * 4)
    run.send("evaluate")
    run.send("log", logs={"loss": 4.2})
    run.step_to(STEPS)
    run.send("train_end")
    run.shown.close()
    head, line = file.getvalue().splitlines()
    assert head == describe_run(SPANS, "", 0) and line == "stage-0-initial  step 3/32  loss 4.2"


def test_a_run_begins_with_a_line_about_it():
    head = describe_run(SPANS, "runs/a", 0)
    assert head.startswith("training runs/a: ") and f"in {len(SPANS)} stages, " in head and "Ctrl-C" in head
    assert "continued" not in head and f"continued at step 3 of {LAST.end_step}" in describe_run(SPANS, "runs/a", 3)
    assert "stages" not in describe_run(SPANS[:1], "runs/a", 0)


def test_an_evaluation_right_after_growth_says_so():
    file = io.StringIO()
    run = Run(file, step=SECOND.first_step)
    run.begin(SECOND)
    run.send("log", logs={"eval_loss": 4.5})
    run.step_to(SECOND.first_step + 1)
    run.send("log", logs={"eval_loss": 4.25})
    run.shown.close()
    first, later = file.getvalue().splitlines()[1:]
    assert first.startswith(f"{SECOND.name} after growth  step ") and later.startswith(f"{SECOND.name}  step ")


def test_the_progress_file_is_written_at_most_every_two_seconds(tmp_path):
    seconds = iter([10.0, 11.0, 12.5])
    callback = ProgressFile(tmp_path, lambda: SECOND, LAST, clock=lambda: next(seconds))
    state = TrainerState(global_step=SECOND.first_step + 1, is_world_process_zero=True)
    for loss, expected in ((5.0, 5.0), (4.0, 5.0), (3.0, 3.0)):
        callback.on_log(None, state, None, {"loss": loss, "epoch": 1.0})
        live = LiveProgress.load(tmp_path)
        assert (live.loss, live.stage, live.step) == (expected, SECOND.number, SECOND.first_step + 1)
    state.is_world_process_zero = False
    callback.on_log(None, state, None, {"loss": 1.0})
    assert LiveProgress.load(tmp_path).loss == 3.0


def test_only_the_main_process_writes():
    file = Terminal()
    run = Run(file, main=False)
    run.begin(FIRST)
    run.step_to(STEPS)
    run.send("prediction_step", eval_dataloader=[None] * 4)
    run.send("evaluate")
    run.send("log", logs={"loss": 4.2})
    run.send("train_end")
    assert run.bars == (None, None) and run.shown.prediction_bar is None
    assert file.getvalue() == ""


# ---- In a trainer ----------------------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def shown_run(path, file, **settings):
    """A trainer with these bars instead of transformers' own."""
    run = trainer(path, disable_tqdm=False, logging_steps=4, **settings)
    spans = compute_stage_spans(run.schedule, run.model.config, BLOCK, [BATCH] * 4)
    run.remove_callback(ProgressCallback)

    def span():
        step = run.state.global_step
        return next((span for span in spans if step < span.end_step), spans[-1])

    shown = RunProgress(span, spans, file=file)
    run.add_callback(shown)
    return run, shown


def test_a_run_and_its_resumption(tmp_path):
    path = tmp_path / "out"
    file = Terminal()
    run, shown = shown_run(path, file, callbacks=[StopAt(STEPS + 5)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert shown.run_bar.n == TOKENS + 4 * BLOCK * BATCH, "the interrupted step is not shown as done"
    shown.close()

    file = Terminal()
    run, shown = shown_run(path, file)
    run.train(resume_from_checkpoint=True)
    assert shown.run_bar is None and shown.training_bar is None
    text = file.getvalue()
    first, second = text.split("\r")[1:3]
    assert re.match(r"run:  38%\|[^|]*\| 768/2.05k tokens", first), "12 of 32 steps were done"
    assert re.match(r"stage-1-layer:  50%\|[^|]*\| 4/8", second)
    assert "run: 100%" in text and "run:   0%" not in text and "stage-0" not in text
    losses = [line for line in lines_of(file) if "  loss " in line]
    of_run = [(entry["step"], entry["loss"]) for entry in RunDirectory(path).history() if "loss" in entry]
    expected = [(f"step {step}/32", f"loss {loss:.4g}") for step, loss in of_run if step > STEPS + 4]
    assert [tuple(re.split("  +", line)[1:3]) for line in losses] == expected and len(expected) == 5
