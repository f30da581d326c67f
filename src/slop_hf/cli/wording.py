"""Errors in the words of the command line: `--target-params` where the library says `target_params`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from typer.core import TyperCommand

from ..errors import SlopError
from .shared import print_error

#: Options whose name is not that of the library's argument.
_ALIASES = {
    "bytes_per_device": "--device-memory",
    "resume_from_checkpoint": "--resume",
    "targets": "--target",
    "tokenizer_kind": "--kind",
    "zero_stage": "--zero",
}
#: What is no argument, whatever it looks like: quoted text, and lists of keys.
_KEPT = r"""(?<!\w)'[^']*'|"[^"]*"|\bknown: [^;)]*"""
_REMEDY = re.compile(r"\b(?:give|use|set|either|needs|(?:raise|lower|loosen)(?: the)?) $")


def name_options(message: str, options: Mapping[str, str], given: Collection[str] = ()) -> str:
    """Return the message of an error with options instead of the library's arguments.

    A name of several words is an argument wherever it stands outside quotes, paths and dotted keys. A single word may
    also be plain English: it is an argument in backticks, before `=`, in a remedy ("give tokens"), and at the
    beginning if the user gave that option.

    Args:
        options: options by the names of arguments.
        given: arguments whose option is on the command line.

    >>> options = {"min_layers": "--min-layers", "tokens": "--tokens", "stages": "--stages"}
    >>> name_options("min_layers must be at least 1, got -1", options)
    '--min-layers must be at least 1, got -1'
    >>> name_options("3 stages need tokens: give tokens, got stages=3", options)
    '3 stages need tokens: give --tokens, got --stages 3'
    """
    if not options:
        return message
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    argument = rf"""(?<![\w.'"/=,-])(?P<name>{names})(?P<value>=True\b|=(?=\S)|(?![\w'"/=-]|\.\w))"""

    def rename(match: re.Match[str]) -> str:
        name, before = match["name"], message[: match.start()]
        if name is None:
            return match[0]
        is_argument = "_" in name or match["value"] or before.endswith("`") or _REMEDY.search(before)
        if not is_argument and (before or name not in given):
            return match[0]
        return options[name] + (" " if match["value"] == "=" else "")

    return re.sub(f"{_KEPT}|{argument}", rename, message)


class Command(TyperCommand):
    """A command whose errors name its options instead of the library's arguments."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; its `SlopError`s keep their type."""
        try:
            return super().invoke(ctx)
        except SlopError as caught:
            parameters = {option: parameter.name for parameter in self.params for option in parameter.opts}
            options = {option[2:].replace("-", "_"): option for option in parameters if option.startswith("--")}
            options |= {name: option for name, option in _ALIASES.items() if option in parameters}
            sources = {name: ctx.get_parameter_source(parameters[option]) for name, option in options.items()}
            given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
            caught.args = (name_options(str(caught), options, given), *caught.args[1:])
            raise


class RecipeParser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, as `slop` does."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise SlopError(f"{message}; see `{self.prog} --help`")


def run_recipe(parser: RecipeParser, run: Callable[[argparse.Namespace], None]) -> None:
    """Call a function with the options on a recipe's command line; print an error of the user as `slop` does."""
    names: list[str] = []
    try:
        arguments = parser.parse_args()
        names += vars(arguments)
        run(arguments)
    except SlopError as caught:
        help_text = parser.format_help()
        options = {name: f"--{name.replace('_', '-')}" for name in names}
        options = {name: option for name, option in options.items() if option in help_text}  # an argument has none
        options |= {name: option for name, option in _ALIASES.items() if option in options.values()}
        print_error(name_options(str(caught), options))
        sys.exit(2)
