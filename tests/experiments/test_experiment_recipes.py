"""The experiments among the recipes: every one can run at every scale, spends what it says, and is the paper's."""

from fractions import Fraction
from functools import cache
from pathlib import Path

import pytest
import yaml

from slop_hf import preview_run
from slop_hf.experiments.config import Experiment
from slop_hf.experiments.jobs import add_shared_prefixes, build_jobs
from slop_hf.paper import tables as paper

EXPERIMENTS = Path(__file__).parents[2] / "recipes" / "experiments"
TABLES = {int(path.stem.removeprefix("table")): path for path in EXPERIMENTS.glob("table*.yaml")}
STUDIES = sorted({*EXPERIMENTS.glob("*.yaml"), *EXPERIMENTS.glob("studies/*.yaml")} - set(TABLES.values()))
PATHS = [*(TABLES[number] for number in sorted(TABLES)), *STUDIES]
SCALES = [(path, scale) for path in PATHS for scale in yaml.safe_load(path.read_text())["scales"]]


@cache
def runs_of(path, scale):
    """An experiment with its runs, prefixes included."""
    experiment = Experiment.from_yaml(path, scale)
    return experiment, add_shared_prefixes(build_jobs(experiment))


#: Each experiment once; the other scales are slow.
AT_EVERY_SCALE = [
    pytest.param(path, scale, marks=() if number == 0 else pytest.mark.slow)
    for path in PATHS
    for number, scale in enumerate(scale for where, scale in SCALES if where == path)
]


def ids(value):
    return value.stem if isinstance(value, Path) else value


def test_every_table_that_trains_is_here_at_every_scale():
    assert sorted(TABLES) == [1, 2, 3, 4, 5, 9, 10, 11]
    for path in TABLES.values():
        assert [scale for where, scale in SCALES if where == path] == ["nano", "micro", "paper"]


@pytest.mark.parametrize(("path", "scale"), AT_EVERY_SCALE, ids=ids)
def test_every_experiment_can_run(path, scale, tmp_path):
    """Offline, as in `test_every_recipe_can_run`; runs that differ in their seed alone are looked at once."""
    experiment, jobs = runs_of(path, scale)
    for number, job in enumerate(jobs):
        if job.seed == experiment.sizes.seeds[0]:
            spans = preview_run(job.config, tmp_path / "out", check_texts=number == 0)
            assert [span.steps > 0 for span in spans] == [count > 0 for count in job.schedule.tokens], job.name


@pytest.mark.parametrize(("path", "scale"), SCALES, ids=ids)
def test_every_run_spends_its_budget(path, scale):
    experiment, jobs = runs_of(path, scale)
    runs = [job for job in jobs if job.arm]
    assert {run.arm for run in runs} == set(experiment.arms)
    for run in runs:
        spent = run.flops if experiment.sizes.equal == "flops" else sum(run.schedule.tokens)
        assert spent == pytest.approx(experiment.sizes.budget * run.budget, rel=0.01), run.name


@pytest.mark.parametrize("path", TABLES.values(), ids=ids)
@pytest.mark.parametrize("scale", ["nano", "micro"])
def test_structures_keep_the_papers_proportions(path, scale):
    small, large = (runs_of(path, name)[0] for name in (scale, "paper"))
    factors = set()
    for name in small.sizes.structures:
        ours, papers = small.get_structure(name), large.get_structure(name)
        sizes = zip(papers.as_dict().values(), ours.as_dict().values(), strict=True)
        factors.add(tuple(Fraction(*pair) for pair in sizes))
    ((width, ffn, depth, heads, kv_heads, head_dim),) = factors  # the same for all structures
    assert width == ffn == heads * head_dim and heads == kv_heads
    assert {factor.denominator for factor in (width, depth, heads)} == {1}


def arms_beside(number):
    """At the paper's scale: (schedule, what the paper prints) of each arm of a table."""
    experiment, jobs = runs_of(TABLES[number], "paper")
    return {job.arm: (job.schedule, experiment.printed.get(job.arm)) for job in jobs if job.arm}


@pytest.mark.parametrize("table", [paper.TABLE_1, paper.TABLE_3, paper.TABLE_4], ids=lambda table: str(table.number))
def test_tables_of_orders_are_the_papers(table):
    """Row by row; in Table 3 heads differ from `paper`, because its initial model has smaller ones."""

    def row(structures, tokens, product, perplexity, hours):
        sizes = tuple((dims.hidden_size, dims.intermediate_size, dims.num_hidden_layers) for dims in structures)
        return sizes, tuple(tokens), float(product), perplexity, hours

    growing = [run for run in table.runs if run.target.intermediate_size >= table.initial.intermediate_size]
    assert len(table.runs) - len(growing) == (3 if table.number == 3 else 0)
    ours = arms_beside(table.number).values()
    assert {row(schedule.structures, schedule.tokens, **printed) for schedule, printed in ours} == {
        row(
            run.path(table.initial),
            (paper.INITIAL_TOKENS, *run.stage_tokens),
            run.product,
            run.perplexity,
            run.total_hours,
        )
        for run in growing
    }


def test_heads_keep_their_size():
    for path, scale in SCALES:
        _, jobs = runs_of(path, scale)
        assert len({dims.head_dim for job in jobs for dims in job.schedule.structures}) == 1, (path, scale)


@pytest.mark.parametrize(("number", "table"), [(2, paper.TABLE_2), (10, paper.TABLE_10)])
def test_tables_of_methods_are_the_papers(number, table):
    names = {"from scratch": "from-scratch", "single stage": "single-stage", "MSG": "msg", "ELLE": "elle"}
    arms = arms_beside(number)
    for method, run in table.items():
        name = names.get(method, "slop" if number == 2 else paper.TABLE_10_SEQUENCE)
        assert arms[name][1] == {"perplexity": run.perplexity, "hours": run.hours}
    target = paper.TARGET if number == 2 else paper.TABLE_10_TARGET
    assert {schedule.target for name, (schedule, _) in arms.items() if name != "not-grown"} == {target}
    assert arms["slop"][0].sequence == ("l-f-h" if number == 2 else "f-l-h")
    assert all(abs(sum(schedule.tokens) - paper.TOTAL_TOKENS) < 10 for schedule, _ in arms.values())


def test_the_place_and_number_of_heads():
    assert [schedule.sequence for schedule, _ in arms_beside(5).values()] == list(arms_beside(5))
    assert {schedule.tokens for schedule, _ in arms_beside(5).values()} == {(25 * 10**9, *[10**10] * 4)}
    heads = {name: schedule.target.num_attention_heads for name, (schedule, _) in arms_beside(9).items()}
    assert heads == {str(count): count for count in (6, 8, 12, 16, 24, 32, 48)}
    sequences = {schedule.sequence for name, (schedule, _) in arms_beside(9).items() if name != "6"}
    assert sequences == {"a-f-h-l"}


def test_the_readme_gives_the_cost_of_each_experiment():
    text = (EXPERIMENTS / "README.md").read_text()
    assert "`studies/*.yaml`" in text
    for path, scale in SCALES:
        if path.parent == EXPERIMENTS:
            row = next(line for line in text.splitlines() if line.startswith(f"| `{path.name}`"))
            _, jobs = runs_of(path, scale)
            by_directory = {job.directory: job.flops for job in jobs}
            paid = sum(by_directory[job.directory] - by_directory.get(job.parent, 0) for job in jobs)
            runs = sum(bool(job.arm) for job in jobs)
            assert f"{runs} · {paid:.1e}".replace("e+", "e") in row, (scale, runs, paid)
