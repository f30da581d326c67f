"""The text of `docs/reproduction.md`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

from ..cost.flops import count_paper_params
from . import reproduction
from . import tables as paper
from .reproduction import OF_STAGE, SINCE_START, Hours, Product, Ranked

PAGE_COMMAND = "slop reproduce --output docs/reproduction.md"
PRODUCT_COLUMNS = ("target", "order", "printed", "computed", "agrees", "note")
HOURS_COLUMNS = ("table", "structure", "trained", "printed", "computed", "off", "agrees", "note")

_CONVENTIONS = {SINCE_START: "since the start", OF_STAGE: "of the stage, Eq. 3"}


def format_row(row: Product | Hours) -> tuple[str, ...]:
    """Return the cells of a row, for `PRODUCT_COLUMNS` or `HOURS_COLUMNS`."""
    agrees = "yes" if row.agrees else "no"
    if isinstance(row, Product):
        return str(row.target), row.sequence, row.printed, f"{row.computed:.3E}", agrees, row.note
    numbers = f"{row.printed:g}", f"{row.computed:.1f}", f"{row.error:+.1%}"
    return str(row.table), str(row.target), row.trained, *numbers, agrees, row.note


def format_reproduction_page() -> str:
    """Return the page that compares each of the paper's numbers with the computed one, as Markdown."""
    tables = (_write_head, _write_conventions, _write_table_1, _write_table_3, _write_table_4)
    sections = (*tables, _write_hours, _write_remarks_on_hours, _write_edge)
    blocks = "\n\n".join(write() for write in sections).split("\n\n")
    return "\n\n".join(map(_wrap, blocks)) + "\n"


def _wrap(block: str) -> str:
    """Wrap the lines of a paragraph or a list; leave headings, tables and formulas as they are."""
    if block.startswith(("#", "|", "<", "    ")):
        return block
    items = (" ".join(item.split()) for item in re.split(r"\n(?=\* )", block))
    indents = ((item, "  " if item.startswith("* ") else "") for item in items)
    return "\n".join(textwrap.fill(item, 119, subsequent_indent=by, break_on_hyphens=False) for item, by in indents)


def _format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def _count_agreeing(rows: Sequence[Product] | Sequence[Hours]) -> str:
    return f"{sum(row.agrees for row in rows)} of {len(rows)}"


def _write_head() -> str:
    products = [row for table in paper.GROWTH_TABLES for row in reproduction.reproduce_products(table)]
    small, large = (f"{count_paper_params(dims) / 1e6:,.1f}M" for dims in (paper.INITIAL, paper.TARGET))
    return f"""# The paper's numbers, computed again

<!-- Written by `{PAGE_COMMAND}`; run it again instead of editing. -->

The SLOP paper does not state all of its conventions. The conventions on this page reproduce
{_count_agreeing(products)} of its printed products to the printed digits, and the GPU hours of its growth stages to a
few percent. Every number that they do not reproduce is listed. A product agrees if it rounds to the printed digits, or
if the printed number is cut off instead of rounded; the notes say so. Structures are (hidden, ffn, layers,
heads). Orders of growth have one letter per stage: `l`ayer, `f`fn, `h`idden.

## What is counted

The objective is a product of increments of `params`, one per growth stage. With hidden size h, ffn size f and l
layers,

    params = l (6 h² + 3 h f)

reproduces its numbers: {small} for {paper.INITIAL}, {large} for {paper.TARGET}. This is not the size of a model: it
has no embeddings, norms and biases, and 6 h² is more than the 4 h² of attention's four square matrices. `3 h f` is a
gated ffn. The paper does not print the formula. An increment below 1 counts as 1."""


def _write_conventions() -> str:
    rows = []
    for table in paper.GROWTH_TABLES:
        products = reproduction.reproduce_products(table)
        by_other = sum(reproduction.match_digits(row.printed, row.by_other) is not None for row in products)
        counts = [sum(row.agrees for row in products), by_other][:: -1 if table is paper.TABLE_4 else 1]
        rows.append((f"Table {table.number}", str(len(products)), *map(str, counts)))
    columns = ("", "products", *(f"{words} (`{name}`)" for name, words in _CONVENTIONS.items()))
    return f"""## Two conventions

Eq. 3 defines the increment **of a stage**, from the structure before it to the structure after it; Table 4 uses it. In
Tables 1 and 3 an increment counts **since the start**, from the initial structure to the structure after the stage.
The number of products that each convention reproduces:

{_format_table(columns, rows)}

The names in brackets are objectives of `slop plan`."""


def _format_products(rows: Sequence[Product], convention: str) -> str:
    """Return a table of products by both conventions; `convention` is the one that the paper's table uses."""
    cells = []
    for row in rows:
        target, order, printed, computed, *rest = format_row(row)
        both = (computed, f"{row.by_other:.3E}")
        cells.append((target, order, printed, *(both if convention == SINCE_START else both[::-1]), *rest))
    return _format_table((*PRODUCT_COLUMNS[:3], *_CONVENTIONS.values(), *PRODUCT_COLUMNS[4:]), cells)


def _write_table_1() -> str:
    ranks = {name: reproduction.rank_targets(name) for name in _CONVENTIONS}
    first, by_stage = (f"{rows[0].sequence} to {rows[0].target}" for rows in ranks.values())
    columns = ("target", "order", "Π Δparams", "hours of its stages", "in Table 1")
    return f"""## Table 1

{_format_products(reproduction.reproduce_products(paper.TABLE_1), SINCE_START)}

The paper recommends l-f-h to {paper.TARGET}. Of all orders to the four targets of the table, the best is {first} by
increments since the start, and {by_stage} by increments of the stage. The best order to each target:

{_format_by_convention(columns, {name: map(_format_ranked, rows) for name, rows in ranks.items()})}"""


def _format_by_convention(columns: Sequence[str], rows: Mapping[str, Iterable[Sequence[str]]]) -> str:
    """Return one table per convention, with headings."""
    tables = {_CONVENTIONS[name]: _format_table(columns, cells) for name, cells in rows.items()}
    return "\n\n".join(f"*By increments {convention}*\n\n{table}" for convention, table in tables.items())


def _format_ranked(row: Ranked) -> tuple[str, ...]:
    printed = "yes" if row.printed else "no"
    return str(row.target), row.sequence, f"{row.product:.3E}", f"{row.stage_hours:.1f}", printed


def _write_table_3() -> str:
    rows, start = reproduction.reproduce_products(paper.TABLE_3), paper.INITIAL_450M
    printed = start.replace(num_hidden_layers=16)
    swapped = reproduction.reproduce_products(paper.TABLE_3, printed)
    sizes = [f"{count_paper_params(dims) / 1e6:.0f}M" for dims in (start, printed)]
    wrong = next(row for row in rows if not row.agrees)
    return f"""## Table 3

{_format_products(rows, SINCE_START)}

* **Layers and heads are swapped.** The initial model is printed as (1024, 4096, 16, 24), in the text's order (hidden,
  ffn, layers, heads). 24 layers and 16 heads reproduce {_count_agreeing(rows)} products; 16 layers reproduce
  {_count_agreeing(swapped)}. 24 layers make {sizes[0]} by `params`, the text's "450M", and 16 make {sizes[1]};
  24 heads would not divide 1024.
* **A dimension shrinks.** ffn goes from 4096 to 3072 on the way to (1152, 3072, 50). An increment counts as 1 if the
  model is then smaller than the initial one, which leaves a single factor of the product that the paper calls best. No
  operator shrinks a model, so this package computes such a product but refuses to grow that way.
* **One row is not reproduced**, {wrong.sequence} to {wrong.target}: it is printed as {wrong.printed} and computes to
  {wrong.computed:.2E}. We consider it a misprint; the ranking of the table is the same either way."""


def _write_table_4() -> str:
    return f"""## Table 4

{_format_products(reproduction.reproduce_products(paper.TABLE_4), OF_STAGE)}

Two dimensions grow, and ffn follows hidden."""


def _write_hours() -> str:
    cost, rows = paper.fit_cost_model(), reproduction.reproduce_hours()
    mean, worst = cost.mean_error or 0.0, max(map(abs, cost.errors))
    return f"""## GPU hours

    hours = a · FLOPs + b · tokens
    FLOPs per token = 6 (l (4 h² + 3 h f) + V h + l h S)

with Llama's vocabulary V = 32000 and sequences of S = {paper.SEQUENCE_LENGTH}; S is not printed. Least squares of
relative errors over the {len(cost.measurements)} stages of 10B tokens (Section 4.1) that Table 1 prints give

    a = {cost.hours_per_flop:.3g} hours per FLOP
    b = {cost.hours_per_token * 1e9:.3g} hours per 1B tokens

with a mean error of {mean:.2%} and a largest error of {worst:.1%}. This is `slop_hf.paper.fit_cost_model()`. In the
table below, hours agree if they are within {reproduction.HOURS_TOLERANCE:.0%}; {_count_agreeing(rows)} do.

{_format_table(HOURS_COLUMNS, [format_row(row) for row in rows])}"""


def _write_remarks_on_hours() -> str:
    speed, peak = reproduction.find_highest_speed() / 1e12, reproduction.A100_FLOPS_PER_SECOND / 1e12
    sums = [
        f"Table {table}, {run.sequence} to {run.target}, prints {run.total_hours:g} for {total:.2f}"
        for table, run, total in reproduction.find_wrong_sums()
    ]
    others = [run.total_hours for run in paper.TABLE_1.runs if not run.recommended]
    slop, scratch, elle = (paper.TABLE_2[method].hours for method in ("SLOP", "from scratch", "ELLE"))
    return f"""Remarks on these hours:

* **They are too few for one A100**, the GPU that the paper names: Table 1 implies up to {speed:.0f} TFLOP/s, and the
  peak of an A100 is {peak:.0f}. Use them to compare schedules with each other. For the hours of your own hardware, use
  `slop calibrate`.
* **The initial models' hours do not lie on a line with the others**, so they are left out of the fit.
* **Some hours are not independent measurements.** Tables 2 and 4 print multiples of Table 1's hours, as the notes say.
  Predicting them shows little more than that Table 1 is fitted.
* **Table 3's stages have the hours of growth from {paper.INITIAL}**, not from the 450M model that the table begins
  with: from that model, the fit would be off by up to {reproduction.find_worst_error_from_450m():.0%}.
* **Table 10's single stage** is not on the line, but SLOP's run of the same table is.
* **Some sums are wrong**: {"; ".join(sums)}.
* **Tokens differ.** A grown run of Table 1 has three growth stages, 25B + 3 × 10B = 55B tokens; training from scratch
  and the single stage have the hours of 65B.
* **Savings are relative to SLOP's hours**, not to the other method's: the text's 183.74% is
  ({scratch} − {slop}) / {slop} = {scratch / slop - 1:.2%}, and its 22.6% is ELLE's {elle / slop - 1:.1%}. Relative to
  the hours without SLOP, the savings are {1 - slop / scratch:.1%} and {1 - slop / elle:.1%}. The text's range over
  Table 1, 2.74% to 35.48%, is {min(others) / slop - 1:.2%} to {max(others) / slop - 1:.2%} by the table's own sums."""


def _write_edge() -> str:
    structures = reproduction.list_same_size()
    ranks = {name: reproduction.rank_by_depth(name) for name in _CONVENTIONS}
    best = [min(rows, key=lambda row: row.product).target for rows in ranks.values()]
    sizes = [count_paper_params(dims) / 1e6 for dims in structures]
    least, most = f"{min(sizes):,.0f}M", f"{max(sizes):,.0f}M"
    columns = ("layers", "best target", "order", "Π Δparams", "hours of its stages")
    return f"""## The objective alone runs to the edge

Table 1 chooses among four targets. {len(structures)} structures of up to {reproduction.DEPTHS[-1][1]} layers meet the
paper's constraints, are as large as those four ({least} to {most} by `params`) and grow in every dimension. The best
of all of them is {best[0]} by increments since the start and {best[1]} by increments of the stage: at the edge of the
space, deep and thin. At the other edge, few layers are better than a moderate number:

{_format_by_convention(columns, {name: map(_format_band, rows) for name, rows in ranks.items()})}

The predicted hours hardly differ, and none of these numbers says which structure learns best. So a planner needs
bounds on depth and shape (`slop plan --max-layers`, `--min-aspect`, `--max-aspect`), or an objective that counts
compute and loss (`--objective hours`, `loss_per_hour`)."""


def _format_band(row: Ranked) -> tuple[str, ...]:
    low, high = next(band for band in reproduction.DEPTHS if row.target.num_hidden_layers <= band[1])
    return f"{low} to {high}", *_format_ranked(row)[:-1]
