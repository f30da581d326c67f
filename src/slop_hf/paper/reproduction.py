"""The paper's printed numbers, computed again: products of Tables 1, 3 and 4, GPU hours of Tables 1 to 4 and 10.

The only inputs from the paper are the structures, the orders and the printed numbers to compare with (`tables.py`).
Products are values of `OBJECTIVES`, as a planner computes them, and hours come from `fit_cost_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from itertools import permutations
from typing import Literal

import numpy as np

from ..cost.flops import count_paper_params
from ..dims import ModelDims
from ..planning.budget import Budget
from ..planning.objectives import OBJECTIVES, evaluate_objective
from ..planning.space import ConfigSpace
from ..planning.structures import CostInputs, DimsArray, DimsTable, FloatArray
from . import tables as paper

#: Objectives: increments since the initial model reproduce Tables 1 and 3, increments per stage (Eq. 3) Table 4.
SINCE_START, OF_STAGE = "delta_params", "delta_params_eq3"

#: Hours are measurements, not arithmetic: they agree up to this relative error.
HOURS_TOLERANCE = 0.06

#: Largest error, in hours, of a sum of a few rounded hours.
SUM_TOLERANCE = 0.05

#: Dense bfloat16 peak from NVIDIA's data sheet of the A100, the GPU that the paper names (Appendix B.1).
A100_FLOPS_PER_SECOND = 312e12

#: Ranges of depth in `rank_by_depth`.
DEPTHS = ((7, 8), (9, 16), (17, 32), (33, 48), (49, 64))


@dataclass(frozen=True)
class Product:
    """A printed product of parameter increments, and the computed product.

    Args:
        computed, by_other: product by the convention of the table, and by the other one.
        agrees: whether the computed product has the printed digits.
        note: remark on the comparison.
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
    """Printed GPU hours, and the hours of the cost model.

    Args:
        target: structure trained from scratch, or grown to.
        trained: what was trained, for how many tokens.
        computed: hours by `fit_cost_model`.
        note: remark on the comparison.
    """

    table: int
    target: ModelDims
    trained: str
    printed: float
    computed: float
    note: str = ""

    @property
    def error(self) -> float:
        """Relative error of the computed hours; positive if they are too long."""
        return self.computed / self.printed - 1

    @property
    def agrees(self) -> bool:
        """Whether the error is within `HOURS_TOLERANCE`."""
        return abs(self.error) <= HOURS_TOLERANCE


@dataclass(frozen=True)
class Ranked:
    """The best order of growth to a target, or to any of several targets.

    Args:
        product: product of the parameter increments.
        stage_hours: hours of its growth stages, 10B tokens each.
        printed: whether it is a row of Table 1.
    """

    target: ModelDims
    sequence: str
    product: float
    stage_hours: float
    printed: bool = False


def match_digits(printed: str, computed: float) -> Literal["rounded", "cut off"] | None:
    """Return how a computed number gives the printed digits; None if it does not.

    >>> match_digits("1.69E+24", 1.6894e24), match_digits("1.52E+26", 1.5258e26), match_digits("5.54E+25", 6.5522e25)
    ('rounded', 'cut off', None)
    """
    number, exact = Decimal(printed), Decimal(computed)
    unit = Decimal((0, (1,), int(number.as_tuple().exponent)))
    if exact.quantize(unit, ROUND_HALF_EVEN) == number:
        return "rounded"
    return "cut off" if exact.quantize(unit, ROUND_DOWN) == number else None


def evaluate_paths(
    paths: Sequence[Sequence[ModelDims]], objective: str, tokens: Sequence[int] | None = None
) -> FloatArray:
    """Return the value of an objective for paths of one length, shape [paths].

    Args:
        paths: structures of each path, the initial one first.
        objective: a name in `OBJECTIVES`.
        tokens: tokens per stage, the initial model's first; default, none.

    >>> product = evaluate_paths([paper.TABLE_4.runs[1].path(paper.INITIAL)], OF_STAGE)[0]
    >>> f"{product:.2E}"  # Table 4, l-h
    '1.38E+16'
    """
    dims = DimsArray.of([structure for structures in paths for structure in structures])
    grid = np.arange(len(dims)).reshape(len(paths), -1)
    inputs = CostInputs(sequence_length=paper.SEQUENCE_LENGTH, cost_model=paper.fit_cost_model())
    budget = Budget(tuple(tokens) if tokens is not None else (0,) * grid.shape[1])
    return evaluate_objective(OBJECTIVES[objective], DimsTable(dims[grid], inputs), budget)


def reproduce_products(table: paper.GrowthTable, initial: ModelDims | None = None) -> list[Product]:
    """Reproduce the products of a table: with increments per stage for Table 4, since the start for Tables 1 and 3.

    Args:
        table: one of `GROWTH_TABLES`.
        initial: initial structure; default, the table's.

    >>> [sum(row.agrees for row in reproduce_products(table)) for table in paper.GROWTH_TABLES]
    [10, 5, 2]
    """
    paths = [run.path(initial or table.initial) for run in table.runs]
    conventions = (OF_STAGE, SINCE_START) if table is paper.TABLE_4 else (SINCE_START, OF_STAGE)
    values = (evaluate_paths(paths, name).tolist() for name in conventions)
    rows = []
    for run, structures, computed, by_other in zip(table.runs, paths, *values, strict=True):
        match = match_digits(run.product, computed)
        note = _describe_product(structures, match, table.initial)
        numbers = run.product, computed, by_other
        rows.append(Product(table.number, run.target, run.sequence, *numbers, match is not None, note))
    return rows


def reproduce_hours() -> list[Hours]:
    """Reproduce the GPU hours of Tables 1 to 4 and 10 with the cost model fitted to Table 1's growth stages.

    The hours of the initial models do not lie on a line with the others, nor does the single stage of Table 10.

    >>> [(row.table, row.trained) for row in reproduce_hours() if not row.agrees]
    [(1, 'initial, 25B'), (3, 'initial, 25B'), (10, 'initial, then 40B')]
    """
    stages = [row for table in paper.GROWTH_TABLES for row in _compare_stages(table)]
    initials = [_compare_initial(table) for table in (paper.TABLE_1, paper.TABLE_3)]
    return sorted([*stages, *initials, *_compare_table_2(), *_compare_table_10()], key=lambda row: row.table)


def rank_targets(objective: str = SINCE_START) -> list[Ranked]:
    """Return the best order of growth to each of Table 1's four targets, best first.

    >>> [(str(best.target), best.sequence, f"{best.product:.2e}") for best in rank_targets()[:2]]
    [('(2816, 7680, 8, 22)', 'l-f-h', '1.69e+24'), ('(1280, 3584, 40, 10)', 'f-h-l', '1.75e+24')]
    """
    best = [_find_best([target], objective) for target in paper.TABLE_1.targets]
    return sorted(best, key=lambda ranked: ranked.product)


def list_same_size() -> list[ModelDims]:
    """Return all structures as large as Table 1's targets that meet the constraints of section 4.1, up to 64 layers.

    As large means from the smallest to the largest of the targets by `count_paper_params`. Hidden size / layers is
    free, and every dimension grows.

    >>> set(paper.TABLE_1.targets) <= set(list_same_size())
    True
    """
    sizes = [count_paper_params(target) for target in paper.TABLE_1.targets]
    middle = (min(sizes) + max(sizes)) / 2
    space = ConfigSpace(
        target_params=middle,
        tolerance=max(sizes) / middle - 1 + 1e-9,  # a little more, so that rounding excludes neither end
        count="paper",
        min_layers=paper.INITIAL.num_hidden_layers + 1,
        min_aspect=1,
        max_aspect=1000,
    )
    return space.structures(paper.INITIAL)


def rank_by_depth(objective: str = SINCE_START) -> list[Ranked]:
    """Return the best structure of `list_same_size` in each of `DEPTHS`: the paper's objective without bounds.

    >>> min(rank_by_depth(), key=lambda best: best.product).target.num_hidden_layers  # deep and thin
    61
    """
    structures = list_same_size()
    bands = ([dims for dims in structures if low <= dims.num_hidden_layers <= high] for low, high in DEPTHS)
    return [_find_best(band, objective) for band in bands if band]


def find_highest_speed() -> float:
    """Return the highest speed of one GPU that Table 1's hours imply, in FLOP/s; compare `A100_FLOPS_PER_SECOND`.

    >>> find_highest_speed() > A100_FLOPS_PER_SECOND
    True
    """
    stages = paper.fit_cost_model().measurements
    return max(stage.flops_per_token * stage.tokens / (stage.hours * 3600) for stage in stages)


def find_worst_error_from_450m() -> float:
    """Return the largest error of the cost model for Table 3's hours if its stages grew from its own initial model.

    >>> find_worst_error_from_450m() > 10 * HOURS_TOLERANCE
    True
    """
    stages = paper.list_stage_hours(paper.TABLE_3, paper.INITIAL_450M).items()
    return max(abs(_compute_hours([dims], [tokens]) / printed - 1) for (dims, tokens), printed in stages)


def find_wrong_sums() -> list[tuple[int, paper.GrownRun, float]]:
    """Return the rows whose printed sum of hours is wrong, as (table, row, sum of its columns).

    >>> [(table, row.sequence, row.total_hours, round(total, 2)) for table, row, total in find_wrong_sums()]
    [(1, 'f-h-l', 123.09, 122.99), (1, 'f-h-l', 107.62, 107.56), (4, 'l-h', 139.8, 129.8)]
    """
    tables = paper.GROWTH_TABLES
    sums = [(table.number, run, table.initial_hours + sum(run.stage_hours)) for table in tables for run in table.runs]
    return [(table, run, total) for table, run, total in sums if abs(total - run.total_hours) > SUM_TOLERANCE]


def _describe_product(structures: Sequence[ModelDims], match: str | None, initial: ModelDims) -> str:
    notes = []
    if match == "cut off":
        notes.append("printed cut off, not rounded")
    elif match is None:
        is_default = structures[0] == initial
        notes.append("misprint: neither convention gives it" if is_default else "does not come out from this start")
    start = count_paper_params(structures[0])
    if smaller := sum(count_paper_params(dims) <= start for dims in structures[1:]):
        notes.append(f"ffn shrinks: increments below 1 count as 1, here {smaller} of {len(structures) - 1}")
    return "; ".join(notes)


def _find_best(targets: Sequence[ModelDims], objective: str) -> Ranked:
    """Return the best order of growth to any of some targets."""
    choices = [(target, "-".join(letters)) for target in targets for letters in permutations("lfh")]
    paths = [paper.trace_path(paper.INITIAL, target, order) for target, order in choices]
    products = evaluate_paths(paths, objective)
    best = int(np.argmin(products))
    hours = _compute_hours(paths[best], (0, *(paper.STAGE_TOKENS,) * 3))
    printed = choices[best] in [(run.target, run.sequence) for run in paper.TABLE_1.runs]
    return Ranked(*choices[best], float(products[best]), hours, printed)


def _compute_hours(structures: Sequence[ModelDims], tokens: Sequence[int]) -> float:
    """Return the hours of a schedule; with one structure and one number of tokens, the hours of plain training."""
    return float(evaluate_paths([structures], "hours", tokens)[0])


def _compare_stages(table: paper.GrowthTable) -> list[Hours]:
    """Return the growth stages of a table, each structure once."""
    origin = "fitted" if table is paper.TABLE_1 else "predicted"
    rows = []
    # The stages of Table 3 have the hours of growth from Table 1's initial model, not from Table 3's own.
    for (dims, tokens), printed in paper.list_stage_hours(table, paper.INITIAL).items():
        if table is paper.TABLE_4 and tokens == paper.STAGE_TOKENS:
            continue  # already printed in Table 1
        note = origin if tokens == paper.STAGE_TOKENS else f"predicted; {_describe_multiple(printed, dims)}"
        computed = _compute_hours([dims], [tokens])
        rows.append(Hours(table.number, dims, f"stage of {tokens / 1e9:g}B", printed, computed, note))
    return rows


def _compare_initial(table: paper.GrowthTable) -> Hours:
    computed = _compute_hours([table.initial], [paper.INITIAL_TOKENS])
    note = f"not on the line: {table.initial_hours / computed:.1f} times as long"
    return Hours(table.number, table.initial, "initial, 25B", table.initial_hours, computed, note)


def _compare_table_2() -> list[Hours]:
    """Return from-scratch training and the single stage; the paper does not print how MSG and ELLE grew."""
    scratch, single = (paper.TABLE_2[method].hours for method in ("from scratch", "single stage"))
    start, rest = paper.TABLE_1.initial_hours, paper.TOTAL_TOKENS - paper.INITIAL_TOKENS
    from_scratch = _compute_hours([paper.TARGET], [paper.TOTAL_TOKENS])
    grown = start + _compute_hours([paper.TARGET], [rest])
    scratch_note = f"predicted; {_describe_multiple(scratch, paper.TARGET)}"
    grown_note = f"predicted; {start} and {_describe_multiple(single - start, paper.TARGET)}"
    return [
        Hours(2, paper.TARGET, "from scratch, 65B", scratch, from_scratch, scratch_note),
        Hours(2, paper.TARGET, "initial, then 40B", single, grown, grown_note),
    ]


def _compare_table_10() -> list[Hours]:
    """Return SLOP's run and the single stage."""
    target, start = paper.TABLE_10_TARGET, paper.TABLE_1.initial_hours
    slop, single = (paper.TABLE_10[method].hours for method in ("SLOP", "single stage"))
    structures = paper.trace_path(paper.INITIAL, target, paper.TABLE_10_SEQUENCE)
    staged = start + _compute_hours(structures, (0, *(paper.STAGE_TOKENS,) * 3))
    grown = start + _compute_hours([target], [paper.TOTAL_TOKENS - paper.INITIAL_TOKENS])
    last = _compute_hours([target], [paper.STAGE_TOKENS])
    note = f"not on the line: four stages of {(single - start) / 4:.1f}; SLOP's last stage takes {last:.1f}"
    return [
        Hours(10, target, "initial, then l-f-h", slop, staged, f"predicted; {start} of it printed"),
        Hours(10, target, "initial, then 40B", single, grown, note),
    ]


def _describe_multiple(printed: float, dims: ModelDims) -> str:
    """Return how printed hours follow from the hours of Table 1 for 10B tokens of the same structure."""
    once = paper.list_stage_hours(paper.TABLE_1)[dims, paper.STAGE_TOKENS]
    return f"{printed / once:.2f} times Table 1's {once}"
