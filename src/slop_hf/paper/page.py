"""The page `docs/reproduction.md`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence

from ..cost.flops import paper_params
from . import reproduction
from . import tables as paper
from .reproduction import OF_STAGE, SINCE_START, Hours, Product, Ranked

COMMAND = "slop reproduce --output docs/reproduction.md"
PRODUCT_COLUMNS = ("target", "order", "printed", "computed", "agrees", "note")
HOURS_COLUMNS = ("table", "structure", "trained", "printed", "computed", "off", "agrees", "note")


def row_cells(row: Product | Hours) -> tuple[str, ...]:
    agrees = "yes" if row.agrees else "no"
    if isinstance(row, Product):
        return str(row.target), row.sequence, row.printed, f"{row.computed:.3E}", agrees, row.note
    figures = f"{row.printed:g}", f"{row.computed:.1f}", f"{row.error:+.1%}"
    return str(row.table), str(row.target), row.trained, *figures, agrees, row.note


def reproduction_page() -> str:
    """The page `docs/reproduction.md`: what the paper's figures are, each beside the computed one."""
    sections = (_head, _conventions, _table_1, _table_3, _table_4, _hours, _hours_remarks, _edge)
    blocks = "\n\n".join(section() for section in sections).split("\n\n")
    return "\n\n".join(map(_filled, blocks)) + "\n"


def _filled(block: str) -> str:
    """A paragraph or a list, its lines filled anew; headings, tables and formulas as they are."""
    if block.startswith(("#", "|", "<", "    ")):
        return block
    items = (" ".join(item.split()) for item in re.split(r"\n(?=\* )", block))
    indents = ((item, "  " if item.startswith("* ") else "") for item in items)
    return "\n".join(textwrap.fill(item, 119, subsequent_indent=by, break_on_hyphens=False) for item, by in indents)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows))


def _count(rows: Sequence[Product] | Sequence[Hours]) -> str:
    return f"{sum(row.agrees for row in rows)} of {len(rows)}"


def _head() -> str:
    products = [*reproduction.table_1(), *reproduction.table_3(), *reproduction.table_4()]
    small, large = (f"{paper_params(dims) / 1e6:,.1f}M" for dims in (paper.INITIAL, paper.TARGET))
    return f"""# The paper's figures, computed again

<!-- Written by `{COMMAND}`; run it again instead of editing. -->

The SLOP paper does not say all of its conventions. Those below give {_count(products)} of its printed products to the
printed digits, and the GPU hours of its growth stages to a few percent; what no convention gives is named. A product
agrees where it rounds to the printed digits, or is cut off to them, which then is noted. Structures are (hidden, ffn,
layers, heads), orders of growth one letter a stage: `l`ayer, `f`fn, `h`idden.

## What is counted

The objective is a product of increments of `params`, one for each stage of growth. With hidden size h, ffn size f and
l layers,

    params = l (6 h² + 3 h f)

gives its figures: {small} for {paper.INITIAL}, {large} for {paper.TARGET}. It is not the size of a model:
embeddings, norms and biases are not in it, and 6 h² is more than the 4 h² of attention's four square matrices.
`3 h f` is a gated ffn. The paper does not print the formula. An increment below 1 counts as 1."""


def _conventions() -> str:
    rows = []
    for table in (paper.TABLE_1, paper.TABLE_3, paper.TABLE_4):
        paths = [run.path(table.initial) for run in table.runs]
        found = [reproduction.evaluate(paths, name).tolist() for name in _CONVENTIONS]
        rows.append((f"Table {table.number}", str(len(table.runs)), *(_agreeing(table, values) for values in found)))
    return f"""## Two conventions

Eq. 3 defines the increment **of a stage**, from the structure before it to the one after it. Table 4 is made that way.
In Tables 1 and 3 an increment is that **since the start**, from the initial structure to the one after the stage. How
many products come out, either way:

{_markdown(("", "products", *(f"{words} (`{name}`)" for name, words in _CONVENTIONS.items())), rows)}

The names are those of objectives of `slop plan`."""


_CONVENTIONS = {SINCE_START: "since the start", OF_STAGE: "of the stage, Eq. 3"}


def _agreeing(table: paper.GrowthTable, values: Sequence[float]) -> str:
    pairs = zip(table.runs, values, strict=True)
    return str(sum(reproduction.agreement(run.product, value) is not None for run, value in pairs))


def _products(rows: Sequence[Product], convention: str) -> str:
    """A table's products by both conventions, the one named being its own."""
    cells = []
    for row in rows:
        target, order, printed, computed, *rest = row_cells(row)
        both = (computed, f"{row.by_other:.3E}")
        cells.append((target, order, printed, *(both if convention == SINCE_START else both[::-1]), *rest))
    return _markdown((*PRODUCT_COLUMNS[:3], *_CONVENTIONS.values(), *PRODUCT_COLUMNS[4:]), cells)


def _table_1() -> str:
    ranks = {name: reproduction.best_orders(name) for name in _CONVENTIONS}
    first, by_stage = (f"{rows[0].sequence} to {rows[0].target}" for rows in ranks.values())
    columns = ("target", "order", "Π Δparams", "hours of its stages", "in Table 1")
    return f"""## Table 1

{_products(reproduction.table_1(), SINCE_START)}

The paper recommends l-f-h to {paper.TARGET}. Of all orders to the table's four targets, the best is
{first} by increments since the start, and
{by_stage} by those of the stage. The best order to each target:

{_both({name: _markdown(columns, [_ranked(one) for one in rows]) for name, rows in ranks.items()})}"""


def _both(tables: Mapping[str, str]) -> str:
    """A table for each convention, named."""
    return "\n\n".join(f"*By increments {_CONVENTIONS[name]}*\n\n{table}" for name, table in tables.items())


def _ranked(one: Ranked) -> tuple[str, ...]:
    printed = "yes" if one.printed else "no"
    return str(one.target), one.sequence, f"{one.product:.3E}", f"{one.stage_hours:.1f}", printed


def _table_3() -> str:
    rows, start = reproduction.table_3(), paper.INITIAL_450M
    printed = start.replace(num_hidden_layers=16)
    swapped = reproduction.table_3(printed)
    sizes = [f"{paper_params(dims) / 1e6:.0f}M" for dims in (start, printed)]
    wrong = next(row for row in rows if not row.agrees)
    return f"""## Table 3

{_products(rows, SINCE_START)}

* **Layers and heads are swapped.** The initial model is printed as (1024, 4096, 16, 24), in the order (hidden, ffn,
  layers, heads) of the text. With 24 layers and 16 heads {_count(rows)} products come out; with 16 layers,
  {_count(swapped)}. 24 layers make {sizes[0]} by `params`, the text's "450M", and 16 make {sizes[1]}; 24 heads would
  not divide 1024.
* **A dimension shrinks.** ffn goes from 4096 to 3072 on the way to (1152, 3072, 50). Where that makes a model smaller
  than the initial one, the increment counts as 1: of the product that the paper calls best, a single factor is left.
  No operator shrinks a model, so that this package computes such a product and refuses to grow that way.
* **One row does not come out**, {wrong.sequence} to {wrong.target}: it is printed as {wrong.printed} and computes to
  {wrong.computed:.2E}. We take it for a misprint; the table's order of merit is the same either way."""


def _table_4() -> str:
    return f"""## Table 4

{_products(reproduction.table_4(), OF_STAGE)}

Two dimensions grow, and ffn goes with hidden."""


def _hours() -> str:
    cost, rows = paper.cost_model(), reproduction.hours()
    mean, worst = cost.mean_error or 0.0, max(map(abs, cost.errors))
    return f"""## GPU hours

    hours = a · FLOPs + b · tokens
    FLOPs = 6 (l (4 h² + 3 h f) + V h + l h S) a token

with Llama's vocabulary V = 32000 and sequences of S = {paper.SEQUENCE_LENGTH}; S is not printed. Least squares of
relative errors over the {len(cost.measurements)} stages of 10B tokens (Section 4.1) that Table 1 prints give

    a = {cost.hours_per_flop:.3g} hours a FLOP
    b = {cost.hours_per_token * 1e9:.3g} hours for 1B tokens

with a mean error of {mean:.2%} and a largest one of {worst:.1%}. This is `slop_hf.paper.cost_model()`. Below, hours
agree where they are within {reproduction.HOURS_TOLERANCE:.0%}: {_count(rows)} do.

{_markdown(HOURS_COLUMNS, [row_cells(row) for row in rows])}"""


def _hours_remarks() -> str:
    speed, peak = reproduction.fastest_flops_per_second() / 1e12, reproduction.A100_FLOPS_PER_SECOND / 1e12
    sums = [
        f"Table {table}, {run.sequence} to {run.target}, {run.total_hours:g} for {found:.2f}"
        for table, run, found in reproduction.wrong_sums()
    ]
    others = [run.total_hours for run in paper.TABLE_1.runs if not run.recommended]
    slop, scratch, elle = (paper.TABLE_2[method].hours for method in ("SLOP", "from scratch", "ELLE"))
    return f"""What to know about these hours:

* **They are too few for one A100**, the GPU that the paper names: Table 1 implies up to {speed:.0f} TFLOP/s, and an
  A100's peak is {peak:.0f}. They compare schedules with one another. For hours of your own hardware, use
  `slop calibrate`.
* **The initial models' hours are on no line with the others**, so that they are left out of the fit.
* **Some are not measurements of their own.** Tables 2 and 4 print multiples of Table 1's hours, as the notes say; that
  they are predicted says little more than that Table 1 is fitted.
* **Table 3's stages are those of growth from {paper.INITIAL}**, not from the 450M model that the table begins
  with: from there, the line would be off by up to {reproduction.worst_from_450m():.0%}.
* **Table 10's single stage** is not on the line, whereas SLOP's run of the same table is.
* **Some sums do not add up**: {"; ".join(sums)}.
* **Tokens differ.** A grown run of Table 1 has three stages of growth, 25B + 3 × 10B = 55B tokens; training from
  scratch and the single stage have the hours of 65B.
* **Savings are shares of SLOP's hours**, not of the other's: the text's 183.74% is
  ({scratch} − {slop}) / {slop} = {scratch / slop - 1:.2%}, and its 22.6% is ELLE's {elle / slop - 1:.1%}. Of the
  hours without SLOP, that is {1 - slop / scratch:.1%} and {1 - slop / elle:.1%}. The text's range over Table 1, 2.74%
  to 35.48%, is {min(others) / slop - 1:.2%} to {max(others) / slop - 1:.2%} by the table's own sums."""


def _edge() -> str:
    structures = reproduction.same_size()
    ranks = {name: reproduction.best_by_depth(name) for name in _CONVENTIONS}
    best = [min(rows, key=lambda one: one.product).target for rows in ranks.values()]
    sizes = [paper_params(dims) / 1e6 for dims in structures]
    least, most = f"{min(sizes):,.0f}M", f"{max(sizes):,.0f}M"
    columns = ("layers", "best target", "order", "Π Δparams", "hours of its stages")
    return f"""## The objective alone runs to the edge

Table 1 chooses among four targets. {len(structures)} structures of up to {reproduction.DEPTHS[-1][1]} layers meet the
paper's constraints, are as large as those four ({least} to {most} by `params`) and grow in every dimension. Over all
of them the best is
{best[0]} by increments since the start and {best[1]} by those of the stage:
at the edge, deep and thin. At the other edge, few layers are better than a middling number:

{_both({name: _markdown(columns, [_band(one) for one in rows]) for name, rows in ranks.items()})}

The predicted hours hardly tell them apart, and nothing here says which of them learns best. So a planner needs
bounds on depth and shape (`slop plan --max-layers`, `--min-aspect`, `--max-aspect`), or an objective that prices
compute and loss (`--objective hours`, `loss_per_hour`)."""


def _band(one: Ranked) -> tuple[str, ...]:
    low, high = next(band for band in reproduction.DEPTHS if one.target.num_hidden_layers <= band[1])
    return f"{low} to {high}", *_ranked(one)[:-1]
