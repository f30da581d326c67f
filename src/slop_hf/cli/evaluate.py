"""`slop eval`."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import slop_hf

from ..errors import EvaluationError
from ..evaluation.tasks import PAPER, PAPER_TASKS, PERPLEXITY, find_headline, list_task_names
from ..io.serialization import to_plain
from ..runs.directory import RunDirectory
from ..runs.records import EvalRecord
from .data import read_data

if TYPE_CHECKING:
    from ..evaluation.held_out import HeldOut

NOTHING = "–"

_PAPER_LIST = "\n".join(
    f"* {name}: `{one.task}`, {one.num_fewshot}-shot, {one.metric}{f' ({one.note})' if one.note else ''}"
    for name, one in PAPER_TASKS.items()
)
HELP = f"""Score the stages of a run, or a model, on tasks of lm-eval, and measure perplexity on held-out text.

`--tasks paper` are the benchmarks that the paper names. It does not state its settings; these are ours:

{_PAPER_LIST}

`perplexity` is exact over all tokens of held-out text, by source. Any other name is a task or group of lm-eval.

Records go into `evaluations.json` of each stage. Results are kept by weights and settings: what is known is not scored
again.

On several GPUs: `accelerate launch -m slop_hf eval RUN`.

Examples:

`slop eval runs/tiny --tasks perplexity --data recipes/grow_tiny.yaml`

`slop eval runs/tiny --tasks paper --limit 100`
"""


def evaluate(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run's directory; or a model's, or its Hub id[@revision].")
    ],
    tasks: Annotated[str, typer.Option(help="paper, perplexity, or tasks of lm-eval, parted by commas.")] = PAPER,
    limit: Annotated[int | None, typer.Option(help="Score the first so many documents of a task only.")] = None,
    batch_size: Annotated[str, typer.Option(help="auto, the largest that fits, or a number.")] = "auto",
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question. Default: each task's own.")
    ] = None,
    stage: Annotated[
        list[int] | None, typer.Option("--stage", help="A stage of the run, several by repeating. Default: all.")
    ] = None,
    after_growth: Annotated[
        bool, typer.Option("--after-growth", help="Score each stage also right after its growth, before training.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="For perplexity: the file of a run or a mixture, of which a part is held out.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of it: --set data.block_size=512")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="For perplexity: a text file, several by repeating.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens of a block of --text.")] = 256,
    include_path: Annotated[
        Path | None, typer.Option(help="A directory with tasks of your own, lm-eval's YAML.")
    ] = None,
    datasets: Annotated[
        Path | None, typer.Option(help="A directory with data of tasks, TASK/SPLIT.jsonl, in place of the Hub's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1. Default: a GPU if there is one.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Where results are kept. Default: in the HF home.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be scored, and score nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    run = RunDirectory(source)
    if not run.exists and (stage or after_growth):
        raise EvaluationError(f"{source} is not a run, and has no stages: leave out --stage and --after-growth")
    if dry_run:
        _show_plan(source, list_task_names(tasks), stage, after_growth, as_json=as_json)
        return
    from ..training.launch import launched  # with torch, which `slop --help` does without

    with launched(), redirect_stdout(sys.stderr):  # libraries print into what may be JSON
        settings = slop_hf.EvalSettings(
            tasks=list_task_names(tasks),
            limit=limit,
            batch_size=_batch_size(batch_size),
            num_fewshot=num_fewshot,
            device=device,
            cache_dir=cache_dir,
            held_out=_held_out(source, data, change or [], text or [], block_size),
            include_path=include_path,
            datasets=datasets,
        )
        if run.exists:
            found = slop_hf.evaluate_run(run, settings, stages=stage, after_growth=after_growth)
        else:
            given = {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}
            records = slop_hf.evaluate_model(source, **given)
    if int(os.environ.get("RANK", "0")):
        return
    if run.exists:
        _show_run(run, found, settings.tasks, as_json=as_json)
    elif as_json:
        print(json.dumps({"model": source, "evaluations": to_plain(records)}, indent=2, ensure_ascii=False))
    else:
        Console().print(_table({source: records}, settings.tasks))


def _batch_size(given: str) -> int | str:
    return int(given) if given.isdigit() else given


def _held_out(
    source: str, data: Path | None, changes: list[str], texts: Sequence[Path], block_size: int
) -> HeldOut | None:
    """What perplexity is measured on, tokenized by the model's tokenizer; None where nothing is given."""
    if data is None and not texts:
        return None
    if data is not None and texts:
        raise EvaluationError("--data and --text are two ways to say what perplexity is measured on: give one")
    from ..data import load_tokenizer, prepare_data
    from ..evaluation.held_out import HeldOut
    from ..evaluation.runs import stages_to_score
    from ..evaluation.scoring import EvaluatedModel

    run = RunDirectory(source)
    tokenizer = str(run.stage_dir(stages_to_score(run)[0]) if run.exists else EvaluatedModel(source).directory)
    if data is not None:
        config = dataclasses.replace(read_data(data, changes), tokenizer=tokenizer)
        return HeldOut.of_corpus(prepare_data(config))
    if missing := [str(path) for path in texts if not path.is_file()]:
        raise EvaluationError(f"--text {missing[0]}: no such file")
    contents = {path.name: path.read_text(encoding="utf-8") for path in texts}
    return HeldOut.of_texts(contents, load_tokenizer(tokenizer), block_size)


def _show_plan(
    source: str, tasks: Sequence[str], stages: Sequence[int] | None, after_growth: bool, *, as_json: bool
) -> None:
    from ..evaluation.runs import stages_to_score

    run = RunDirectory(source)
    names = [source]
    if run.exists:
        names = [run.schedule.stage_name(number) for number in stages_to_score(run, stages)]
    if as_json:
        print(json.dumps({"stages": names, "tasks": list(tasks), "after_growth": after_growth}, indent=2))
        return
    shots = {one.task: f" ({one.num_fewshot}-shot)" for one in PAPER_TASKS.values()}
    print(f"would score {', '.join(names)}{' (and each after its growth)' if after_growth else ''}")
    print("on " + ", ".join(f"{task}{shots.get(task, '')}" for task in tasks))


def _show_run(
    run: RunDirectory, found: Mapping[int, Sequence[EvalRecord]], tasks: Sequence[str], *, as_json: bool
) -> None:
    from ..evaluation.runs import AFTER_GROWTH, END, compute_run_utility

    utility = compute_run_utility(run, found)
    names = {number: run.schedule.stage_name(number) for number in found}
    if as_json:
        stages = [
            {"stage": number, "name": names[number], "evaluations": to_plain(records)}
            for number, records in found.items()
        ]
        print(json.dumps({"run": str(run.path), "stages": stages, "marginal_utility": utility}, indent=2))
        return
    rows: dict[str, list[EvalRecord]] = {}
    for number, records in found.items():
        for when, label in ((AFTER_GROWTH, f"{names[number]}, after growth"), (END, names[number])):
            if of_row := [record for record in records if record.when == when]:
                rows[label] = of_row
    Console().print(_table(rows, tasks))
    if utility is not None:
        print(f"marginal utility (Eq. 2): {utility:.4g} perplexity a device hour")


def _table(rows: Mapping[str, Sequence[EvalRecord]], tasks: Sequence[str]) -> Table:
    """A row for each model, a column for each task with the metric that stands for it."""
    chosen: dict[str, dict[str, tuple[str, float]]] = {}
    for label, records in rows.items():
        pairs = {record.task: find_headline(record) for record in records}
        chosen[label] = {task: pair for task, pair in pairs.items() if pair is not None}
    found = {task: None for row in chosen.values() for task in row}
    # A tag of lm-eval stands for tasks and has no score of its own: theirs are shown.
    columns = tasks if all(task in found for task in tasks) else list(found)
    table = Table()
    table.add_column("stage")
    for task in columns:
        metric = next(row[task][0] for row in chosen.values() if task in row)
        table.add_column(Text(task if task == metric else f"{task}\n{metric}"), justify="right")
    for label, row in chosen.items():
        cells = [_cell(row[task]) if task in row else NOTHING for task in columns]
        table.add_row(Text(label), *cells)
    return table


def _cell(pair: tuple[str, float]) -> str:
    metric, value = pair
    return f"{value:,.2f}" if PERPLEXITY in metric else f"{value:.4f}"
