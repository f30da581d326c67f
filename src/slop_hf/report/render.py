"""The templates of the report: Markdown, and HTML in a single file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

#: Figures about twice as wide as high, which a page shows larger than the others.
WIDE = frozenset(("loss", "path", "heads"))

#: Title and caption of each figure.
FIGURES = {
    "loss": (
        "Loss against training FLOPs",
        "Training loss (lines) and held-out loss (markers); a dashed line is a growth, labelled with what grew. The "
        "descent at the very beginning leaves through the top.",
    ),
    "path": (
        "The path of structures",
        "(a) Parameters in training; (b) dimensions as multiples of their initial sizes at each stage, lines drawn "
        "slightly apart where they would coincide.",
    ),
    "radar": (
        "Downstream tasks",
        "Scores of the finished runs' last stages on the tasks that all evaluated runs share, with the same examples "
        "and limits. Each axis runs from 0 at the centre to the best of these runs at the rim, whose score stands "
        "beside the task; compare along an axis, not areas. As Fig. 4 of the SLOP paper, which does not say how its "
        "axes are scaled.",
    ),
    "correlation": (
        "Correlation of training times",
        "Pearson's correlation between the device hours of the stages, the initial one first, of every two finished "
        "schedules with the same number of stages; in the order of Π Δparams where all have one. As Fig. 3 of the "
        "SLOP paper, which names neither the coefficient nor the times that it takes. Over so few stages, a high "
        "correlation says little.",
    ),
    "heads": (
        "Number of attention heads",
        "Targets that differ in their heads alone, grown from one structure in one order: perplexity at the end, and "
        "scores on the tasks that they share, where they were evaluated. As Table 9 and Fig. 6 of the SLOP paper.",
    ),
}

#: What the table of runs × tasks shows.
SCORES = (
    "What each run's last stage scored on downstream tasks, ± the standard error; a dash where it was not scored so. "
    "The results of every stage, with examples shown and limits, follow under each run."
)

#: Headings of columns, and what stands under them.
GLOSSARY = (
    (
        ("target structure", "structure"),
        "hidden size, feed-forward size, layers, attention heads; what differs from one key/value head a query head, "
        "or from heads that fill the hidden size, is spelled out.",
    ),
    (
        ("sequence",),
        "the order of growth; l layer, f feed-forward, h hidden (heads that follow it included), a attention heads; "
        "lf grows both in one stage.",
    ),
    (
        ("Π Δparams",),
        "product over the growth stages of the parameters added since the initial model (Eq. 11 of the SLOP paper as "
        "in its Table 1); the planner's score, smaller is better.",
    ),
    (("ppl",), "perplexity on the held-out data, exp of the held-out loss, at the end of the run or stage."),
    (("seconds a stage",), "wall-clock seconds of training, the initial stage first."),
    (("sum (s)",), "their sum. Device hours are seconds × devices / 3600."),
    (("tokens",), "training tokens. k is 10³, M 10⁶, B 10⁹, T 10¹²."),
    (
        ("FLOPs",),
        "training FLOPs, forward and backward: 6 × (matrix weights + layers × query width × sequence length) a token; "
        "recomputation is not counted.",
    ),
    (
        ("marginal utility",),
        "Σ over growth stages of the drop in perplexity from the stage before, divided by the stage's device hours "
        "(Eq. 2), in perplexity a device hour; larger is better, and a stage that raised the perplexity counts "
        "negatively.",
    ),
    (("grew",), "the operators at the beginning of the stage, and in brackets the init of what is new."),
    (("steps",), "optimizer steps of the stage."),
    (
        ("loss after growth", "held-out loss"),
        "loss on the held-out data in nats a token, right after the growth and at the end of the stage.",
    ),
)
RESULTS_GLOSSARY = (
    (
        ("task", "metric", "setting"),
        "a benchmark and what is measured on it, at the end of each stage ± the standard error, and right after a "
        "growth where it was; the examples shown before each question, and the limit on documents where there is one.",
    ),
)
DATA_GLOSSARY = (
    (
        ("share", "available", "passes"),
        "of a source: its share of the run's tokens, the tokens it has, and how often they have been passed over by "
        "the end.",
    ),
)


@dataclass(frozen=True)
class DrawnFigure:
    """A figure of the report, of a name in `FIGURES`.

    Args:
        name: its name.
        path: its PNG file.
    """

    name: str
    path: Path

    @property
    def title(self) -> str:
        """What it shows, in a few words."""
        return FIGURES[self.name][0]

    @property
    def caption(self) -> str:
        """How to read it."""
        return FIGURES[self.name][1]

    @property
    def is_wide(self) -> bool:
        """Whether a page shows it at full width."""
        return self.name in WIDE

    @property
    def data_uri(self) -> str:
        """The picture itself, for a page that needs no other file."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode("ascii")


def render(template: str, content: Mapping[str, Any]) -> str:
    """Fill in a template; what goes into one of HTML is escaped.

    Args:
        template: its file, `report.md.j2` or `report.html.j2`.
        content: `title`, `runs`, `comparison`, `scores` and `figures`.
    """
    runs = content["runs"]
    glossary = [
        *GLOSSARY,
        *(RESULTS_GLOSSARY if any(run["results"] for run in runs) else ()),
        *(DATA_GLOSSARY if any(run["data"] for run in runs) else ()),
    ]
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(content, glossary=glossary, scores_caption=SCORES)
