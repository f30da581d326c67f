"""The paper's printed numbers, computed again."""

from itertools import pairwise

import pytest

from slop_hf import ModelDims
from slop_hf.cost.flops import count_paper_params
from slop_hf.paper import reproduction
from slop_hf.paper import tables as paper
from slop_hf.paper.reproduction import OF_STAGE, SINCE_START, evaluate_paths, match_digits

TABLES = {table.number: reproduction.reproduce_products(table) for table in paper.GROWTH_TABLES}
HOURS = reproduction.reproduce_hours()
MISPRINT = (3, ModelDims(1152, 4608, 40, 9), "l-h-f")


def hours_of(table, trained):
    return [row for row in HOURS if row.table == table and row.trained == trained]


@pytest.mark.parametrize("row", [row for rows in TABLES.values() for row in rows], ids=lambda row: str(row)[:90])
def test_products(row):
    """Compute each product by plain arithmetic, without the objectives."""
    table = {1: paper.TABLE_1, 3: paper.TABLE_3, 4: paper.TABLE_4}[row.table]
    sizes = [count_paper_params(dims) for dims in paper.trace_path(table.initial, row.target, row.sequence)]
    since_start = of_stage = 1
    for before, after in pairwise(sizes):
        since_start *= max(1, after - sizes[0])
        of_stage *= max(1, after - before)
    own, other = (of_stage, since_start) if row.table == 4 else (since_start, of_stage)
    assert row.computed == pytest.approx(own, rel=1e-9) and row.by_other == pytest.approx(other, rel=1e-9)
    assert row.agrees == ((row.table, row.target, row.sequence) != MISPRINT)
    assert not match_digits(row.printed, row.by_other)


def test_every_printed_row_is_reproduced():
    assert [len(rows) for rows in TABLES.values()] == [10, 6, 2]
    for table, rows in zip(paper.GROWTH_TABLES, TABLES.values(), strict=True):
        assert [(run.target, run.sequence, run.product) for run in table.runs] == [
            (row.target, row.sequence, row.printed) for row in rows
        ]


def test_notes():
    noted = {(row.table, row.sequence, row.printed): row.note for rows in TABLES.values() for row in rows if row.note}
    assert noted == {
        (1, "l-h-f", "1.52E+26"): "printed cut off, not rounded",
        (3, "f-l-h", "1.59E+17"): "ffn shrinks: increments below 1 count as 1, here 1 of 3",
        (3, "f-h-l", "4.76E+8"): "ffn shrinks: increments below 1 count as 1, here 2 of 3",
        (3, "l-h-f", "5.54E+25"): "misprint: neither convention gives it",
    }


def test_table_3_as_printed():
    """Layers and heads as printed reproduce no product, and 24 heads do not divide the hidden size."""
    rows = reproduction.reproduce_products(paper.TABLE_3, paper.INITIAL_450M.replace(num_hidden_layers=16))
    assert not any(row.agrees for row in rows) and all("from this start" in row.note for row in rows)
    assert round(count_paper_params(paper.INITIAL_450M) / 1e6) == 453
    with pytest.raises(ValueError, match="not divisible by num_attention_heads 24"):
        ModelDims(1024, 4096, 16, 24)


@pytest.mark.parametrize(
    ("objective", "order"),
    [
        (SINCE_START, [("l-f-h", 2816), ("f-h-l", 1280), ("l-f-h", 2560), ("f-h-l", 1536)]),
        (OF_STAGE, [("f-h-l", 1280), ("l-f-h", 2816), ("l-f-h", 2560), ("f-h-l", 1536)]),
    ],
)
def test_best_order_to_each_target(objective, order):
    ranked = reproduction.rank_targets(objective)
    assert [(best.sequence, best.target.hidden_size) for best in ranked] == order
    assert [best.printed for best in ranked] == [best.target.hidden_size in (2816, 1536) for best in ranked]
    recommended = next(run for run in paper.TABLE_1.runs if run.recommended)
    assert (ranked[0].target == recommended.target) == (objective == SINCE_START)


@pytest.mark.parametrize(
    ("objective", "best"),
    [(SINCE_START, ModelDims(1024, 2816, 61, 8)), (OF_STAGE, ModelDims(896, 3584, 63, 7))],
)
def test_the_objective_alone_runs_to_the_edge(objective, best):
    bands = reproduction.rank_by_depth(objective)
    products = [row.product for row in bands]
    assert min(bands, key=lambda row: row.product).target == best
    middle = products.index(max(products))
    assert products == sorted(products[:middle]) + sorted(products[middle:], reverse=True) and 0 < middle < 4
    assert bands[0].target == ModelDims(3072, 8192, 7, 24)
    # No structure of list_same_size is better than the best of its band.
    letters = ("l-f-h", "l-h-f", "f-l-h", "f-h-l", "h-l-f", "h-f-l")
    structures = reproduction.list_same_size()
    paths = [[paper.trace_path(paper.INITIAL, dims, order) for dims in structures] for order in letters]
    everything = [evaluate_paths(paths_of_order, objective) for paths_of_order in paths]
    assert min(values.min() for values in everything) == pytest.approx(min(products))


def test_fit():
    cost = paper.fit_cost_model()
    assert len(cost.measurements) == 30 and len({stage.label for stage in cost.measurements}) == 22
    assert cost.mean_error < 0.015 and max(map(abs, cost.errors)) < 0.037
    rows = {str(row.target): row for row in hours_of(1, "stage of 10B")}
    assert [rows[stage.label].error for stage in cost.measurements] == pytest.approx(cost.errors)


@pytest.mark.parametrize(
    ("table", "trained", "count", "tolerance"),
    [
        (1, "stage of 10B", 22, 0.037),
        (2, "from scratch, 65B", 1, 0.01),
        (2, "initial, then 40B", 1, 0.01),
        (3, "stage of 10B", 12, 0.06),
        (4, "stage of 20B", 2, 0.012),
        (10, "initial, then l-f-h", 1, 0.01),
    ],
)
def test_hours(table, trained, count, tolerance):
    rows = hours_of(table, trained)
    assert len(rows) == count
    assert all(row.agrees and abs(row.error) <= tolerance for row in rows)


def test_hours_that_are_not_reproduced():
    apart = {(row.table, row.trained): row for row in HOURS if not row.agrees}
    assert set(apart) == {(1, "initial, 25B"), (3, "initial, 25B"), (10, "initial, then 40B")}
    assert all("not on the line" in row.note for row in apart.values())
    assert apart[1, "initial, 25B"].computed == pytest.approx(19.4, abs=0.1)
    assert abs(apart[10, "initial, then 40B"].error) > 0.2


def test_hours_that_are_multiples_of_others():
    once = paper.list_stage_hours(paper.TABLE_1)[paper.TARGET, paper.STAGE_TOKENS]
    assert paper.TABLE_2["from scratch"].hours == pytest.approx(6.5 * once, rel=1e-3)
    assert paper.TABLE_2["single stage"].hours == pytest.approx(paper.TABLE_1.initial_hours + 4 * once, rel=1e-3)
    assert [row.note.split(";")[1] for row in hours_of(4, "stage of 20B")] == [
        " 2.00 times Table 1's 34.01",
        " 2.00 times Table 1's 43.39",
    ]


def test_printed_sums():
    """All printed sums but one are right up to a tenth of an hour, so the numbers are copied correctly."""
    wrong = {(table, run.sequence): total - run.total_hours for table, run, total in reproduction.find_wrong_sums()}
    assert wrong.pop((4, "l-h")) == pytest.approx(-10)
    assert set(wrong) == {(1, "f-h-l")} and all(abs(off) < 0.11 for off in wrong.values())


@pytest.mark.parametrize(
    ("printed", "computed", "how"),
    [
        ("1.69E+24", 1.6851e24, "rounded"),
        ("1.69E+24", 1.6949e24, "rounded"),
        ("1.69E+24", 1.6999e24, "cut off"),
        ("1.69E+24", 1.6849e24, None),
        ("1.69E+24", 1.7e24, None),
        ("4.76E+8", 4.7599e8, "rounded"),
        ("4.76E+8", 4.7599e9, None),
    ],
)
def test_agreement(printed, computed, how):
    assert match_digits(printed, computed) == how
