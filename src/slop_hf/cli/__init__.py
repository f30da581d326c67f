"""The `slop` command and its subcommands.

Commands parse options, call the library and print. They use the lazily loaded names of `slop_hf`, so that `slop plan`
loads no torch.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import SlopError
from .advise import advise_command
from .calibrate import calibrate_command
from .compare import compare_command
from .data import data_app
from .evaluate import HELP, evaluate_command
from .grow import grow_command
from .init import begin_command
from .launch import LAUNCH_HELP, launch_command
from .plan import plan_command
from .probe import probe_command
from .publish import publish_command
from .report import report_command
from .reproduce import reproduce_command
from .rollback import rollback_command
from .sample import sample_command
from .shared import make_streams_printable, print_error, set_verbosity
from .status import show_status
from .train import train_command
from .upscale import upscale_command
from .wording import Command

app = typer.Typer(
    name="slop",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("init", cls=Command)(begin_command)
app.command("advise", cls=Command)(advise_command)
app.command("plan", cls=Command)(plan_command)
app.command("probe", cls=Command)(probe_command)
app.command("grow", cls=Command)(grow_command)
app.command("upscale", cls=Command)(upscale_command)
app.add_typer(data_app, name="data")
app.command("train", cls=Command)(train_command)
app.command("launch", cls=Command, help=LAUNCH_HELP)(launch_command)
app.command("status", cls=Command)(show_status)
app.command("sample", cls=Command)(sample_command)
app.command("compare", cls=Command)(compare_command)
app.command("publish", cls=Command)(publish_command)
app.command("rollback", cls=Command)(rollback_command)
app.command("eval", cls=Command, help=HELP)(evaluate_command)
app.command("report", cls=Command)(report_command)
app.command("reproduce", cls=Command)(reproduce_command)
app.command("calibrate", cls=Command)(calibrate_command)

#: click's `ClickException`, or typer's own copy of it: typer exports neither.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]


def _print_version(value: bool) -> None:
    if value:
        print(f"slop-hf {__version__}")
        raise typer.Exit


@app.callback()
def set_up(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also print what the libraries log, and tracebacks of errors.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print results and errors only: no progress, no warnings.")
    ] = False,
) -> None:
    """Grow a small language model into a large one, in stages: plan a schedule, train through it, report on it.

    Examples:

    `slop plan --initial 768,2048,6,6 --target-params 1e9 --tokens 65e9 -o plan.yaml`

    `slop --quiet train run.yaml -o runs/first`
    """
    if verbose and quiet:
        raise typer.BadParameter("--quiet and --verbose contradict each other: give one of them")
    if verbose or quiet:
        set_verbosity(logging.INFO if verbose else logging.ERROR)


@cache
def _build_command() -> Any:
    """Build the command from `app`; typer evaluates every option's type for it."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; an error of the user is printed as one line on stderr, with exit code 2."""
    make_streams_printable()
    try:
        sys.exit(_build_command()(prog_name="slop", standalone_mode=False))
    except SlopError as caught:
        print_error(str(caught))
    except OSError as caught:
        if caught.filename is None:
            raise
        print_error(f"{caught.filename}: {caught.strerror or caught}")
    except _ClickError as caught:
        # Empty after the help of a command without arguments, which is printed already.
        message = caught.format_message().strip()  # type: ignore[attr-defined]
        if message:
            context = getattr(caught, "ctx", None)
            hint = f"; see `{context.command_path} --help`" if context else ""
            print_error(message[0].lower() + message[1:].rstrip(".") + hint)
    sys.exit(2)
