"""The model card of a published stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from ..evaluation.tasks import PERPLEXITY
from ..report.tables import NOTHING, count, decimals, significant, stage_markdown
from ..runs.records import EvalRecord
from .lineage import GROWTH_FILE, PublishedGrowth

TAGS = ["slop-hf", "model-growth"]
HELD_OUT = "held-out"  # what stands for a data set where perplexity was measured
#: Where what scored a model is found, by its name: the Hub names no source without its address.
SOURCES = {"lm-eval": "https://github.com/EleutherAI/lm-evaluation-harness"}


def model_card(
    growth: PublishedGrowth,
    repo_id: str,
    *,
    base_model: str | None = None,
    has_tokenizer: bool = True,
    has_figure: bool = True,
) -> str:
    """The card of a stage, as Markdown with metadata.

    Args:
        growth: what is told of the stage.
        repo_id: where it is published.
        base_model: the model on the Hub that the run began with.
        has_tokenizer, has_figure: whether the revision holds a tokenizer, and `loss.png`.
    """
    name, record = repo_id.rpartition("/")[2], growth.record
    results = list(_eval_results(growth))
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,  # the Hub knows none that says "grown"
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=name if results else None,
        eval_results=results or None,
    )
    text = _template().render(
        card_data=data.to_yaml(),
        name=name,
        repo_id=repo_id,
        growth=growth,
        growth_file=GROWTH_FILE,
        record=record,
        total_tokens=sum(one.tokens for one in (*growth.ancestors, record)),
        order=", ".join(" and ".join(stage.operators) for stage in growth.schedule.stages),
        is_last=record.stage == len(growth.schedule.stages),
        earlier=len(growth.ancestors) - record.stage,
        base_model=base_model,
        target=f"{2 * record.parameters:.1e}".replace("e+0", "e").replace("e+", "e"),
        table=stage_markdown([*growth.ancestors, record]),
        results=[row for one in growth.evaluations for row in _rows(one)],
        has_tokenizer=has_tokenizer,
        has_figure=has_figure,
    )
    return str(ModelCard(text))


@cache
def _template():  # type: ignore[no-untyped-def]  # jinja2 is loose about what it gives
    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(count=count, decimals=decimals)
    return environment.get_template("card.md.j2")


def _rows(one: EvalRecord) -> Iterator[tuple[str, ...]]:
    """A line of the table for each metric."""
    when = "" if one.when == "end" else f" ({one.when.replace('_', ' ')})"
    shots = NOTHING if one.num_fewshot is None else str(one.num_fewshot)
    documents = NOTHING if one.documents is None else f"{one.documents:,}"
    for metric, value in one.metrics.items():
        yield one.task + when, metric, significant(value), significant(one.stderr.get(metric)), shots, documents


def _eval_results(growth: PublishedGrowth) -> Iterator[EvalResult]:
    """Results in the Hub's format: those of the trained stage, or at least its perplexity."""
    at_end = [one for one in growth.evaluations if one.when == "end"]
    for one in at_end:
        source = SOURCES.get(one.harness.partition(" ")[0])
        for metric, value in one.metrics.items():
            if math.isfinite(value):
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=HELD_OUT if one.task == PERPLEXITY else one.task,
                    dataset_name="held-out text" if one.task == PERPLEXITY else one.task,
                    metric_type=metric,
                    metric_value=value,
                    dataset_args=None if one.num_fewshot is None else {"num_few_shot": one.num_fewshot},
                    source_name=one.harness if source else None,
                    source_url=source,
                )
    perplexity = growth.record.perplexity
    if not at_end and perplexity is not None and math.isfinite(perplexity):
        yield EvalResult(
            task_type="text-generation",
            dataset_type=HELD_OUT,
            dataset_name="held-out part of the training data",
            metric_type="perplexity",
            metric_value=perplexity,
        )
