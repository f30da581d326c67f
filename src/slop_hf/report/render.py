"""The report's templates: Markdown, and HTML in a single file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from .tables import TextTable, escape_markdown

#: Introduction to the table of runs × tasks.
SCORES_CAPTION = (
    "Scores of each run's last stage on downstream tasks, ± the standard error. A dash means that the run was not "
    "evaluated on the task with these settings. The section of each run lists the scores of every stage, with "
    "few-shot examples and limits."
)

#: Headings of columns, and their meaning; a report explains the columns that it has.
REPORT_GLOSSARY = (
    (
        ("target structure", "structure"),
        "hidden size, feed-forward size, layers, attention heads. Key/value heads and the head size are given if they "
        "differ from the usual: as many key/value heads as query heads, and heads that fill the hidden size.",
    ),
    (
        ("sequence",),
        "the order of growth: l for layers, f for the feed-forward size, h for the hidden size (including the heads "
        "that follow it), a for attention heads; lf grows both in one stage.",
    ),
    (
        ("Π Δparams",),
        "the planner's score: the product over the growth stages of the parameters added since the initial model "
        "(Eq. 11 of the SLOP paper, as computed in its Table 1). Smaller is better.",
    ),
    (("ppl",), "perplexity on the held-out data at the end of the run or stage: exp of the held-out loss."),
    (("seconds per stage",), "wall-clock seconds of training, the initial stage first."),
    (("sum (s)",), "the sum of these seconds. Device hours are seconds × devices / 3600."),
    (("tokens",), "training tokens. k is 10³, M 10⁶, B 10⁹, T 10¹²."),
    (
        ("FLOPs",),
        "training FLOPs, forward and backward: 6 × (matrix weights + layers × query width × sequence length) per "
        "token. Recomputation is not counted.",
    ),
    (
        ("marginal utility",),
        "the drop in perplexity of each growth stage divided by its device hours, summed over the growth stages "
        "(Eq. 2 of the SLOP paper), in perplexity per device hour. Larger is better; a stage that raised the "
        "perplexity counts negatively.",
    ),
    (("grew",), "the operators applied at the beginning of the stage, with the initialisation of the new weights."),
    (("steps",), "optimizer steps of the stage."),
    (
        ("loss after growth", "held-out loss"),
        "loss on the held-out data in nats per token, right after the growth and at the end of the stage.",
    ),
    (
        ("task", "metric", "setting"),
        "a benchmark and its metric, scored at the end of each stage ± the standard error, and right after the growth "
        "if evaluated then. The setting is the number of few-shot examples before each question, and the limit on "
        "the number of documents, if any.",
    ),
    (
        ("share", "available", "passes"),
        "a source's share of the run's tokens, the number of tokens it has, and how many times the run has read them "
        "by its end.",
    ),
)


def select_glossary(tables: Iterable[TextTable]) -> list[tuple[tuple[str, ...], str]]:
    """Return the entries of `REPORT_GLOSSARY` that explain a column of the tables."""
    headings = {heading for table in tables for heading, _ in table.columns}
    return [(names, meaning) for names, meaning in REPORT_GLOSSARY if headings & {*names}]


def render_report(template: str, content: Mapping[str, object]) -> str:
    """Fill in a template, `report.md.j2` or `report.html.j2`; HTML is escaped."""
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Pictures as data, for a page in a single file.
    environment.filters["markdown"] = escape_markdown
    environment.filters["data_uri"] = lambda path: f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
    return environment.get_template(template).render(content, scores_caption=SCORES_CAPTION)
