"""`write_comparison`: a comparison as JSON, Markdown and figures in one directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..io.files import write_text
from .arms import build_jobs
from .collect import collect_comparison
from .config import Experiment
from .final_losses import draw_final_losses
from .summary_text import summarize_comparison
from .jobs import add_shared_prefixes
from .loss_curves import draw_arm_curves
from .planner_accuracy import describe_planner_accuracy, build_prediction_cells, draw_utility
from .comparison import Comparison
from .running import ProgressCallback, describe_machine, run_experiment
from .tables import build_arm_cells, build_ledger_cells, build_arm_stage_cells

COMPARISON_MARKDOWN, COMPARISON_JSON = "comparison.md", "comparison.json"


@dataclass(frozen=True)
class ComparisonFigure:
    """A figure that every comparison has.

    Args:
        title: what it shows, in a few words.
        caption: how to read it.
        draw: writes it, or returns None where there is nothing to draw.
    """

    title: str
    caption: str
    draw: Callable[[Comparison, Path], Path | None]


#: By the names of their files.
COMPARISON_FIGURES = {
    "loss": ComparisonFigure(
        "Held-out loss against training FLOPs",
        "Lines are means over seeds, bands reach from the lowest seed to the highest, triangles are growths. Squares "
        "are the ends of an arm's runs at several budgets, each with a learning-rate schedule of its own. The dashed "
        "line is the reference's final loss, rings are where arms get to it. As Fig. 2 of the SLOP paper.",
        draw_arm_curves,
    ),
    "seconds": ComparisonFigure(
        "Held-out loss against training time",
        "The same against wall-clock time of training, without evaluation, saving and growth.",
        partial(draw_arm_curves, against="seconds"),
    ),
    "losses": ComparisonFigure(
        "Held-out loss at the end",
        "A dot a seed, a bar at their mean, and the mean ± the sample standard deviation on the right. The dashed "
        "line and its band are the mean and the range of the arm that the others are set beside.",
        draw_final_losses,
    ),
    "utility": ComparisonFigure(
        "Predicted and measured marginal utility",
        "Σ Δloss / ΔFLOPs over the growth stages of each schedule (Eq. 2 of the SLOP paper, losses in place of "
        "perplexities, FLOPs in place of hours).",
        draw_utility,
    ),
}

#: What stands in columns of the table of arms, by their headings.
COLUMN_MEANINGS = {
    "grows": "the order of growth; l layer, f feed-forward, h hidden (heads that follow it included), a attention "
    "heads; lf grows both in one stage.",
    "budget": "multiple of the comparison's; each run has a whole learning-rate schedule.",
    "FLOPs": "training FLOPs, forward and backward.",
    "seconds": "of training, the mean over seeds; wall-clock, without evaluation, saving and growth.",
    "held-out loss": "in nats a token at the end, the mean over seeds ± the sample standard deviation.",
    "ppl": "perplexity, exp of the loss, likewise.",
    "FLOPs saved": "1 − FLOPs to the reference's final loss / the reference's FLOPs: the mean over seeds, and the "
    "lowest to the highest, in percent. An arm gets there at its target's first evaluation at or below that loss; "
    "where it was run at several budgets, also on the line between the ends of two of its runs, over log FLOPs.",
    "marginal utility": "Eq. 2 of the SLOP paper, in perplexity a device hour.",
}


def write_comparison(comparison: Comparison, directory: str | Path) -> Path:
    """Write what came out of an experiment, for programs and for readers.

    Leaves `comparison.json` (the record), `comparison.md` (what was found, tables, figures) and those of `COMPARISON_FIGURES`
    that there is something to draw for; each is written aside and renamed.

    Args:
        comparison: what was measured.
        directory: to write into; the runs may lie there as well.

    Returns:
        the directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    comparison.save(directory / COMPARISON_JSON)
    drawn = []
    for name, figure in COMPARISON_FIGURES.items():
        path = directory / f"{name}.png"
        if figure.draw(comparison, path) is None:
            path.unlink(missing_ok=True)  # an earlier comparison's
        else:
            drawn.append(name)
    write_text(directory / COMPARISON_MARKDOWN, format_comparison_page(comparison, drawn))
    return directory


def format_comparison_page(comparison: Comparison, figures: list[str]) -> str:
    """The comparison as a document, with links to its figures.

    Args:
        comparison: what was measured.
        figures: names in `COMPARISON_FIGURES` of those that lie beside the document.
    """
    cells = build_arm_cells(comparison)
    shown = [heading for heading, _ in cells.columns]
    parts = [
        f"# {comparison.title} · {comparison.scale}",
        comparison.about,
        " ".join(summarize_comparison(comparison)),
        cells.markdown(),
        "\n".join(f"- **{heading}**: {meaning}" for heading, meaning in COLUMN_MEANINGS.items() if heading in shown),
    ]
    for name in figures:
        parts += [format_figure_link(name, f"{name}.png"), COMPARISON_FIGURES[name].caption]
    if told := describe_planner_accuracy(comparison):
        parts += ["## The planner's ranking", told, build_prediction_cells(comparison).markdown()]
    if comparison.runs:
        parts += ["## Stages", "Losses are means over seeds.", build_arm_stage_cells(comparison).markdown()]
    if comparison.ledger:
        parts += ["## What it cost", "Everything counted once.", build_ledger_cells(comparison).markdown()]
    around = [comparison.device, *(f"{name} {version}" for name, version in comparison.versions.items())]
    if made := ", ".join(part for part in around if part):
        parts.append(f"Run on {made}." if comparison.device else f"Run with {made}.")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def format_figure_link(name: str, path: str) -> str:
    """A link to a figure of a name in `COMPARISON_FIGURES`."""
    return f"![{COMPARISON_FIGURES[name].title}]({path})"


def compare_arms(
    experiment: Experiment,
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    told: ProgressCallback | None = None,
    train: bool = True,
) -> Comparison:
    """Run all arms of an experiment, and write what came out of them into its directory.

    Args:
        experiment: to run, `Experiment.from_yaml("recipes/experiments/table2.yaml", "nano")`.
        root: its directory; what lies there is gone on with.
        devices, workers, told: as in `run_experiment`.
        train: whether to train what is missing; otherwise what has finished is compared.

    Returns:
        the comparison, which lies in `root` as `comparison.json` and `comparison.md` beside its figures.

    Raises:
        SlopError: for what cannot be run, before anything is; and where a run fails.
    """
    if train:
        run_experiment(experiment, root, devices=devices, workers=workers, told=told)
    comparison = collect_comparison(experiment, add_shared_prefixes(build_jobs(experiment)), Path(root), describe_machine())
    write_comparison(comparison, root)
    return comparison
