"""`slop init`: a run file to begin with, copied from a recipe or planned for a model and a budget."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console

from ..errors import RunError, SlopError
from ..io.files import check_output, write_text
from ..io.serialization import Json, to_plain, to_yaml
from ..io.units import format_count
from ..planning.advice import Advice, Question, advise, build_run
from .model_config import build_config, choose_sequence_length, read_config, read_whole_config
from .options import AsJson
from .recipe_files import RecipeFile, find_recipe, list_launch_configs, list_recipes, plan_copies
from .shared import print_json

_BUDGET = re.compile(r"([\d.,_]+(?:[eE][+-]?\d+)?)\s*(flops|tokens)", re.IGNORECASE)
#: Titles of the recipes in a folder.
_GROUPS = {"": "Runs", "data": "Mixtures of data", "experiments": "Experiments, for slop compare"}
#: What the sections of a planned run hold, for the comments of its file.
_SECTIONS = {
    "schedule": "The structure and the training tokens of each stage.",
    "model": "Settings of the model that growth does not change.",
    "data": "Training text: data.source is a file, a folder, a URL or a data set on the Hub (owner/name).",
    "training": "Arguments of transformers.TrainingArguments, and those of slop-hf.",
}


def begin_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Name of a recipe, such as tiny.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write. Default: the name of the recipe, and .yaml.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run file with comments, as a beginning for your own.

    With a name, it is a copy of that recipe; files that the recipe names, such as its mixture of data, are written
    next to it. Without a name, the recipes are listed. In a terminal you are then asked for a model, training text
    and a budget, and get the run that `slop advise` proposes for them.

    Examples:

    `slop init tiny -o run.yaml` (trains on a CPU in minutes, offline)

    `slop init data/fineweb-edu`
    """
    check_output(output, "--output", RunError)
    if name is None:
        asks = _is_terminal() and not as_json
        if output is not None and not asks:
            raise RunError("--output needs the name of a recipe; `slop init` lists them")
        _show_recipes(as_json, runs_last=asks)
        if not asks:
            return
        name = typer.prompt("\nName of a recipe, or Enter for a run of your own", default="", show_default=False)
    if name:
        recipe = find_recipe(name.removesuffix(".yaml"))
        _copy_recipe(recipe, output or Path(f"{Path(recipe.name).name}.yaml"), force)
    else:
        _plan_own_run(output or Path("run.yaml"), force)


def _is_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _show_recipes(as_json: bool, *, runs_last: bool) -> None:
    """Print the recipes; the runs last if a question follows, so that a small terminal still shows them."""
    if as_json:
        print_json([{"name": recipe.name, "about": recipe.about} for recipe in list_recipes()])
        return
    console = Console(highlight=False)
    groups: dict[str, list[RecipeFile]] = {title: [] for title in _GROUPS.values()}
    for recipe in list_recipes():
        groups[_GROUPS[recipe.name.rpartition("/")[0].partition("/")[0]]].append(recipe)
    sections = [*groups.items(), ("Configurations for slop launch --config", list_launch_configs())]
    for title, entries in reversed(sections) if runs_last else sections:
        width = 2 + max((len(entry.name) for entry in entries), default=0)
        console.print(f"[bold]{title}")
        for entry in entries:
            lines = textwrap.wrap(entry.about, max(console.width - width - 2, 20))
            print(f"  {entry.name:<{width}}" + ("\n" + " " * (width + 2)).join(lines))
    print("\nto begin: slop init tiny -o run.yaml")


def _copy_recipe(recipe: RecipeFile, output: Path, force: bool) -> None:
    copies = plan_copies(recipe.path, output)
    _refuse_existing([path for path, text in copies.items() if not _holds(path, text)], force)
    for path, text in copies.items():
        write_text(path, text)
    others = [str(path) for path in copies if path != output]
    print(f"written: {output}" + (f", and what it needs: {', '.join(others)}" if others else ""))
    kind = recipe.name.partition("/")[0]
    commands = {"data": "slop data inspect {}", "experiments": "slop compare {} --dry-run"}
    print("next: " + commands.get(kind, "slop train {}").format(shlex.quote(str(output))))


def _holds(path: Path, text: str) -> bool:
    """Whether a file holds this text: two recipes may share a mixture."""
    return path.is_file() and path.read_bytes() == text.encode()


def _refuse_existing(paths: list[Path], force: bool) -> None:
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        raise RunError(f"{existing[0]} exists; write to another file with --output, or overwrite it with --force")


class _Answers(NamedTuple):
    """The answers of a user.

    Args:
        model: directory or Hub id of the model to grow; "" for a new one.
        already_seen: tokens that it was trained on.
        data: source of the training text.
        budget, unit: FLOPs to spend, or tokens of the model.
    """

    model: str
    already_seen: float
    data: str
    budget: float
    unit: str


def _plan_own_run(output: Path, force: bool) -> None:
    """Ask for a model, data and a budget, and write the run that is the best way to spend the budget."""
    _refuse_existing([output], force)
    answers = _ask()
    question = Question(
        answers.budget,
        "flops" if answers.unit == "flops" else "tokens",
        start=read_config(answers.model, "the model")[0] if answers.model else None,
        already_seen=answers.already_seen,
        config=build_config(answers.model or None, None, tied=False),
        sequence_length=choose_sequence_length(
            read_whole_config(answers.model, "the model") if answers.model else {}, None
        ),
    )
    advice = advise(question)
    content = build_run(question, advice.options[0], answers.data, answers.model or None)
    write_text(output, _comment_run(content, answers, advice, output))
    print(f"\n{advice.verdict.sentence}")
    print(f"written: {output}, {advice.options[0].label}\nnext: slop train {shlex.quote(str(output))} --dry-run")
    print(f"other ways to spend the budget: {_spell_advise(answers)}")


def _ask() -> _Answers:
    model = typer.prompt(
        "Model to grow: a directory or a Hub id (Enter: a new one)",
        default="",
        show_default=False,
        value_proc=_parse_model,
    )
    seen = 0.0
    if model:
        seen = typer.prompt("Tokens that it was trained on, such as 300e9 (0: untrained)", value_proc=_parse_tokens)
    data = typer.prompt("Training text: a folder, a file, a URL or a Hub data set", default="python-stdlib")
    kinds = "'1e18 FLOPs' or '2e9 tokens'" if model else "'1e18 FLOPs'"
    budget, unit = typer.prompt(f"Budget, such as {kinds}", value_proc=_parse_budget)
    return _Answers(model, seen, data, budget, unit)


def _parse_model(text: str) -> str:
    if text:
        try:
            read_config(text, "the model")
        except SlopError as caught:
            raise typer.BadParameter(str(caught)) from None
    return text


def _parse_tokens(text: str) -> float:
    try:
        tokens = float(text.replace(",", "").replace("_", ""))
    except ValueError:
        raise typer.BadParameter(f"expected a number such as 300e9, got {text!r}") from None
    if not 0 <= tokens < float("inf"):
        raise typer.BadParameter(f"expected 0 or more tokens, got {text!r}")
    return tokens


def _parse_budget(text: str) -> tuple[float, str]:
    """Read a budget with its unit.

    >>> _parse_budget("1e18 FLOPs"), _parse_budget("2e9 tokens")
    ((1e+18, 'flops'), (2000000000.0, 'tokens'))
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None or not (amount := _parse_tokens(match[1])):
        raise typer.BadParameter(f"expected a number above 0 with its unit, such as 1e18 FLOPs, got {text!r}")
    return amount, match[2].lower()


def _spell_advise(answers: _Answers) -> str:
    """Return the command that gives the whole answer to the same question."""
    start = ["--from", answers.model, "--already-seen", f"{answers.already_seen:g}"] if answers.model else []
    return shlex.join(["slop", "advise", *start, f"--{answers.unit}", f"{answers.budget:g}"])


def _comment_run(content: dict[str, Json], answers: _Answers, advice: Advice, output: Path) -> str:
    """Return the YAML of a planned run, with comments on where it comes from and what its sections hold."""
    option = advice.options[0]
    head = [
        f"{option.label}: {format_count(option.parameters)} parameters in the end, {option.flops:.2e} training FLOPs.",
        f"Predicted loss: {option.loss:.3f} ± {option.error:.2f} (80% interval). {advice.verdict.sentence}",
        f"Planned by {_spell_advise(answers)}",
    ]
    lines = [f"# {line}" for text in head for line in textwrap.wrap(text, 110)]
    lines.append(f"#   slop train {output}")
    for section, value in content.items():
        lines += [f"# {_SECTIONS[section]}", to_yaml({section: to_plain(value)}).rstrip()]
    return "\n".join(lines) + "\n"
