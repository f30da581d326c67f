"""Tables, sentences and figures of the experiments in README.md and docs/, rebuilt from the committed records.

python benchmarks/results.py            # the same as `make results`
python benchmarks/results.py --check    # changes nothing; exits 1 and lists what is out of date

Records are written by `slop compare --record benchmarks/results/NAME.json`. In a document,

    <!-- results: NAME KIND -->
    <!-- end -->

encloses text made from a record. KIND is `table`, `countings`, `sentences`, `stages`, `ledger`, `predictions`,
`agreement`, `figure` (loss against FLOPs), `figure-seconds`, `figure-losses`, `figure-savings` or `figure-utility`.
The figures are in docs/images/results; those that a document shows are drawn from their records. Two blocks have no
record: `exactness families` summarises docs/exactness.md, and `FLOPS advice` is what `slop advise --flops FLOPS` says.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from slop_hf.errors import RunError
from slop_hf.experiments.comparison import Comparison
from slop_hf.experiments.earlier_records import add_missing_facts
from slop_hf.experiments.planner_accuracy import describe_planner_accuracy, tabulate_predictions
from slop_hf.experiments.summary_text import summarise_comparison
from slop_hf.experiments.tables import tabulate_arm_stages, tabulate_arms, tabulate_countings, tabulate_ledger
from slop_hf.experiments.write import COMPARISON_FIGURES, format_figure_link
from slop_hf.io.files import write_text
from slop_hf.io.serialization import read_json
from slop_hf.report.drawing import read_source

ROOT = Path(__file__).parents[1]
RECORDS, IMAGES = "benchmarks/results", "docs/images/results"
BEGIN, END = re.compile(r"<!-- results:(.*)-->\s*$"), "<!-- end -->"


def _fill(text: str) -> str:
    return textwrap.fill(text, 119, break_long_words=False, break_on_hyphens=False)


#: Name of a comparison's figure by the kind of its block.
FIGURE_KINDS = {
    "figure": "loss",
    **{f"figure-{name}": name for name in COMPARISON_FIGURES if name != "loss"},
}
TEXT_KINDS: dict[str, Callable[[Comparison], str]] = {
    "table": lambda comparison: tabulate_arms(comparison).markdown(),
    "countings": lambda comparison: tabulate_countings(comparison).markdown(),
    "sentences": lambda comparison: _fill(" ".join(summarise_comparison(comparison))),
    "stages": lambda comparison: tabulate_arm_stages(comparison).markdown(),
    "ledger": lambda comparison: tabulate_ledger(comparison).markdown(),
    "predictions": lambda comparison: tabulate_predictions(comparison).markdown(),
    "agreement": lambda comparison: _fill(describe_planner_accuracy(comparison)),
}
KINDS = (*TEXT_KINDS, *FIGURE_KINDS)
EXACTNESS = "docs/exactness.md"
SHOWN = re.compile(rf"\]\([^)\s]*images/results/([^)\s]+)_({'|'.join(COMPARISON_FIGURES)})\.png\)")


class Shown(NamedTuple):
    """A figure shown in a document."""

    record: str
    figure: str

    @property
    def path(self) -> str:
        """Path of its file, relative to the root of the repository."""
        return f"{IMAGES}/{self.record}_{self.figure}.png"


def read_records(root: Path) -> dict[str, Comparison]:
    """Read the comparisons among the committed records, by file name.

    Raises:
        RunError: if a file is not valid JSON, or an invalid comparison.
    """
    records = {}
    for path in sorted((root / RECORDS).glob("*.json")):
        content = read_json(path, if_missing="take the record again", error=RunError)
        if isinstance(content, dict) and {"scale", "equal", "arms"} <= content.keys():  # not a benchmark's record
            records[path.stem] = add_missing_facts(Comparison.load(path))
    return records


def rebuild(text: str, document: str, records: Mapping[str, Comparison], root: Path = ROOT) -> str:
    """Return a document with all its blocks rebuilt from the records; the rest stays as it is.

    Raises:
        RunError: if a block does not end, or names an unknown record or kind; the message names the line.
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
            lines.append(build_block(marker[1].split(), where, document, records, root).rstrip("\n") + "\n")
    if begun:
        raise RunError(f"{document}, line {begun}: the block has no {END}")
    return "".join(lines)


def build_block(words: Sequence[str], where: str, document: str, records: Mapping[str, Comparison], root: Path) -> str:
    """Return the content of a block."""
    if words == ["exactness", "families"]:
        return tabulate_families((root / EXACTNESS).read_text(encoding="utf-8"))
    if words[1:] == ["advice"]:
        return ask_for_advice(words[0])
    if len(words) != 2 or words[1] not in KINDS:
        raise RunError(f"{where}: expected NAME KIND, with a KIND of {', '.join(KINDS)}; got {' '.join(words)!r}")
    name, kind = words
    if name not in records:
        raise RunError(f"{where}: no record {RECORDS}/{name}.json; there are {', '.join(records) or 'none'}")
    if kind in TEXT_KINDS:
        return TEXT_KINDS[kind](records[name])
    shown = Shown(name, FIGURE_KINDS[kind])
    link = Path(os.path.relpath(shown.path, Path(document).parent)).as_posix()
    return f"{format_figure_link(shown.figure, link)}\n\n{_fill(COMPARISON_FIGURES[shown.figure].caption)}"


def tabulate_families(page: str) -> str:
    """Return a table of families and operators from the page of measured errors.

    A cell is `exact` if some init of the operator keeps the function in every case, `in part` if one does in some
    cases, `inexact` if the operator only changes it, and – if every case is refused.

    Args:
        page: text of docs/exactness.md.
    """
    ranks: dict[str, dict[str, int]] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 9 or cells[0] in ("family", "---"):
            continue
        family, operator, keeps, refused = cells[0], cells[1], cells[3], cells[8]
        rank = {"yes": 2 if refused else 3, "if whole": 2, "no": 1, "": 0}[keeps]
        of_family = ranks.setdefault(family, {})
        of_family[operator] = max(of_family.get(operator, 0), rank)
    operators = list(next(iter(ranks.values()), {}))
    rows = [
        (f"`{family}`", *(("–", "inexact", "in part", "exact")[row[operator]] for operator in operators))
        for family, row in sorted(ranks.items())
    ]
    lines = [("family", *operators), ["---"] * (len(operators) + 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ask_for_advice(flops: str) -> str:
    """Return the answer of `slop advise` in a terminal of 80 columns, as a block of text."""
    command = [sys.executable, "-m", "slop_hf", "advise", "--flops", flops]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=True)
    lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
    return "\n".join(["```text", *lines, "```"])


def list_documents(root: Path) -> list[str]:
    """List the documents that may hold blocks, relative to the root of the repository."""
    return ["README.md", *(path.relative_to(root).as_posix() for path in sorted((root / "docs").glob("*.md")))]


def update(root: Path, *, check: bool, redraw: bool = False) -> Iterator[str]:
    """Rebuild documents and figures, or only check whether they are up to date.

    Args:
        redraw: whether to draw every figure again, for a change of how figures look.

    Yields:
        Path of each document or figure that was out of date.
    """
    records = read_records(root)
    shown: dict[Shown, None] = {}
    for document in list_documents(root):
        before = (root / document).read_text(encoding="utf-8")
        after = rebuild(before, document, records, root)
        shown |= {Shown(*match): None for match in SHOWN.findall(after)}
        if after != before:
            if not check:
                write_text(root / document, after)
            yield document
    for figure in shown:
        if figure.record not in records:
            raise RunError(f"{figure.path} is shown, but there is no record {RECORDS}/{figure.record}.json")
        if redraw or read_source(root / figure.path) != records[figure.record].fingerprint:
            if (
                not check
                and COMPARISON_FIGURES[figure.figure].draw(records[figure.record], root / figure.path) is None
            ):
                raise RunError(f"{RECORDS}/{figure.record}.json has nothing to draw {figure.path} from")
            yield figure.path


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild or check; return the exit code, 1 if `--check` finds something out of date."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--redraw", action="store_true", help="draw every figure again, not only those out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    try:
        outdated = list(update(options.root, check=options.check, redraw=options.redraw))
    except RunError as caught:
        print(f"error: {caught}", file=sys.stderr)
        return 2
    for path in outdated:
        print(f"{path} is out of date; run `make results`" if options.check else f"{path} brought up to date")
    return int(options.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
