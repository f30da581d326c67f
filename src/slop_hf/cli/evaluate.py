"""`slop eval`: the command, its dry run and its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

import slop_hf

from ..errors import EvaluationError
from ..evaluation.tasks import PAPER, PAPER_TASKS, PERPLEXITY, find_headline, list_task_names
from ..io.hub_address import Address
from ..io.serialization import read_text
from ..io.units import NOTHING
from ..runs.directory import RunDirectory
from ..runs.records import AFTER_GROWTH, END_OF_STAGE, EvalRecord
from .data import read_data
from .options import AsJson
from .shared import is_first_process, print_json, print_table, redirect_prints, show_steps

if TYPE_CHECKING:
    from ..evaluation.held_out import HeldOut
    from ..evaluation.settings import EvalSettings

_PAPER_LIST = "\n".join(
    f"* {name}: `{task.task}`, {task.num_fewshot}-shot, {task.metric}{f' ({task.note})' if task.note else ''}"
    for name, task in PAPER_TASKS.items()
)
HELP = f"""Score the stages of a run, or a model, on lm-eval tasks, and measure perplexity on held-out text.

`--tasks paper` stands for the benchmarks that the paper names. It does not state its settings; these are ours:

{_PAPER_LIST}

`perplexity` is exact over all tokens of held-out text, per source. Any other name is a task or group of lm-eval.

The records are written to `evaluations.json` of each stage. Scores are cached by weights and settings, so that nothing
is scored twice.

On several GPUs: `accelerate launch -m slop_hf eval RUN`.

Examples:

`slop eval runs/tiny --tasks perplexity --data recipes/grow_tiny.yaml`

`slop eval runs/tiny --tasks paper --limit 100`
"""


def evaluate_command(
    source: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="Run directory, model directory, or Hub id[@revision].")
    ],
    tasks: Annotated[str, typer.Option(help="paper, perplexity, or lm-eval tasks, separated by commas.")] = PAPER,
    limit: Annotated[int | None, typer.Option(help="Score only the first N documents of each task.")] = None,
    batch_size: Annotated[str, typer.Option(help="A number, or auto for the largest that fits.")] = "auto",
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question. Default: set by each task.")
    ] = None,
    stage: Annotated[
        list[int] | None, typer.Option("--stage", help="Stage of the run to score; repeat it for more. Default: all.")
    ] = None,
    after_growth: Annotated[
        bool, typer.Option("--after-growth", help="Also score each stage right after its growth, before training.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="For perplexity: YAML file of a run or a mixture; its held-out part is used.")
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="Change a value of that file: data.block_size=512")
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="For perplexity: text file instead; repeat it for more.")
    ] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block of --text.")] = 256,
    include_path: Annotated[Path | None, typer.Option(help="Directory with your own tasks in lm-eval's YAML.")] = None,
    datasets: Annotated[
        Path | None, typer.Option(help="Directory with task data, TASK/SPLIT.jsonl, that replaces the Hub's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Device, such as cuda:1. Default: a GPU if there is one.")] = None,
    cache_dir: Annotated[Path | None, typer.Option(help="Cache of the scores. Default: in the HF home.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be scored; score nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    run, names = RunDirectory(source), list_task_names(tasks)
    if not run.exists:
        _check_model(source, is_dry=dry_run)
        if stage or after_growth:
            raise EvaluationError(f"{source} is not a run, and has no stages: leave out --stage and --after-growth")
    stages = run.select_stages(stage) if run.exists else ()
    if data is not None and text:
        raise EvaluationError("--data and --text both name the text for perplexity: give one of them")
    if change and data is None:
        raise EvaluationError("--set changes a value of the file that --data names: give --data, too")
    if dry_run:
        models = [run.schedule.stage_name(number) for number in stages] if run.exists else [source]
        _show_plan(models, names, after_growth, as_json=as_json)
        return
    from ..evaluation.held_out import HeldOut  # with torch, which `slop --help` does without
    from ..training.launch import guard_exit

    with guard_exit(), redirect_prints(as_json=True), show_steps("slop_hf.evaluation"):
        has_text = data is not None or bool(text)
        settings = slop_hf.EvalSettings(
            tasks=names,
            limit=limit,
            batch_size=int(batch_size) if batch_size.isdigit() else batch_size,
            num_fewshot=num_fewshot,
            device=device,
            cache_dir=cache_dir,
            held_out=HeldOut({}, None, "") if has_text else None,
            include_path=include_path,
            datasets=datasets,
        )
        if has_text:  # only now that all else is right
            held_out = _read_held_out(source, settings, data, change, text or [], block_size)
            settings = dataclasses.replace(settings, held_out=held_out)
        if run.exists:
            records_by_stage = slop_hf.evaluate_run(run, settings, stages=stages, after_growth=after_growth)
        else:
            records = slop_hf.evaluate_model(source, settings)
    if not is_first_process():
        return
    if run.exists:
        _show_run(run, records_by_stage, settings.tasks, as_json=as_json)
    elif as_json:
        print_json({"model": source, "evaluations": records})
    else:
        _show_scores({source: records}, settings.tasks)


def _check_model(source: str, *, is_dry: bool) -> None:
    """Refuse what is neither a run, nor a model's directory, nor the name of a model on the Hub."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise EvaluationError(
                f"{source} is neither a run nor a model directory: no schedule.yaml, and no config.json"
            )
        return
    address = None if path.exists() else Address.find(source)
    # A dry run does not look on the Hub, where only few and old models have a name without an owner.
    if address is None or (is_dry and "/" not in address.repo_id):
        raise EvaluationError(
            f"{source} is neither a run nor a model: there is no such directory, and models on the Hub are named "
            "user/name[@revision]"
        )


def _read_held_out(
    source: str,
    settings: EvalSettings,
    data: Path | None,
    changes: list[str] | None,
    texts: Sequence[Path],
    block_size: int,
) -> HeldOut:
    """Return the text to measure perplexity on, tokenized by the model's tokenizer."""
    from ..data import load_tokenizer, prepare_data
    from ..evaluation.held_out import HeldOut
    from ..evaluation.scoring import EvaluatedModel, check_tasks

    contents = _read_texts(texts)
    run = RunDirectory(source)
    tokenizer = str(run.stage_dir(0) if run.exists else EvaluatedModel(source).directory)
    if data is not None:
        config = dataclasses.replace(read_data(data, changes), tokenizer=tokenizer)
        check_tasks(settings)  # before the data is prepared, which may take long
        return HeldOut.from_corpus(prepare_data(config))
    return HeldOut.from_texts(contents, load_tokenizer(tokenizer), block_size)


def _read_texts(paths: Sequence[Path]) -> dict[str, str]:
    """Return the texts of files by the files' names, or by their paths if two have the same name."""
    names = [path.name for path in paths]
    labels = [str(path) if names.count(path.name) > 1 else path.name for path in paths]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise EvaluationError(f"--text {repeated[0]} is given twice: name each file once")
    return {label: read_text(path, error=EvaluationError) for label, path in zip(labels, paths, strict=True)}


def _show_plan(names: Sequence[str], tasks: Sequence[str], after_growth: bool, *, as_json: bool) -> None:
    if as_json:
        print_json({"stages": names, "tasks": tasks, "after_growth": after_growth})
        return
    shots = {task.task: f" ({task.num_fewshot}-shot)" for task in PAPER_TASKS.values()}
    print(f"would score {', '.join(names)}{' (and each right after its growth)' if after_growth else ''}")
    print("on " + ", ".join(f"{task}{shots.get(task, '')}" for task in tasks))


def _show_run(
    run: RunDirectory, records: Mapping[int, Sequence[EvalRecord]], tasks: Sequence[str], *, as_json: bool
) -> None:
    from ..evaluation.runs import compute_run_utility

    utility = compute_run_utility(run, records)
    names = {number: run.schedule.stage_name(number) for number in records}
    if as_json:
        stages = [
            {"stage": number, "name": names[number], "evaluations": of_stage} for number, of_stage in records.items()
        ]
        print_json({"run": str(run.path), "stages": stages, "marginal_utility": utility})
        return
    rows: dict[str, list[EvalRecord]] = {}
    for number, of_stage in records.items():
        for when, label in ((AFTER_GROWTH, f"{names[number]}, after growth"), (END_OF_STAGE, names[number])):
            if of_row := [record for record in of_stage if record.when == when]:
                rows[label] = of_row
    _show_scores(rows, tasks)
    if utility is not None:
        print(f"marginal utility (Eq. 2): {utility:.4g} perplexity per device hour")


def _show_scores(rows: Mapping[str, Sequence[EvalRecord]], tasks: Sequence[str]) -> None:
    """Print one row per model, and one column per task with its headline metric."""
    scores: dict[str, dict[str, tuple[str, float]]] = {}
    metrics: dict[str, str] = {}
    for label, records in rows.items():
        headlines = {record.task: find_headline(record) for record in records}
        scores[label] = {task: headline for task, headline in headlines.items() if headline is not None}
        metrics |= {task: metric for task, (metric, _) in scores[label].items() if task not in metrics}
    # A tag of lm-eval stands for several tasks and has no score itself: then the scores of the tasks are shown.
    columns = tasks if all(task in metrics for task in tasks) else list(metrics)
    print_table(
        "",
        (
            "stage",
            *(
                f">{escape(task)}" if task == metrics[task] else f">{escape(task)}\n{metrics[task]}"
                for task in columns
            ),
        ),
        [
            (escape(label), *(_format_score(*row[task]) if task in row else NOTHING for task in columns))
            for label, row in scores.items()
        ],
    )


def _format_score(metric: str, value: float) -> str:
    return f"{value:,.2f}" if PERPLEXITY in metric else f"{value:.4f}"
