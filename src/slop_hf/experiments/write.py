"""`compare_arms` and `write_comparison`: a comparison as JSON, Markdown and figures in one directory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import RunError
from ..io.files import check_output, write_text
from ..report.tables import escape_markdown
from .collect import collect_comparison
from .comparison import Comparison
from .config import Experiment
from .final_losses import draw_final_losses
from .jobs import add_shared_prefixes, build_jobs
from .loss_curves import draw_arm_curves
from .planner_accuracy import describe_planner_accuracy, draw_utility, tabulate_predictions
from .running import JobEndCallback, describe_machine, run_experiment
from .savings import draw_savings
from .summary_text import summarise_comparison
from .tables import tabulate_arm_stages, tabulate_arms, tabulate_countings, tabulate_ledger

COMPARISON_MARKDOWN, COMPARISON_JSON = "comparison.md", "comparison.json"


@dataclass(frozen=True)
class ComparisonFigure:
    """A figure of every comparison: `draw` writes it, or returns None if there is nothing to draw."""

    title: str
    caption: str
    draw: Callable[[Comparison, Path], Path | None]


#: Figures by the names of their files.
COMPARISON_FIGURES = {
    "loss": ComparisonFigure(
        "Held-out loss against training FLOPs",
        "Lines are means over seeds, and bands reach from the lowest seed to the highest. Triangles are growths. "
        "Squares are the ends of an arm's runs at several budgets, each with a complete learning-rate schedule. The "
        "dashed line is the reference's final loss; rings mark where the ends of an arm's runs reach it. As in Fig. 2 "
        "of the SLOP paper.",
        draw_arm_curves,
    ),
    "seconds": ComparisonFigure(
        "Held-out loss against training time",
        "The same against wall-clock training time, without evaluation, saving and growth.",
        partial(draw_arm_curves, against="seconds"),
    ),
    "losses": ComparisonFigure(
        "Held-out loss at the end",
        "One dot per seed, a bar at their mean, and on the right the mean ± the sample standard deviation. The dashed "
        "line and its band are the mean and the range of the arm that the others are compared with.",
        draw_final_losses,
    ),
    "savings": ComparisonFigure(
        "FLOPs saved against tokens per parameter",
        "1 − FLOPs of an arm / FLOPs with which the reference would end at the same loss, on the line between the "
        "ends of two of its runs, over log FLOPs; means over seeds, and bars from the lowest to the highest. Below 0 "
        "the arm needs more FLOPs. Dashed arms do not grow. A caret marks a lower bound: the reference's longest run "
        "ends above that loss.",
        draw_savings,
    ),
    "utility": ComparisonFigure(
        "Predicted and measured marginal utility",
        "Σ Δloss / ΔFLOPs over the growth stages of each schedule: Eq. 2 of the SLOP paper with losses in place of "
        "perplexities and FLOPs in place of hours.",
        draw_utility,
    ),
}

#: Meanings of the columns in the table of arms, by heading.
ARM_COLUMN_MEANINGS = {
    "grows": "order of growth: l layers, f feed-forward, h hidden (with the heads that follow it), a attention heads; "
    "lf grows both in one stage.",
    "budget": "multiple of the comparison's budget; each run has a complete learning-rate schedule.",
    "FLOPs": "training FLOPs, forward and backward.",
    "seconds": "wall-clock training time, mean over seeds, without evaluation, saving and growth.",
    "held-out loss": "nats per token at the end, mean over seeds ± sample standard deviation.",
    "ppl": "perplexity, exp of the loss, mean over seeds ± sample standard deviation.",
    "schedule": "whether the learning rate has fallen to a tenth of its peak or below when the run ends; an "
    "unfinished schedule reaches no loss and saves nothing.",
    "FLOPs saved": "1 − FLOPs to the reference's final loss / the reference's FLOPs, in percent: mean over seeds, and "
    "lowest to highest. An arm reaches that loss at the end of a run, with a finished schedule; if the arm was run at "
    "several budgets, also on the line between the ends of two of its runs, over log FLOPs. ≥: the arm's shortest run "
    "is already below that loss, so a shorter one might save more.",
    "marginal utility": "Eq. 2 of the SLOP paper, in perplexity per device hour.",
}


_ABOUT_COUNTINGS = (
    "Differences are means over seeds, with the lowest and the highest. FLOPs are multiples of those of the compared "
    "arm's run at the full budget."
)
#: Meanings of the columns in the table of countings, by heading.
COUNTING_COLUMN_MEANINGS = {
    "tokens per parameter": "tokens of all stages per parameter of the final model.",
    "equal FLOPs": "held-out loss minus the one with which the arm that others are compared with would end at the "
    "same FLOPs, the optimizer's included: on the line between the ends of two of its runs, over log FLOPs; nothing "
    "is extrapolated.",
    "equal tokens": "the same at equal tokens, which costs fewer FLOPs if the arm begins small.",
    "saved at its loss": "1 − FLOPs / the FLOPs with which the compared arm would end at the same loss, on that line; "
    "≥: its longest run ends above that loss.",
    "gap closed": "at equal tokens, the share of the distance between the initial structure without growth and the "
    "compared arm that the arm has covered: 100% is as good as that arm.",
    "best size not grown": "of the other arms without growth, whatever their size, the one with the lowest loss at "
    "these FLOPs; `vs best size` is the difference to it.",
    "optimizer's share": "share of the optimizer's steps in the FLOPs.",
    "passes over the data": "tokens trained on per token of the training data.",
}


def write_comparison(comparison: Comparison, directory: str | Path) -> Path:
    """Write a comparison as `comparison.json`, `comparison.md` and the figures with something to show.

    Returns:
        The directory, which may hold the runs as well.
    """
    check_output(directory, error=RunError, is_directory=True)
    directory = Path(directory)
    comparison.save(directory / COMPARISON_JSON)
    drawn = []
    for name, figure in COMPARISON_FIGURES.items():
        path = directory / f"{name}.png"
        if figure.draw(comparison, path) is None:
            path.unlink(missing_ok=True)  # from an earlier comparison
        else:
            drawn.append(name)
    write_text(directory / COMPARISON_MARKDOWN, format_comparison_page(comparison, drawn))
    return directory


def format_comparison_page(comparison: Comparison, figures: Sequence[str]) -> str:
    """Return a comparison as a Markdown page, with links to the named figures of `COMPARISON_FIGURES` next to it."""
    table = tabulate_arms(comparison)
    headings = [heading for heading, _ in table.columns]
    parts = [
        f"# {escape_markdown(f'{comparison.title} · {comparison.scale}')}",
        comparison.about,
        " ".join(summarise_comparison(comparison)),
        table.markdown(),
        "\n".join(f"- **{heading}**: {text}" for heading, text in ARM_COLUMN_MEANINGS.items() if heading in headings),
    ]
    if comparison.runs:
        countings = tabulate_countings(comparison)
        shown = [heading for heading, _ in countings.columns]
        meanings = [f"- **{name}**: {text}" for name, text in COUNTING_COLUMN_MEANINGS.items() if name in shown]
        parts += ["## Ways of counting", _ABOUT_COUNTINGS]
        parts += [countings.markdown(), "\n".join(meanings)]
    for name in figures:
        parts += [format_figure_link(name, f"{name}.png"), COMPARISON_FIGURES[name].caption]
    if accuracy := describe_planner_accuracy(comparison):
        parts += ["## The planner's ranking", accuracy, tabulate_predictions(comparison).markdown()]
    if comparison.runs:
        parts += ["## Stages", "Losses are means over seeds.", tabulate_arm_stages(comparison).markdown()]
    if comparison.ledger:
        parts += ["## What it cost", "Everything is counted once.", tabulate_ledger(comparison).markdown()]
    software = [f"{name} {version}" for name, version in comparison.versions.items()]
    if machine := [comparison.device] * bool(comparison.device) + software:
        parts.append(f"Run {'on' if comparison.device else 'with'} {', '.join(machine)}.")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def format_figure_link(name: str, path: str) -> str:
    """Return a Markdown link to a figure, by its name in `COMPARISON_FIGURES`."""
    return f"![{COMPARISON_FIGURES[name].title}]({path})"


def compare_arms(
    experiment: Experiment,
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    on_job_end: JobEndCallback | None = None,
    train: bool = True,
    told: JobEndCallback | None = None,
) -> Comparison:
    """Run all arms of an experiment, and write the comparison with its figures into the experiment's directory.

        experiment = Experiment.from_yaml("recipes/experiments/table2.yaml", "nano")
        comparison = compare_arms(experiment, "runs/table2", workers=2)

    Args:
        experiment: experiment to run.
        root: directory of the comparison; runs in it are resumed.
        devices, workers, on_job_end: as in `run_experiment`.
        train: whether to train unfinished runs; otherwise only the finished ones are compared.
        told: earlier name of `on_job_end`.

    Returns:
        The comparison, also written to `root` as `comparison.json` and `comparison.md`.

    Raises:
        SlopError: if some run cannot begin (checked before any training), if a run fails, or if there is no run to
            compare.
    """
    if told is not None:
        warnings.warn("compare_arms(told=…) is now compare_arms(on_job_end=…)", DeprecationWarning, stacklevel=2)
        on_job_end = told
    if train:
        run_experiment(experiment, root, devices=devices, workers=workers, on_job_end=on_job_end)
    jobs = add_shared_prefixes(build_jobs(experiment))
    comparison = collect_comparison(experiment, jobs, Path(root), describe_machine())
    if not train and not (comparison.runs or comparison.diverged):
        raise RunError(f"{root} has no finished run of this experiment: train the runs first (train=True)")
    write_comparison(comparison, root)
    return comparison
