"""Reference pages of the documentation, written from the code.

A page in `docs/reference/` has a marker `<!-- reference: NAME -->`, and `conf.py` puts a text of `TEXTS` in its place.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum

import typer.cli
from transformers import TrainingArguments

import slop_hf
from slop_hf.cli import _build_command
from slop_hf.data import DataConfig, Mixture, Source
from slop_hf.dims import ModelDims
from slop_hf.evaluation.settings import EvalSettings
from slop_hf.experiments.config import ArmConfig, ExperimentConfig, ScaleConfig
from slop_hf.schedule import GrowthSchedule, GrowthStage
from slop_hf.training.arguments import SlopTrainingArguments
from slop_hf.training.config import ExpertOptions, RunConfig, StageEvaluation

#: Sections of a file, with the class of their keys.
RUN_FILE = {
    "A run": RunConfig,
    "`schedule`": GrowthSchedule,
    "`schedule.stages`: each growth": GrowthStage,
    "`schedule.initial` and `dims`: a structure": ModelDims,
    "`model.experts`": ExpertOptions,
    "`data`": DataConfig,
    "`data.mixture`": Mixture,
    "`data.mixture.sources`: each source": Source,
    "`evaluation`": StageEvaluation,
}
EXPERIMENT_FILE = {
    "An experiment": ExperimentConfig,
    "`arms`: each arm": ArmConfig,
    "`scales`: each scale": ScaleConfig,
}
#: Classes whose docstrings describe fields that a class shares with them.
_ALSO_DESCRIBED_BY = {DataConfig: (Source,), StageEvaluation: (EvalSettings,)}
_MARKER = re.compile(r"<!-- reference: (\w+) -->")
_ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n     +.+)*)", re.MULTILINE)


class Key(typing.NamedTuple):
    """One key of a YAML file, or one training argument."""

    name: str
    type: str
    default: str
    text: str


def list_keys(kind: type) -> list[Key]:
    """Return the fields of a dataclass with their types, defaults and descriptions."""
    texts = _read_arguments(*_ALSO_DESCRIBED_BY.get(kind, ()), kind)
    hints = typing.get_type_hints(kind)
    keys = []
    for field in dataclasses.fields(kind):
        if "help" in field.metadata:  # argparse needs %% for a percent sign
            text = _escape(field.metadata["help"].replace("%%", "%")) + _describe_choices(field.metadata)
        else:
            text = _escape(texts.get(field.name, ""))
        keys.append(Key(field.name, _format_type(hints[field.name]), _format_default(field), text))
    return keys


def write_keys(keys: list[Key]) -> str:
    """Return a definition list of keys, in Markdown."""
    return "\n".join(f"`{key.name}` (`{key.type}`, {key.default})\n: {key.text}\n" for key in keys)


def write_sections(sections: Mapping[str, type]) -> str:
    """Return a section for each part of a file, in Markdown."""
    return "\n".join(f"## {title}\n\n{write_keys(list_keys(kind))}" for title, kind in sections.items())


def write_arguments() -> str:
    """Return the training arguments: those that slop-hf adds or gives another default, then the others."""
    changed = inspect.get_annotations(SlopTrainingArguments)
    keys = [key for key in list_keys(SlopTrainingArguments) if key.name != "output_dir"]  # `slop train -o` names it
    ours = [key for key in keys if key.name in changed]
    theirs = [key for key in keys if key.name not in changed]
    return (
        f"## Arguments of slop-hf, and other defaults\n\n{write_keys(ours)}\n"
        f"## Arguments of `transformers.{TrainingArguments.__name__}`\n\n{write_keys(theirs)}"
    )


def write_commands() -> str:
    """Return the help of every command, in Markdown."""
    command = _build_command()
    text = typer.cli.get_docs_for_click(obj=command, ctx=command.context_class(command, info_name="slop"), name="slop")
    text = text.partition("\n")[2]  # the page has a title
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)  # a list of headings with their first words


def write_api() -> str:
    """Return directives of autodoc for the public names, by package."""
    packages: dict[str, list[str]] = {}
    for name in sorted(slop_hf.__all__, key=str.lower):
        packages.setdefault(".".join(getattr(slop_hf, name).__module__.split(".")[:2]), []).append(name)
    return "\n".join(
        f"## `{package}`\n\n```{{eval-rst}}\n{''.join(map(_write_directive, names))}```\n"
        for package, names in sorted(packages.items())
    )


TEXTS: Mapping[str, Callable[[], str]] = {
    "run_file": lambda: write_sections(RUN_FILE),
    "experiment_file": lambda: write_sections(EXPERIMENT_FILE),
    "arguments": write_arguments,
    "commands": write_commands,
    "api": write_api,
}


def fill_page(text: str) -> str:
    """Return a page with the texts in place of its markers."""
    return _MARKER.sub(lambda marker: TEXTS[marker[1]](), text)


def _write_directive(name: str) -> str:
    value = getattr(slop_hf, name)
    if not isinstance(value, type):
        return f".. autofunction:: slop_hf.{name}\n\n"
    # The signature of the arguments has more than a hundred parameters; a page of their own lists them.
    signature = "()" if value is SlopTrainingArguments else ""
    return f".. autoclass:: slop_hf.{name}{signature}\n   :members:\n\n"


def _read_arguments(*kinds: type) -> dict[str, str]:
    """Return the descriptions in the sections Args of the docstrings of classes.

    If several describe a field, the last one counts; an entry for several fields counts only if there is no other.

    >>> _read_arguments(Source)["split"], _read_arguments(Source, DataConfig)["split"]
    ('split of Hub datasets.', 'split of Hub datasets.')
    """
    docstrings = (inspect.getdoc(kind) or "" for kind in kinds)
    sections = (re.search(r"^Args:\n((?:    .*\n?|\n)+)", docstring, re.MULTILINE) for docstring in docstrings)
    entries = [entry for section in sections if section for entry in _ENTRY.findall(section[1])]
    entries.sort(key=lambda entry: entry[0].count(","), reverse=True)
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def _escape(text: str) -> str:
    """Return plain text with code in backticks as Markdown.

    >>> _escape("a * b, `a * b`")
    'a \\\\* b, `a * b`'
    """
    return re.sub(r"(`[^`]*`)|([<*\[\]{}])", lambda match: match[1] or f"\\{match[2]}", text)


def _describe_choices(metadata: Mapping[str, typing.Any]) -> str:
    choices = metadata.get("choices", ())
    return " Choices: " + ", ".join(f"`{choice}`" for choice in choices) + "." if choices else ""


def _format_type(hint: object) -> str:
    """Return a type as it is written in Python, with the values of its choices.

    >>> _format_type(typing.Literal["text", "lines"] | None)
    '"text" | "lines" | None'
    """
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " | ".join(map(json.dumps, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_format_type, arguments))
    if arguments:
        return f"{origin.__name__}[{', '.join(map(_format_type, arguments))}]"
    if hint is Ellipsis:
        return "..."
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))


def _format_default(field: dataclasses.Field[typing.Any]) -> str:
    """Return the default as a file would give it."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(value):
        return "default: its own defaults"
    return f"default `{json.dumps(value.value if isinstance(value, Enum) else value)}`"
