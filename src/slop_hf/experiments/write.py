"""`write_comparison`: a comparison as JSON, Markdown and figures in one directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..io.files import write_text
from .arms import arm_runs
from .collect import collect
from .config import Experiment
from .final_losses import losses_figure
from .summary_text import sentences
from .jobs import with_trunks
from .loss_curves import loss_figure
from .planner_accuracy import agreement_sentence, predictions_cells, utility_figure
from .comparison import Comparison
from .running import Told, machine_name, run_experiment
from .tables import arms_cells, ledger_cells, stages_cells

MARKDOWN_FILE, JSON_FILE = "comparison.md", "comparison.json"


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
FIGURES = {
    "loss": ComparisonFigure(
        "Held-out loss against training FLOPs",
        "Lines are means over seeds, bands reach from the lowest seed to the highest, triangles are growths. Squares "
        "are the ends of an arm's runs at several budgets, each with a learning-rate schedule of its own. The dashed "
        "line is the reference's final loss, rings are where arms get to it. As Fig. 2 of the SLOP paper.",
        loss_figure,
    ),
    "seconds": ComparisonFigure(
        "Held-out loss against training time",
        "The same against wall-clock time of training, without evaluation, saving and growth.",
        partial(loss_figure, against="seconds"),
    ),
    "losses": ComparisonFigure(
        "Held-out loss at the end",
        "A dot a seed, a bar at their mean, and the mean ± the sample standard deviation on the right. The dashed "
        "line and its band are the mean and the range of the arm that the others are set beside.",
        losses_figure,
    ),
    "utility": ComparisonFigure(
        "Predicted and measured marginal utility",
        "Σ Δloss / ΔFLOPs over the growth stages of each schedule (Eq. 2 of the SLOP paper, losses in place of "
        "perplexities, FLOPs in place of hours).",
        utility_figure,
    ),
}

#: What stands in columns of the table of arms, by their headings.
GLOSSARY = {
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

    Leaves `comparison.json` (the record), `comparison.md` (what was found, tables, figures) and those of `FIGURES`
    that there is something to draw for; each is written aside and renamed.

    Args:
        comparison: what was measured.
        directory: to write into; the runs may lie there as well.

    Returns:
        the directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    comparison.save(directory / JSON_FILE)
    drawn = []
    for name, figure in FIGURES.items():
        path = directory / f"{name}.png"
        if figure.draw(comparison, path) is None:
            path.unlink(missing_ok=True)  # an earlier comparison's
        else:
            drawn.append(name)
    write_text(directory / MARKDOWN_FILE, comparison_markdown(comparison, drawn))
    return directory


def comparison_markdown(comparison: Comparison, figures: list[str]) -> str:
    """The comparison as a document, with links to its figures.

    Args:
        comparison: what was measured.
        figures: names in `FIGURES` of those that lie beside the document.
    """
    cells = arms_cells(comparison)
    shown = [heading for heading, _ in cells.columns]
    parts = [
        f"# {comparison.title} · {comparison.scale}",
        comparison.about,
        " ".join(sentences(comparison)),
        cells.markdown(),
        "\n".join(f"- **{heading}**: {meaning}" for heading, meaning in GLOSSARY.items() if heading in shown),
    ]
    for name in figures:
        parts += [figure_markdown(name, f"{name}.png"), FIGURES[name].caption]
    if told := agreement_sentence(comparison):
        parts += ["## The planner's ranking", told, predictions_cells(comparison).markdown()]
    if comparison.runs:
        parts += ["## Stages", "Losses are means over seeds.", stages_cells(comparison).markdown()]
    if comparison.ledger:
        parts += ["## What it cost", "Everything counted once.", ledger_cells(comparison).markdown()]
    around = [comparison.device, *(f"{name} {version}" for name, version in comparison.versions.items())]
    if made := ", ".join(part for part in around if part):
        parts.append(f"Run on {made}." if comparison.device else f"Run with {made}.")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def figure_markdown(name: str, path: str) -> str:
    """A link to a figure of a name in `FIGURES`."""
    return f"![{FIGURES[name].title}]({path})"


def compare_arms(
    experiment: Experiment,
    root: str | Path,
    *,
    devices: Sequence[str] = (),
    workers: int = 1,
    told: Told | None = None,
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
    comparison = collect(experiment, with_trunks(arm_runs(experiment)), Path(root), machine_name())
    write_comparison(comparison, root)
    return comparison
