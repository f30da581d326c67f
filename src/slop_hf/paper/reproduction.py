"""The paper's figures computed again: products of Tables 1, 3 and 4, GPU hours of Tables 1 to 4 and 10.

Nothing is taken from the paper but the structures, the orders and the printed figures to compare with (`paper.py`).
Products come from `OBJECTIVES` by `score`, as a planner's do, and hours from `paper.cost_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from itertools import permutations
from typing import Literal

import numpy as np

from ..cost.flops import paper_params
from ..dims import ModelDims
from ..planning.budget import Budget
from ..planning.objectives import OBJECTIVES, score
from ..planning.space import ConfigSpace
from ..planning.structures import DimsArray, Prices, Structures
from . import tables as paper

#: Increments over the initial model make Tables 1 and 3, increments of the stage (Eq. 3) make Table 4.
SINCE_START, OF_STAGE = "delta_params", "delta_params_eq3"

#: Hours are a measurement, not arithmetic: they agree where they are off by no more than this share.
HOURS_TOLERANCE = 0.06

#: Hours that the sum of a few rounded ones may be off.
SUM_TOLERANCE = 0.05

#: Dense bfloat16, by NVIDIA's data sheet of the A100, the GPU that the paper names (Appendix B.1).
A100_FLOPS_PER_SECOND = 312e12

#: Depths that are looked at together, in `best_by_depth`.
DEPTHS = ((7, 8), (9, 16), (17, 32), (33, 48), (49, 64))


@dataclass(frozen=True)
class Product:
    """A printed product of parameter increments, and the computed one.

    Args:
        table: its number.
        target, sequence: the row.
        printed: as printed.
        computed: by the convention of its table.
        by_other: by the other convention.
        agrees: whether the computed one is the same to the printed digits.
        note: what there is to say about it.
    """

    table: int
    target: ModelDims
    sequence: str
    printed: str
    computed: float
    by_other: float
    agrees: bool
    note: str = ""


@dataclass(frozen=True)
class Hours:
    """Printed GPU hours, and those of the cost model.

    Args:
        table: its number.
        target: the structure that was trained, or grown to.
        trained: what was done.
        printed: as printed.
        computed: by `paper.cost_model`.
        note: what there is to say about them.
    """

    table: int
    target: ModelDims
    trained: str
    printed: float
    computed: float
    note: str = ""

    @property
    def error(self) -> float:
        """How far the computed hours are off, as a share of the printed ones; above 0 is too long."""
        return self.computed / self.printed - 1

    @property
    def agrees(self) -> bool:
        """Whether that is within `HOURS_TOLERANCE`."""
        return abs(self.error) <= HOURS_TOLERANCE


@dataclass(frozen=True)
class Ranked:
    """The best order of growth to a target, or to any of several targets.

    Args:
        target, sequence: where it leads, and how.
        product: of the parameter increments.
        stage_hours: of its stages of growth, 10B tokens each.
        printed: whether it is a row of Table 1.
    """

    target: ModelDims
    sequence: str
    product: float
    stage_hours: float
    printed: bool = False


def agreement(printed: str, computed: float) -> Literal["rounded", "cut off"] | None:
    """How a computed number gives the printed digits; None where it does not.

    >>> agreement("1.69E+24", 1.6894e24), agreement("1.52E+26", 1.5258e26), agreement("5.54E+25", 6.5522e25)
    ('rounded', 'cut off', None)
    """
    number, exact = Decimal(printed), Decimal(computed)
    unit = Decimal((0, (1,), int(number.as_tuple().exponent)))
    if exact.quantize(unit, ROUND_HALF_EVEN) == number:
        return "rounded"
    return "cut off" if exact.quantize(unit, ROUND_DOWN) == number else None


def evaluate(paths: Sequence[Sequence[ModelDims]], objective: str, tokens: Sequence[int] | None = None) -> np.ndarray:
    """The value of an objective for paths of one length.

    Args:
        paths: the structures of each, the initial one first.
        objective: a name in `OBJECTIVES`.
        tokens: of each stage, the initial model's first; by default none.

    >>> product = evaluate([paper.TABLE_4.runs[1].path(paper.INITIAL)], "delta_params_eq3")[0]
    >>> f"{product:.2E}"  # Table 4, l-h
    '1.38E+16'
    """
    dims = DimsArray.of([structure for structures in paths for structure in structures])
    grid = np.arange(len(dims)).reshape(len(paths), -1)
    prices = Prices(sequence_length=paper.SEQUENCE_LENGTH, cost_model=paper.cost_model())
    budget = Budget(tuple(tokens) if tokens is not None else (0,) * grid.shape[1])
    return score(OBJECTIVES[objective], Structures(dims[grid], prices), budget)


def table_1() -> list[Product]:
    """Table 1: all ten products, increments counted since the start.

    >>> all(row.agrees for row in table_1())
    True
    """
    return _products(paper.TABLE_1, SINCE_START)


def table_3(initial: ModelDims = paper.INITIAL_450M) -> list[Product]:
    """Table 3: five of six products, increments counted since the start.

    Args:
        initial: the structure to begin with; the default has 24 layers and 16 heads, which are printed the other way.

    >>> [row.agrees for row in table_3()]
    [True, True, True, True, False, True]
    >>> any(row.agrees for row in table_3(paper.INITIAL_450M.replace(num_hidden_layers=16)))
    False
    """
    return _products(paper.TABLE_3, SINCE_START, initial)


def table_4() -> list[Product]:
    """Table 4: both products, increments counted by the stage, as Eq. 3 says.

    >>> all(row.agrees for row in table_4())
    True
    """
    return _products(paper.TABLE_4, OF_STAGE)


def hours() -> list[Hours]:
    """GPU hours of Tables 1 to 4 and 10, beside the cost model that is fitted to Table 1's growth stages.

    The initial models' hours are on no line with the others, nor is the single stage of Table 10.

    >>> [(row.table, row.trained) for row in hours() if not row.agrees]
    [(1, 'initial, 25B'), (3, 'initial, 25B'), (10, 'initial, then 40B')]
    """
    # Table 3's stages are those of growth from Table 1's initial model, not from its own.
    stages = [*_stages(paper.TABLE_1, "fitted"), *_stages(paper.TABLE_3), *_stages(paper.TABLE_4)]
    initials = [_initial(table) for table in (paper.TABLE_1, paper.TABLE_3)]
    rows = [*stages, *initials, *_table_2(), *_table_10()]
    return sorted(rows, key=lambda row: row.table)


def best_orders(objective: str = SINCE_START) -> list[Ranked]:
    """The best order of growth to each of Table 1's four targets, best first.

    Args:
        objective: `SINCE_START` or `OF_STAGE`.

    >>> [(str(one.target), one.sequence, f"{one.product:.2e}") for one in best_orders()[:2]]
    [('(2816, 7680, 8, 22)', 'l-f-h', '1.69e+24'), ('(1280, 3584, 40, 10)', 'f-h-l', '1.75e+24')]
    """
    return sorted((_best([target], objective) for target in paper.TABLE_1.targets), key=lambda one: one.product)


def same_size() -> list[ModelDims]:
    """All structures as large as Table 1's targets that meet the paper's constraints (section 4.1), up to 64 layers.

    As large: from the smallest to the largest of the targets by `cost.paper_params`. Hidden size / layers is free,
    and every dimension grows.

    >>> set(paper.TABLE_1.targets) <= set(same_size())
    True
    """
    sizes = [paper_params(target) for target in paper.TABLE_1.targets]
    middle = (min(sizes) + max(sizes)) / 2
    space = ConfigSpace(
        target_params=middle,
        tolerance=max(sizes) / middle - 1 + 1e-9,  # a little more, so that rounding keeps both ends in
        count="paper",
        min_layers=paper.INITIAL.num_hidden_layers + 1,
        min_aspect=1,
        max_aspect=1000,
    )
    return space.structures(paper.INITIAL)


def best_by_depth(objective: str = SINCE_START) -> list[Ranked]:
    """The best of `same_size` in each of `DEPTHS`: where the paper's objective leads if nothing bounds it.

    Args:
        objective: `SINCE_START` or `OF_STAGE`.

    >>> min(best_by_depth(), key=lambda one: one.product).target.num_hidden_layers  # deep and thin
    61
    """
    structures = same_size()
    bands = ([dims for dims in structures if low <= dims.num_hidden_layers <= high] for low, high in DEPTHS)
    return [_best(band, objective) for band in bands if band]


def fastest_flops_per_second() -> float:
    """The highest speed of one GPU that Table 1's hours imply, in FLOP/s; `A100_FLOPS_PER_SECOND` is the peak of one.

    >>> fastest_flops_per_second() > A100_FLOPS_PER_SECOND
    True
    """
    measured = paper.cost_model().measurements
    return max(one.flops_per_token * one.tokens / (one.hours * 3600) for one in measured)


def worst_from_450m() -> float:
    """The largest error of the cost model for Table 3's hours, were its stages grown from its own initial model.

    >>> worst_from_450m() > 10 * HOURS_TOLERANCE
    True
    """
    stages = paper.stage_hours(paper.TABLE_3, paper.INITIAL_450M).items()
    return max(abs(_hours_of([dims], [tokens]) / printed - 1) for (dims, tokens), printed in stages)


def wrong_sums() -> list[tuple[int, paper.GrownRun, float]]:
    """Rows whose printed sum of hours is not that of their own columns: the table, the row, and what they add up to.

    >>> [(table, row.sequence, row.total_hours, round(found, 2)) for table, row, found in wrong_sums()]
    [(1, 'f-h-l', 123.09, 122.99), (1, 'f-h-l', 107.62, 107.56), (4, 'l-h', 139.8, 129.8)]
    """
    tables = (paper.TABLE_1, paper.TABLE_3, paper.TABLE_4)
    sums = [(table.number, run, table.initial_hours + sum(run.stage_hours)) for table in tables for run in table.runs]
    return [(table, run, found) for table, run, found in sums if abs(found - run.total_hours) > SUM_TOLERANCE]


def _products(table: paper.GrowthTable, objective: str, initial: ModelDims | None = None) -> list[Product]:
    paths = [run.path(initial or table.initial) for run in table.runs]
    other = OF_STAGE if objective == SINCE_START else SINCE_START
    found, by_other = evaluate(paths, objective).tolist(), evaluate(paths, other).tolist()
    rows = []
    for run, structures, computed, other_value in zip(table.runs, paths, found, by_other, strict=True):
        how = agreement(run.product, computed)
        figures = run.product, computed, other_value
        note = _note(structures, how, table.initial)
        rows.append(Product(table.number, run.target, run.sequence, *figures, how is not None, note))
    return rows


def _note(structures: Sequence[ModelDims], how: str | None, initial: ModelDims) -> str:
    notes = []
    if how == "cut off":
        notes.append("printed cut off, not rounded")
    elif how is None:
        known = structures[0] == initial
        notes.append("misprint: neither convention gives it" if known else "does not come out from this start")
    start = paper_params(structures[0])
    if smaller := sum(paper_params(dims) <= start for dims in structures[1:]):
        notes.append(f"ffn shrinks: increments below 1 count as 1, here {smaller} of {len(structures) - 1}")
    return "; ".join(notes)


def _best(targets: Sequence[ModelDims], objective: str) -> Ranked:
    """The best of all orders of some targets."""
    orders = ["-".join(letters) for letters in permutations("lfh")]
    choices = [(target, order) for target in targets for order in orders]
    paths = [paper.path(paper.INITIAL, target, order) for target, order in choices]
    products = evaluate(paths, objective)
    best = int(np.argmin(products))
    growth = (0, *(paper.STAGE_TOKENS,) * 3)
    spent = float(evaluate([paths[best]], "hours", growth)[0])
    printed = choices[best] in [(run.target, run.sequence) for run in paper.TABLE_1.runs]
    return Ranked(*choices[best], float(products[best]), spent, printed)


def _hours_of(structures: Sequence[ModelDims], tokens: Sequence[int]) -> float:
    """Hours of a schedule; of one structure and one number of tokens, those of plain training."""
    return float(evaluate([structures], "hours", tokens)[0])


def _stages(table: paper.GrowthTable, origin: str = "predicted") -> list[Hours]:
    """The growth stages of a table, each structure once."""
    rows = []
    for (dims, tokens), printed in paper.stage_hours(table, paper.INITIAL).items():
        if table is paper.TABLE_4 and tokens == paper.STAGE_TOKENS:
            continue  # printed in Table 1 already
        note = origin if tokens == paper.STAGE_TOKENS else f"predicted; {_multiple(printed, dims)}"
        computed = _hours_of([dims], [tokens])
        rows.append(Hours(table.number, dims, f"stage of {tokens / 1e9:g}B", printed, computed, note))
    return rows


def _initial(table: paper.GrowthTable) -> Hours:
    computed = _hours_of([table.initial], [paper.INITIAL_TOKENS])
    note = f"not on the line: {table.initial_hours / computed:.1f} times as long"
    return Hours(table.number, table.initial, "initial, 25B", table.initial_hours, computed, note)


def _table_2() -> list[Hours]:
    """Training from scratch, and the initial model grown at once; how MSG and ELLE grew is not printed."""
    scratch, single = (paper.TABLE_2[method].hours for method in ("from scratch", "single stage"))
    start, rest = paper.TABLE_1.initial_hours, paper.TOTAL_TOKENS - paper.INITIAL_TOKENS
    all_of_it, grown = _hours_of([paper.TARGET], [paper.TOTAL_TOKENS]), start + _hours_of([paper.TARGET], [rest])
    known = f"predicted; {_multiple(scratch, paper.TARGET)}"
    also = f"predicted; {start} and {_multiple(single - start, paper.TARGET)}"
    return [
        Hours(2, paper.TARGET, "from scratch, 65B", scratch, all_of_it, known),
        Hours(2, paper.TARGET, "initial, then 40B", single, grown, also),
    ]


def _table_10() -> list[Hours]:
    """SLOP's run and the initial model grown at once."""
    target, start = paper.TABLE_10_TARGET, paper.TABLE_1.initial_hours
    slop, single = (paper.TABLE_10[method].hours for method in ("SLOP", "single stage"))
    structures = paper.path(paper.INITIAL, target, paper.TABLE_10_SEQUENCE)
    staged = start + _hours_of(structures, (0, *(paper.STAGE_TOKENS,) * 3))
    at_once = start + _hours_of([target], [paper.TOTAL_TOKENS - paper.INITIAL_TOKENS])
    last = _hours_of([target], [paper.STAGE_TOKENS])
    note = f"not on the line: four stages of {(single - start) / 4:.1f}, where SLOP's last takes {last:.1f}"
    return [
        Hours(10, target, "initial, then l-f-h", slop, staged, f"predicted; {start} of it printed"),
        Hours(10, target, "initial, then 40B", single, at_once, note),
    ]


def _multiple(printed: float, dims: ModelDims) -> str:
    """How printed hours follow from those that Table 1 prints for 10B tokens of the same structure."""
    once = paper.stage_hours(paper.TABLE_1)[dims, paper.STAGE_TOKENS]
    return f"{printed / once:.2f} times Table 1's {once}"
