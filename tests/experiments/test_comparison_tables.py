"""Tables and sentences say what a comparison holds, no more."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from comparisons import RUN, comparison
from rich.console import Console

from slop_hf.experiments.comparison import Comparison, Cost
from slop_hf.experiments.earlier_records import add_missing_facts
from slop_hf.experiments.results import compute_arm_results, compute_countings
from slop_hf.experiments.summary_text import summarise_comparison
from slop_hf.experiments.tables import (
    build_arms_table,
    build_terminal_table,
    tabulate_arm_stages,
    tabulate_arms,
    tabulate_countings,
    tabulate_ledger,
)
from slop_hf.report.tables import TextTable


def column(cells: TextTable, heading: str) -> list[str]:
    place = [name for name, _ in cells.columns].index(heading)
    return [row[place] for row in cells.rows]


def headings(cells: TextTable) -> list[str]:
    return [name for name, _ in cells.columns]


def printed(table: object, width: int = 120) -> str:
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_a_row_an_arm_and_budget():
    record = comparison(3, budgets={"from-scratch": (0.25, 1.0)})
    cells = tabulate_arms(record)
    assert column(cells, "arm") == ["slop", "from-scratch", "from-scratch", "single-stage"]
    assert column(cells, "budget") == ["×1", "×0.25", "×1", "×1"]
    assert column(cells, "grows") == ["l-f-h", "–", "–", "lfh"]
    assert column(cells, "seeds") == ["3"] * 4
    slop = compute_arm_results(record)[0]
    assert column(cells, "held-out loss")[0] == f"{slop.loss.mean:.4f} ± {slop.loss.deviation:.4f}"
    assert column(cells, "loss vs from-scratch")[:3] == [f"{slop.against_reference.mean:+.4f}", "–", "–"]
    assert column(cells, "schedule") == ["finished"] * 4
    assert column(cells, "FLOPs saved") == ["≥ 0.0% (0.0 to 0.0)", "–", "–", "≥ 0.0% (0.0 to 0.0)"]


def test_columns_without_content_are_left_out():
    record = comparison(["from-scratch", "not-grown"], 1, reference=None)
    record = replace(record, arms=dict.fromkeys(record.arms, ""))
    measured = ["seeds", "schedule", "tokens", "FLOPs", "seconds", "held-out loss", "ppl", "loss vs from-scratch"]
    assert headings(tabulate_arms(record)) == ["arm", *measured]


def test_the_papers_numbers_have_their_own_columns():
    numbers = {"slop": {"perplexity": 9.84, "hours": 133.7}, "single-stage": {"hours": 1201.25}}
    cells = tabulate_arms(comparison(3, budgets={"slop": (0.5, 1.0)}, printed=numbers))
    assert column(cells, "perplexity (paper)") == ["–", "9.84", "–", "–"]
    assert column(cells, "hours (paper)") == ["–", "133.7", "–", "1,201.25"]


def test_an_arm_that_never_gets_there_says_so():
    cells = tabulate_arms(comparison(2, losses={"slop": 3.5}))
    assert column(cells, "FLOPs saved") == ["not reached", "–"]


def test_stages_are_those_of_the_full_budget():
    record = comparison(2, budgets={"slop": (0.5, 1.0)})
    cells = tabulate_arm_stages(record)
    assert column(cells, "stage") == ["0 initial", "1 layer", "2 ffn", "3 hidden", "0 initial"]
    assert column(cells, "arm") == ["slop", "", "", "", "from-scratch"]
    runs = record.runs_of("slop")
    after = sum(run.stages[1].eval_loss_after_growth for run in runs) / len(runs)
    assert column(cells, "loss after growth")[:2] == ["–", f"{after:.4f}"]


def test_the_ledger_is_summed():
    cells = tabulate_ledger(comparison(2))
    assert column(cells, "count") == ["6", "2", "8"]
    assert column(cells, "device seconds") == ["4,321", "99.5", "4,420"]
    assert "optimizer FLOPs" not in headings(cells)
    assert tabulate_ledger(comparison(2, ledger=())).rows == ()
    counted = tabulate_ledger(
        comparison(2, ledger=(Cost("runs", 1, 1, 1.0, 1.0, 2e9), Cost("trunks", 1, 1, 1.0, 1.0)))
    )
    assert column(counted, "optimizer FLOPs") == ["2.00e+09", "0", "2.00e+09"]


def test_countings_show_what_was_run():
    record = comparison(
        ["slop", "from-scratch", "not-grown"], 2, budgets={"slop": (0.5, 1.0), "from-scratch": (0.5, 1.0)}
    )
    cells = tabulate_countings(record)
    assert column(cells, "arm") == ["slop", "slop", "from-scratch", "from-scratch", "not-grown"]
    assert column(cells, "best size not grown") == ["from-scratch"] * 2 + ["–", "not-grown", "from-scratch"]
    assert column(cells, "FLOPs of from-scratch") == ["×0.50", "×1.00", "×0.50", "×1.00", "×1.00"]
    assert (
        column(cells, "optimizer's share") == ["0.10%"] * 5 and column(cells, "passes over the data") == ["0.25"] * 5
    )
    counting = compute_countings(record)[1]
    low, high = sorted(counting.equal_flops.values)
    assert column(cells, "equal FLOPs")[1] == f"{counting.equal_flops.mean:+.4f} ({low:+.4f} to {high:+.4f})"


UNFINISHED = "The learning rate of slop is still high at the end: its losses are not read as savings."


@pytest.mark.parametrize(
    ("end_rate", "budgets", "expected", "cell"),
    [
        (0.1, (0.5, 1.0), "with 27.0% fewer FLOPs", "27.0% (25.8 to 28.8)"),
        (1.0, (0.5, 1.0), UNFINISHED, "not reached"),
        (None, (0.5, 1.0), "No other arm reaches the final loss", "not reached"),
        (
            0.1,
            (1.0,),
            "slop ends below the final loss of from-scratch at the full budget, and nothing smaller",
            "≥ 0.0%",
        ),
        (0.1, (0.75, 1.0), "it saves 24.2% or more, at 3.8 tokens per parameter", "≥ 24.2%"),
    ],
)
def test_only_finished_schedules_save(end_rate, budgets, expected, cell):
    record = comparison(2, budgets={"slop": budgets})
    runs = [replace(run, end_rate=end_rate) if run.arm == "slop" else run for run in record.runs]
    record = replace(record, runs=tuple(runs))
    assert ("unfinished" in printed(build_arms_table(record))) == (end_rate == 1.0)
    assert expected in " ".join(summarise_comparison(record))
    assert column(tabulate_arms(record), "FLOPs saved")[0].startswith(cell)


@pytest.mark.parametrize(
    ("scale", "expected"), [(1, "at 3.8 tokens per parameter, fewer than the 20"), (10, "at 38 tokens")]
)
def test_a_saving_names_its_tokens_per_parameter(scale, expected):
    record = comparison(2, budgets={"slop": (0.5, 1.0)})
    runs = [
        replace(run, stages=tuple(replace(stage, tokens=scale * stage.tokens) for stage in run.stages))
        for run in record.runs
    ]
    (saving,) = [text for text in summarise_comparison(replace(record, runs=tuple(runs))) if "fewer FLOPs" in text]
    assert expected in saving and ("fewer than the 20" in saving) == (scale == 1)


def test_settings_of_earlier_records_say_how_their_learning_rates_end():
    """And what their optimizers cost."""
    training = {"batch_tokens": 2048, "per_device_train_batch_size": 16}
    settings = {"run": {**RUN, "training": training}, "arms": {"slop": {"lr_scheduler_type": "constant"}}}
    now = comparison(2, 1, settings=settings)
    before = replace(now, runs=tuple(replace(run, end_rate=None, optimizer_flops=None) for run in now.runs))
    slop, scratch = add_missing_facts(before).runs
    assert (slop.end_rate, scratch.end_rate) == (1.0, 0.1)
    assert scratch.optimizer_flops == 14 * scratch.parameters * round(scratch.tokens / 2048)
    assert add_missing_facts(now) is now and add_missing_facts(replace(before, settings={})).runs == before.runs


def test_the_terminal_takes_names_as_they_are():
    record = comparison(2, 1)
    runs = tuple(replace(run, arm="slop[bold]") if run.arm == "slop" else run for run in record.runs)
    record = replace(record, arms={"slop[bold]": "", "from-scratch": ""}, runs=runs)
    assert "slop[bold]" in printed(build_arms_table(record)) and "3 hidden" in printed(
        build_terminal_table(tabulate_arm_stages(record), "Stages")
    )
    assert "sum" in printed(build_terminal_table(tabulate_ledger(record), "What it cost"))


def test_growth_that_paid():
    text = " ".join(summarise_comparison(comparison(budgets={"slop": (0.5, 1.0)})))
    assert (
        "slop has the lowest final loss of 8 arms" in text
        and "below every other arm beyond the spread of seeds" in text
    )
    assert "Growth paid: slop ends 0.1107 below from-scratch, beyond the spread of seeds." in text
    assert (
        "slop reaches the final loss of from-scratch with 27.0% fewer FLOPs (25.8% to 28.8% by seed), at 3.8 tokens "
        "per parameter, fewer than the 20 of compute-optimal training, the most of all arms with several budgets."
        in text
    )
    assert "copies, single-stage, stacking and msg end below the final loss of from-scratch at the full budget" in text
    assert "Not every seed of elle and not-grown reaches the final loss of from-scratch." in text
    assert "slop ends 0.1107 below from-scratch, the best of 2 sizes without growth at the same FLOPs." in text
    assert "3 seeds per arm" in text and "tokens per parameter of the target (468k)" in text


def test_growth_that_did_not_pay():
    text = " ".join(summarise_comparison(comparison(2, losses={"slop": 3.5})))
    assert "from-scratch has the lowest final loss of 2 arms" in text
    assert "Growth did not pay: slop ends" in text and "above from-scratch, beyond the spread of seeds" in text
    assert "No other arm reaches the final loss of from-scratch with every seed." in text


def test_at_equal_tokens_growth_has_fewer_flops():
    """So a higher loss does not say that growth did not pay."""
    record = replace(comparison(2, 1, losses={"slop": 3.5}), equal="tokens")
    runs = tuple(halve_flops(run) if run.arm == "slop" else run for run in record.runs)
    text = " ".join(summarise_comparison(replace(record, runs=runs)))
    assert "above from-scratch with 50% fewer FLOPs." in text and "did not pay" not in text


def halve_flops(run):
    return replace(run, stages=tuple(replace(stage, flops=stage.flops / 2) for stage in run.stages))


def test_growth_within_the_spread():
    text = " ".join(summarise_comparison(comparison(2, losses={"slop": 3.302})))
    assert "It is uncertain whether growth paid: slop ends" in text and "within the spread of seeds" in text


def test_one_seed_proves_nothing():
    text = " ".join(summarise_comparison(comparison(2, 1)))
    assert "with one seed, that may be chance" in text and "growth seems to pay" in text and "one seed per arm" in text
    assert "beyond the spread" not in text


def test_arms_of_a_study_are_compared_with_its_first_arm():
    record = comparison(["slop", "single-stage", "copies", "msg"], reference=None)
    text = " ".join(summarise_comparison(record))
    assert "Compared with slop, copies, single-stage and msg end higher, beyond the spread of seeds." in text
    assert "Growth" not in text and "reaches" not in text
    close = comparison(["slop", "msg"], reference=None, losses={"slop": 3.29})
    assert "All other arms stay within the spread of seeds of slop." in " ".join(summarise_comparison(close))


def test_a_smaller_model_that_is_lowest_is_named():
    text = " ".join(summarise_comparison(comparison(losses={"not-grown": 3.0})))
    assert "not-grown has the lowest final loss of 8 arms" in text and "Growth paid: slop" in text


def test_names_with_spaces_are_quoted():
    record = comparison(2, 1)
    runs = tuple(replace(run, arm="rate, doubled") if run.arm == "slop" else run for run in record.runs)
    record = replace(record, arms={"rate, doubled": "", "from-scratch": ""}, runs=runs)
    assert "“rate, doubled” has the lowest final loss" in summarise_comparison(record)[0]


def test_missing_runs_are_named():
    names = tuple(f"slop, seed {seed}" for seed in range(9))
    assert summarise_comparison(comparison(2, missing=names))[-1] == (
        "9 runs have not finished: slop, seed 0; slop, seed 1; slop, seed 2; slop, seed 3; slop, seed 4; …."
    )


def test_a_comparison_without_runs():
    empty = comparison(2, 0)
    assert tabulate_arms(empty).rows == tabulate_arm_stages(empty).rows == ()
    assert "| arm |" in tabulate_arms(empty).markdown()
    assert summarise_comparison(empty) == ["No run at the full budget has finished."]


@pytest.mark.parametrize("loss", [math.inf, math.nan])
def test_a_diverged_arm_comes_last(loss):
    record = comparison(2)
    runs = [
        replace(run, stages=(*run.stages[:-1], replace(run.stages[-1], eval_loss=loss))) if run.arm == "slop" else run
        for run in record.runs
    ]
    diverged: Comparison = replace(record, runs=tuple(runs))
    assert "from-scratch has the lowest final loss of 2 arms" in summarise_comparison(diverged)[0]
    assert column(tabulate_arms(diverged), "held-out loss")[0] == "diverged"
