"""The `slop` command and its subcommands.

Commands parse options, call the library and print. They use the lazily loaded names of `slop_hf`, so that `slop plan`
loads no torch.
"""

from __future__ import annotations

import sys

import typer

from ..errors import SlopError
from .calibrate import calibrate_command
from .compare import compare_command
from .data import data_app
from .evaluate import HELP, evaluate_command
from .grow import grow_command
from .plan import plan_command
from .probe import probe_command
from .publish import publish_command
from .report import report_command
from .reproduce import reproduce_command
from .rollback import rollback_command
from .shared import make_streams_printable
from .train import train_command

app = typer.Typer(
    name="slop",
    help="Grow a small language model into a large one, in stages: plan a schedule, train through it, report on it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan_command)
app.command("probe")(probe_command)
app.command("grow")(grow_command)
app.add_typer(data_app, name="data")
app.command("train")(train_command)
app.command("compare")(compare_command)
app.command("publish")(publish_command)
app.command("rollback")(rollback_command)
app.command("eval", help=HELP)(evaluate_command)
app.command("report")(report_command)
app.command("reproduce")(reproduce_command)
app.command("calibrate")(calibrate_command)


def main() -> None:
    """Run the command line; an error of the user is printed as one line on stderr, with exit code 2."""
    make_streams_printable()
    try:
        app()
    except SlopError as caught:
        print(f"error: {caught}", file=sys.stderr)
        sys.exit(2)
