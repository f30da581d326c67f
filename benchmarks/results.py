"""Tables, sentences and figures of the experiments in README.md and docs/, rebuilt from their committed records.

python benchmarks/results.py            # what `make results` runs
python benchmarks/results.py --check    # changes nothing; exits 1 and names what is out of date

A record is what `slop compare --record benchmarks/results/NAME.json` wrote. In a document,

    <!-- results: NAME KIND -->
    <!-- end -->

encloses what it says: `table`, `summarize_comparison`, `stages`, `ledger`, `predictions`, `agreement`, `figure` (loss against
FLOPs), `figure-seconds`, `figure-losses`, `figure-utility`. Figures lie in docs/images/results; those that a document
shows are drawn, once for each record.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from slop_hf.errors import RunError
from slop_hf.experiments.summary_text import summarize_comparison
from slop_hf.experiments.planner_accuracy import describe_planner_accuracy, build_prediction_cells
from slop_hf.experiments.comparison import Comparison
from slop_hf.experiments.tables import build_arm_cells, build_ledger_cells, build_arm_stage_cells
from slop_hf.experiments.write import COMPARISON_FIGURES, format_figure_link
from slop_hf.io.files import write_text
from slop_hf.io.serialization import read_json

ROOT = Path(__file__).parents[1]
RECORDS, IMAGES = "benchmarks/results", "docs/images/results"
BEGIN, END = re.compile(r"<!-- results:(.*)-->\s*$"), "<!-- end -->"


def _filled(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


#: Figures by the kind of their block.
FIGURE_KINDS = {"figure": "loss", "figure-seconds": "seconds", "figure-losses": "losses", "figure-utility": "utility"}
TEXT_KINDS: dict[str, Callable[[Comparison], str]] = {
    "table": lambda found: build_arm_cells(found).markdown(),
    "sentences": lambda found: _filled(" ".join(summarize_comparison(found))),
    "stages": lambda found: build_arm_stage_cells(found).markdown(),
    "ledger": lambda found: build_ledger_cells(found).markdown(),
    "predictions": lambda found: build_prediction_cells(found).markdown(),
    "agreement": lambda found: _filled(describe_planner_accuracy(found)),
}
KINDS = (*TEXT_KINDS, *FIGURE_KINDS)
SHOWN = re.compile(rf"\]\([^)\s]*images/results/([^)\s]+)_({'|'.join(COMPARISON_FIGURES)})\.png\)")


class Shown(NamedTuple):
    """A figure that a document shows."""

    record: str
    figure: str

    @property
    def path(self) -> str:
        """Of its file, from the root of the repository."""
        return f"{IMAGES}/{self.record}_{self.figure}.png"


def read_records(root: Path) -> dict[str, Comparison]:
    """The comparisons among the committed records, by the names of their files.

    Raises:
        RunError: for a file that is not JSON, or is meant to be a comparison and is none.
    """
    found = {}
    for path in sorted((root / RECORDS).glob("*.json")):
        content = read_json(path, if_missing="take the record again", error=RunError)
        if isinstance(content, dict) and {"scale", "equal", "arms"} <= content.keys():  # benchmarks have none of these
            found[path.stem] = Comparison.load(path)
    return found


def rebuild(text: str, document: str, records: Mapping[str, Comparison]) -> str:
    """A document with all of its blocks as the records have them; what stands outside of blocks stays as it is.

    Raises:
        RunError: naming the line, for a block that does not end, or of a record or a kind that there is not.
    """
    lines, begun = [], 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        where = f"{document}, line {number}"
        marker = BEGIN.match(line)
        if marker and begun:
            raise RunError(f"{where}: the block that begins in line {begun} has no {END} before the next one")
        if line.strip() == END:
            if not begun:
                raise RunError(f"{where}: {END}, but no block has begun")
            begun = 0
        if not begun:
            lines.append(line)
        if marker:
            begun = number
            lines.append(block(marker[1].split(), where, document, records).rstrip("\n") + "\n")
    if begun:
        raise RunError(f"{document}, line {begun}: the block has no {END}")
    return "".join(lines)


def block(words: Sequence[str], where: str, document: str, records: Mapping[str, Comparison]) -> str:
    """What stands in a block."""
    if len(words) != 2 or words[1] not in KINDS:
        raise RunError(f"{where}: expected NAME KIND, with a KIND of {', '.join(KINDS)}; got {' '.join(words)!r}")
    name, kind = words
    if name not in records:
        raise RunError(f"{where}: no record {RECORDS}/{name}.json; there are {', '.join(records) or 'none'}")
    if kind in TEXT_KINDS:
        return TEXT_KINDS[kind](records[name])
    shown = Shown(name, FIGURE_KINDS[kind])
    link = Path(os.path.relpath(shown.path, Path(document).parent)).as_posix()
    return f"{format_figure_link(shown.figure, link)}\n\n{COMPARISON_FIGURES[shown.figure].caption}"


def documents(root: Path) -> list[str]:
    """Those that may hold blocks, from the root of the repository."""
    return ["README.md", *(path.relative_to(root).as_posix() for path in sorted((root / "docs").glob("*.md")))]


def update(root: Path, *, check: bool) -> Iterator[str]:
    """Bring documents and figures up to date, or only see whether they are.

    Yields:
        what was out of date, one after another.
    """
    records = read_records(root)
    shown: dict[Shown, None] = {}
    for document in documents(root):
        before = (root / document).read_text(encoding="utf-8")
        after = rebuild(before, document, records)
        shown |= {Shown(*found): None for found in SHOWN.findall(after)}
        if after != before:
            if not check:
                write_text(root / document, after)
            yield document
    for figure in shown:
        if figure.record not in records:
            raise RunError(f"{figure.path} is shown, but there is no record {RECORDS}/{figure.record}.json")
        if drawn_from(root / figure.path) != records[figure.record].fingerprint:
            if not check and COMPARISON_FIGURES[figure.figure].draw(records[figure.record], root / figure.path) is None:
                raise RunError(f"{RECORDS}/{figure.record}.json has nothing to draw {figure.path} from")
            yield figure.path


def drawn_from(path: Path) -> str | None:
    """The fingerprint of the record that a figure was drawn from; None where there is no figure."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.info.get("Source")


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild or check; 1 where something was found out of date by `--check`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where something is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    options = parser.parse_args(arguments)
    try:
        found = list(update(options.root, check=options.check))
    except RunError as caught:
        print(f"error: {caught}", file=sys.stderr)
        return 2
    for path in found:
        print(f"{path} is out of date; run `make results`" if options.check else f"{path} brought up to date")
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
