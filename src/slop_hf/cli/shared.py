"""Printing and verbosity, shared by the commands."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import TextIO

from rich.box import SIMPLE
from rich.cells import cell_len
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ..io.serialization import to_json

#: Longer words in a column that wraps are folded, such as the order of many stages.
_LONGEST_WORD = 16

_SPELLING = "slop_hf.spelling"
#: Spellings of the characters that commands print, for encodings without them.
_SPELLINGS = {
    "Π": "Prod", "Σ": "Sum", "Δ": "d", "ρ": "rho", "µ": "u", "→": "->", "×": "x", "…": "...", "–": "-", "—": "-",
    "−": "-", "·": "*", "²": "^2", "≤": "<=", "≥": ">=", "±": "+-", "≈": "~", "✓": "ok", "“": '"', "”": '"', "’": "'",
}  # fmt: skip


def set_verbosity(level: int) -> None:
    """Set the level of the loggers of slop_hf, transformers and huggingface_hub, imported already or not."""
    name = logging.getLevelName(level).lower()
    os.environ.update(TRANSFORMERS_VERBOSITY=name, HF_HUB_VERBOSITY=name)  # read when they are first imported
    for library in ("slop_hf", "transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(level)
    if level < logging.WARNING:
        logging.basicConfig(format="%(name)s: %(message)s")


def is_quiet() -> bool:
    """Whether commands print results and errors only (`slop --quiet`)."""
    return logging.getLogger("slop_hf").getEffectiveLevel() >= logging.ERROR


def print_error(message: str) -> None:
    """Print an error of the user; with `slop --verbose`, also where it was raised."""
    if logging.getLogger("slop_hf").isEnabledFor(logging.INFO) and sys.exc_info()[0] is not None:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)


def is_first_process() -> bool:
    """Whether this is the only process of a command, or the first one of a launch."""
    return os.environ.get("RANK", "0") == "0"


def redirect_prints(*, as_json: bool) -> AbstractContextManager[TextIO | None]:
    """Send what libraries print to stderr if stdout is to hold JSON only, and nowhere under `slop --quiet`."""
    if is_quiet():
        return redirect_stdout(io.StringIO())
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def make_streams_printable() -> None:
    """Let stdout and stderr print every character: what their encoding lacks is spelled with what it has.

    Under `LC_ALL=C`, or in a Windows console, an encoding may be without Π or →; file names may be in no encoding.
    """
    codecs.register_error(_SPELLING, _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_SPELLING)


def _spell(error: UnicodeError) -> tuple[str, int]:
    """Spell characters that an encoding lacks; an error handler of `codecs`."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    parts = (
        _SPELLINGS.get(character) or character.encode("ascii", "backslashreplace").decode("ascii")
        for character in characters
    )
    return "".join(parts), error.end


def print_json(value: object) -> None:
    """Print a value, dataclasses included, as indented JSON."""
    print_json_text(to_json(value))


def print_json_text(text: str) -> None:
    """Print JSON text; characters that stdout lacks become JSON's escapes, which are read as the same value."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(json.loads(text), indent=2) + "\n"
    print(text, end="")


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    total: Sequence[str] = (),
    wraps: Sequence[str] = (),
    optional: Sequence[str] = (),
    caption: str | None = None,
) -> None:
    """Print a table, with every cell whole; cells may contain rich's markup.

    Args:
        columns: names of the columns; a leading `>` right-aligns a column.
        total: cells of a last row, below a line.
        wraps: names of columns to wrap if the terminal is narrow.
        optional: names of columns to leave out if it is narrower still, in this order; the caption names them.
        caption: line below the table, which may be longer than the table is wide.
    """
    console = Console()
    names = [column.removeprefix(">") for column in columns]
    lines = [names, *rows, *([total] if total else [])]
    least = [
        max(_measure_cell(line[number], wraps=name in wraps) for line in lines) for number, name in enumerate(names)
    ]
    shown, left_out = list(range(len(names))), list[str]()

    def measure() -> int:
        return sum(least[number] for number in shown) + 2 * len(shown)

    for name in optional:
        if measure() > console.width:
            shown.remove(names.index(name))
            left_out.append(name)
    if left_out:
        note = f"left out in {console.width} columns: {', '.join(left_out)}"
        caption = f"{caption}; {note}" if caption else note
    table = Table(box=SIMPLE, title=title, pad_edge=False, collapse_padding=True)
    for number in shown:
        justify: JustifyMethod = "right" if columns[number].startswith(">") else "left"
        no_wrap = names[number] not in wraps
        table.add_column(names[number], justify=justify, no_wrap=no_wrap, overflow="fold", min_width=least[number])
    for row in rows:
        table.add_row(*(row[number] for number in shown))
    if total:
        table.add_section()
        table.add_row(*(total[number] for number in shown))
    # The lines of a table wider than the terminal are wrapped by it: not pretty, but whole.
    Console(width=max(console.width, measure())).print(table)
    if caption:  # not the table's, which a narrow table would wrap at its own width
        console.print(caption, style="table.caption", highlight=False)


def _measure_cell(cell: str, *, wraps: bool) -> int:
    """Return the columns of a terminal that a cell needs at least."""
    text = Text.from_markup(cell).plain
    if not wraps:
        return cell_len(text)
    return min(max(map(cell_len, text.split()), default=0), _LONGEST_WORD)


@contextmanager
def print_if_slow(text: str, seconds: float = 5.0) -> Iterator[None]:
    """Print a line on stderr if the block takes longer than this."""
    timer = threading.Timer(seconds, lambda: print(text, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def show_steps(library: str) -> Iterator[None]:
    """Print what a part of the library logs about its steps, one line each on stderr, unless `slop --quiet`.

    Args:
        library: name of the part, such as `slop_hf.evaluation`.
    """
    logger, handler = logging.getLogger(library), logging.StreamHandler()
    if not is_first_process() or is_quiet():
        yield
        return
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # or another handler would print the same line again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
