"""The `slop` command, and what it consists of.

Commands parse, call and print. They reach the library through the lazy names of `slop_hf`, so that `slop plan` loads
no torch.
"""

from __future__ import annotations

import sys

import typer

from ..errors import SlopError
from .calibrate import calibrate_command
from .compare import compare
from .data import data_app
from .evaluate import HELP, evaluate
from .grow import grow
from .plan import plan_command
from .probe import probe
from .publish import publish
from .report import report
from .reproduce import reproduce
from .rollback import rollback
from .train import train_command

app = typer.Typer(
    name="slop",
    help="Grow a small language model into a large one, in stages: plan a schedule, train through it, report.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("plan")(plan_command)
app.command()(probe)
app.command()(grow)
app.add_typer(data_app, name="data")
app.command("train")(train_command)
app.command()(compare)
app.command()(publish)
app.command()(rollback)
app.command("eval", help=HELP)(evaluate)
app.command()(report)
app.command()(reproduce)
app.command("calibrate")(calibrate_command)


def main() -> None:
    """Run the command line; a user's error is one line on stderr and exit code 2."""
    try:
        app()
    except SlopError as caught:
        print(f"error: {caught}", file=sys.stderr)
        sys.exit(2)
